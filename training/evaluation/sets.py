"""The images that a run trains on and is evaluated on, and a cache that keeps them in memory."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipelines.index import Index
from pipelines.labels import labelled_part
from training.config import TrainConfig

# Limit for one process: CIFAR-10 has 150 MB, a bank of 20,000 photographs about 2 GiB.
_MOST_BYTES = 2 << 30


class ImageCache:
    """Tables by key, stored with `put` and fetched with `get`; by default in this process.

    The cache holds at most `most_bytes`. A set of images that does not fit, or for which `put` returns None,
    is read again each time.
    """

    def __init__(
        self,
        put: Callable[[pa.Table], Any] = lambda table: table,
        get: Callable[[Any], pa.Table] = lambda table: table,
        most_bytes: int | None = _MOST_BYTES,
    ) -> None:
        self._put, self._get, self._most_bytes = put, get, most_bytes
        self._kept: dict[Hashable, list[Any]] = {}
        self._bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def tables(self, key: Hashable, read: Callable[[], Iterator[pa.Table]]) -> Iterator[pa.Table]:
        """The tables of the key; from `read` until they were read to the end once, then from the cache."""
        if key in self._kept:
            yield from self.kept(key)
            return
        kept: list[Any] | None = []
        size = 0
        for table in read():
            size += table.nbytes
            if self._most_bytes is not None and self._bytes + size > self._most_bytes:
                kept = None
            stored = None if kept is None else self._put(table)
            kept = None if kept is None or stored is None else [*kept, stored]
            yield table
        if kept is not None:
            self._kept[key] = kept
            self._bytes += size

    def kept(self, key: Hashable) -> Iterator[pa.Table]:
        """The cached tables of the key; KeyError where it has none."""
        return map(self._get, self._kept[key])

    def clear(self) -> None:
        """Remove all tables."""
        self._kept.clear()
        self._bytes = 0


@dataclass(frozen=True, eq=False)
class Sets:
    """The images of a run: for training, held out for evaluation, and for the final test.

    bank: the training images that evaluated images are compared with. diagnosed: those of the bank that are
    used for diagnostics. `of` and `complete` choose both.
    """

    train: Index
    held_out: Index | None = None
    test: Index | None = None
    bank: Index | None = None
    diagnosed: Index | None = None

    @classmethod
    def of(cls, config: TrainConfig, train: Index, test: Index | None) -> "Sets":
        """The sets of `config`, from all images of data.train and data.test.

        Held-out images and samples have each class in proportion where there are labels. A share of the
        labels (supervised.labels) is taken after holding out, so that a baseline with few labels is evaluated
        on the same images as a run on all. Raises ValueError where there are too few images.
        """
        settings, held_out = config.evaluation, None
        if settings.held_out is not None:
            train, held_out = train.split(settings.held_out, config.seed)
            held_out = held_out.sample(settings.test_images, config.seed)
        if (share := config.supervised.labels) is not None:
            train = labelled_part(train, config.data, share, seed=config.seed)
        test = test.sample(settings.test_images, config.seed) if test else None
        return cls(train, held_out, test).training_on(train, config)

    def training_on(self, train: Index, config: TrainConfig) -> "Sets":
        """These sets with other training images, and samples of them."""
        bank = train.sample(config.evaluation.train_images, config.seed)
        diagnosed = bank.sample(config.evaluation.diagnostic_images, config.seed)
        return replace(self, train=train, bank=bank, diagnosed=diagnosed)

    def complete(self, config: TrainConfig) -> "Sets":
        """These sets with their samples, which are chosen if missing."""
        return self if self.bank and self.diagnosed else self.training_on(self.train, config)

    @property
    def samples(self) -> tuple[Index, Index]:
        """The bank, and the images for diagnostics."""
        return self.bank or self.train, self.diagnosed or self.bank or self.train
