"""Launch training workers on the connected Ray cluster, and show their metrics on its dashboard."""

import logging
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import ray
import ray.train
import torch
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device
from ray.util.metrics import Gauge

from pipelines import storage
from pipelines.storage.scratch import scratch_folder
from pipelines.stream import stream_windows
from training.config import TrainConfig
from training.errors import ClusterLostError, RunError, StoppedError, UnsavedError
from training.evaluation.evaluator import Sets
from training.evaluation.sets import ImageCache
from training.gather import LocalGather, ProcessGroupGather
from training.metrics import LOG, Progress
from training.process import Worker
from training.ray_train.channel import WorkerEnd, open_channel
from training.ray_train.nodes import Head, fitting_workers
from training.ray_train.process_group import GroupConfig
from training.ray_train.turns import Place, groups_of, remove_groups
from training.trainer import run_uri, train

# Errors of the config or the code, which any other worker would raise too.
_FINAL_ERRORS = (
    ValueError,
    TypeError,
    NameError,
    AttributeError,
    LookupError,
    ImportError,
    AssertionError,
)

# Ray Train's error for workers that found no room in time; its class is private.
_NO_ROOM = "WorkerGroupStartupTimeoutError"

_LOOK_SECONDS = 0.2

Result = TypeVar("Result")
Task = Callable[[TrainConfig, Sets, Worker, Progress], None]


class Launch(Protocol):
    """Runs a task on workers: launch, or the one of a WorkerPool."""

    def __call__(
        self,
        config: TrainConfig,
        sets: Sets,
        progress: Progress,
        task: Task,
        *,
        workers: int,
        stopping: Callable[[], bool],
        since: float | None = None,
    ) -> None: ...


@dataclass(frozen=True, eq=False)
class _Job:
    config: TrainConfig
    sets: Sets
    task: Task
    channel: WorkerEnd


def launch(
    config: TrainConfig,
    sets: Sets,
    progress: Progress,
    task: Task = train,
    *,
    workers: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
    since: float | None = None,
) -> None:
    """Run `task` for `config` on `workers` workers of the connected Ray cluster; report to progress(values).

    If other runs use the cluster, it waits for its turn, first come, first served. `since` is when it came,
    in seconds since 1970; unset: now. It takes fewer workers if the config allows that and more do not fit.

    Raises ValueError if the cluster is too small, RunError if a worker fails, ClusterLostError if the
    cluster's head is gone, and StoppedError once the run has saved because `stopping()`, which is polled, was
    true or a node of its workers is being drained.
    """
    workers = workers or fitting_workers(config)
    launch_group(
        config, sets, progress, partial(watched, task=task), workers=workers, stopping=stopping, since=since
    )


def launch_group(
    config: TrainConfig,
    sets: Sets,
    progress: Progress,
    task: Task,
    *,
    workers: int,
    stopping: Callable[[], bool],
    since: float | None = None,
) -> None:
    """As launch, but without Ray's metrics and without the run's name in the workers' log."""
    left = Event()

    def take_turn() -> None:
        with Place(since or time.time()) as place:
            while not _started(config, sets, progress, task, place, workers, stopping, left):
                pass  # Something else took the room; it is still this run's turn.

    try:
        while_head_answers(take_turn)
    finally:
        left.set()


def _started(
    config: TrainConfig,
    sets: Sets,
    progress: Progress,
    task: Task,
    place: Place,
    most: int,
    stopping: Callable[[], bool],
    left: Event,
) -> bool:
    """Wait for the turn, then do the task; False if the workers found no room after all.

    `left` is set once the caller no longer waits for them.
    """

    def ending() -> bool:
        return left.is_set() or stopping()

    workers, bundle = place.wait(config, most, progress, ending)
    known, mine = groups_of(bundle, workers), set[str]()

    def forward(event: dict[str, Any]) -> None:
        if event.get("phase") == "workers":
            # No other run can have started since, so the new groups are this run's.
            mine.update(groups_of(bundle, workers) - known)
            place.leave()
        progress(event)

    # The driver watches for draining nodes itself, in channel.py. A worker that does not answer is lost after
    # as long as the others wait for it.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(max(60.0, config.timeout))
    with (
        open_channel(forward, ending) as channel,
        scratch_folder() as scratch,
    ):
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": _Job(config, sets, task, channel)},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu="GPU" in bundle,
                resources_per_worker=bundle,
            ),
            torch_config=GroupConfig(
                backend="nccl" if "GPU" in bundle else "gloo", timeout_s=int(config.timeout)
            ),
            # diptych saves its own checkpoints and retries by itself, so Ray should do neither.
            run_config=RunConfig(
                name=config.name,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            remove_groups(mine)  # The controller may have died before it released the room.
            raise _failure(config, error) from error
        except ControllerError as error:
            if type(error.controller_failure).__name__ == _NO_ROOM:
                return False
            cause = _root_error(error)
            # Such as a wrong address of a node, which would fail again.
            final = isinstance(cause, ValueError)
            raise RunError(f"the workers could not be started: {_described(cause)}", final=final) from error
        except (RayActorError, OutOfMemoryError) as error:
            # Ray keeps the room of a lost controller as long as its driver lives.
            if not left.is_set():
                remove_groups(mine or groups_of(bundle, workers) - known)
            raise RunError(f"the workers' controller was lost: {_root(error)}", final=False) from error
    return True


def while_head_answers(work: Callable[[], Result]) -> Result:
    """The result of `work`; raises ClusterLostError once the cluster's head is gone, where Ray would wait."""
    head, done = Head(), in_thread(work)
    while True:
        ended = bool(wait([done], _LOOK_SECONDS).done)
        failed = ended and done.exception() is not None
        # If the head does not answer, it may be the cause of any failure.
        if head.lost() or (failed and head.answers and head.given_up()):
            raise ClusterLostError
        if ended and (head.answers or not failed):
            return done.result()


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Run `work` in a daemon thread: in the main thread Ray would handle Ctrl-C itself."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return done


def _failure(config: TrainConfig, error: WorkerGroupError) -> Exception:
    """The error to raise: one of the run itself, if there is one, rather than one of its workers."""
    causes = {rank: _root_error(failure) for rank, failure in sorted(error.worker_failures.items())}
    for cause in causes.values():
        if isinstance(cause, StoppedError):
            return cause
        if isinstance(cause, UnsavedError):
            return RunError(f"{cause}", final=True)
    final = [rank for rank, cause in causes.items() if isinstance(cause, _FINAL_ERRORS)]
    rank = final[0] if final else next(iter(causes))
    cause = causes[rank]
    message = f"worker {rank} failed: {_described(cause)} ({_traceback_place(config, error)})"
    died = any(isinstance(cause, RayActorError | OutOfMemoryError) for cause in causes.values())
    return RunError(message, final=bool(final), died=died)


def _traceback_place(config: TrainConfig, error: WorkerGroupError) -> str:
    """Write the traceback and return its place, or why it cannot be written: that must not hide the cause."""
    log = storage.join(run_uri(config), "error.log")
    try:
        storage.write(log, str(error).encode())
    except OSError as refused:
        return f"no traceback: {storage.first_line(refused)}"
    return f"traceback: {log}"


def _work(loop_config: dict[str, Any]) -> None:
    """The function that each worker process runs."""
    job: _Job = loop_config["job"]
    context = ray.train.get_context()
    leads = context.get_world_rank() == 0
    if leads:
        job.channel.put({"phase": "workers"})
    job.channel.join()
    stopping = job.channel.watch()
    alone = context.get_world_size() == 1
    threads = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    worker = Worker(
        gather=LocalGather() if alone else ProcessGroupGather(),
        device=get_device(),
        threads=threads,
        tables=stream_windows,
        stopping=stopping if leads else lambda: False,
        # No limit: Ray's object store spills to disk.
        cache=ImageCache(_put, ray.get, most_bytes=None),
    )
    job.task(job.config, job.sets, worker, job.channel.put)


def _put(table: pa.Table) -> ray.ObjectRef | None:
    """Put the table into Ray's object store; None where neither that nor the disk has room."""
    try:
        return ray.put(table)
    except (ObjectStoreFullError, OutOfDiskError):
        return None


def watched(config: TrainConfig, sets: Sets, worker: Worker, progress: Progress, *, task: Task) -> None:
    """Do the task, send its progress to Ray's metrics too, and log with the run's name and rank."""
    _log_as(config.name, worker.gather.rank)
    metrics = DashboardMetrics(config.name)

    def show(event: dict[str, Any]) -> None:
        metrics.update(event)
        progress(event)

    task(config, sets, worker, show)


def _log_as(run: str, rank: int) -> None:
    """Prefix each line of diptych's log with the run and rank."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {run} rank {rank} %(levelname)s: %(message)s"))
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(logging.INFO)


def _root_error(error: BaseException) -> BaseException:
    """The innermost cause."""
    names = ("cause", "controller_failure", "health_check_failure", "__cause__")
    while cause := next((found for name in names if (found := getattr(error, name, None))), None):
        error = cause
    return error


def _root(error: BaseException) -> str:
    return _described(_root_error(error))


def _described(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, OutOfMemoryError):  # Ray's message is a page long.
        used = re.search(r"was (\S+) used / (\S+) limit", str(error))
        of = f", {used[1]} of {used[2]} being used" if used else ""
        return (
            f"Ray ended it because its node ran out of memory{of}; use nodes with more, a smaller "
            "--data.window-bytes or --micro-batch-size"
        )
    return f"{type(error).__name__}: {storage.first_line(error)}"


_METRICS = {
    "step": "Steps done",
    "epoch": "Number of the epoch, from 1",
    "loss": "Loss of the last step shown",
    "learning_rate": "Learning rate of the last step shown",
    "images_per_second": "Images a second, over all workers",
    "data_wait_seconds": "Seconds of the last step shown that rank 0 waited for data",
    "view_matching": "Share of the last step's views whose nearest other view in the batch is their partner",
    "knn_top1": "kNN accuracy, from 0 to 1",
    "effective_rank": "Effective rank of the features",
    "skipped": "Steps skipped so far, whose loss or gradient was not finite",
    "quarantined": "Images quarantined so far",
}


class DashboardMetrics:
    """Ray metrics named diptych_..., tagged with the run's name."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            name: Gauge(f"diptych_{name}", description, tag_keys=("run",))
            for name, description in _METRICS.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def update(self, values: dict[str, Any]) -> None:
        """Set the metrics that `values` contains."""
        for name, gauge in self._gauges.items():
            if name in values:
                gauge.set(values[name])
