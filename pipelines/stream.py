"""Windows and other jobs to tables through Ray Data, and how far ahead of their use it reads."""

import logging
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeVar, cast

import pyarrow as pa
import ray.data
from ray.data import DataContext

from pipelines.config import DataConfig
from pipelines.index import Index
from pipelines.plan import Window
from pipelines.reader import SCHEMA, Reading, ahead, read_pieces

_PAUSE_SECONDS = 0.05

Answer = TypeVar("Answer")


def limit_read_ahead(context: DataContext) -> None:
    """Let a pool of tasks or actors be ahead of what is taken by twice its size, and rest where it is.

    Else all would be read that the object store has room for: in a burst that takes the cores from the
    training, and into memory that is always fresh. And Ray Data's scheduler, a thread of this process, has
    nothing to wait for while nobody takes what has been read, and goes round and round: that took 0.9 of a
    core, and Python's lock, from the training beside it.
    """
    try:
        from ray.data._internal.execution.backpressure_policy import (
            ENABLED_BACKPRESSURE_POLICIES,
            ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
            BackpressurePolicy,
        )
        from ray.data._internal.execution.execution_callback import ExecutionCallback
    except ImportError:
        return

    class FewAhead(BackpressurePolicy):
        def can_add_input(self, op: Any) -> bool:
            return _unless_gone(lambda: _few_wait(self._topology, op), True)

    class Pause(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            if _unless_gone(lambda: _nothing_to_do(executor), False):
                time.sleep(_PAUSE_SECONDS)

    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, FewAhead])
    context.custom_execution_callback_classes = [Pause]


def _few_wait(topology: Any, operator: Any) -> bool:
    most = operator.get_max_concurrency_limit()
    if most is None:
        return True
    waiting = operator.internal_output_queue_num_blocks() + len(topology[operator].output_queue)
    return operator.num_active_tasks() + waiting < 2 * most


def _nothing_to_do(executor: Any) -> bool:
    operators = executor._topology or {}
    busy = any(op.num_active_tasks() and not op._in_task_output_backpressure for op in operators)
    return not busy and not executor._consumer_idling()


def _unless_gone(ask: Callable[[], Answer], otherwise: Answer) -> Answer:
    """What `ask` gives; `otherwise` where the names that it needs are Ray's no longer, or others."""
    try:
        return ask()
    except (AttributeError, KeyError, TypeError):
        return otherwise


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
