"""Windows and other jobs to Arrow tables through Ray Data, ahead of their use, in the plan's order."""

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeVar, cast

import pyarrow as pa
import ray.data

from pipelines.backpressure import limit_read_ahead
from pipelines.config import DataConfig
from pipelines.plan import Window
from pipelines.reader import SCHEMA, Reading, ahead, read_pieces
from pipelines.sources import Index

# The readers of one worker: so many tasks at a time. It sets a core aside for them, since they must never
# wait for cores that workers have taken; what each asks for only keeps it off nodes that have none.
READERS = 2
READER_CPUS = 0.01

# Ray Data keeps a block per job from the start (0.7 ms each), so a long run is streamed in parts.
_JOBS_PER_DATASET = 256

# The one column of what a task gives in place of what it could not make.
_ERROR = "error"

Job = TypeVar("Job")


def stream_windows(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
    """Tables as reader.SCHEMA, whose rows are those of the windows' pieces, in order.

    A window's rows may come in several tables, where they are larger than a block of Ray's object store.
    Raises ValueError as read_pieces does.
    """
    return ahead(_tables(index, data, windows))


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
    jobs: Iterable[Job], work: Callable[[Job], pa.Table], *, cpus: float, most: int
) -> Iterator[pa.Table]:
    """The same by at most so many actors, each on a GPU or, without, on `cpus` cores.

    Each keeps its own `work`, and with it what that has loaded.
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    room = gpus or max(1, int(resources.get("CPU", 1) / cpus))
    return _mapped(
        jobs,
        _Actor,
        fn_constructor_args=(work,),
        num_cpus=cpus,
        num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(room, most))),
    )


class _Actor:
    def __init__(self, work: Callable[[Any], pa.Table]) -> None:
        self._work = work

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _attempt(self._work, batch)


def _attempt(work: Callable[[Any], pa.Table], batch: pa.Table) -> pa.Table:
    try:
        return work(pickle.loads(batch["job"][0].as_py()))
    except (ValueError, OSError) as error:
        # Ray Data would bring back a text of some thirty lines, and not the error.
        return pa.table({_ERROR: [str(error)]})


def _mapped(jobs: Iterable[Job], run: Any, **resources: Any) -> Iterator[pa.Table]:
    jobs = iter(jobs)
    # Its notes of each dataset would run through the progress bars.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    while part := list(islice(jobs, _JOBS_PER_DATASET)):
        items = [{"job": pickle.dumps(job)} for job in part]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            run, batch_size=None, batch_format="pyarrow", **resources
        )
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        limit_read_ahead(dataset.context)
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            table = cast(pa.Table, block)
            if _ERROR in table.column_names:
                raise ValueError(table[_ERROR][0].as_py())
            yield table
