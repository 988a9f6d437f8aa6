"""The lines of metrics.jsonl as columns: a million of them in 100 MB instead of 3 GB."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.json as pj
from jaxtyping import Float, Int

from pipelines import storage
from pipelines.storage.checksums import decode_lines, is_torn, lines_as_written
from pipelines.storage.growing import Place, is_local, segment_uri, segments

# Bytes that are read at a time, and lines that are made dictionaries at a time.
_BLOCK_BYTES, _BATCH_LINES = 1 << 24, 10_000


class Metrics(Sequence[dict[str, Any]]):
    """The lines of a run's metrics, as dictionaries of the keys that each line has.

    They are kept as columns, in 8 bytes a number; `column` and `having` make no dictionaries.
    """

    def __init__(self, table: pa.Table, rows: Int[np.ndarray, " n"] | None = None) -> None:
        """A row for each line, null where it lacks a key; with `rows`, the lines of these numbers only."""
        self.table = table
        self._rows = np.arange(table.num_rows) if rows is None else rows

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> "Metrics":
        """Metrics with these lines."""
        return cls(_table(list(lines)))

    def having(self, key: str) -> "Metrics":
        """The lines that have `key`."""
        if key not in self.table.column_names:
            return Metrics(self.table, self._rows[:0])
        valid = self.table[key].is_valid().to_numpy()
        return Metrics(self.table, self._rows[valid[self._rows]])

    def column(self, key: str) -> Float[np.ndarray, " n"]:
        """The numbers under `key`, NaN for lines without it."""
        if key not in self.table.column_names:
            return np.full(len(self), np.nan)
        return self.table[key].to_numpy().astype(float)[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> "Metrics": ...
    def __getitem__(self, index: int | slice) -> "dict[str, Any] | Metrics":
        if isinstance(index, slice):
            return Metrics(self.table, self._rows[index])
        return self._lines(self._rows[[index]])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _BATCH_LINES):
            yield from self._lines(self._rows[start : start + _BATCH_LINES])

    def _lines(self, rows: Int[np.ndarray, " n"]) -> list[dict[str, Any]]:
        lines = self.table.take(pa.array(rows)).to_pylist()
        return [{key: value for key, value in line.items() if value is not None} for line in lines]


class Block(NamedTuple):
    """Successive lines of a file of metrics, and where the first of them begins."""

    place: Place
    content: bytes
    metrics: Metrics

    def end(self, lines: int) -> Place:
        """The place behind so many of its lines."""
        segment, offset = self.place
        if lines == len(self.metrics):
            return Place(segment, offset + len(self.content))
        for line in self.content.splitlines(keepends=True):
            if not lines:
                break
            lines -= bool(line.strip())
            offset += len(line)
        return Place(segment, offset)


def read_blocks(uri: str) -> Iterator[Block]:
    """The lines of all segments of the file, in blocks; none where there is no file.

    Raises ValueError, which names the segment, for a damaged line. The last one of a file on this machine is
    ignored if a process that was killed has left it unfinished.
    """
    numbers = segments(uri)
    for number in numbers:
        of, growing = segment_uri(uri, number), number == numbers[-1] and is_local(uri)
        offset, first_line, last = 0, 1, False
        while not last:
            content, table, last = _read_block(of, offset, first_line, growing)
            yield Block(Place(number, offset), content, Metrics(table))
            offset += len(content)
            first_line += content.count(b"\n")


def joined(uri: str, blocks: Iterable[Block]) -> Metrics:
    """The lines of all blocks of the file."""
    tables = [block.metrics.table for block in blocks]
    with _of_one_kind(uri):
        return Metrics(pa.concat_tables(tables, promote_options="permissive") if tables else _table([]))


def _read_block(uri: str, offset: int, first_line: int, growing: bool) -> tuple[bytes, pa.Table, bool]:
    """Whole lines from `offset` on, their columns, and whether they are the file's last ones."""

    def parsed() -> tuple[bytes, pa.Table, bool]:
        content = storage.read_range(uri, offset, _BLOCK_BYTES)
        end, last = content.rfind(b"\n") + 1, len(content) < _BLOCK_BYTES
        if (last or not end) and not (last and growing and is_torn(content[end:])):
            end = len(content)
        return content[:end], _parsed(content[:end], uri, first_line), last

    return storage.reading_again(parsed, f"reading {uri}", lambda error: isinstance(error, ValueError))


def _parsed(content: bytes, uri: str, first_line: int) -> pa.Table:
    if lines_as_written(content):
        # Arrow reads neither NaN nor values of several kinds under one key.
        with suppress(pa.ArrowInvalid):
            return pj.read_json(BytesIO(content)).drop_columns("crc32")
    with _of_one_kind(uri):
        return _table(decode_lines(content, uri, first_line))


def _table(lines: Sequence[Mapping[str, Any]]) -> pa.Table:
    keys = dict.fromkeys(key for line in lines for key in line)
    return pa.table({key: pa.array([line.get(key) for line in lines]) for key in keys})


@contextmanager
def _of_one_kind(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        why = storage.first_line(error)
        raise ValueError(f"{uri} has values of several kinds under one key ({why}); restore it") from error
