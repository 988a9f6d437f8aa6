"""Read, write and list files by URI, on this machine or in object storage. Writes are atomic."""

import errno
import os
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from pipelines.storage.filesystems import absolute, resolve
from pipelines.storage.retry import briefly, first_line, patience, reading_again, retrying, transient, way_out

__all__ = [
    "absolute",
    "briefly",
    "check_folder",
    "exists",
    "first_line",
    "join",
    "listing",
    "make_folder",
    "names",
    "patience",
    "read",
    "read_as",
    "reading_again",
    "remove",
    "remove_partials",
    "resolve",
    "retrying",
    "transient",
    "way_out",
    "write",
]


_T = TypeVar("_T")

# The temporary name under which a file is written.
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.partial")


def join(uri: str, *parts: str) -> str:
    """`uri` extended by `parts`, separated by slashes."""
    return "/".join([uri.rstrip("/"), *parts])


# Every function below retries during a storage outage, and raises the errors of `retrying`.


def read(uri: str) -> bytes | None:
    """The file's content, or None if there is no such file."""
    filesystem, path = resolve(uri)

    def content() -> bytes | None:
        if filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        # In one request: a stream would take one for every 256 KiB, in sequence.
        with filesystem.open_input_file(path) as file:
            return file.read()

    return retrying(content, f"reading {uri}")


def read_as(parse: Callable[[bytes], _T], uri: str) -> _T | None:
    """The result of `parse` for the file's content, or None if there is no such file.

    If `parse` raises ValueError, the file is read again, because bits may have flipped on the way. Raises the
    error if it persists.
    """

    def parsed() -> _T | None:
        content = read(uri)
        return None if content is None else parse(content)

    return reading_again(parsed, f"reading {uri}", lambda error: isinstance(error, ValueError))


def write(uri: str, content: bytes) -> None:
    """Write `content` atomically: readers see the old file or the new one."""
    filesystem, path = resolve(uri)
    buffer = pa.py_buffer(content)  # Raises for anything but bytes before a file is opened.
    if isinstance(filesystem, fs.LocalFileSystem):
        _write_local(Path(path), buffer)
    elif isinstance(filesystem, fs.AzureFileSystem):
        retrying(lambda: _write_azure(filesystem, path, buffer), f"writing {uri}")
    else:
        retrying(lambda: _put(filesystem, path, buffer), f"writing {uri}")


def make_folder(uri: str) -> None:
    """Make the folder and its parents. Does nothing in object storage."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        Path(path).mkdir(parents=True, exist_ok=True)


def check_folder(uri: str) -> None:
    """Raise FileNotFoundError if a folder on this machine has vanished.

    A write would create it again, on the wrong disk if its own was unmounted.
    """
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem) and not Path(path).is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder has vanished", path)


def names(uri: str) -> list[str]:
    """Sorted names of the files directly below `uri`; empty if it does not exist."""
    filesystem, path = resolve(uri)
    selector = fs.FileSelector(path, allow_not_found=True)
    found = retrying(lambda: filesystem.get_file_info(selector), f"listing {uri}")
    return sorted(info.base_name for info in found if info.type == fs.FileType.File)


def listing(uri: str) -> list[fs.FileInfo]:
    """All files at or below `uri`, sorted by path within the file system (see `resolve`).

    Raises FileNotFoundError if there is no file or folder.
    """
    filesystem, path = resolve(uri)

    def found() -> list[fs.FileInfo]:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(_missing(filesystem, path, uri))
        if info.type == fs.FileType.File:
            return [info]
        return filesystem.get_file_info(fs.FileSelector(path, recursive=True))

    files = (info for info in retrying(found, f"listing {uri}") if info.type == fs.FileType.File)
    try:
        return sorted(files, key=lambda info: info.path)
    except UnicodeDecodeError as error:
        name = error.object.decode("utf-8", "backslashreplace")
        raise ValueError(f"the name of {name} is not UTF-8; rename the file") from error


def exists(uri: str) -> bool:
    """Whether there is a file or a folder at `uri`."""
    filesystem, path = resolve(uri)
    info = retrying(lambda: filesystem.get_file_info(path), f"looking for {uri}")
    return info.type != fs.FileType.NotFound


def remove(uri: str) -> None:
    """Delete the file, if it exists."""
    filesystem, path = resolve(uri)

    def delete() -> None:
        # A missing file is not an error: an earlier try whose response was lost may have deleted it.
        if filesystem.get_file_info(path).type != fs.FileType.NotFound:
            filesystem.delete_file(path)

    retrying(delete, f"deleting {uri}")


def remove_partials(uri: str, *, of: str = "", older_than: float = 0.0) -> None:
    """Delete partial files that killed writers left below `uri`; with `of`, only those of that file name.

    Keeps files changed within the last `older_than` seconds, whose writers may be alive. S3 and GCS keep
    nothing of an interrupted write.
    """
    filesystem, path = resolve(uri)
    azure = isinstance(filesystem, fs.AzureFileSystem)
    if not azure and not isinstance(filesystem, fs.LocalFileSystem):
        return
    delete = filesystem.delete_dir if azure else filesystem.delete_file
    selector = fs.FileSelector(path, allow_not_found=True, recursive=True)
    for info in retrying(lambda: filesystem.get_file_info(selector), f"listing {uri}"):
        place = PurePosixPath(info.path).parent if azure else PurePosixPath(info.path)
        found = _PARTIAL.fullmatch(place.name) if info.type == fs.FileType.File else None
        old = not older_than or time.time() - (info.mtime_ns or 0) / 1e9 > older_than
        if found and old and of in ("", found[1]):
            with suppress(FileNotFoundError):  # Its writer is alive and has just renamed it.
                retrying(lambda path=str(place): delete(path), f"deleting {place}")


def _missing(filesystem: fs.FileSystem, path: str, uri: str) -> str:
    bucket = path.partition("/")[0]
    remote = not isinstance(filesystem, fs.LocalFileSystem)
    if remote and filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
        return f"the bucket of {uri} does not exist; create it or check the spelling"
    return f"{uri} does not exist; give a file or a folder that does"


def _put(filesystem: fs.FileSystem, path: str, content: pa.Buffer) -> None:
    with filesystem.open_output_stream(path, compression=None) as file:
        file.write(content)  # S3 and GCS show an object only once it is closed.


def _write_azure(filesystem: fs.FileSystem, path: str, content: pa.Buffer) -> None:
    """Write beside the blob, then copy within the account: pyarrow empties a blob when it opens it."""
    folder, _, name = path.rpartition("/")
    # In a folder, which takes one request to delete. A file takes four, and one may hang for seconds.
    partial = f"{folder}/.{name}.{uuid.uuid4().hex}.partial"
    try:
        _put(filesystem, f"{partial}/content", content)
        filesystem.copy_file(f"{partial}/content", path)
    finally:
        with suppress(OSError, pa.ArrowException):  # The error of the write says more.
            filesystem.delete_dir(partial)


def _write_local(target: Path, content: pa.Buffer) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        # The error of a full disk names no file, the others name the partial one.
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        with suppress(OSError):  # Missing after a success; after a failure the error above says more.
            partial.unlink()
