"""Files to which bytes are appended: in place on this machine, in segments in object storage."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs

from pipelines.storage.files import make_folder, names, read, remove, write
from pipelines.storage.filesystems import resolve

# Bytes after which a segment in object storage is complete.
SEGMENT_BYTES = 10_000_000


class Place(NamedTuple):
    """A place in a growing file: so many bytes into its segment of this number, from 1."""

    segment: int
    offset: int


START = Place(1, 0)


class GrowingFile:
    """A file that grows at its end, and whose earlier part is not written again.

    On this machine it is one file, and a process that is killed may leave a part of the last flush. Object
    storage cannot append: there the last segment is written whole at each flush until it has `segment_bytes`,
    then the next one begins. Segments are URI, URI.00002, URI.00003 and so on.
    """

    def __init__(self, uri: str, keep: Place = START, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Keeps what lies before `keep`; the first flush drops what lies behind it."""
        self._uri, self._segment_bytes = uri, segment_bytes
        self._segment, self._offset = keep
        self._local = is_local(uri)
        self._pending = bytearray()
        # The bytes of a segment in object storage that is not complete.
        self._open = bytearray()
        # Whether the file ends where the last flush ended.
        self._settled = False
        if not self._local and self._offset:
            self._reopen()

    def write(self, content: bytes) -> None:
        """Append bytes, which stay in memory until the next flush."""
        self._pending += content

    def flush(self) -> None:
        """Write what was appended, and have it on the disk. Raises OSError; the next flush tries again."""
        if not self._pending:
            return
        if self._local:
            make_folder(self._uri.rpartition("/")[0])
        settled, self._settled = self._settled, False
        if not settled:
            _remove_behind(self._uri, self._segment)
        if self._local:
            self._append_local(settled)
        else:
            self._write_segment()
        self._settled = True
        self._pending.clear()

    def _reopen(self) -> None:
        content = read(segment_uri(self._uri, self._segment)) or b""
        if len(content) == self._offset >= self._segment_bytes:
            self._segment, self._offset = self._segment + 1, 0
        else:
            self._open += content[: self._offset]

    def _append_local(self, settled: bool) -> None:
        path = Path(resolve(segment_uri(self._uri, self._segment))[1])
        try:
            with path.open("ab") as file:
                # Drop what lies behind the place to keep, or a part of a flush that failed. Not otherwise:
                # what another process may have appended stays whole.
                if not settled and file.tell() > self._offset:
                    file.truncate(self._offset)
                file.write(self._pending)
                file.flush()
                os.fsync(file.fileno())
                self._offset = file.tell()
        except OSError as error:
            # The error of a full disk names no file.
            raise OSError(error.errno, error.strerror, str(path)) from error

    def _write_segment(self) -> None:
        content = bytes(self._open + self._pending)
        write(segment_uri(self._uri, self._segment), content)
        if len(content) < self._segment_bytes:
            self._open += self._pending
        else:
            self._segment += 1
            self._open.clear()


def is_local(uri: str) -> bool:
    """Whether the file is on this machine, where a process that is killed may leave a part of a flush."""
    return isinstance(resolve(uri)[0], fs.LocalFileSystem)


def segment_uri(uri: str, number: int) -> str:
    """URI of a growing file's segment of this number, from 1."""
    return uri if number == 1 else f"{uri}.{number:05}"


def segments(uri: str) -> list[int]:
    """Sorted numbers of the segments that exist."""
    folder, _, first = uri.rpartition("/")
    pattern = re.compile(re.escape(first) + r"(?:\.(\d{5,}))?")
    return sorted(int(found[1] or 1) for found in map(pattern.fullmatch, names(folder)) if found)


def _remove_behind(uri: str, segment: int) -> None:
    # From the end, so that no segment is missing between others if this is interrupted.
    for number in reversed(segments(uri)):
        if number > segment:
            with suppress(FileNotFoundError):
                remove(segment_uri(uri, number))
