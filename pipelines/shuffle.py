"""An external shuffle in two passes, in bounded memory: an index -> parts -> shards in a random order.

First each job reads a part of the data set and writes it beside the shards, its rows grouped by the shard
that they belong to. Then each job gathers one shard's rows from all parts and sorts them. Row r is sorted by
the word that `philox.hashes` draws for it: the order is `philox.permutation`'s of all rows, whoever does
what. A part, like a shard, is written whole or not at all; a shuffle that is resumed writes what is missing.
"""

import io
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int, UInt64
from pyarrow import fs

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.layout import CONNECTIONS, reading
from pipelines.packing import ShardJob, all_readings, write_images
from pipelines.philox import Key, derive_key, hashes, permutation
from pipelines.plan import Piece
from pipelines.reader import Reading, read_pieces
from pipelines.sources import Index

# First part of a key's path; other modules use others.
_SHUFFLE = 5

# Readers of Parquet data sets pass over names that begin with _.
_PART = "_part-"

# A part ends with where each shard's rows begin and their checksum, where the last one's end, and a checksum
# of all that.
_TRAILER = np.dtype([("offset", "<i8"), ("checksum", "<u4")])
_CHECKSUM_BYTES = 4

# Of reader.SCHEMA, what a shard is made of and what is said of bad images.
_KEPT = ["image", "label", "path", "key", "sample", "bad"]

PART_REPORT = pa.schema({"images": pa.int64()})


@dataclass(frozen=True, eq=False)
class Order:
    """The order of all rows: each has a word by its number, and a shard has those between two bounds."""

    key: Key
    bounds: UInt64[np.ndarray, " shards-1"]

    @classmethod
    def of(cls, seed: int, rows: int, rows_per_shard: int) -> "Order":
        """The order for `seed`, in shards of `rows_per_shard` rows; it takes 16 bytes a row for a moment."""
        key = derive_key(seed, _SHUFFLE)
        words = np.sort(hashes(key, np.arange(rows)))
        return cls(key, words[rows_per_shard::rows_per_shard].copy())

    @property
    def shards(self) -> int:
        return len(self.bounds) + 1

    def sorted(self, samples: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Places of `samples` in the order of their words."""
        return np.argsort(hashes(self.key, samples), kind="stable")

    def ends(self, samples: Int[np.ndarray, " n"]) -> Int[np.ndarray, " shards"]:
        """Where the rows of each shard end among `samples`, once they are sorted."""
        words = np.sort(hashes(self.key, samples))
        return np.append(np.searchsorted(words, self.bounds, side="left"), len(samples))


@dataclass(frozen=True, eq=False)
class PartJob:
    """One part to write: its number, and what it is read from."""

    number: int
    reading: Reading


def part_jobs(index: Index, rows_per_part: int) -> Iterator[PartJob]:
    """The index's rows in its order, in parts of some `rows_per_part` rows; no fragment is read twice."""
    for number, part in enumerate(all_readings(index, rows_per_part)):
        yield PartJob(number, part)


def write_part(job: PartJob, data: DataConfig, dest: str, order: Order) -> pa.Table:
    """Write the job's rows below `dest`, those of each shard side by side; PART_REPORT of it.

    Raises ValueError where the source cannot be read, OSError where nothing can be written.
    """
    # In one chunk: of several, each `take` would first make one.
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
    """Write shard `number` out of all parts at `dest`; packing.REPORT of it.

    Raises ValueError where a part is missing or damaged, OSError where nothing can be written.
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
    """The shards of the same order without parts: for images that are read one by one anyway."""
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
    """Numbers of the parts that an earlier run of the command wrote."""
    return {int(name.removeprefix(_PART)) for name in storage.names(dest) if name.startswith(_PART)}


def remove_parts(dest: str) -> None:
    """Delete all parts, and what a process that was killed while it wrote one has left on a disk."""
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
    """The rows of a part that belong to `shard`, None where it has none."""

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
        raise ValueError(f"{path} is damaged; delete it, and the same command writes it anew")
    return pa.ipc.open_stream(content).read_all() if content else None
