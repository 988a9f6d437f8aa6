"""Assemble each step's batch from the tables as read: shuffle the rows and replace bad images."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int, Shaped

from pipelines.plan import Window
from pipelines.quarantine import WAY_OUT, Quarantined


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of reader.SCHEMA as arrays. Images are views of Arrow's memory; a bad image is None."""

    image: Shaped[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]
    path: Shaped[np.ndarray, " n"]
    key: Shaped[np.ndarray, " n"]
    sample: Int[np.ndarray, " n"]
    height: Int[np.ndarray, " n"]
    width: Int[np.ndarray, " n"]
    orientation: Int[np.ndarray, " n"]
    bad: Shaped[np.ndarray, " n"]

    @classmethod
    def of(cls, table: pa.Table) -> "Rows":
        others = {field.name: table[field.name].to_numpy() for field in fields(cls) if field.name != "image"}
        return cls(image=_views(table["image"]), **others)

    @classmethod
    def concatenate(cls, parts: list["Rows"]) -> "Rows":
        return cls(
            **{field.name: np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(cls)}
        )

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: Any) -> "Rows":
        return Rows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @property
    def is_bad(self) -> Bool[np.ndarray, " n"]:
        return np.array([reason is not None for reason in self.bad], bool)

    @property
    def good(self) -> "Rows":
        return self[~self.is_bad]

    def marked(self, broken: Mapping[int, str]) -> "Rows":
        """The rows, with those in `broken` marked as bad, for the given reasons."""
        bad = self.bad.copy()
        for row, reason in broken.items():
            bad[row] = reason
        return replace(self, bad=bad)

    @property
    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """Height and width of the images as shown."""
        return np.stack([self.height, self.width], axis=1).astype(np.int64)

    @property
    def first_bad(self) -> str:
        """The first bad row's key, file and reason."""
        first = self.quarantined[0]
        return f"{first.key} of {first.path}: {first.reason}"

    @property
    def quarantined(self) -> tuple[Quarantined, ...]:
        """The bad rows."""
        rows = np.flatnonzero(self.is_bad)
        return tuple(
            Quarantined(self.path[row], self.key[row], self.bad[row], int(self.sample[row]))
            for row in rows.tolist()
        )


def _views(column: pa.ChunkedArray) -> Shaped[np.ndarray, " n"]:
    views = np.empty(len(column), object)
    row = 0
    for chunk in column.chunks:
        _, offsets, content = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        whole = np.frombuffer(content, np.uint8) if content else np.empty(0, np.uint8)
        missing = chunk.is_null().to_numpy(zero_copy_only=False)
        for place, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
            views[row] = None if missing[place] else whole[start:end]
            row += 1
    return views


class ShuffledWindow:
    """A window's rows in shuffled order; another row's image stands in for each bad one.

    The stand-in is the first good image, searched from half a window further on, so that a batch seldom holds
    an image twice. It gets the bad row's draws, so its views differ from those of its own row. The choice
    depends only on the window's images, not on the worker or on where a run was resumed.
    """

    def __init__(self, rows: Rows, broken: MutableMapping[int, str]) -> None:
        """`broken`: samples known not to decode, and why; `mark` adds to it."""
        self._rows, self._broken = rows, broken
        self._bad = {int(row): rows.bad[row] for row in np.flatnonzero(rows.is_bad)}
        if broken:
            found = [row for row, sample in enumerate(rows.sample.tolist()) if sample in broken]
            self._bad |= {row: broken[int(rows.sample[row])] for row in found}

    def batch(self, start: int, stop: int) -> tuple[Rows, Int[np.ndarray, " n"]]:
        """Rows [start, stop), and for each the row whose image it shows.

        Raises ValueError if the window has no good image.
        """
        bad = [row for row in range(start, stop) if row in self._bad]
        shown = np.arange(start, stop)
        if not bad:
            return self._rows[start:stop], shown
        shown[np.array(bad) - start] = [self._stand_in(row) for row in bad]
        own, images = self._rows[start:stop], self._rows[shown]
        reasons = np.array([self._bad.get(row) for row in range(start, stop)], object)
        rows = Rows(
            image=images.image, label=images.label, height=images.height, width=images.width,
            orientation=images.orientation, sample=own.sample, path=own.path, key=own.key, bad=reasons,
        )  # fmt: skip
        return rows, shown

    def mark(self, row: int, reason: str) -> None:
        """Record that the image of `row` does not decode."""
        self._bad[row] = reason
        self._broken[int(self._rows.sample[row])] = reason

    def _stand_in(self, row: int) -> int:
        size = len(self._rows)
        for step in range(size):
            candidate = (row + size // 2 + step) % size
            if candidate not in self._bad:
                return candidate
        first = self._rows.marked(self._bad).first_bad
        raise ValueError(f"all {size} images that are read together are bad: {first}; {WAY_OUT}")


@dataclass(frozen=True, eq=False)
class Batch:
    """A worker's part of a step: rows [start, stop) of one window of each of its lanes."""

    windows: tuple[ShuffledWindow, ...]
    start: int
    stop: int

    @cached_property
    def _parts(self) -> list[tuple[Rows, Int[np.ndarray, " n"]]]:
        return [window.batch(self.start, self.stop) for window in self.windows]

    @cached_property
    def rows(self) -> Rows:
        return Rows.concatenate([rows for rows, _ in self._parts])

    def without(self, broken: Mapping[int, str]) -> "Batch":
        """The batch with stand-ins for broken images. `broken`: the reason by position in the batch."""
        for place, reason in broken.items():
            lane, row = divmod(place, self.stop - self.start)
            self.windows[lane].mark(int(self._parts[lane][1][row]), reason)
        return Batch(self.windows, self.start, self.stop)


def step_batches(
    tables: Iterable[pa.Table], windows: Iterable[Window], lanes: int, lane_batch_size: int
) -> Iterator[Batch]:
    """Yield each step's batch: lane_batch_size rows of each lane.

    `windows` alternate between the lanes. `tables` (reader.SCHEMA) hold the windows' pieces in order; a table
    may end anywhere.
    """
    stream = _Stream(tables)
    left: list[list[Rows]] = [[] for _ in range(lanes)]
    broken: dict[int, str] = {}
    turn: list[ShuffledWindow] = []
    for window in windows:
        lane = len(turn)
        rows = Rows.concatenate(left[lane] + stream.take(window.rows_read))
        left[lane] = [rows[window.size :]]
        turn.append(ShuffledWindow(rows[window.order()], broken))
        if len(turn) == lanes:
            for start in range(window.skip, window.size, lane_batch_size):
                yield Batch(tuple(turn), start, start + lane_batch_size)
            turn = []


class _Stream:
    """Takes a given number of rows at a time from a stream of tables."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = iter(tables)
        self._rest: Rows | None = None

    def take(self, count: int) -> list[Rows]:
        parts = []
        while count:
            rows = Rows.of(next(self._tables)) if self._rest is None else self._rest
            parts.append(rows[:count])
            count -= len(parts[-1])
            self._rest = rows[len(parts[-1]) :] if len(parts[-1]) < len(rows) else None
        return parts
