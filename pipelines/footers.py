"""Parquet files, opened with their footers checked; readers of the same files keep the footers."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.checksums import check_footer, parquet_end_bytes

# What is read of a file's end, as pyarrow does, in the hope that the footer is there.
_END_BYTES = 64 << 10

# Footers that a process keeps, as they are stored; in memory they take several times that.
_KEPT_BYTES = 16 << 20

# A file by its system, its path, its size and when it was written, as its index knows it.
_Key = tuple[str, str, int, int]


class _Footers:
    """The footers that were used last, up to `most_bytes` together."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._kept: OrderedDict[_Key, pq.FileMetaData] = OrderedDict()
        self._lock = Lock()

    def get(self, key: _Key) -> pq.FileMetaData | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def keep(self, key: _Key, footer: pq.FileMetaData) -> None:
        self.forget(key)
        with self._lock:
            self._kept[key] = footer
            self._bytes += footer.serialized_size
            while self._bytes > self._most_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.serialized_size

    def forget(self, key: _Key) -> None:
        with self._lock:
            if footer := self._kept.pop(key, None):
                self._bytes -= footer.serialized_size


_footers = _Footers(_KEPT_BYTES)


@contextmanager
def opened(filesystem: fs.FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; checksums that it has are verified: the footer's now, a page's when it is read.

    Raises ChecksumError, OSError or pyarrow.ArrowInvalid where one is wrong, or the file is none.
    """
    with filesystem.open_input_file(path) as file, _parquet(filesystem, file, _read(file)) as parquet:
        yield parquet


@contextmanager
def reopened(filesystem: fs.FileSystem, path: str, written: int) -> Iterator[pq.ParquetFile]:
    """The same for a file that was `written` then: its footer is read once, as long as no read fails."""
    with filesystem.open_input_file(path) as file:
        key = (filesystem.type_name, path, file.size(), written)
        footer = _footers.get(key)
        if footer is None:
            footer = _read(file)
            _footers.keep(key, footer)
        try:
            with _parquet(filesystem, file, footer) as parquet:
                yield parquet
        except Exception:
            # It may be the footer that is wrong: the next try reads it again.
            _footers.forget(key)
            raise


def _read(file: pa.NativeFile) -> pq.FileMetaData:
    size = file.size()
    end = file.read_at(min(size, _END_BYTES), max(0, size - _END_BYTES))
    wanted = min(size, parquet_end_bytes(end))
    if len(end) < wanted:
        end = file.read_at(wanted, size - wanted)
    check_footer(end)
    return pq.read_metadata(pa.BufferReader(end))


def _parquet(filesystem: fs.FileSystem, file: pa.NativeFile, footer: pq.FileMetaData) -> pq.ParquetFile:
    # Object storage is slow to answer: ranges side by side become one request, and several wait at once.
    # A disk answers at once, and what is read ahead would take memory a second time.
    remote = not isinstance(filesystem, fs.LocalFileSystem)
    return pq.ParquetFile(file, metadata=footer, page_checksum_verification=True, pre_buffer=remote)
