"""Classes in a batch, by the plan that a run has, of 1.28 million images that are stored by class.

    python benchmarks/mixing.py
    python benchmarks/mixing.py --classes 10 --images 50000 --image-bytes 930     # CIFAR-10

For each way to store them the classes in a batch and the pairs of one class, averaged over batches of an
epoch: before (windows of 1,024 rows, torchvision's data sets in runs of 256, a shuffle of row groups and then
of each shard's rows) and now (windows of 128 MiB, single rows of torchvision's, a shuffle of all rows). Labels
alone and no image: half a minute.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.comparison import Comparison, add_json_option, write_json
from pipelines.config import DataConfig
from pipelines.mixing import Mixing, measure
from pipelines.philox import derive_key, permutation
from pipelines.plan import Line, Plan
from pipelines.windows import ROW_BYTES

_BEFORE_ROWS = 1024
_GROUP_BYTES, _SHARD_BYTES = 8 << 20, 128 << 20


@dataclass(frozen=True)
class _Stored:
    """The labels of the images in their order, and how many lie in each fragment."""

    labels: np.ndarray
    group: int
    random_access: bool = False

    @property
    def fragments(self) -> np.ndarray:
        ends = np.arange(0, len(self.labels) + self.group, self.group).clip(max=len(self.labels))
        return np.diff(np.unique(ends))


def _ways(arguments: argparse.Namespace) -> Iterator[tuple[str, _Stored, int]]:
    """Name, what is stored, and the rows of a window, of each line of the table."""
    labels = np.arange(arguments.images) * arguments.classes // arguments.images
    window = int(DataConfig.window_bytes / (arguments.image_bytes + ROW_BYTES))
    group = max(1, min(int(_GROUP_BYTES / arguments.image_bytes), 1024))
    shard = group * max(1, round(_SHARD_BYTES / arguments.image_bytes / group))
    shuffled = labels[permutation(derive_key(0, 5), len(labels))]
    yield "a folder", _Stored(labels, 1, random_access=True), _BEFORE_ROWS
    yield "before: torchvision, runs of 256", _Stored(labels, 256), _BEFORE_ROWS
    yield "now: torchvision", _Stored(labels, 256, random_access=True), _BEFORE_ROWS
    for rows in (1000, 256, group):
        yield f"before: fragments of {rows:,}", _Stored(labels, rows), _BEFORE_ROWS
        yield f"now: fragments of {rows:,}", _Stored(labels, rows), window
    for rows in (1000, 256):
        yield (
            f"before: pack --shuffle 0 of {rows:,}",
            _Stored(_shard_by_shard(labels, rows, shard), group),
            _BEFORE_ROWS,
        )
    yield "now: pack", _Stored(shuffled, group), window
    yield "now: pack, windows of 1,024", _Stored(shuffled, group), _BEFORE_ROWS


def _shard_by_shard(labels: np.ndarray, group: int, shard: int) -> np.ndarray:
    """The order that `pack --shuffle 0` wrote before: of fragments, and of each shard's rows."""
    stored = _Stored(labels, group)
    line = Line.of(stored.fragments, derive_key(0, 5, 0))
    starts = np.cumsum(stored.fragments) - stored.fragments
    pieces = line.pieces(0, len(labels))
    rows = np.concatenate([starts[p.fragment] + np.arange(p.start, p.stop) for p in pieces])
    parts = []
    for number, start in enumerate(range(0, len(rows), shard)):
        part = rows[start : start + shard]
        parts.append(part[permutation(derive_key(0, 5, 1, number), len(part))])
    return labels[np.concatenate(parts)]


def _measured(arguments: argparse.Namespace, stored: _Stored, window_rows: int) -> Mixing:
    plan = Plan(
        stored.fragments, 0, arguments.lanes, arguments.batch_size, window_rows,
        random_access=stored.random_access,
    )  # fmt: skip
    labels_of: Callable[[np.ndarray], np.ndarray] = stored.labels.__getitem__
    found = measure(plan, labels_of)
    assert found
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--image-bytes", type=int, default=110_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lanes", type=int, default=8)
    add_json_option(parser)
    arguments = parser.parse_args()
    found: dict[str, Mixing] = {}
    print(f"{'stored as':<40} {'window':>8} {'classes':>8} {'share':>6} {'same-class pairs':>17}")
    for name, stored, window in _ways(arguments):
        found[name] = mixing = _measured(arguments, stored, window)
        lane = len(stored.labels) // arguments.lanes
        print(
            f"{name:<40} {min(window, lane):>8,} {mixing.classes:>8.1f} {mixing.share:>6.0%} "
            f"{mixing.same_class:>17.2%}",
            flush=True,
        )
    packed = found["now: pack"]
    full = packed.shuffled_classes
    print(f"{'a full shuffle':<49} {full:>8.1f} {1:>6.0%} {packed.shuffled_same_class:>17.2%}")
    packed = Comparison(
        "classes in a batch after pack", "a full shuffle", "", [packed.classes], [full], more_is_better=True
    )
    write_json(arguments.json, [packed])


if __name__ == "__main__":
    main()
