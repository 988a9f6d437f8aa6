"""Pack a data set into shards: directly, or by an external sort in two passes; the sizes of shards.

In the first pass each job reads a part of the data set and writes it beside the shards, its rows grouped by
shard. In the second pass each job gathers the rows of one shard from all parts and sorts them. The sort key
of row r is the word that `philox.hashes` draws for it, so the order is that of `philox.permutation` for all
rows, for any division into jobs. Parts and shards are written atomically; a resumed command writes those that
are missing.
"""

import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int, UInt64
from pyarrow import fs

from pipelines import quarantine, storage
from pipelines.config import DataConfig
from pipelines.formats.base import CONNECTIONS, reading
from pipelines.index import Index
from pipelines.philox import Key, derive_key, hashes, permutation
from pipelines.plan import Line, Piece
from pipelines.reader import Reading, read_pieces
from pipelines.shards import encode_shard, notes, shard_name

# Large enough for object storage, small enough that a task holds a few of them.
_SHARD_BYTES, _GROUP_BYTES, _PART_BYTES = 128 << 20, 8 << 20, 256 << 20

# Most images of a row group: a window that needs a part of it reads all of it.
_GROUP_ROWS = 1024

# Parts to cut a data set into, so that many cores read it. Smaller parts than this would take longer to start
# a task for than to read.
_PARTS, _LEAST_PART_ROWS, _LEAST_PART_BYTES = 64, 2048, 16 << 20

REPORT = pa.schema({"images": pa.int64(), "bytes": pa.int64(), "bad": pa.string()})


@dataclass(frozen=True, eq=False)
class ShardJob:
    """A shard to write: its number, and where its rows are read."""

    number: int
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Sizes:
    """Rows of a shard, of a row group, and of a part; the last of each may have fewer."""

    rows_per_shard: int
    rows_per_group: int
    rows_per_part: int

    @classmethod
    def of(
        cls, bytes_per_image: float, rows: int, *, shard: int | None, group: int | None, part: int | None
    ) -> "Sizes":
        """The given sizes; unset: about 128 MB per shard, 8 MB per row group and at most 256 MB per part.

        Parts of small images are smaller, so that there are 64 of `rows` rows.
        """
        group = group or max(1, min(int(_GROUP_BYTES / bytes_per_image), _GROUP_ROWS, shard or _GROUP_ROWS))
        whole_groups = max(1, round(_SHARD_BYTES / bytes_per_image / group))
        least = min(_LEAST_PART_ROWS, _LEAST_PART_BYTES / bytes_per_image)
        part = part or max(1, round(min(_PART_BYTES / bytes_per_image, max(-(-rows // _PARTS), least))))
        return cls(shard or whole_groups * group, group, part)


def shard_jobs(index: Index, rows_per_shard: int, *, window_rows: int | None = None) -> Iterator[ShardJob]:
    """The rows of the index in order, cut into shards; a shard is read at once, or by `window_rows` rows."""
    line = _line(index.rows)
    total = int(line.ends[-1])
    for number, start in enumerate(range(0, total, rows_per_shard)):
        stop = min(start + rows_per_shard, total)
        windows = _windows(line, start, stop, window_rows or rows_per_shard)
        yield ShardJob(number, tuple(Reading.of(index, pieces) for pieces in windows))


def all_readings(index: Index, window_rows: int) -> Iterator[Reading]:
    """All rows of the index in order, about `window_rows` at a time, and each fragment once."""
    line = _line(index.rows)
    windows = _windows(line, 0, int(line.ends[-1]), window_rows)
    return (Reading.of(index, pieces) for pieces in windows)


def _line(rows: Int[np.ndarray, " fragments"]) -> Line:
    return Line(np.arange(len(rows)), np.cumsum(rows))


def _windows(line: Line, start: int, stop: int, window_rows: int) -> Iterator[list[Piece]]:
    while start < stop:
        # Up to the end of a fragment, so that it is read once.
        end = min(stop, line.fragment_end(min(start + window_rows, stop)))
        yield list(line.pieces(start, end))
        start = end


def pack_shard(
    job: ShardJob, data: DataConfig, dest: str, rows_per_group: int, classes: Sequence[str]
) -> pa.Table:
    """Write the good images of the job with their original bytes. Returns a REPORT table.

    Raises ValueError if the source cannot be read, OSError if the shard cannot be written.
    """
    table = pa.concat_tables([read_pieces(reading, data, own_bytes=True) for reading in job.readings])
    labelled = job.readings[0].has_labels
    return write_images(
        job.number, dest, table, labelled=labelled, rows_per_group=rows_per_group, classes=classes
    )


def write_images(
    number: int, dest: str, table: pa.Table, *, labelled: bool, rows_per_group: int, classes: Sequence[str]
) -> pa.Table:
    """Write the good images of `table` (reader.SCHEMA) as shard `number`. Returns a REPORT table."""
    columns = ["image", *(["label"] if labelled else []), "key"]
    good = good_rows(table).select(columns)
    return write_shard(number, dest, good, table, rows_per_group=rows_per_group, classes=classes)


def good_rows(table: pa.Table) -> pa.Table:
    """The rows of `table` (reader.SCHEMA, with or without images) whose images are good."""
    return table.filter(pc.is_null(table["bad"]))  # pyright: ignore[reportAttributeAccessIssue]


def with_reasons(table: pa.Table, broken: Mapping[int, str]) -> pa.Table:
    """`table` with the rows in `broken` marked as bad, with their reasons."""
    reasons = table["bad"].to_pylist()
    for row, reason in broken.items():
        reasons[row] = reason
    at = table.schema.get_field_index("bad")
    return table.set_column(at, table.schema.field(at), pa.array(reasons, pa.string()))


def write_shard(
    number: int, dest: str, rows: pa.Table, table: pa.Table, *, rows_per_group: int, classes: Sequence[str]
) -> pa.Table:
    """Write `rows` as shard `number`, with a list of the bad images of `table`. Returns a REPORT table."""
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
    """The reports (REPORT) of the shards that an interrupted command wrote, by number."""
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
    """At least `images` rows (or all), the same number from each of some evenly spaced fragments."""
    rows = index.rows
    count = min(len(rows), max(1, round(images / rows.mean())), images)
    while True:
        chosen = np.linspace(0, len(rows), count, endpoint=False).astype(int) + len(rows) // (2 * count)
        each = np.minimum(-(-images // count), rows[chosen])
        if each.sum() >= images or count == len(rows):
            break
        count = min(2 * count, len(rows))
    # Fragments may be too small for equal numbers: then take all rows.
    each = each if each.sum() >= images else rows
    pieces = zip(chosen.tolist(), each.tolist(), strict=True)
    return Reading.of(index, [Piece(at, 0, stop) for at, stop in pieces])


def mean_bytes(table: pa.Table) -> float:
    """Mean size of the good images of `table` (reader.SCHEMA). Raises ValueError if there is none."""
    sizes = pc.binary_length(table["image"]).drop_null()  # pyright: ignore[reportAttributeAccessIssue]
    if not len(sizes):
        raise ValueError(
            f"none of {len(table)} images that were looked at is good: {table['bad'][0]}; "
            f"{quarantine.WAY_OUT}"
        )
    return pc.mean(sizes).as_py()  # pyright: ignore[reportAttributeAccessIssue]


# First part of a key's path; other modules use other first parts.
_SHUFFLE = 5

# Readers of Parquet data sets skip names that begin with _.
_PART = "_part-"

# A part ends with a trailer: the offset and the checksum of each shard's rows, the offset of their end, and
# the checksum of the trailer.
_TRAILER = np.dtype([("offset", "<i8"), ("checksum", "<u4")])
_CHECKSUM_BYTES = 4

# Columns of reader.SCHEMA that shards and reports of bad images need.
_KEPT = ["image", "label", "path", "key", "sample", "bad"]

PART_REPORT = pa.schema({"images": pa.int64()})


@dataclass(frozen=True, eq=False)
class Order:
    """The order of all rows: each sample number has a word, and a shard has the words between two bounds.

    key: of the random words; None: the words are the sample numbers, so the order is the source's.
    """

    key: Key | None
    bounds: UInt64[np.ndarray, " shards-1"]

    @classmethod
    def of(cls, seed: int | None, rows: int, rows_per_shard: int) -> "Order":
        """The order for `seed`, in shards of `rows_per_shard` rows. Takes 16 bytes per row temporarily."""
        key = None if seed is None else derive_key(seed, _SHUFFLE)
        words = np.sort(_words(key, np.arange(rows)))
        return cls(key, words[rows_per_shard::rows_per_shard].copy())

    @property
    def shards(self) -> int:
        return len(self.bounds) + 1

    def sorted(self, samples: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Positions of `samples`, sorted by their words."""
        return np.argsort(_words(self.key, samples), kind="stable")

    def ends(self, samples: Int[np.ndarray, " n"]) -> Int[np.ndarray, " shards"]:
        """Ends of the rows of each shard among the sorted `samples`."""
        words = np.sort(_words(self.key, samples))
        return np.append(np.searchsorted(words, self.bounds, side="left"), len(samples))


def _words(key: Key | None, samples: Int[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    return samples.astype(np.uint64) if key is None else hashes(key, samples)


@dataclass(frozen=True, eq=False)
class PartJob:
    """A part to write: its number, and where its rows are read."""

    number: int
    reading: Reading


def part_jobs(index: Index, rows_per_part: int) -> Iterator[PartJob]:
    """The rows of the index in order, about `rows_per_part` in each part, and each fragment once."""
    for number, part in enumerate(all_readings(index, rows_per_part)):
        yield PartJob(number, part)


def write_part(job: PartJob, data: DataConfig, dest: str, order: Order) -> pa.Table:
    """Write the rows of the job below `dest`, grouped by shard. Returns a PART_REPORT table.

    Raises ValueError if the source cannot be read, OSError if the part cannot be written.
    """
    # In one chunk: each `take` would join several again.
    table = read_pieces(job.reading, data, own_bytes=True).select(_KEPT).combine_chunks()
    samples = table["sample"].to_numpy()
    places, ends = order.sorted(samples), order.ends(samples)
    out, trailer = io.BytesIO(), np.zeros(order.shards + 1, _TRAILER)
    for shard, (start, stop) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
        content = _encode(table.take(pa.array(places[start:stop]))) if start < stop else b""
        trailer[shard] = out.tell(), zlib.crc32(content)
        out.write(content)
    trailer[-1] = out.tell(), 0
    out.write(trailer.tobytes())
    out.write(zlib.crc32(trailer.tobytes()).to_bytes(_CHECKSUM_BYTES, "little"))
    storage.write(_place(dest, job.number), out.getvalue())
    return pa.table({"images": [len(table)]}, schema=PART_REPORT)


def write_gathered(
    number: int,
    dest: str,
    order: Order,
    *,
    parts: int,
    labelled: bool,
    rows_per_group: int,
    classes: Sequence[str],
) -> pa.Table:
    """Write shard `number` from all parts at `dest`. Returns a REPORT table.

    Raises ValueError if a part is missing or damaged, OSError if the shard cannot be written.
    """
    filesystem, folder = storage.resolve(dest)
    paths = [f"{folder}/{_name(part)}" for part in range(parts)]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        slices = list(pool.map(lambda path: _read_slice(filesystem, path, number, order.shards), paths))
    table = pa.concat_tables(filter(None, slices))
    table = table.take(pa.array(order.sorted(table["sample"].to_numpy())))
    return write_images(
        number, dest, table, labelled=labelled, rows_per_group=rows_per_group, classes=classes
    )


def direct_jobs(index: Index, seed: int, rows_per_shard: int) -> Iterator[ShardJob]:
    """The shards of the same order without parts, for images that are read one by one."""
    rows = index.rows
    order = permutation(derive_key(seed, _SHUFFLE), int(rows.sum()))
    ends = np.cumsum(rows)
    for number, start in enumerate(range(0, len(order), rows_per_shard)):
        chosen = order[start : start + rows_per_shard]
        fragments = np.searchsorted(ends, chosen, side="right")
        within = (chosen - (ends - rows)[fragments]).tolist()
        pieces = [Piece(at, row, row + 1) for at, row in zip(fragments.tolist(), within, strict=True)]
        yield ShardJob(number, (Reading.of(index, pieces),))


def finished_parts(dest: str) -> set[int]:
    """Numbers of the parts that an interrupted command wrote."""
    return {int(name.removeprefix(_PART)) for name in storage.names(dest) if name.startswith(_PART)}


def remove_parts(dest: str) -> None:
    """Delete all parts, and the incomplete ones that killed processes left on a disk."""
    left = [name for name in storage.names(dest) if name.startswith((_PART, f".{_PART}"))]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda name: storage.remove(storage.join(dest, name)), left))


def _name(part: int) -> str:
    return f"{_PART}{part:05}"


def _place(dest: str, part: int) -> str:
    return storage.join(dest, _name(part))


def _encode(table: pa.Table) -> pa.Buffer:
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def _read_slice(filesystem: fs.FileSystem, path: str, shard: int, shards: int) -> pa.Table | None:
    """The rows of a part that belong to `shard`; None if there are none."""

    def read() -> bytes | None:
        with filesystem.open_input_file(path) as file:
            length = (shards + 1) * _TRAILER.itemsize
            at = file.size() - length - _CHECKSUM_BYTES
            if at < 0:
                return None
            ending = file.read_at(length + _CHECKSUM_BYTES, at)
            if zlib.crc32(ending[:length]) != int.from_bytes(ending[length:], "little"):
                return None
            here, after = np.frombuffer(ending[:length], _TRAILER)[shard : shard + 2]
            content = file.read_at(int(after["offset"] - here["offset"]), int(here["offset"]))
            return content if zlib.crc32(content) == here["checksum"] else None

    content = reading(read, path)
    if content is None:
        raise ValueError(f"{path} is damaged; delete it, and the same command writes it again")
    return pa.ipc.open_stream(content).read_all() if content else None
