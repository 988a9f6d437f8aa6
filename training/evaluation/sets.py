"""Which images a run trains on and is judged by, and those that stay in memory for it."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipelines.index import Index
from pipelines.labels import labelled_part
from training.config import TrainConfig

# Of a process on its own: CIFAR-10 has 150 MB, a bank of 20,000 photographs about as much as this.
_MOST_BYTES = 2 << 30


class ImageCache:
    """Tables by a key, where `put` lays them and from where `get` brings them back.

    Unset, they stay in this process, up to `most_bytes` together. A set of images of which `put` gives None
    for a table, or that has no room, is read anew each time.
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
        """What `read` gives: called the first time, and as long as it has not been read to its end."""
        if key in self._kept:
            yield from self.kept(key)
            return
        kept: list[Any] | None = []
        size = 0
        for table in read():
            size += table.nbytes
            if self._most_bytes is not None and self._bytes + size > self._most_bytes:
                kept = None
            laid = None if kept is None else self._put(table)
            kept = None if kept is None or laid is None else [*kept, laid]
            yield table
        if kept is not None:
            self._kept[key] = kept
            self._bytes += size

    def kept(self, key: Hashable) -> Iterator[pa.Table]:
        """The tables of a key that is there."""
        return map(self._get, self._kept[key])

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._bytes = 0


@dataclass(frozen=True, eq=False)
class Sets:
    """The images of a run: those it trains on, those it is watched by, and those it is judged by.

    bank: of those it trains on the ones that evaluated images are compared with. diagnosed: of the bank the
    ones for diagnostics. `of` and `complete` choose both.
    """

    train: Index
    held_out: Index | None = None
    test: Index | None = None
    bank: Index | None = None
    diagnosed: Index | None = None

    @classmethod
    def of(cls, config: TrainConfig, train: Index, test: Index | None) -> "Sets":
        """The sets of `config` out of all images: of data.train, which it may split, and of data.test.

        What is held out and the samples have each class in proportion where `train` and `test` have their
        labels. A share of the labels is taken of what is left, so that a baseline with few labels is judged
        by the same images as a run on all. Raises ValueError where there are too few images.
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
        """The same with other training images, and samples of these."""
        bank = train.sample(config.evaluation.train_images, config.seed)
        diagnosed = bank.sample(config.evaluation.diagnostic_images, config.seed)
        return replace(self, train=train, bank=bank, diagnosed=diagnosed)

    def complete(self, config: TrainConfig) -> "Sets":
        """These, with their samples."""
        return self if self.bank and self.diagnosed else self.training_on(self.train, config)

    @property
    def samples(self) -> tuple[Index, Index]:
        """The bank, and of it the images for diagnostics."""
        return self.bank or self.train, self.diagnosed or self.bank or self.train
