"""A data set cut into jobs of one output shard each, and how one is packed in the source's order."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from pipelines import quarantine, storage
from pipelines.config import DataConfig
from pipelines.layout import CONNECTIONS
from pipelines.plan import Line, Piece
from pipelines.reader import Reading, read_pieces
from pipelines.shards import encode_shard, notes, shard_name
from pipelines.sources import Index

# Large enough for object storage, small enough that a task holds a few of them.
_SHARD_BYTES, _GROUP_BYTES, _PART_BYTES = 128 << 20, 8 << 20, 256 << 20

# Images of a row group at most: a window that wants part of one reads all of it.
_GROUP_ROWS = 1024

REPORT = pa.schema({"images": pa.int64(), "bytes": pa.int64(), "bad": pa.string()})


@dataclass(frozen=True, eq=False)
class ShardJob:
    """One shard to write: its number, and what it is read from."""

    number: int
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Sizes:
    """Rows of a shard, of each of its row groups, and of a part of a shuffle; the last may have fewer."""

    rows_per_shard: int
    rows_per_group: int
    rows_per_part: int

    @classmethod
    def of(
        cls, bytes_per_image: float, *, shard: int | None, group: int | None, part: int | None = None
    ) -> "Sizes":
        """The sizes given, or else about 128 MB a shard, 8 MB a row group and 256 MB a part."""
        group = group or max(1, min(int(_GROUP_BYTES / bytes_per_image), _GROUP_ROWS, shard or _GROUP_ROWS))
        whole_groups = max(1, round(_SHARD_BYTES / bytes_per_image / group))
        part = part or max(1, round(_PART_BYTES / bytes_per_image))
        return cls(shard or whole_groups * group, group, part)


def shard_jobs(index: Index, rows_per_shard: int, *, window_rows: int | None = None) -> Iterator[ShardJob]:
    """The index's rows in its order, cut into shards; each is read at once, or by some `window_rows` rows."""
    line = _line(index.rows)
    total = int(line.ends[-1])
    for number, start in enumerate(range(0, total, rows_per_shard)):
        stop = min(start + rows_per_shard, total)
        windows = _windows(line, start, stop, window_rows or rows_per_shard)
        yield ShardJob(number, tuple(Reading.of(index, pieces) for pieces in windows))


def all_readings(index: Index, window_rows: int) -> Iterator[Reading]:
    """The whole index in its order, some `window_rows` rows at a time, no fragment twice."""
    line = _line(index.rows)
    windows = _windows(line, 0, int(line.ends[-1]), window_rows)
    return (Reading.of(index, pieces) for pieces in windows)


def _line(rows: Int[np.ndarray, " fragments"]) -> Line:
    return Line(np.arange(len(rows)), np.cumsum(rows))


def _windows(line: Line, start: int, stop: int, window_rows: int) -> Iterator[list[Piece]]:
    while start < stop:
        # To the fragment's end, so that it is read once.
        end = min(stop, line.fragment_end(min(start + window_rows, stop)))
        yield list(line.pieces(start, end))
        start = end


def pack_shard(
    job: ShardJob, data: DataConfig, dest: str, rows_per_group: int, classes: Sequence[str]
) -> pa.Table:
    """Write the job's good images, whose bytes are kept as they are; REPORT of it.

    Raises ValueError where the source cannot be read, OSError where nothing can be written.
    """
    table = pa.concat_tables([read_pieces(reading, data, own_bytes=True) for reading in job.readings])
    labelled = job.readings[0].has_labels
    return write_images(
        job.number, dest, table, labelled=labelled, rows_per_group=rows_per_group, classes=classes
    )


def write_images(
    number: int, dest: str, table: pa.Table, *, labelled: bool, rows_per_group: int, classes: Sequence[str]
) -> pa.Table:
    """Write the good images of `table` (reader.SCHEMA) as shard `number`; REPORT of it."""
    columns = ["image", *(["label"] if labelled else []), "key"]
    good = good_rows(table).select(columns)
    return write_shard(number, dest, good, table, rows_per_group=rows_per_group, classes=classes)


def good_rows(table: pa.Table) -> pa.Table:
    """The rows of `table` (reader.SCHEMA, with or without images) that are not bad."""
    return table.filter(pc.is_null(table["bad"]))  # pyright: ignore[reportAttributeAccessIssue]


def with_reasons(table: pa.Table, broken: Mapping[int, str]) -> pa.Table:
    """`table` with the rows in `broken` marked as bad, each for its reason."""
    reasons = table["bad"].to_pylist()
    for row, reason in broken.items():
        reasons[row] = reason
    at = table.schema.get_field_index("bad")
    return table.set_column(at, table.schema.field(at), pa.array(reasons, pa.string()))


def write_shard(
    number: int, dest: str, rows: pa.Table, table: pa.Table, *, rows_per_group: int, classes: Sequence[str]
) -> pa.Table:
    """Write `rows` as shard `number`, whole or not at all, with a note of what is bad in `table`; REPORT."""
    bad = table.filter(pc.is_valid(table["bad"]))  # pyright: ignore[reportAttributeAccessIssue]
    lines = quarantine.encode(
        quarantine.Quarantined(row["path"], row["key"], row["bad"], row["sample"])
        for row in bad.select(["path", "key", "bad", "sample"]).to_pylist()
    ).decode()
    content = encode_shard(rows, rows_per_group=rows_per_group, classes=classes, quarantine=lines)
    storage.write(storage.join(dest, shard_name(number)), content)
    return _report(len(rows), len(content), lines)


def _report(images: int, size: int, bad: str) -> pa.Table:
    return pa.table({"images": [images], "bytes": [size], "bad": [bad]}, schema=REPORT)


def finished_shards(dest: str) -> dict[int, pa.Table]:
    """REPORT of each shard that an earlier part of the command wrote, by number."""
    found = (
        [file for file in storage.listing(dest) if file.path.endswith(".parquet")]
        if storage.exists(dest)
        else []
    )
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        read = pool.map(lambda file: notes(storage.join(dest, file.base_name)), found)
        return {
            int(file.base_name.removesuffix(".parquet")): _report(rows, file.size, bad)
            for file, (rows, bad) in zip(found, read, strict=True)
        }


def spread(index: Index, images: int) -> Reading:
    """At least so many rows, or all, out of fragments that lie evenly over the index, of each as many."""
    rows = index.rows
    count = min(len(rows), max(1, round(images / rows.mean())), images)
    while True:
        chosen = np.linspace(0, len(rows), count, endpoint=False).astype(int) + len(rows) // (2 * count)
        each = np.minimum(-(-images // count), rows[chosen])
        if each.sum() >= images or count == len(rows):
            break
        count = min(2 * count, len(rows))
    # All rows of each, where even all fragments' shares are too few.
    each = each if each.sum() >= images else rows
    pieces = zip(chosen.tolist(), each.tolist(), strict=True)
    return Reading.of(index, [Piece(at, 0, stop) for at, stop in pieces])


def mean_bytes(table: pa.Table) -> float:
    """Of the good images of `table` (reader.SCHEMA); ValueError where there is none."""
    sizes = pc.binary_length(table["image"]).drop_null()  # pyright: ignore[reportAttributeAccessIssue]
    if not len(sizes):
        raise ValueError(
            f"none of {len(table)} images that were looked at is good: {table['bad'][0]}; "
            f"{quarantine.WAY_OUT}"
        )
    return pc.mean(sizes).as_py()  # pyright: ignore[reportAttributeAccessIssue]
