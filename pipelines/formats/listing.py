"""URI to files: which of those that lie there are the data set, and what is passed over."""

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import PurePosixPath

from pyarrow import fs

from pipelines import storage
from pipelines.formats import folders, parquet, tars
from pipelines.formats.base import CHANGED, JUNK, Files, Layout, Place

_ENDINGS: dict[Layout, tuple[str, ...]] = {
    "parquet": parquet.ENDINGS,
    "tar": tars.ENDINGS,
    "folder": folders.ENDINGS,
}
_NAMES = {"parquet": "Parquet file", "tar": "tar", "folder": "image"}

# A file or folder that begins so is not part of the data set: `_delta_log` and `_SUCCESS` are Delta's and
# Spark's own, as for pyarrow's data sets, while photographs may be named _DSC0001.jpg and a class _cat.
_HIDDEN: dict[Layout, tuple[str, ...]] = {"parquet": (".", "_"), "tar": (".", "_"), "folder": (".",)}

Kinds = dict[Layout, list[Place]]

_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def find_files(uri: str) -> Files:
    """The files of the data set at `uri`: a file, all below a folder, or those that match a pattern with *.

    Of Parquet files, tars and images those are read that are the most and hold the most bytes. Raises
    ValueError where these are two, or there is none, and FileNotFoundError where there is nothing.
    """
    folder, pattern = _split_pattern(storage.resolve(uri)[1])
    found = _listed(uri)
    if pattern:
        # Only * is a wildcard.
        literal = pattern.replace("[", "[[]").replace("?", "[?]")
        found = [file for file in found if fnmatchcase(file.path, literal)]
    kinds: Kinds = {layout: places for layout in _ENDINGS if (places := _of_kind(layout, found, folder))}
    compressed = [file.path for file in found if file.path.lower().endswith(_COMPRESSED)]
    if not kinds:
        what = f"matches {pattern}" if pattern else "is Parquet, a tar or an image"
        hint = f"; {compressed[0]} is compressed: write it anew, uncompressed" if compressed else ""
        raise ValueError(f"{uri} holds no image: no file there {what}{hint}")
    layout = _main_kind(kinds, uri)
    places = kinds[layout]
    root = folder if pattern or [place.path for place in places] != [folder] else _parent(folder)
    return Files(layout, root, sorted(places), _passed_over(kinds, layout, compressed, uri))


def check_unchanged(uri: str, places: Iterable[Place]) -> None:
    """Raise ValueError, which names the file, unless all these files of `uri` are there as they were.

    Others that have come since are no matter.
    """
    now = {file.path: file for file in _listed(uri)}
    for place in places:
        file = now.get(place.path)
        if file is None:
            raise ValueError(f"{place.path} is gone; {CHANGED}")
        found = Place(file.path, file.size, file.mtime_ns or 0)
        if found != place:
            raise ValueError(
                f"{place.path} is another than when its images were listed: {_about(place)} then, "
                f"{_about(found)} now; {CHANGED}"
            )


def _about(place: Place) -> str:
    written = datetime.fromtimestamp(place.written / 1e9, UTC)
    return f"{place.size:,} bytes of {written:%Y-%m-%d %H:%M:%S.%f} UTC"


def _listed(uri: str) -> list[fs.FileInfo]:
    """All files below the folder that `uri` names, or in which its pattern begins."""
    return storage.listing(uri[: uri.index("*")].rpartition("/")[0] if "*" in uri else uri)


def _of_kind(layout: Layout, found: list[fs.FileInfo], folder: str) -> list[Place]:
    # A file's path is made anew each time that it is asked for.
    paths = ((file.path, file) for file in found)
    return [
        Place(path, file.size, file.mtime_ns or 0)
        for path, file in paths
        if path.lower().endswith(_ENDINGS[layout]) and not _is_hidden(path, folder, layout)
    ]


def _is_hidden(path: str, folder: str, layout: Layout) -> bool:
    """Whether a part of the path below `folder` says that it is not part of the data set."""
    above, _, name = path.removeprefix(folder).lstrip("/").rpartition("/")
    return name.startswith(_HIDDEN[layout]) or name in JUNK or _is_hidden_folder(above, layout)


@lru_cache
def _is_hidden_folder(below: str, layout: Layout) -> bool:
    return any(part.startswith(_HIDDEN[layout]) or part in JUNK for part in below.split("/"))


def _main_kind(kinds: Kinds, uri: str) -> Layout:
    """The layout that has the most files and the most bytes."""
    most = max(len(places) for places in kinds.values())
    heaviest = max(kinds, key=lambda layout: sum(place.size for place in kinds[layout]))
    if len(kinds[heaviest]) < most:
        raise ValueError(
            f"{uri} holds {_counted(kinds)}; take away what is not meant, or give one alone, as "
            + " or ".join(_pattern(uri, places) for places in kinds.values())
        )
    return heaviest


def _passed_over(kinds: Kinds, layout: Layout, compressed: list[str], uri: str) -> str | None:
    """Other files that lie there, and how to read those instead."""
    others: Kinds = {kind: places for kind, places in kinds.items() if kind != layout}
    said = []
    if others:
        ways = " or ".join(_pattern(uri, places) for places in others.values())
        said.append(f"passed over: {_counted(others)}, which {ways} would give")
    if compressed:
        what = _number(len(compressed), "compressed tar")
        said.append(f"passed over: {what} (such as {compressed[0]}); write them anew, uncompressed")
    return f"{uri}: {_number(len(kinds[layout]), _NAMES[layout])}; {'; '.join(said)}" if said else None


def _counted(kinds: Kinds) -> str:
    return " and ".join(
        f"{_number(len(places), _NAMES[layout])} (such as {places[0].path})"
        for layout, places in kinds.items()
    )


def _number(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _pattern(uri: str, places: list[Place]) -> str:
    """A pattern of files with the most frequent ending of `places`."""
    endings = Counter(PurePosixPath(place.path).suffix for place in places)
    folder = uri[: uri.index("*")].rpartition("/")[0] if "*" in uri else uri.rstrip("/")
    return f"{folder}/*{endings.most_common(1)[0][0]}"


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _split_pattern(path: str) -> tuple[str, str | None]:
    """The folder to list, and the whole pattern where `path` has wildcards."""
    if "*" not in path:
        return path.rstrip("/"), None
    return _parent(path[: path.index("*")]), path
