"""Parts that all data set formats (Parquet, folders, tars) share, such as labels in paths."""

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

# Path, key and sample number (see index.Index). Together they identify an image: keys alone may repeat.
Identity = tuple[str, str, int | None]

# Rows as every format reads them. `label` is -1 where there is none; `path` and `key` locate the image.
# large_binary, because a window may exceed the 2 GiB limit of binary.
ROWS = pa.schema({"image": pa.large_binary(), "label": pa.int64(), "path": pa.string(), "key": pa.string()})

# Endings of image files. Those in a format that is not decoded are listed, and reported as bad images.
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff",
    ".gif", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".dib",
)  # fmt: skip

# Folders that macOS archives and Synology storage add.
JUNK = frozenset({"__MACOSX", "@eaDir"})

# Files that one task reads at a time: object storage has high latency and high bandwidth.
CONNECTIONS = 16


# The way out if a file differs from its index.
CHANGED = "restore it, or start a new run for the changed images"


class Place(NamedTuple):
    """A file of the data set: its path within the file system, its size in bytes, its modification time.

    written: modification time in nanoseconds since 1970; 0 if the storage has none.
    """

    path: str
    size: int
    written: int = 0


@dataclass(frozen=True)
class Files:
    """The files of a data set, sorted by path. root: the folder whose subfolders are the classes.

    passed_over: one line about other files there, which are not read.
    """

    layout: Layout
    root: str
    places: list[Place]
    passed_over: str | None = None

    @property
    def below(self) -> list[str]:
        """The paths of the files, relative to the root."""
        return [place.path.removeprefix(self.root).lstrip("/") for place in self.places]


@dataclass(frozen=True, eq=False)
class Listing:
    """The fragments of a data set: a table with the columns path and rows, and those of its format.

    no_labels: the first image or file without a label, if any; then no labels are used at all.
    classes: the names of the labels, if they have names. image_bytes: encoded size of all images; 0 if it is
    about the size of the files.
    """

    fragments: pa.Table
    no_labels: str | None = None
    classes: tuple[str, ...] = ()
    image_bytes: int = 0


def reading(call: Callable[[], _T], place: str) -> _T:
    """Call `call`, which reads `place`, again during a storage outage or if the content arrives damaged.

    Returns its result. Raises ValueError, naming the place, if that is missing, damaged or not permitted.
    """
    what = f"reading {place}"

    def damaged(error: Exception) -> bool:
        if isinstance(error, (FileNotFoundError, PermissionError)) or str(error).startswith(what):
            return False
        return isinstance(error, (OSError, pa.ArrowInvalid, ChecksumError))

    try:
        return storage.reading_again(lambda: storage.retrying(call, what), what, damaged)
    except (OSError, pa.ArrowInvalid, ChecksumError) as error:
        line = storage.first_line(error)
        if line.startswith(what):
            raise ValueError(line) from error
        way_out = CHANGED if isinstance(error, FileNotFoundError) else "write it again, or remove it"
        raise ValueError(f"cannot read {place}: {line.rstrip('.')}; {way_out}") from error


# Hive's name for a missing value.
_NONE = "__HIVE_DEFAULT_PARTITION__"

_NUMBER = re.compile(r"-?\d{1,18}")

# The label of each file, and the names of the labels if they have names.
Labels = tuple[Int[np.ndarray, " files"], tuple[str, ...]]


def partition_values(paths: Sequence[str], column: str) -> list[str | None]:
    """The value of `column` in the Hive partition folders of each path, or None."""
    return [_value(path, f"{column}=") for path in paths]


def value_labels(values: Sequence[str]) -> Labels:
    """The values themselves if all are whole numbers, else their positions among the sorted values."""
    if all(_NUMBER.fullmatch(value) for value in values):
        return np.array([int(value) for value in values], np.int64), ()
    return name_labels(values)


def name_labels(names: Sequence[str]) -> Labels:
    """Each name's position among the sorted names."""
    classes, labels = np.unique(np.array(names), return_inverse=True)
    return labels.astype(np.int64), tuple(classes.tolist())


def _value(path: str, prefix: str) -> str | None:
    if prefix not in path:
        return None
    named = [part for part in path.split("/")[:-1] if part.startswith(prefix)]
    value = unquote(named[-1].removeprefix(prefix)) if named else _NONE
    return None if value == _NONE else value
