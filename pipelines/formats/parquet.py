"""Parquet files: their footers, their row groups, and the rows of windows."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int
from pyarrow import fs

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.formats.base import (
    CHANGED,
    ROWS,
    Files,
    Listing,
    Place,
    partition_values,
    reading,
    value_labels,
)
from pipelines.storage.checksums import check_footer, parquet_end_bytes

ENDINGS = (".parquet", ".parq")


def index_files(
    filesystem: fs.FileSystem, files: Files, data: DataConfig, pool: Executor, done: Callable[[], None]
) -> Listing:
    """List the row groups of `files`. They have labels if all files have the label column or its partitions.

    Raises ValueError for a file that cannot be read, or whose columns are not images and whole numbers.
    """

    def footer(file: Place) -> tuple[list[int], bool, int]:
        found = reading(lambda: _read_footer(filesystem, file.path, data), file.path)
        done()
        return found

    footers = list(pool.map(footer, files.places))
    counts = [len(rows) for rows, _, _ in footers]
    image_bytes = sum(size for _, _, size in footers)
    columns = {
        "path": np.repeat([file.path for file in files.places], counts),
        "rows": np.concatenate([np.array(rows, np.int64) for rows, _, _ in footers]),
        "row_group": np.concatenate([np.arange(count) for count in counts]),
    }
    table, has_column = pa.table(columns), [has for _, has, _ in footers]
    if not any(has_column):
        return replace(_partitioned(table, files, counts, data.label_column), image_bytes=image_bytes)
    without = [file.path for file, has in zip(files.places, has_column, strict=True) if not has]
    no_labels = _without(without[0], data.label_column) if without else None
    return Listing(table, no_labels, image_bytes=image_bytes)


def _partitioned(table: pa.Table, files: Files, counts: list[int], column: str) -> Listing:
    """The listing of files without a label column; Hive partition folders may give the labels."""
    values = partition_values(files.below, column)
    if None in values:
        return Listing(table, _without(files.places[values.index(None)].path, column))
    labels, classes = value_labels([value for value in values if value is not None])
    return Listing(table.append_column("label", pa.array(np.repeat(labels, counts))), classes=classes)


def _without(path: str, column: str) -> str:
    return f"{path} has no column {column!r} (--data.label-column names another)"


def read_pieces(
    filesystem: fs.FileSystem, pieces: list[dict], data: DataConfig, has_labels: bool, pool: Executor
) -> pa.Table:
    """Rows [start, stop) of each row group, as base.ROWS; a file is opened once for all of its pieces."""
    numbers: dict[str, list[int]] = {}
    for number, piece in enumerate(pieces):
        numbers.setdefault(piece["path"], []).append(number)
    files = [[pieces[number] for number in of] for of in numbers.values()]
    tables = list(pool.map(lambda file: _read_file(filesystem, file, data, has_labels), files))
    if len(tables) == 1:
        return tables[0]
    parts = [tables[0]] * len(pieces)
    for table, of in zip(tables, numbers.values(), strict=True):
        at = 0
        for number in of:
            parts[number] = table.slice(at, pieces[number]["stop"] - pieces[number]["start"])
            at += len(parts[number])
    return pa.concat_tables(parts)


def read_labels(
    filesystem: fs.FileSystem, fragments: list[dict], data: DataConfig
) -> Int[np.ndarray, " rows"]:
    """The labels of all rows of a file's row groups, -1 where there is none. Reads no image."""
    path, counts = fragments[0]["path"], [piece.get("fragment_rows", piece["rows"]) for piece in fragments]
    if "label" in fragments[0]:
        return np.repeat([fragment["label"] for fragment in fragments], counts)
    groups = [fragment["row_group"] for fragment in fragments]

    def read() -> pa.Table:
        with opened(filesystem, path) as file:
            _check_groups(file.metadata, path, dict(zip(groups, counts, strict=True)))
            return file.read_row_groups(groups, columns=[data.label_column])

    return _labels(reading(read, _place(path, groups)), data, path).to_numpy()


def _labels(table: pa.Table, data: DataConfig, path: str) -> pa.ChunkedArray:
    try:
        return pc.fill_null(table[data.label_column].cast(pa.int64()), -1)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path}: column {data.label_column!r} has a label beyond int64: {storage.first_line(error)}; "
            "renumber the classes"
        ) from error


def _read_footer(filesystem: fs.FileSystem, path: str, data: DataConfig) -> tuple[list[int], bool, int]:
    """Rows of each row group, whether there is a label column, and the uncompressed bytes of the images."""
    with opened(filesystem, path) as file:
        metadata, schema = file.metadata, file.schema_arrow
    _check_columns(schema, path, data)
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    columns = [column for column in range(metadata.num_columns) if _is_image(metadata, column, data)]
    size = sum(group.column(column).total_uncompressed_size for group in groups for column in columns)
    return [group.num_rows for group in groups], data.label_column in schema.names, size


def _is_image(metadata: pq.FileMetaData, column: int, data: DataConfig) -> bool:
    """Whether a column of the file holds the images' bytes. Each field of a struct is a column."""
    path = metadata.schema.column(column).path
    return path in (data.image_column, f"{data.image_column}.bytes")


def _check_columns(schema: pa.Schema, path: str, data: DataConfig) -> None:
    """Raise ValueError unless images are bytes and labels, if there are any, are whole numbers."""
    if data.image_column not in schema.names:
        raise ValueError(
            f"{path} holds no image: no column {data.image_column!r} among {', '.join(schema.names)}; "
            "name it with --data.image-column"
        )
    for name in (data.image_column, data.label_column, data.key_column):
        if (count := schema.names.count(name)) > 1:
            raise ValueError(f"{path} has {count} columns {name!r}; write it again, with one of that name")
    kind = schema.field(data.image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(
            f"{path}: column {data.image_column!r} is {kind}, not encoded images (bytes, or a struct with "
            "a field `bytes`); name another with --data.image-column"
        )
    if data.label_column in schema.names:
        kind = schema.field(data.label_column).type
        if not pa.types.is_integer(kind):
            raise ValueError(
                f"{path}: column {data.label_column!r} is {kind}, not whole numbers from 0; "
                "name another with --data.label-column, or none that is there to do without labels"
            )


def _read_file(filesystem: fs.FileSystem, pieces: list[dict], data: DataConfig, has_labels: bool) -> pa.Table:
    """The rows of pieces of a single file."""
    path = pieces[0]["path"]
    place = _place(path, [piece["row_group"] for piece in pieces])
    table = reading(lambda: _read_rows(filesystem, path, pieces, data), place)
    images, paths = table[data.image_column], None
    if pa.types.is_struct(images.type):
        if images.type.get_field_index("path") >= 0:
            paths = pc.struct_field(images, "path")  # pyright: ignore[reportAttributeAccessIssue]
        images = pc.struct_field(images, "bytes")  # pyright: ignore[reportAttributeAccessIssue]
    keys = _names(table[data.key_column] if data.key_column in table.column_names else paths)
    if has_labels and "label" not in pieces[0]:
        labels = _labels(table, data, path)
    else:
        counts = [piece["stop"] - piece["start"] for piece in pieces]
        labels = pa.array(np.repeat([piece.get("label", -1) for piece in pieces], counts))
    columns = {
        "image": images.cast(pa.large_binary()),
        "label": labels,
        "path": pa.array([path] * len(table)),
        "key": _numbered(keys, pieces),
    }
    return pa.table(columns, schema=ROWS)


def _read_rows(filesystem: fs.FileSystem, path: str, pieces: list[dict], data: DataConfig) -> pa.Table:
    """The needed columns of a file, for the rows of the pieces in order."""
    stops: dict[int, int] = {}
    for piece in pieces:
        stops[piece["row_group"]] = max(piece["stop"], stops.get(piece["row_group"], 0))
    with reopened(filesystem, path, pieces[0].get("file_written", 0)) as file:
        names = set(file.schema_arrow.names) & {data.image_column, data.label_column, data.key_column}
        rows = _check_groups(file.metadata, path, stops)
        table = file.read_row_groups(list(stops), columns=sorted(names))
    starts = dict(zip(stops, (np.cumsum(rows) - rows).tolist(), strict=True))
    return pa.concat_tables(
        table.slice(starts[piece["row_group"]] + piece["start"], piece["stop"] - piece["start"])
        for piece in pieces
    )


def _place(path: str, groups: list[int]) -> str:
    """Names the row groups of one read in error messages."""
    return f"{path}, row group {groups[0]}" + (f" and {len(groups) - 1} more" if len(groups) > 1 else "")


def _check_groups(footer: pq.FileMetaData, path: str, least: dict[int, int]) -> list[int]:
    """The row counts of these row groups. Raises ValueError if one is missing or has fewer than `least`."""
    rows = []
    for group, wanted in least.items():
        there = group < footer.num_row_groups
        if not there or footer.row_group(group).num_rows < wanted:
            raise ValueError(
                f"cannot read {path}, row group {group}: it had more rows when it was indexed; {CHANGED}"
            )
        rows.append(footer.row_group(group).num_rows)
    return rows


def _numbered(keys: pa.ChunkedArray | None, pieces: list[dict]) -> pa.ChunkedArray | pa.Array:
    """The keys; a row without one is named by its position."""
    if keys is not None and not keys.null_count:
        return keys
    places = pa.array(
        [
            f"row group {piece['row_group']}, row {row}"
            for piece in pieces
            for row in range(piece["start"], piece["stop"])
        ]
    )
    return places if keys is None else pc.coalesce(keys, places)  # pyright: ignore


def _names(column: pa.ChunkedArray | None) -> pa.ChunkedArray | None:
    """The column as text, or None if it is not text."""
    try:
        return None if column is None else column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


# Bytes to read at a file's end, as in pyarrow: they usually contain the whole footer.
_END_BYTES = 64 << 10

# Size of the cached footers of a process as stored; in memory they take several times as much.
_KEPT_BYTES = 16 << 20

# A file's file system, path, size and modification time as in the index.
_Key = tuple[str, str, int, int]


class _Footers:
    """A cache of the most recently used footers, `most_bytes` in all."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._kept: OrderedDict[_Key, pq.FileMetaData] = OrderedDict()
        self._lock = Lock()

    def get(self, key: _Key) -> pq.FileMetaData | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def keep(self, key: _Key, footer: pq.FileMetaData) -> None:
        self.forget(key)
        with self._lock:
            self._kept[key] = footer
            self._bytes += footer.serialized_size
            while self._bytes > self._most_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.serialized_size

    def forget(self, key: _Key) -> None:
        with self._lock:
            if footer := self._kept.pop(key, None):
                self._bytes -= footer.serialized_size


_footers = _Footers(_KEPT_BYTES)


@contextmanager
def opened(filesystem: fs.FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file and verify its checksums, if any: the footer's now, a page's when it is read.

    Raises ChecksumError, OSError or pyarrow.ArrowInvalid for a wrong checksum or a file that is not Parquet.
    """
    with filesystem.open_input_file(path) as file, _parquet(filesystem, file, _read(file)) as parquet:
        yield parquet


@contextmanager
def reopened(filesystem: fs.FileSystem, path: str, written: int) -> Iterator[pq.ParquetFile]:
    """Like `opened`, but reuses a cached footer. `written`: the file's modification time in the index."""
    with filesystem.open_input_file(path) as file:
        key = (filesystem.type_name, path, file.size(), written)
        footer = _footers.get(key)
        if footer is None:
            footer = _read(file)
            _footers.keep(key, footer)
        try:
            with _parquet(filesystem, file, footer) as parquet:
                yield parquet
        except Exception:
            # The footer may be the cause: the next try reads it again.
            _footers.forget(key)
            raise


def _read(file: pa.NativeFile) -> pq.FileMetaData:
    size = file.size()
    end = file.read_at(min(size, _END_BYTES), max(0, size - _END_BYTES))
    wanted = min(size, parquet_end_bytes(end))
    if len(end) < wanted:
        end = file.read_at(wanted, size - wanted)
    check_footer(end)
    return pq.read_metadata(pa.BufferReader(end))


def _parquet(filesystem: fs.FileSystem, file: pa.NativeFile, footer: pq.FileMetaData) -> pq.ParquetFile:
    # Object storage has high latency: pre_buffer merges neighbouring ranges into one request and sends
    # several at once. A disk does not need that, and it would take the memory twice.
    remote = not isinstance(filesystem, fs.LocalFileSystem)
    return pq.ParquetFile(file, metadata=footer, page_checksum_verification=True, pre_buffer=remote)
