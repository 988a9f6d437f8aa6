"""Parquet files of encoded images: a fragment is a row group, known from the file's footer alone."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int
from pyarrow import fs

from pipelines import storage
from pipelines.checksums import check_footer, parquet_end_bytes
from pipelines.config import DataConfig
from pipelines.layout import CHANGED, ROWS, Files, Listing, Place, reading
from pipelines.partitions import partition_values, value_labels

ENDINGS = (".parquet", ".parq")

# What is read of a file's end, as pyarrow does, in the hope that the footer is there.
_END_BYTES = 64 << 10


def index_files(
    filesystem: fs.FileSystem, files: Files, data: DataConfig, pool: Executor, done: Callable[[], None]
) -> Listing:
    """The row groups of `files`, which have labels if all have the label column, or lie in its partitions.

    Raises ValueError for a file that cannot be read or whose columns are not images and whole numbers.
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
    """The listing of files without a label column, whose folders may give it, as for pyarrow's data sets."""
    values = partition_values(files.below, column)
    if None in values:
        return Listing(table, _without(files.places[values.index(None)].path, column))
    labels, classes = value_labels([value for value in values if value is not None])
    return Listing(table.append_column("label", pa.array(np.repeat(labels, counts))), classes=classes)


def _without(path: str, column: str) -> str:
    return f"{path} has no column {column!r} (--data.label-column names another)"


@contextmanager
def opened(filesystem: fs.FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; checksums that it has are verified: the footer's now, a page's when it is read.

    Raises ChecksumError, OSError or pyarrow.ArrowInvalid where one is wrong, or the file is none.
    """
    with filesystem.open_input_file(path) as file:
        size = file.size()
        end = file.read_at(min(size, _END_BYTES), max(0, size - _END_BYTES))
        wanted = min(size, parquet_end_bytes(end))
        if len(end) < wanted:
            end = file.read_at(wanted, size - wanted)
        check_footer(end)
        metadata = pq.read_metadata(pa.BufferReader(end))
        with pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True) as opened:
            yield opened


def read_pieces(
    filesystem: fs.FileSystem, pieces: list[dict], data: DataConfig, has_labels: bool, pool: Executor
) -> pa.Table:
    """Rows [start, stop) of each row group, as layout.ROWS."""
    return pa.concat_tables(pool.map(lambda piece: _read_piece(filesystem, piece, data, has_labels), pieces))


def read_labels(filesystem: fs.FileSystem, fragment: dict, data: DataConfig) -> Int[np.ndarray, " rows"]:
    """The label of each row of a row group, -1 where it has none; no image is read."""
    path, group = fragment["path"], fragment["row_group"]
    if "label" in fragment:
        return np.full(fragment.get("fragment_rows", fragment["rows"]), fragment["label"])

    def read() -> pa.Table:
        with opened(filesystem, path) as file:
            return file.read_row_group(group, columns=[data.label_column])

    return _labels(reading(read, f"{path}, row group {group}"), data, path).to_numpy()


def _labels(table: pa.Table, data: DataConfig, path: str) -> pa.ChunkedArray:
    try:
        return pc.fill_null(table[data.label_column].cast(pa.int64()), -1)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path}: column {data.label_column!r} has a label beyond int64: {storage.first_line(error)}; "
            "number the classes anew"
        ) from error


def _read_footer(filesystem: fs.FileSystem, path: str, data: DataConfig) -> tuple[list[int], bool, int]:
    """Rows of each row group, whether there is a label column, and the bytes of the images once unpacked."""
    with opened(filesystem, path) as file:
        metadata, schema = file.metadata, file.schema_arrow
    _check_columns(schema, path, data)
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    columns = [column for column in range(metadata.num_columns) if _is_image(metadata, column, data)]
    size = sum(group.column(column).total_uncompressed_size for group in groups for column in columns)
    return [group.num_rows for group in groups], data.label_column in schema.names, size


def _is_image(metadata: pq.FileMetaData, column: int, data: DataConfig) -> bool:
    """Whether a column of the file holds the images' bytes: of a struct each field is a column of its own."""
    path = metadata.schema.column(column).path
    return path in (data.image_column, f"{data.image_column}.bytes")


def _check_columns(schema: pa.Schema, path: str, data: DataConfig) -> None:
    """Raise ValueError unless images are bytes and labels, where there are any, whole numbers."""
    if data.image_column not in schema.names:
        raise ValueError(
            f"{path} holds no image: no column {data.image_column!r} among {', '.join(schema.names)}; "
            "name it with --data.image-column"
        )
    for name in (data.image_column, data.label_column, data.key_column):
        if (count := schema.names.count(name)) > 1:
            raise ValueError(f"{path} has {count} columns {name!r}; write it anew, with one of that name")
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


def _read_piece(filesystem: fs.FileSystem, piece: dict, data: DataConfig, has_labels: bool) -> pa.Table:
    path, group, start, stop = (piece[name] for name in ("path", "row_group", "start", "stop"))

    def read() -> pa.Table:
        with opened(filesystem, path) as file:
            names = set(file.schema_arrow.names) & {data.image_column, data.label_column, data.key_column}
            if group >= file.num_row_groups:
                raise ValueError(
                    f"cannot read {path}, row group {group}: it had more when it was indexed; {CHANGED}"
                )
            return file.read_row_group(group, columns=sorted(names)).slice(start, stop - start)

    table = reading(read, f"{path}, row group {group}")
    images, paths = table[data.image_column], None
    if pa.types.is_struct(images.type):
        if images.type.get_field_index("path") >= 0:
            paths = pc.struct_field(images, "path")  # pyright: ignore[reportAttributeAccessIssue]
        images = pc.struct_field(images, "bytes")  # pyright: ignore[reportAttributeAccessIssue]
    numbered = pa.array([f"row group {group}, row {row}" for row in range(start, stop)])
    keys = _names(table[data.key_column] if data.key_column in table.column_names else paths)
    if has_labels and "label" not in piece:
        labels = _labels(table, data, path)
    else:
        labels = pa.array(np.full(len(table), piece.get("label", -1)))
    columns = {
        "image": images.cast(pa.large_binary()),
        "label": labels,
        "path": pa.array([path] * len(table)),
        "key": numbered if keys is None else pc.coalesce(keys, numbered),  # pyright: ignore
    }
    return pa.table(columns, schema=ROWS)


def _names(column: pa.ChunkedArray | None) -> pa.ChunkedArray | None:
    """The column as text, or None where it holds something else."""
    try:
        return None if column is None else column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
