"""Find the files of a data set at a URI, and name the other files there."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import lru_cache

from pyarrow import fs

from pipelines import storage
from pipelines.formats import folders, parquet, tars
from pipelines.formats.base import CHANGED, JUNK, Files, Layout, Place

_ENDINGS: dict[Layout, tuple[str, ...]] = {
    "parquet": parquet.ENDINGS,
    "tar": tars.ENDINGS,
    "folder": folders.ENDINGS,
}
# By its ending alone, as a data set may have millions of files.
_LAYOUTS: dict[str, Layout] = {ending: layout for layout, endings in _ENDINGS.items() for ending in endings}
_NAMES = {"parquet": "Parquet file", "tar": "tar", "folder": "image"}

# Files and folders with these prefixes are not part of the data set: `_delta_log` and `_SUCCESS` belong to
# Delta and Spark, as in pyarrow's data sets. But a photograph may be named _DSC0001.jpg, and a class _cat.
_HIDDEN: dict[Layout, tuple[str, ...]] = {"parquet": (".", "_"), "tar": (".", "_"), "folder": (".",)}

_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


@dataclass
class _Kind:
    """The files of one layout, in columns."""

    paths: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)


Kinds = dict[Layout, _Kind]


def find_files(uri: str, found: Callable[[int], None] | None = None) -> Files:
    """The files of the data set at `uri`: a file, a folder with all its subfolders, or a pattern with *.

    Of Parquet files, tars and images, the kind with the most files and the most bytes is the data set. found:
    as in `storage.listing`. Raises ValueError if these are two kinds, or if there is none, and
    FileNotFoundError if `uri` does not exist.
    """
    folder, pattern = _split_pattern(storage.resolve(uri)[1])
    kinds, compressed = _kinds(_listed(uri, found), folder, pattern)
    if not kinds:
        what = f"matches {pattern}" if pattern else "is Parquet, a tar or an image"
        hint = f"; {compressed[0]} is compressed: write it again, uncompressed" if compressed else ""
        raise ValueError(f"{uri} holds no image: no file there {what}{hint}")
    layout = _main_kind(kinds, uri)
    kind = kinds[layout]
    root = folder if pattern or kind.paths != [folder] else _parent(folder)
    passed_over = _passed_over(kinds, layout, compressed, uri)
    return Files(layout, root, kind.paths, kind.sizes, kind.written, passed_over)


def check_unchanged(uri: str, places: Iterable[Place]) -> None:
    """Raise ValueError, naming the file, if one of these files of `uri` is missing or has changed.

    New files are ignored.
    """
    now = {file.path: file for file in _listed(uri)}
    for place in places:
        file = now.get(place.path)
        if file is None:
            raise ValueError(f"{place.path} is gone; {CHANGED}")
        found = Place(file.path, file.size, file.mtime_ns or 0)
        if found != place:
            raise ValueError(
                f"{place.path} has changed since its images were listed: {_about(place)} then, "
                f"{_about(found)} now; {CHANGED}"
            )


def _about(place: Place) -> str:
    written = datetime.fromtimestamp(place.written / 1e9, UTC)
    return f"{place.size:,} bytes of {written:%Y-%m-%d %H:%M:%S.%f} UTC"


def _listed(uri: str, found: Callable[[int], None] | None = None) -> list[fs.FileInfo]:
    """All files below the folder of `uri`, or that in which its pattern begins, sorted by path."""
    return storage.listing(uri[: uri.index("*")].rpartition("/")[0] if "*" in uri else uri, found)


def _kinds(found: list[fs.FileInfo], folder: str, pattern: str | None) -> tuple[Kinds, list[str]]:
    """The files of each layout, and the paths of compressed tars."""
    # Only * is a wildcard.
    literal = pattern.replace("[", "[[]").replace("?", "[?]") if pattern else None
    kinds: Kinds = {layout: _Kind() for layout in _ENDINGS}
    compressed: list[str] = []
    for file in found:
        path = file.path  # pyarrow decodes it at each access.
        if literal and not fnmatchcase(path, literal):
            continue
        layout = _LAYOUTS.get(path[path.rfind(".") :].lower())
        if layout is None:
            if path.lower().endswith(_COMPRESSED):
                compressed.append(path)
        elif not _is_hidden(path, folder, layout):
            kind = kinds[layout]
            kind.paths.append(path)
            kind.sizes.append(file.size)
            kind.written.append(file.mtime_ns or 0)
    return {layout: kind for layout, kind in kinds.items() if kind.paths}, compressed


def _is_hidden(path: str, folder: str, layout: Layout) -> bool:
    """Whether a part of the path below `folder` excludes the file from the data set."""
    below = path.removeprefix(folder)
    cut = below.rfind("/") + 1
    name = below[cut:]
    return name.startswith(_HIDDEN[layout]) or name in JUNK or _is_hidden_folder(below[:cut], layout)


@lru_cache
def _is_hidden_folder(below: str, layout: Layout) -> bool:
    return any(part.startswith(_HIDDEN[layout]) or part in JUNK for part in below.split("/"))


def _main_kind(kinds: Kinds, uri: str) -> Layout:
    """The layout with the most files and the most bytes."""
    most = max(len(kind.paths) for kind in kinds.values())
    heaviest = max(kinds, key=lambda layout: sum(kinds[layout].sizes))
    if len(kinds[heaviest].paths) < most:
        raise ValueError(
            f"{uri} holds {_counted(kinds)}; remove those that are not meant, or choose one kind: "
            + " or ".join(_pattern(uri, kind) for kind in kinds.values())
        )
    return heaviest


def _passed_over(kinds: Kinds, layout: Layout, compressed: list[str], uri: str) -> str | None:
    """The other files there, and how to read those instead; None if there are none."""
    others: Kinds = {other: kind for other, kind in kinds.items() if other != layout}
    said = []
    if others:
        ways = " or ".join(_pattern(uri, kind) for kind in others.values())
        said.append(f"not read: {_counted(others)}; {ways} would read them instead")
    if compressed:
        what = _number(len(compressed), "compressed tar")
        said.append(f"not read: {what} (such as {compressed[0]}); write them again, uncompressed")
    return f"{uri}: {_number(len(kinds[layout].paths), _NAMES[layout])}; {'; '.join(said)}" if said else None


def _counted(kinds: Kinds) -> str:
    return " and ".join(
        f"{_number(len(kind.paths), _NAMES[layout])} (such as {kind.paths[0]})"
        for layout, kind in kinds.items()
    )


def _number(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _pattern(uri: str, kind: _Kind) -> str:
    """A pattern of the files with the most frequent ending of `kind`."""
    endings = Counter(path[path.rfind(".") :] for path in kind.paths)
    folder = uri[: uri.index("*")].rpartition("/")[0] if "*" in uri else uri.rstrip("/")
    return f"{folder}/*{endings.most_common(1)[0][0]}"


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _split_pattern(path: str) -> tuple[str, str | None]:
    """The folder to list, and the whole pattern if `path` has wildcards."""
    if "*" not in path:
        return path.rstrip("/"), None
    return _parent(path[: path.index("*")]), path
