"""Common parts of the formats of a data set (Parquet, folders, tars), labels in paths among them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from pipelines import storage
from pipelines.storage.checksums import ChecksumError

_T = TypeVar("_T")

Layout = Literal["parquet", "tar", "folder", "torchvision"]

# Path, key and sample's number (see sources.Index), which tell an image from all others: keys may repeat.
Identity = tuple[str, str, int | None]

# Rows as a layout reads them. `label` is -1 where there is none; `path` and `key` say where an image is.
# large_binary, because a window may hold more than the 2 GiB that binary's offsets reach.
ROWS = pa.schema({"image": pa.large_binary(), "label": pa.int64(), "path": pa.string(), "key": pa.string()})

# Endings of files that hold one image; those that are not decoded are listed and then reported.
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff",
    ".gif", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".dib",
)  # fmt: skip

# Folders that archives of macOS and the storage boxes of Synology add.
JUNK = frozenset({"__MACOSX", "@eaDir"})

# Files that one task reads at a time: object storage is slow to answer and fast to send.
CONNECTIONS = 16


# The way out where a file is not what its index says of it.
CHANGED = "put it back, or give the changed images a run of their own"


class Place(NamedTuple):
    """A file of the data set: its path within the file system, its size in bytes, and when it was written.

    written: nanoseconds since 1970, as the storage has it; 0 where it tells none.
    """

    path: str
    size: int
    written: int = 0


@dataclass(frozen=True)
class Files:
    """The files of a data set, sorted by path, and the folder from which its classes are counted.

    passed_over: what else lies there and is not read, in one line.
    """

    layout: Layout
    root: str
    places: list[Place]
    passed_over: str | None = None

    @property
    def below(self) -> list[str]:
        """The paths of the files from the root."""
        return [place.path.removeprefix(self.root).lstrip("/") for place in self.places]


@dataclass(frozen=True, eq=False)
class Listing:
    """The fragments of a data set: a table with the columns path and rows, and a layout's own.

    no_labels: which image or file has no label, where one has none; then there are no labels at all.
    classes: the names of the labels, where there are any. image_bytes: of all images together, encoded, where
    they are not about the files' own.
    """

    fragments: pa.Table
    no_labels: str | None = None
    classes: tuple[str, ...] = ()
    image_bytes: int = 0


def reading(call: Callable[[], _T], place: str) -> _T:
    """What `call` returns, which reads `place`; called again while the storage is away or what comes is torn.

    Raises ValueError, naming the place, where it is gone, torn or refused.
    """
    what = f"reading {place}"

    def torn(error: Exception) -> bool:
        if isinstance(error, (FileNotFoundError, PermissionError)) or str(error).startswith(what):
            return False
        return isinstance(error, (OSError, pa.ArrowInvalid, ChecksumError))

    try:
        return storage.reading_again(lambda: storage.retrying(call, what), what, torn)
    except (OSError, pa.ArrowInvalid, ChecksumError) as error:
        line = storage.first_line(error)
        if line.startswith(what):
            raise ValueError(line) from error
        way_out = CHANGED if isinstance(error, FileNotFoundError) else "write it anew, or take it away"
        raise ValueError(f"cannot read {place}: {line.rstrip('.')}; {way_out}") from error


# What stands for no value.
_NONE = "__HIVE_DEFAULT_PARTITION__"

_NUMBER = re.compile(r"-?\d{1,18}")

# The label of each file, and the names of the labels where they have names.
Labels = tuple[Int[np.ndarray, " files"], tuple[str, ...]]


def partition_values(paths: Sequence[str], column: str) -> list[str | None]:
    """The value that the folders of each path have for the column, or None where they have none."""
    return [_value(path, f"{column}=") for path in paths]


def value_labels(values: Sequence[str]) -> Labels:
    """The values themselves where all are whole numbers, else their places among all of them, sorted."""
    if all(_NUMBER.fullmatch(value) for value in values):
        return np.array([int(value) for value in values], np.int64), ()
    return name_labels(values)


def name_labels(names: Sequence[str]) -> Labels:
    """Each name's place among all of them, sorted."""
    classes, labels = np.unique(np.array(names), return_inverse=True)
    return labels.astype(np.int64), tuple(classes.tolist())


def _value(path: str, prefix: str) -> str | None:
    if prefix not in path:
        return None
    named = [part for part in path.split("/")[:-1] if part.startswith(prefix)]
    value = unquote(named[-1].removeprefix(prefix)) if named else _NONE
    return None if value == _NONE else value
