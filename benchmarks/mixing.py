"""Classes in a batch of 1.28 million images that are stored by class, by a run's own plan.

    python benchmarks/mixing.py
    python benchmarks/mixing.py --classes 10 --images 50000 --image-bytes 930     # CIFAR-10

Prints the classes in a batch and the pairs of one class, averaged over batches of an epoch, for each way to
store the images: as diptych 0.1 read them (windows of 1,024 rows, torchvision's data sets in runs of 256, a
shuffle of row groups and then of each shard's rows) and as it reads them now (windows of 128 MiB, single rows
of torchvision's, a shuffle of all rows). Needs labels alone and no images: half a minute.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from benchmarks.comparison import Comparison, add_json_option, write_json
from pipelines.config import DataConfig
from pipelines.formats.base import Layout
from pipelines.index import Index
from pipelines.mixing import Mixing, measure
from pipelines.packing import Order, Sizes
from pipelines.philox import derive_key, permutation
from pipelines.plan import Line, Plan, training_plan

# Rows of a window.
_BEFORE = 1024


@dataclass(frozen=True)
class _Stored:
    """The labels in the order of the images, the images of a fragment, and the rows of a window."""

    labels: np.ndarray
    group: int
    layout: Layout = "parquet"
    window_rows: int | None = None

    def plan(self, arguments: argparse.Namespace) -> Plan:
        """The plan of a run with the arguments' settings."""
        rows = _fragments(len(self.labels), self.group)
        table = pa.table({"rows": rows, "first_sample": np.cumsum(rows) - rows})
        index = Index("", self.layout, table, image_bytes=arguments.image_bytes)
        data = DataConfig(train="", window_rows=self.window_rows)
        return training_plan(index, data, seed=0, lanes=arguments.lanes, batch_size=arguments.batch_size)


def _fragments(images: int, group: int) -> np.ndarray:
    return np.diff(np.unique(np.arange(0, images + group, group).clip(max=images)))


def _ways(arguments: argparse.Namespace) -> Iterator[tuple[str, _Stored]]:
    """A name and a layout for each line of the table."""
    labels = np.arange(arguments.images) * arguments.classes // arguments.images
    sizes = Sizes.of(arguments.image_bytes, len(labels), shard=None, group=None, part=None)
    group, shard = sizes.rows_per_group, sizes.rows_per_shard
    yield "now: a folder", _Stored(labels, 1, "folder")
    yield "before: torchvision, runs of 256", _Stored(labels, 256, window_rows=_BEFORE)
    yield "now: torchvision", _Stored(labels, 256, "torchvision")
    for rows in (1000, 256, group):
        yield f"before: fragments of {rows:,}", _Stored(labels, rows, window_rows=_BEFORE)
        yield f"now: fragments of {rows:,}", _Stored(labels, rows)
    for rows in (1000, 256):
        older = _shard_by_shard(labels, rows, shard)
        yield f"before: pack --shuffle 0 of {rows:,}", _Stored(older, group, window_rows=_BEFORE)
    order = Order.of(0, len(labels), shard)
    yield "now: pack", _Stored(labels[order.sorted(np.arange(len(labels)))], group)


def _shard_by_shard(labels: np.ndarray, group: int, shard: int) -> np.ndarray:
    """The order of `pack --shuffle 0` in diptych 0.1: shuffled fragments, then each shard's rows."""
    fragments = _fragments(len(labels), group)
    line = Line.of(fragments, derive_key(0, 5, 0))
    starts = np.cumsum(fragments) - fragments
    pieces = line.pieces(0, len(labels))
    rows = np.concatenate([starts[p.fragment] + np.arange(p.start, p.stop) for p in pieces])
    parts = []
    for number, start in enumerate(range(0, len(rows), shard)):
        part = rows[start : start + shard]
        parts.append(part[permutation(derive_key(0, 5, 1, number), len(part))])
    return labels[np.concatenate(parts)]


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
    for name, stored in _ways(arguments):
        plan = stored.plan(arguments)
        mixing = measure(plan, stored.labels.__getitem__)
        assert mixing
        found[name] = mixing
        rows = min(plan.window_size, plan.lane_rows)
        values = f"{mixing.classes:>8.1f} {mixing.share:>6.0%} {mixing.same_class:>17.2%}"
        print(f"{name:<40} {rows:>8,} {values}", flush=True)
    packed = found["now: pack"]
    full = packed.shuffled_classes
    print(f"{'a full shuffle':<49} {full:>8.1f} {1:>6.0%} {packed.shuffled_same_class:>17.2%}")
    packed = Comparison(
        "classes in a batch after pack", "a full shuffle", "", [packed.classes], [full], more_is_better=True
    )
    write_json(arguments.json, [packed])


if __name__ == "__main__":
    main()
