"""What is measured of an encoder, while it trains and afterwards, by all workers together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipelines.feed import evaluation_views, still_views
from pipelines.plan import sweep
from pipelines.quarantine import WAY_OUT, Quarantined
from pipelines.sources import Index
from pipelines.views import Views
from pipelines.windows import reading_rows
from training.class_numbers import class_numbers
from training.config import ProbeConfig, TrainConfig
from training.diagnostics import alignment, effective_rank, uniformity
from training.encoders import Encoder
from training.evaluate import embed, embed_views, knn_accuracy
from training.probe import Labelled, Probed, linear_probe
from training.process import Worker


@dataclass(frozen=True, eq=False)
class Sets:
    """The images of a run: those it trains on, those it is watched by, and those it is judged by."""

    train: Index
    held_out: Index | None = None
    test: Index | None = None

    @classmethod
    def of(cls, config: TrainConfig, train: Index, test: Index | None) -> "Sets":
        """The sets of `config`, which may hold out a part of the training images."""
        if config.evaluation.held_out is None:
            return cls(train, None, test)
        kept, held_out = train.split(config.evaluation.held_out, config.seed)
        return cls(kept, held_out, test)


class Evaluator:
    """Measures encoders on the sets of a run; every worker calls it, and all get the same values.

    Images that turn out to be bad are added to `left_out`.
    """

    def __init__(
        self, config: TrainConfig, sets: Sets, worker: Worker, left_out: list[Quarantined] | None = None
    ) -> None:
        self._config, self._sets, self._worker = config, sets, worker
        self._left_out = [] if left_out is None else left_out

    def online(
        self, encoders: Mapping[str, Encoder], *, last: bool, classifier: Encoder | None = None
    ) -> dict[str, float]:
        """kNN accuracy of each encoder, under its name, a classifier's `top1`, and the first's diagnostics.

        On the held-out images; on the test images where none are held out and, with the suffix _test, after
        the last step.
        """
        values: dict[str, float] = {}
        watched = self._sets.held_out or self._sets.test
        if watched:
            values |= self._accuracies(encoders, classifier, watched)
        if last and self._sets.held_out and self._sets.test:
            judged = self._accuracies(encoders, classifier, self._sets.test)
            values |= {f"{key}_test": value for key, value in judged.items()}
        return values | self._diagnostics(next(iter(encoders.values())))

    def knn(self, encoder: Encoder) -> float:
        """Accuracy on the test images with the labelled training images."""
        bank, queries = self._labelled(encoder)
        return knn_accuracy(bank, queries, self._config.evaluation, self._worker.gather)

    def linear(self, encoder: Encoder, probe: ProbeConfig) -> Probed:
        """A linear probe's accuracy on the test images with the labelled training images."""
        bank, queries = self._labelled(encoder)
        return linear_probe(bank, queries, probe, seed=self._config.seed, gather=self._worker.gather)

    def _accuracies(
        self, encoders: Mapping[str, Encoder], classifier: Encoder | None, queried: Index
    ) -> dict[str, float]:
        values = self._probed(encoders, queried)
        return values if classifier is None else values | {"top1": self._top1(classifier, queried)}

    def _top1(self, classifier: Encoder, queried: Index) -> float:
        (logits,), labels = self._embed([classifier], queried, self._config.evaluation.test_images)
        values = torch.tensor(self._sets.train.label_values, dtype=torch.int64, device=labels.device)
        right = (logits.argmax(1) == class_numbers(labels, values)).sum()
        counts = torch.stack([right, torch.tensor(len(labels), device=right.device)])
        counts = self._worker.gather.total(counts)
        return float(counts[0] / counts[1])

    def _probed(self, encoders: Mapping[str, Encoder], queried: Index) -> dict[str, float]:
        """kNN accuracy of each encoder and, where wished for, a linear probe's on the first's features."""
        settings = self._config.evaluation
        networks = list(encoders.values())
        banks, bank_labels = self._embed(networks, self._sets.train, settings.train_images)
        queries, labels = self._embed(networks, queried, settings.test_images)
        gather = self._worker.gather
        values = {
            name: knn_accuracy((bank, bank_labels), (query, labels), settings, gather)
            for name, bank, query in zip(encoders, banks, queries, strict=True)
        }
        if settings.linear:
            first = (banks[0], bank_labels), (queries[0], labels)
            values["linear_top1"] = linear_probe(
                *first, ProbeConfig(), seed=self._config.seed, gather=gather
            ).top1
        return values

    def _labelled(self, encoder: Encoder) -> tuple[Labelled, Labelled]:
        assert self._sets.test
        settings = self._config.evaluation
        (bank,), labels = self._embed([encoder], self._sets.train, settings.train_images)
        (queries,), answers = self._embed([encoder], self._sets.test, settings.test_images)
        return (bank, labels), (queries, answers)

    def _embed(
        self, encoders: Sequence[Encoder], index: Index, limit: int | None
    ) -> tuple[list[Float[Tensor, "n dim"]], Int[Tensor, " n"]]:
        views = evaluation_views(
            self._tables(index, limit), self._config.data, self._worker.dali,
            batch_size=self._config.evaluation.batch_size,
        )  # fmt: skip
        features, labels = embed(encoders, self._noting(views), self._worker.device)
        if not self._worker.gather.total(torch.tensor(len(labels), device=labels.device)):
            raise ValueError(f"no image of {index.uri} that evaluation looked at can be decoded; {WAY_OUT}")
        if len(labels) and (least := int(labels.min())) < 0:
            raise ValueError(
                f"an image of {index.uri} has label {least}, not one from 0; evaluation needs labels of all "
                "images: give it one, or leave it out"
            )
        return features, labels

    def _diagnostics(self, encoder: Encoder) -> dict[str, float]:
        """Of the training views of a few images, as they are in epoch 0."""
        settings, data = self._config.evaluation, self._config.data
        if not settings.diagnostic_images:
            return {}
        views = still_views(
            self._tables(self._sets.train, settings.diagnostic_images), data.views, self._worker.dali,
            batch_size=settings.batch_size, seed=self._config.seed,
        )  # fmt: skip
        first, second = (
            self._worker.gather.uneven_rows(features)
            for features in embed_views(encoder, self._noting(views), self._worker.device)
        )
        if len(first) < 2:
            return {}
        return {
            "alignment": alignment(first, second),
            "uniformity": uniformity(first),
            "effective_rank": effective_rank(first),
        }

    def _tables(self, index: Index, limit: int | None) -> Iterator:
        gather, data = self._worker.gather, self._config.data
        windows = sweep(
            index.rows, gather.rank, gather.world_size,
            seed=self._config.seed, limit=limit, window_rows=reading_rows(index, data),
        )  # fmt: skip
        return self._worker.tables(index, data, windows)

    def _noting(self, views: Iterator[Views]) -> Iterator[Views]:
        for batch in views:
            self._left_out.extend(batch.quarantined)
            yield batch
