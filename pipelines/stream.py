"""Windows and other jobs to Arrow tables through Ray Data, ahead of their use, in the plan's order."""

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, TypeVar, cast

import pyarrow as pa
import ray.data

from pipelines.config import DataConfig
from pipelines.plan import Window
from pipelines.reader import SCHEMA, Reading, read_pieces
from pipelines.sources import Index

# What the readers of one worker take of the cluster: two tasks at a time, half a core each.
READER_CPUS = 0.5
READERS = 2

# Ray Data keeps a block per job from the start (0.7 ms each), so a long run is streamed in parts.
_JOBS_PER_DATASET = 256

# Tables that wait to be taken while the next is fetched.
_TABLES_AHEAD = 2

# The one column of what a task gives in place of what it could not make.
_ERROR = "error"

Job = TypeVar("Job")


def stream_windows(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
    """Tables as reader.SCHEMA, whose rows are those of the windows' pieces, in order.

    A window's rows may come in several tables, where they are larger than a block of Ray's object store.
    Raises ValueError as read_pieces does.
    """
    return _ahead(_tables(index, data, windows))


def _tables(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
    readings = (Reading.of(index, window.pieces) for window in windows if window.pieces)
    tables = map_jobs(readings, partial(read_pieces, data=data), cpus=READER_CPUS, tasks=READERS)
    return (table.select(SCHEMA.names) for table in tables)


def map_jobs(
    jobs: Iterable[Job], work: Callable[[Job], pa.Table], *, cpus: float = 1.0, tasks: int | None = None
) -> Iterator[pa.Table]:
    """What `work` makes of each job, in order: tasks of `cpus` cores, at most so many at a time.

    A table may come in several parts, where it is larger than a block of Ray's object store. Raises
    ValueError where `work` raises that or OSError.
    """

    def run(batch: pa.Table) -> pa.Table:
        return _attempt(work, batch)

    return _mapped(jobs, run, num_cpus=cpus, compute=ray.data.TaskPoolStrategy(tasks))


def map_jobs_on_actors(
    jobs: Sequence[Job], build: Callable[[], Callable[[Job], pa.Table]], *, cpus: float
) -> Iterator[pa.Table]:
    """The same by actors, each of which calls `build` once: on a GPU each, or on `cpus` cores without."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    room = gpus or max(1, int(resources.get("CPU", 1) / cpus))
    return _mapped(
        jobs,
        _Actor,
        fn_constructor_args=(build,),
        num_cpus=cpus,
        num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(room, len(jobs)))),
    )


class _Actor:
    def __init__(self, build: Callable[[], Callable[[Any], pa.Table]]) -> None:
        self._build, self._work = build, None

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _attempt(self._built, batch)

    def _built(self, job: Any) -> pa.Table:
        # Not in __init__, whose errors Ray would answer with another actor.
        self._work = self._work or self._build()
        return self._work(job)


def _attempt(work: Callable[[Any], pa.Table], batch: pa.Table) -> pa.Table:
    try:
        return work(pickle.loads(batch["job"][0].as_py()))
    except (ValueError, OSError) as error:
        # Ray Data would bring back a text of some thirty lines, and not the error.
        return pa.table({_ERROR: [str(error)]})


def _mapped(jobs: Iterable[Job], run: Any, **resources: Any) -> Iterator[pa.Table]:
    jobs = iter(jobs)
    while part := list(islice(jobs, _JOBS_PER_DATASET)):
        items = [{"job": pickle.dumps(job)} for job in part]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            run, batch_size=None, batch_format="pyarrow", **resources
        )
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            table = cast(pa.Table, block)
            if _ERROR in table.column_names:
                raise ValueError(table[_ERROR][0].as_py())
            yield table


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
