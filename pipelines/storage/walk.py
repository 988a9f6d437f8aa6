"""All files below a folder: in S3 the subfolders are listed in parallel, with progress."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pyarrow import fs

# Subfolders to list at a time.
_CONNECTIONS = 16

# A request lists up to 1,000 objects. If the first few subfolders have fewer than this on average, all are
# listed at once: one by one they would take more than four times as many requests.
_FIRST, _OBJECTS = 8, 250


def walk(
    filesystem: fs.FileSystem, folder: str, found: Callable[[int], None] | None = None
) -> list[fs.FileInfo]:
    """All files and folders below `folder`; in S3, calls found(number so far) after each subfolder."""
    if isinstance(filesystem, fs.S3FileSystem):
        infos = _by_subfolders(filesystem, folder, found)
        if infos is not None:
            return infos
    return filesystem.get_file_info(fs.FileSelector(folder, recursive=True))


def _by_subfolders(
    filesystem: fs.FileSystem, folder: str, found: Callable[[int], None] | None
) -> list[fs.FileInfo] | None:
    """All files and folders below `folder`; None if it is better listed at once."""
    infos = filesystem.get_file_info(fs.FileSelector(folder))
    below = [info.path for info in infos if info.type == fs.FileType.Directory]
    if any(path.endswith("/") for path in below):
        return None  # A name without characters: its listing would be that of `folder`.

    first, rest = below[:_FIRST], below[_FIRST:]

    def listed(path: str) -> list[fs.FileInfo]:
        return filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))

    def add(paths: list[str]) -> None:
        for more in pool.map(listed, paths):
            infos.extend(more)
            if found:
                found(len(infos))

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        beside = len(infos)
        add(first)
        if rest and len(infos) - beside < _OBJECTS * len(first):
            return None
        add(rest)
    return infos
