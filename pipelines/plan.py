"""Plan which rows make up each global batch, from (index, seed, epoch, step).

A lane is a virtual worker. Each epoch permutes the fragments, lays their rows end to end and cuts this line
into equal lanes. A lane is read in windows, and each window is shuffled as a whole. The global batch of step
k is rows [k * b, (k + 1) * b) of every lane, with b = batch_size / lanes, so it is the same for any number of
workers. Pure NumPy.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Int

from pipelines.config import DataConfig
from pipelines.index import Index
from pipelines.philox import Key, derive_key, permutation

# First part of a key's path: no two uses of the seed share a stream.
_FRAGMENTS, _ROWS = 1, 2


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one fragment."""

    fragment: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows of a lane that are shuffled together.

    pieces: the rows to read. They follow rows left over from the lane's previous windows; the first `size`
    rows of both are the window, and the rest is left for the next one, so no fragment is read twice.
    key_path: seed and path of the shuffle's key; None: not shuffled. skip: rows at the front of the shuffled
    window that were used before a resume.
    """

    pieces: tuple[Piece, ...]
    size: int
    key_path: tuple[int, ...] | None = None
    skip: int = 0

    @property
    def rows(self) -> int:
        """Rows that the window yields."""
        return self.size - self.skip

    @property
    def rows_read(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def order(self) -> Int[np.ndarray, " size"]:
        """Positions of the window's rows in shuffled order, including the skipped ones at the front."""
        if self.key_path is None:
            return np.arange(self.size)
        # The key is derived only here, because that is slow and not needed for reading.
        return permutation(derive_key(*self.key_path), self.size)


@dataclass(frozen=True, eq=False)
class Line:
    """All rows laid end to end. order: the permuted fragments. ends: where each ends on the line."""

    order: Int[np.ndarray, " fragments"]
    ends: Int[np.ndarray, " fragments"]

    @classmethod
    def of(cls, rows: Int[np.ndarray, " fragments"], key: Key) -> "Line":
        order = permutation(key, len(rows))
        return cls(order, np.cumsum(rows[order]))

    def fragment_end(self, row: int) -> int:
        """The end, on the line, of the fragment that holds row `row` - 1 of the line."""
        return int(self.ends[np.searchsorted(self.ends, row, side="left")])

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Rows [start, stop) of the line, fragment by fragment."""
        at = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begins = int(self.ends[at - 1]) if at else 0
            end = min(stop, int(self.ends[at]))
            if end > start:
                yield Piece(int(self.order[at]), start - begins, end - begins)
            start, at = end, at + 1


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of a whole training run. rows: the row count of each fragment of the index.

    With `random_access`, rows are read one by one, and an epoch permutes all rows instead of the fragments.
    Raises ValueError if lanes do not divide the batch, or the data set is smaller than a batch.
    """

    rows: Int[np.ndarray, " fragments"]
    seed: int
    lanes: int
    batch_size: int
    window_rows: int
    random_access: bool = False

    def __post_init__(self) -> None:
        check_lanes(self.batch_size, self.lanes)
        if self.steps_per_epoch < 1:
            images = int(self.rows.sum())
            fits = (
                f"--batch-size {self.lane_rows * self.lanes}"
                if self.lane_rows
                else (f"--lanes 1 --batch-size {images}")
            )
            raise ValueError(
                f"the data set has {images} images, less than one batch of batch_size={self.batch_size} "
                f"in lanes={self.lanes}; try {fits}"
            )

    # Cached: every window needs these, and adding up the rows of many fragments takes time.
    @cached_property
    def lane_rows(self) -> int:
        return int(self.rows.sum()) // self.lanes

    @cached_property
    def _ends(self) -> Int[np.ndarray, " fragments"]:
        return np.cumsum(self.rows)

    @cached_property
    def steps_per_epoch(self) -> int:
        return self.lane_rows // self.lane_batch_size

    @property
    def lane_batch_size(self) -> int:
        return self.batch_size // self.lanes

    @property
    def window_size(self) -> int:
        """Rows of a full window: as many batches as fit into `window_rows`, at least one."""
        return max(1, self.window_rows // self.lane_batch_size) * self.lane_batch_size

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a global step."""
        return divmod(step, self.steps_per_epoch)

    def windows(self, lanes: range, start_step: int, stop_step: int) -> Iterator[Window]:
        """Yield the windows that the worker of `lanes` reads for steps [start_step, stop_step), in order.

        Windows alternate between the lanes, so that all lanes reach a step together.
        """
        epoch, first_step = self.position(start_step)
        while epoch * self.steps_per_epoch < stop_step:
            last_step = min(self.steps_per_epoch, stop_step - epoch * self.steps_per_epoch)
            stop = last_step * self.lane_batch_size
            first = first_step * self.lane_batch_size
            numbers = range(first // self.window_size, -(-stop // self.window_size))
            for number in numbers:
                skip = max(0, first - number * self.window_size)
                yield from (self._window(epoch, lane, number, skip, numbers.start) for lane in lanes)
            epoch, first_step = epoch + 1, 0

    def _window(self, epoch: int, lane: int, number: int, skip: int, first_number: int) -> Window:
        """Window `number` of a lane, of which reading starts at window `first_number`."""
        line = self._line(epoch)
        begin = lane * self.lane_rows
        end = begin + self.steps_per_epoch * self.lane_batch_size
        start = begin + number * self.window_size
        stop = min(start + self.window_size, end)
        # Fragments are read to their end, or the lane's: rows beyond `stop` belong to the next window.
        read_from = start if number == first_number else min(line.fragment_end(start), end)
        pieces = self._pieces(line, read_from, min(line.fragment_end(stop), end))
        return Window(pieces, stop - start, (self.seed, _ROWS, epoch, lane, number), skip)

    def _pieces(self, line: Line, start: int, stop: int) -> tuple[Piece, ...]:
        if not self.random_access:
            return tuple(line.pieces(start, stop))
        rows = line.order[start:stop]
        fragments = np.searchsorted(self._ends, rows, side="right")
        within = rows - (self._ends - self.rows)[fragments]
        pairs = zip(fragments.tolist(), within.tolist(), strict=True)
        return tuple(Piece(fragment, row, row + 1) for fragment, row in pairs)

    @lru_cache(maxsize=2)  # noqa: B019 - a plan lives as long as its run
    def _line(self, epoch: int) -> Line:
        rows = np.ones(int(self._ends[-1]), np.int64) if self.random_access else self.rows
        return Line.of(rows, derive_key(self.seed, _FRAGMENTS, epoch))


def evaluation_windows(
    rows: Int[np.ndarray, " fragments"],
    rank: int,
    world_size: int,
    *,
    window_rows: int,
    rows_read: Int[np.ndarray, " fragments"] | None = None,
) -> Iterator[Window]:
    """Yield the windows that worker `rank` reads in evaluation: all workers together read every row once.

    Each rank gets a contiguous share of the rows in the index's order, so the concatenated rows of all ranks
    depend neither on the number of ranks nor on how rows are grouped into fragments.
    rows_read: the number of rows to read for each fragment when not all are wanted; unset: `rows`.
    """
    total = int(rows.sum())
    line = Line(np.arange(len(rows)), np.cumsum(rows))
    rows_read = rows if rows_read is None else rows_read
    read = np.cumsum(rows_read)
    share = shard(total, rank, world_size)
    first, last = share.start, share.stop
    while first < last:
        at = int(np.searchsorted(line.ends, first, side="right"))
        before = int(read[at - 1]) if at else 0
        until = max(at, int(np.searchsorted(read, before + window_rows, side="right")) - 1)
        stop = min(int(line.ends[until]), last)
        # Windows end at the end of a fragment, so that few fragments are read twice. A large fragment is
        # split if all of its rows are wanted; if only some are, they take less memory.
        if stop > first + 2 * window_rows and rows[at] == rows_read[at]:
            stop = first + window_rows
        yield Window(tuple(line.pieces(first, stop)), stop - first)
        first = stop


def shard(count: int, rank: int, world_size: int) -> slice:
    """The contiguous share of `count` rows that worker `rank` evaluates."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


def check_lanes(batch_size: int, lanes: int, workers: int = 1) -> None:
    """Raise ValueError unless workers divide lanes and lanes divide batch_size."""
    if batch_size % lanes:
        nearest = max(1, batch_size // lanes) * lanes
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of lanes={lanes}; try --batch-size {nearest}"
        )
    if lanes % workers:
        fits = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        raise ValueError(
            f"lanes={lanes} must be a multiple of workers={workers}; try --workers out of {fits}"
        )


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The lanes that worker `rank` serves: rank, rank + world_size, ..."""
    return range(rank, lanes, world_size)


# Bytes that an image takes in a window besides its encoded bytes: its key, its path and its array object.
ROW_BYTES = 512

# Images to read at once if more have no benefit: those read one by one are fully shuffled already.
_ENOUGH = 1024


def window_rows(index: Index, data: DataConfig) -> int:
    """The number of images of a lane to read and shuffle together, the same for any number of workers."""
    if data.window_rows is not None:
        return data.window_rows
    fitting = max(1, int(data.window_bytes / (index.image_bytes + ROW_BYTES)))
    return min(fitting, _ENOUGH) if index.random_access else fitting


def reading_rows(index: Index, data: DataConfig) -> int:
    """The number of images to read at once without shuffling, as in evaluation."""
    return min(window_rows(index, data), _ENOUGH)


def training_plan(index: Index, data: DataConfig, *, seed: int, lanes: int, batch_size: int) -> Plan:
    """The order in which a run sees the images of `index`. Raises ValueError like Plan."""
    rows = window_rows(index, data)
    plan = Plan(index.rows, seed, lanes, batch_size, rows, random_access=index.random_access)
    if data.window_rows is not None:
        return plan
    # Make all windows about equal: a short last window would mix images from few places.
    windows = -(-plan.steps_per_epoch // (plan.window_size // plan.lane_batch_size))
    steps = -(-plan.steps_per_epoch // windows)
    return replace(plan, window_rows=steps * plan.lane_batch_size)


def lane_bytes(plan: Plan, index: Index) -> float:
    """The memory that a lane's window takes in a worker, in bytes."""
    return min(plan.window_size, plan.lane_rows) * (index.image_bytes + ROW_BYTES)
