"""Evaluation of an encoder by all workers together, during training and afterwards."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipelines.feed import evaluation_views, still_views
from pipelines.index import Index
from pipelines.plan import Window, evaluation_windows, reading_rows, shard
from pipelines.quarantine import WAY_OUT, Quarantined
from pipelines.views import Views
from training.config import ProbeConfig, TrainConfig
from training.evaluation.certainty import baselines, class_numbers, with_margins
from training.evaluation.knn import (
    alignment,
    effective_rank,
    embed,
    embed_views,
    fitting_neighbours,
    knn_accuracy,
    uniformity,
)
from training.evaluation.linear_probe import Labelled, linear_probe
from training.evaluation.sets import Sets
from training.models.encoders import Encoder
from training.process import Worker


class Evaluator:
    """Evaluates encoders on the sets of a run; every worker calls it, and all get the same values.

    Images that turn out to be bad are appended to `quarantined`. singly: as in knn.embed.
    """

    def __init__(
        self,
        config: TrainConfig,
        sets: Sets,
        worker: Worker,
        quarantined: list[Quarantined] | None = None,
        *,
        singly: bool = False,
    ) -> None:
        self._config, self._sets, self._worker = config, sets.complete(config), worker
        self._quarantined = [] if quarantined is None else quarantined
        self._singly = singly

    def online(
        self, encoders: Mapping[str, Encoder], *, last: bool, classifier: Encoder | None = None
    ) -> dict[str, float]:
        """kNN accuracy of each encoder under its name, a classifier's `top1`, and the first's diagnostics.

        Also each accuracy's margin, the values of certainty.baselines, and neighbours, bank_images and
        trained_on_images. Measured on the held-out images, or on the test images where none are held out;
        after the last step on the test images too, with the suffix _test.
        """
        values: dict[str, float] = {}
        queried = self._sets.held_out or self._sets.test
        if queried:
            values |= self._accuracies(encoders, classifier, queried, keep=True)
        if last and self._sets.held_out and self._sets.test:
            tested = self._accuracies(encoders, classifier, self._sets.test, keep=False)
            values |= {f"{key}_test": value for key, value in tested.items()}
        return values | self._diagnostics(next(iter(encoders.values())))

    def knn(self, encoder: Encoder) -> dict[str, float]:
        """kNN accuracy on the test images as `top1`, with its margin, baselines and counts as in `online`."""
        bank, queries = self._labelled(encoder)
        top1 = knn_accuracy(bank.labelled, queries.labelled, self._config.evaluation, self._worker.gather)
        return self._with_baselines({"top1": top1}, bank, queries) | self._neighbours(bank)

    def linear(self, encoder: Encoder, probe: ProbeConfig) -> dict[str, float]:
        """A linear probe's accuracy on the test images, likewise, and its `learning_rate`."""
        bank, queries = self._labelled(encoder)
        probed = linear_probe(
            bank.labelled, queries.labelled, probe, seed=self._config.seed, gather=self._worker.gather
        )
        values = self._with_baselines({"top1": probed.top1}, bank, queries)
        return values | {"learning_rate": probed.learning_rate}

    def _accuracies(
        self, encoders: Mapping[str, Encoder], classifier: Encoder | None, queried: Index, *, keep: bool
    ) -> dict[str, float]:
        """kNN accuracy of each encoder and, if configured, of a linear probe on the first's features."""
        settings, gather, networks = self._config.evaluation, self._worker.gather, list(encoders.values())
        bank = self._embed(networks, self._sets.samples[0], keep=True)
        queries = self._embed(networks, queried, keep)
        values = {
            name: knn_accuracy((rows, bank.labels), (answers, queries.labels), settings, gather)
            for name, rows, answers in zip(encoders, bank.features, queries.features, strict=True)
        }
        if settings.linear:
            probed = linear_probe(
                bank.labelled, queries.labelled, ProbeConfig(), seed=self._config.seed, gather=gather
            )
            values["linear_top1"] = probed.top1
        if classifier is not None:
            values["top1"] = self._top1(classifier, queried, keep)
        return self._with_baselines(values, bank, queries) | self._neighbours(bank)

    def _with_baselines(
        self, accuracies: dict[str, float], bank: "_Embedded", queries: "_Embedded"
    ) -> dict[str, float]:
        """The accuracies with their margins, baselines and numbers of images."""
        gather = self._worker.gather
        known = gather.uneven_rows(bank.labels)
        compared = baselines(gather.uneven_rows(queries.labels), known)
        twice = torch.isin(queries.digests, gather.uneven_rows(bank.digests)).sum()
        return {
            **with_margins(accuracies, int(compared["evaluated_images"])),
            **compared,
            "bank_images": len(known),
            "trained_on_images": int(gather.total(twice)),
        }

    def _neighbours(self, bank: "_Embedded") -> dict[str, int]:
        known = self._worker.gather.uneven_rows(bank.labels)
        return {"neighbours": fitting_neighbours(self._config.evaluation.neighbours, known)}

    def _top1(self, classifier: Encoder, queried: Index, keep: bool) -> float:
        logits, labels = self._embed([classifier], queried, keep).labelled
        values = torch.tensor(self._sets.train.label_values, dtype=torch.int64, device=labels.device)
        right = (logits.argmax(1) == class_numbers(labels, values)).sum()
        counts = torch.stack([right, torch.tensor(len(labels), device=right.device)])
        counts = self._worker.gather.total(counts)
        return float(counts[0] / counts[1])

    def _labelled(self, encoder: Encoder) -> tuple["_Embedded", "_Embedded"]:
        assert self._sets.test
        return (
            self._embed([encoder], self._sets.samples[0], keep=False),
            self._embed([encoder], self._sets.test, keep=False),
        )

    def _embed(self, encoders: Sequence[Encoder], index: Index, keep: bool) -> "_Embedded":
        digests: list[int] = []
        views = evaluation_views(
            _digested(self._tables(index, keep), digests), self._config.data, self._worker.dali,
            batch_size=self._config.evaluation.batch_size,
        )  # fmt: skip
        device = self._worker.device
        features, labels = embed(encoders, self._noting(views), device, singly=self._singly)
        if not self._worker.gather.total(torch.tensor(len(labels), device=device)):
            raise ValueError(f"evaluation found no image of {index.uri} that can be decoded; {WAY_OUT}")
        if len(labels) and (least := int(labels.min())) < 0:
            raise ValueError(
                f"an image of {index.uri} has label {least}, not one from 0; evaluation needs labels for all "
                "images: label it, or remove it"
            )
        return _Embedded(features, labels, torch.tensor(digests, dtype=torch.int64, device=device))

    def _diagnostics(self, encoder: Encoder) -> dict[str, float]:
        """Diagnostics of the training views of a few images, as drawn in epoch 0."""
        settings, data = self._config.evaluation, self._config.data
        if not settings.diagnostic_images:
            return {}
        views = still_views(
            self._diagnostic_tables(), data.views, self._worker.dali,
            batch_size=settings.batch_size, seed=self._config.seed,
        )  # fmt: skip
        first, second = (
            self._worker.gather.uneven_rows(features)
            for features in embed_views(
                encoder, self._noting(views), self._worker.device, singly=self._singly
            )
        )
        if len(first) < 2:
            return {}
        return {
            "alignment": alignment(first, second),
            "uniformity": uniformity(first),
            "effective_rank": effective_rank(first),
        }

    def _diagnostic_tables(self) -> Iterator[pa.Table]:
        """The sample's images that lie in this worker's share of the bank.

        They come from the cached bank if there is one, so that storage is read only once.
        """
        gather, cache, bank, sample = self._worker.gather, self._worker.cache, *self._sets.samples
        share = bank.samples[shard(len(bank.samples), gather.rank, gather.world_size)]
        mine = sample.only(np.flatnonzero(np.isin(sample.samples, share)))

        def read() -> Iterator[pa.Table]:
            if self._key(bank) not in cache:
                yield from self._worker.tables(mine, self._config.data, self._windows(mine, 0, 1))
                return
            wanted = pa.array(mine.samples)
            for table in cache.kept(self._key(bank)):
                yield table.filter(pc.is_in(table["sample"], wanted))  # pyright: ignore

        return self._worker.kept_tables(self._key(sample), read)

    def _tables(self, index: Index, keep: bool) -> Iterator[pa.Table]:
        gather, data = self._worker.gather, self._config.data
        windows = self._windows(index, gather.rank, gather.world_size)
        if not keep:
            return self._worker.training_tables(index, data, windows)
        return self._worker.kept_tables(self._key(index), lambda: self._worker.tables(index, data, windows))

    def _key(self, index: Index) -> Hashable:
        """Cache key: the images and how they are read, which may differ between the trials of a search."""
        data = self._config.data
        return index, data.image_column, data.label_column, data.key_column, data.max_pixels

    def _windows(self, index: Index, rank: int, world_size: int) -> Iterator[Window]:
        size = reading_rows(index, self._config.data)
        return evaluation_windows(index.rows, rank, world_size, window_rows=size, rows_read=index.rows_read)

    def _noting(self, views: Iterator[Views]) -> Iterator[Views]:
        for batch in views:
            self._quarantined.extend(batch.quarantined)
            yield batch


@dataclass(frozen=True, eq=False)
class _Embedded:
    """This worker's share of a set: the features from each encoder, and the images' labels and digests."""

    features: list[Float[Tensor, "n dim"]]
    labels: Int[Tensor, " n"]
    digests: Int[Tensor, " n"]

    @property
    def labelled(self) -> Labelled:
        """The first encoder's features, with the labels."""
        return self.features[0], self.labels


def _digested(tables: Iterator[pa.Table], digests: list[int]) -> Iterator[pa.Table]:
    """The same tables; `digests` gets one of each image's bytes, 64 bits of BLAKE2."""
    for table in tables:
        for image in table["image"]:
            if image.is_valid:
                digest = blake2b(image.as_buffer(), digest_size=8).digest()
                digests.append(int.from_bytes(digest, "little", signed=True))
        yield table
