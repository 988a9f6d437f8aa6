"""Turn windows and other jobs into tables through Ray Data, reading only a limited number ahead."""

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
    """Limit a pool of tasks or actors to twice its size of results ahead, and let Ray Data's scheduler sleep.

    Otherwise Ray Data reads as much as the object store can hold, in bursts that take the cores from the
    training and always into fresh memory. And its scheduler, a thread of this process, busy-waits while
    nobody takes the results: that took 0.9 of a core, and Python's lock, from the training.
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
    """The result of `ask`, or `otherwise` if Ray's private names have changed."""
    try:
        return ask()
    except (AttributeError, KeyError, TypeError):
        return otherwise


# Reading tasks of one worker at a time. A worker reserves a core for them, because they must never wait for
# cores that workers hold. READER_CPUS only keeps a task off nodes without cores.
READERS = 2
READER_CPUS = 0.01

# Ray Data creates a block per job at the start (0.7 ms each), so a long run is streamed in parts.
_JOBS_PER_DATASET = 256

# The only column of the table that a failed task returns.
_ERROR = "error"

Job = TypeVar("Job")


def stream_windows(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
    """Yield the rows of the windows' pieces as tables (reader.SCHEMA), in order.

    A window larger than a block of Ray's object store comes in several tables. Raises ValueError like
    read_pieces.
    """
    return ahead(_tables(index, data, windows))


def _tables(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
    readings = (Reading.of(index, window.pieces) for window in windows if window.pieces)
    tables = map_jobs(readings, partial(read_pieces, data=data), cpus=READER_CPUS, tasks=READERS)
    return (table.select(SCHEMA.names) for table in tables)


def map_jobs(
    jobs: Iterable[Job], work: Callable[[Job], pa.Table], *, cpus: float = 1.0, tasks: int | None = None
) -> Iterator[pa.Table]:
    """Yield the result of `work` for each job, in order: at most `tasks` tasks of `cpus` cores at a time.

    A table larger than a block of Ray's object store comes in several parts. Raises ValueError if `work`
    raises ValueError or OSError.
    """

    def run(batch: pa.Table) -> pa.Table:
        return _attempt(work, batch)

    return _mapped(jobs, run, num_cpus=cpus, compute=ray.data.TaskPoolStrategy(tasks))


def map_jobs_on_actors(
    jobs: Iterable[Job], work: Callable[[Job], pa.Table], *, cpus: float, most: int
) -> Iterator[pa.Table]:
    """Like map_jobs, with at most `most` actors, each on a GPU or, if there is none, on `cpus` cores.

    Each actor keeps its copy of `work`, and so the data that it has loaded.
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
        # Ray Data would replace the error by some thirty lines of text.
        return pa.table({_ERROR: [str(error)]})


def _mapped(jobs: Iterable[Job], run: Any, **resources: Any) -> Iterator[pa.Table]:
    jobs = iter(jobs)
    # Ray Data's log messages for each dataset would disturb the progress bars.
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
