"""Windows to Arrow tables through Ray Data, read ahead by the cluster, in the plan's order."""

import pickle
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import cast

import pyarrow as pa
import ray.data

from pipelines.config import DataConfig
from pipelines.plan import Window
from pipelines.reader import SCHEMA, Reading, read_pieces
from pipelines.sources import Index

# What the readers of one worker take of the cluster: two tasks at a time, half a core each.
READER_CPUS = 0.5
READERS = 2

# Ray Data keeps a block per reading from the start (0.7 ms each), so a long run is streamed in parts.
_READINGS_PER_DATASET = 256

# Tables that wait to be taken while the next is fetched.
_TABLES_AHEAD = 2

# The one column of what a reader gives in place of a window that it could not read.
_ERROR = "error"


def stream_windows(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
    """Tables as reader.SCHEMA, whose rows are those of the windows' pieces, in order.

    A window's rows may come in several tables, where they are larger than a block of Ray's object store.
    Raises ValueError as read_pieces does.
    """
    return _ahead(_tables(index, data, windows))


def _tables(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
    def read(batch: pa.Table) -> pa.Table:
        try:
            return read_pieces(pickle.loads(batch["reading"][0].as_py()), data)
        except ValueError as error:
            # Ray Data would bring back a text of some thirty lines, and not the error.
            return pa.table({_ERROR: [str(error)]})

    readings = (Reading.of(index, window.pieces) for window in windows if window.pieces)
    while part := list(islice(readings, _READINGS_PER_DATASET)):
        items = [{"reading": pickle.dumps(reading)} for reading in part]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            read,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=READER_CPUS,
            compute=ray.data.TaskPoolStrategy(READERS),
        )
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            table = cast(pa.Table, block)
            if _ERROR in table.column_names:
                raise ValueError(table[_ERROR][0].as_py())
            yield table.select(SCHEMA.names)


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same, taken a few ahead in a thread, so that there is no pause where the next dataset starts."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, tables, None) for _ in range(_TABLES_AHEAD))
        while (table := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, tables, None))
            yield table
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
