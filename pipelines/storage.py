"""Files by URI, on this machine or in object storage, each written whole or not at all."""

import os
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system that holds `uri`, and the path within it.

    Raises ValueError for a scheme that pyarrow has no file system for.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), absolute(uri)
    scheme, place = urlsplit(uri)[:2]
    if "@" in place:
        # A config is stored and shown, so a secret must not stand in it.
        raise ValueError(
            f"the {scheme}:// URI carries credentials; leave them out and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    if scheme == "s3":
        # Servers other than Amazon's often know no trailing checksums; Amazon's does not need them.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    try:
        return fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"cannot open {uri}: {first_line(error)}; use a path, file:// or s3://") from error


def absolute(uri: str) -> str:
    """`uri`, or where it is a path, that path from the root: workers have another working directory."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """The URI of what lies below `uri`."""
    return "/".join([uri.rstrip("/"), *parts])


def read(uri: str) -> bytes | None:
    """The file's content, or None where there is none."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as file:
        return file.read()


def write(uri: str, content: bytes) -> None:
    """Write `content` whole or not at all: readers see the old file or the new one."""
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(path) as file:  # An object appears when it is closed.
            file.write(content)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def names(uri: str) -> list[str]:
    """Sorted names of the files directly below `uri`; none where it does not exist."""
    filesystem, path = resolve(uri)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == fs.FileType.File)


def remove(uri: str) -> None:
    """Delete the file."""
    filesystem, path = resolve(uri)
    filesystem.delete_file(path)


def first_line(error: BaseException) -> str:
    """An error's message without the pages that storage clients add to it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
