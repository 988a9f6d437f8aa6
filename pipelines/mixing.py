"""Measure how well a run's batches are mixed: the classes in its planned batches against a full shuffle.

Images are often stored by class. A batch from few places of such a data set has few classes. That makes the
task easy, and pairs of the same class are false negatives.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from pipelines.config import DataConfig
from pipelines.index import Index
from pipelines.labels import read_labels
from pipelines.philox import Key, derive_key, permutation, uniforms
from pipelines.plan import Plan

# First parts of key paths; other modules use others.
_SAMPLE, _PART = 10, 11

# Evenly spaced places in an epoch, and the number of batches to check at each.
_PLACES, _BATCHES = 8, 4

# Images of a full shuffle to check if reading a label is free.
_SHUFFLED = 1 << 16

# Up to this many rows are permuted to draw from them; from more, rows are drawn one by one.
_PERMUTED = 1 << 18

# A run with less than this share of a full shuffle's classes, or more than this excess of pairs, gets a
# warning.
_FEW_CLASSES, _MANY_PAIRS = 0.7, 0.03

MIXING_ADVICE = "shuffle them with `diptych data pack`, or set a larger --data.window-bytes"

Rows = Int[np.ndarray, " rows"]


@dataclass(frozen=True)
class Mixing:
    """Means over some batches of an epoch, and the expected values for a full shuffle of the data set.

    images: the number of images checked per batch. classes: distinct classes among them. same_class: the
    share of all pairs of them that have the same class.
    """

    images: int
    classes: float
    shuffled_classes: float
    same_class: float
    shuffled_same_class: float

    @property
    def share(self) -> float:
        """Classes per batch as a share of a full shuffle's."""
        return self.classes / self.shuffled_classes

    @property
    def is_poor(self) -> bool:
        """Whether there are fewer than 70 % of a full shuffle's classes, or 3 % more pairs of the same class.

        With few classes, every batch has nearly all of them, and only the pairs show how unevenly.
        """
        return self.share < _FEW_CLASSES or self.same_class - self.shuffled_same_class > _MANY_PAIRS

    def __str__(self) -> str:
        return (
            f"classes among {self.images:,} images of a batch: {self.classes:.3g} (full shuffle: "
            f"{self.shuffled_classes:.3g}); pairs of one class: {self.same_class:.2%} (full shuffle: "
            f"{self.shuffled_same_class:.2%})"
        )


def measure(
    plan: Plan,
    labels_of: Callable[[Rows], Rows],
    *,
    images: int | None = None,
    fragments: int | None = None,
) -> Mixing | None:
    """The mixing of epoch 0 under `plan`; None if no image has a label.

    labels_of: returns the labels of rows of the index (ascending, distinct), -1 for none. Checks at most
    `images` images of a batch and about `fragments` fragments: reading a label may cost a request.
    """
    batches = list(_sampled(plan, min(images or plan.batch_size, plan.batch_size), fragments))
    size = len(batches[0])
    shuffled = _random_rows(int(plan.rows.sum()), max(size, _SHUFFLED if fragments is None else size))
    wanted = np.unique(np.concatenate([*batches, shuffled]))
    known = labels_of(wanted)
    found = [_labelled(known[np.searchsorted(wanted, rows)]) for rows in batches]
    found = [labels for labels in found if len(labels)]
    reference = _labelled(known[np.searchsorted(wanted, shuffled)])
    if not found or not len(reference):
        return None
    classes, pairs = zip(*(_expected(labels, len(labels)) for labels in found), strict=True)
    return Mixing(size, float(np.mean(classes)), _expected(reference, size)[0], float(np.mean(pairs)),
                  _expected(reference, size)[1])  # fmt: skip


def run_mixing(plan: Plan, index: Index, data: DataConfig) -> Mixing | None:
    """The mixing of a run, from the labels of at most a few hundred row groups.

    None if there are no labels, or if images are read one by one, which is a full shuffle. Raises ValueError
    if labels cannot be read.
    """
    if index.random_access or not index.has_labels:
        return None

    def labels_of(rows: Rows) -> Rows:
        return read_labels(index.only(rows), data, lambda done, of: None)

    return measure(plan, labels_of, images=256, fragments=256)


def batch_rows(plan: Plan, step: int, count: int) -> Int[np.ndarray, "steps batch"]:
    """Rows of the index in the global batches of `count` steps from `step`, or fewer if a window ends."""
    first, size = np.cumsum(plan.rows) - plan.rows, plan.lane_batch_size
    lanes = []
    for window in plan.windows(range(plan.lanes), step, step + 1):
        parts = [first[piece.fragment] + np.arange(piece.start, piece.stop) for piece in window.pieces]
        rows = np.concatenate(parts)[: window.size][window.order()][window.skip :]
        lanes.append(rows.reshape(-1, size)[:count])
    return np.concatenate(lanes, axis=1)


def _sampled(plan: Plan, images: int, fragments: int | None) -> Iterator[Rows]:
    """Yield `images` rows of each of some batches of epoch 0, until they lie in `fragments` fragments."""
    starts = dict.fromkeys(((2 * np.arange(_PLACES) + 1) * plan.steps_per_epoch // (2 * _PLACES)).tolist())
    ends = np.cumsum(plan.rows)
    seen: set[int] = set()
    for start in starts:
        for number, rows in enumerate(batch_rows(plan, start, _BATCHES)):
            # A random part of the batch, to include all lanes.
            key = derive_key(plan.seed, _PART, start + number)
            rows = rows[permutation(key, len(rows))[:images]]
            yield rows
            seen.update(np.searchsorted(ends, rows, side="right").tolist())
            if fragments is not None and len(seen) >= fragments:
                return


def _random_rows(total: int, count: int) -> Rows:
    """`count` distinct rows out of `total` (or all), in random order."""
    key: Key = derive_key(0, _SAMPLE)
    if total <= max(_PERMUTED, 4 * count):
        return permutation(key, total)[:count]
    drawn = np.floor(uniforms(key, np.arange(2 * count), 1)[:, 0] * total).astype(np.int64)
    return np.array(list(dict.fromkeys(drawn.tolist()))[:count])


def _labelled(labels: Rows) -> Rows:
    return labels[labels >= 0]


def _expected(labels: Rows, images: int) -> tuple[float, float]:
    """The expected (classes, share of pairs of the same class) of `images` labels drawn without replacement.

    A class with n of N labels is missing with probability C(N - n, images) / C(N, images).
    """
    counts = np.unique(labels, return_counts=True)[1].tolist()
    total = len(labels)
    images = min(images, total)
    missing = sum(math.exp(_log_ratio(total, count, images)) for count in counts if total - count >= images)
    pairs = sum(count * (count - 1) for count in counts) / max(1, total * (total - 1))
    return len(counts) - missing, pairs


def _log_ratio(total: int, count: int, images: int) -> float:
    """log(C(total - count, images) / C(total, images))."""
    log = math.lgamma
    return log(total - count + 1) - log(total - count - images + 1) + log(total - images + 1) - log(total + 1)
