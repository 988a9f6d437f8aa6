"""Read files in object storage from front to back, with several ranges fetched ahead at a time."""

import io
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, cast

import pyarrow as pa
from pyarrow import fs

# Storage takes about as long to answer as to send this much, so smaller requests do not pay.
_RANGE_BYTES = 2 << 20

# Bytes to read at a time from a disk, or after a jump.
_BUFFER_BYTES = 1 << 16


@contextmanager
def read_ahead(filesystem: fs.FileSystem, path: str, ranges: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open the file at `path`; returns it and its size in bytes.

    In object storage, up to `ranges` ranges are fetched ahead. After a jump over more than a range, only what
    is asked for is read.
    """
    with filesystem.open_input_file(path) as file:
        if isinstance(filesystem, fs.LocalFileSystem):
            yield _buffered(cast(io.RawIOBase, file)), file.size()
            return
        with ThreadPoolExecutor(ranges) as pool:
            try:
                yield _buffered(_Ranges(file, ranges, pool)), file.size()
            finally:
                pool.shutdown(cancel_futures=True)


def _buffered(file: io.RawIOBase) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(file, _BUFFER_BYTES))


class _Ranges(io.RawIOBase):
    """A file whose ranges a thread pool fetches ahead while they are read in order."""

    def __init__(self, file: pa.NativeFile, ahead: int, pool: ThreadPoolExecutor) -> None:
        self._file, self._ahead, self._pool = file, ahead, pool
        self._size, self._at, self._last = file.size(), 0, -1
        self._ranges: OrderedDict[int, Future[bytes]] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        number, start = divmod(self._at, _RANGE_BYTES)
        if number in (self._last, self._last + 1):
            content = self._range(number)[start : start + len(buffer)]
        else:
            content = self._file.read_at(len(buffer), self._at)
        self._last = number
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def _range(self, number: int) -> bytes:
        """The content of range `number`. Requests those after it and drops those before it."""
        last = min(number + self._ahead, -(-self._size // _RANGE_BYTES))
        for wanted in range(number, max(last, number + 1)):
            if wanted not in self._ranges:
                at = wanted * _RANGE_BYTES
                self._ranges[wanted] = self._pool.submit(self._file.read_at, _RANGE_BYTES, at)
        while next(iter(self._ranges)) < number:
            self._ranges.popitem(last=False)[1].cancel()
        return self._ranges[number].result()
