"""URI to Index: which files hold the images, in which row groups, read from metadata alone."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from pyarrow import fs

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.philox import derive_key, permutation

_READERS = 16

# First part of a key's path; pipelines.plan and pipelines.draws use others.
_SPLIT = 4


@dataclass(frozen=True, eq=False)
class Index:
    """Every fragment (a row group of a Parquet file) of a data set, sorted by path.

    A sample's number is its row's place in this order, kept by the parts of a split: it does not depend on
    who reads it. `first_sample` is that of each fragment's first row.
    """

    uri: str
    paths: tuple[str, ...]
    file: Int[np.ndarray, " fragments"]
    row_group: Int[np.ndarray, " fragments"]
    rows: Int[np.ndarray, " fragments"]
    first_sample: Int[np.ndarray, " fragments"]
    has_labels: bool

    def split(self, share: float, seed: int) -> tuple["Index", "Index"]:
        """The index without, and of, randomly chosen fragments that hold at least `share` of the rows.

        Raises ValueError where one part would be empty.
        """
        order = permutation(derive_key(seed, _SPLIT), len(self.rows))
        count = int(np.searchsorted(np.cumsum(self.rows[order]), share * self.rows.sum())) + 1
        if count >= len(order):
            raise ValueError(
                f"{self.uri} has {len(order)} row groups, too few to hold out {share:.0%} of its images; "
                "write smaller row groups"
            )
        return self._part(np.sort(order[count:])), self._part(np.sort(order[:count]))

    def _part(self, fragments: Int[np.ndarray, " some"]) -> "Index":
        columns = {
            name: getattr(self, name)[fragments] for name in ("file", "row_group", "rows", "first_sample")
        }
        return replace(self, **columns)


def build_index(uri: str, data: DataConfig, progress: Callable[[int, int], None] | None = None) -> Index:
    """Read the metadata of every Parquet file at `uri`; calls progress(done, files) after each.

    Raises ValueError, naming the URI, where it does not exist, holds no Parquet file or no image, or
    lacks a column.
    """
    filesystem, path = storage.resolve(uri)
    paths = _list_parquet(filesystem, path, uri)
    footers: list[tuple[Int[np.ndarray, " groups"], bool]] = []
    with ThreadPoolExecutor(_READERS) as pool:
        for footer in pool.map(lambda file: _read_footer(filesystem, file, data), paths):
            footers.append(footer)
            if progress:
                progress(len(footers), len(paths))
    counts = [rows for rows, _ in footers]
    rows = np.concatenate(counts)
    index = Index(
        uri=uri,
        paths=tuple(paths),
        file=np.repeat(np.arange(len(paths)), [len(rows) for rows in counts]),
        row_group=np.concatenate([np.arange(len(rows)) for rows in counts]),
        rows=rows,
        first_sample=np.cumsum(rows) - rows,
        has_labels=all(labels for _, labels in footers),
    )
    if index.rows.sum() == 0:
        raise ValueError(f"{uri} holds no image: its {len(paths)} Parquet files have no rows")
    return index


def _list_parquet(filesystem: fs.FileSystem, path: str, uri: str) -> list[str]:
    folder, pattern = _split_pattern(path)
    try:
        info = filesystem.get_file_info(folder)
        if info.type == fs.FileType.NotFound:
            raise ValueError(f"{uri} does not exist; give a Parquet file or a folder of them")
        if info.type == fs.FileType.File:
            return [path]
        found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    except OSError as error:
        raise ValueError(f"cannot list {uri}: {storage.first_line(error)}") from error
    files = (file.path for file in found if file.type == fs.FileType.File)
    # Only * is a wildcard.
    literal = (pattern or "*.parquet").replace("[", "[[]").replace("?", "[?]")
    paths = sorted(file for file in files if fnmatchcase(file, literal))
    if not paths:
        raise ValueError(f"{uri} holds no image: no file there matches {pattern or '*.parquet'}")
    return paths


def _split_pattern(path: str) -> tuple[str, str | None]:
    """The folder to list, and the whole pattern where `path` has wildcards."""
    if "*" not in path:
        return path, None
    return path[: path.index("*")].rpartition("/")[0], path


def _read_footer(
    filesystem: fs.FileSystem, path: str, data: DataConfig
) -> tuple[Int[np.ndarray, " groups"], bool]:
    """Rows of each row group, and whether there is a label column."""
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"cannot read {path}: {storage.first_line(error)}") from error
    _check_columns(schema, path, data)
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.array(rows, np.int64), data.label_column in schema.names


def _check_columns(schema: pa.Schema, path: str, data: DataConfig) -> None:
    """Raise ValueError unless images are bytes and labels, where there are any, whole numbers."""
    if data.image_column not in schema.names:
        raise ValueError(
            f"{path} holds no image: no column {data.image_column!r} among {', '.join(schema.names)}; "
            "name it with --data.image-column"
        )
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
                "name another with --data.label-column"
            )
