"""Start workers on the connected Ray cluster with Ray Train, and run a task on them."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from threading import Event, Thread
from typing import Any, Protocol, TypeVar

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from pipelines.storage.scratch import scratch_folder
from training.config import TrainConfig
from training.errors import ClusterLostError, RunError
from training.evaluation.evaluator import Sets
from training.metrics import Progress
from training.ray_train.channel import WorkerEnd, open_channel
from training.ray_train.failures import described, failure, not_started, root_error
from training.ray_train.nodes import Head, fitting_workers
from training.ray_train.process_group import GroupConfig
from training.ray_train.turns import Place, groups_of, remove_groups
from training.ray_train.worker import Job, Task, watched, work
from training.trainer import train

# Ray Train's error for workers that found no room in time; its class is private.
_NO_ROOM = "WorkerGroupStartupTimeoutError"

_LOOK_SECONDS = 0.2

Result = TypeVar("Result")


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
    group = _WorkerGroup(config, sets, progress, task, stopping)

    def take_turn() -> None:
        with Place(since or time.time()) as place:
            while not group.done(place, workers):
                pass  # Something else took the room; it is still this run's turn.

    try:
        while_head_answers(take_turn)
    finally:
        group.left.set()


class _WorkerGroup:
    """Workers that do one task together. left: is set when the caller no longer waits for them."""

    def __init__(
        self, config: TrainConfig, sets: Sets, progress: Progress, task: Task, stopping: Callable[[], bool]
    ) -> None:
        self.left = Event()
        self._config, self._sets, self._task = config, sets, task
        self._progress, self._stopping = progress, stopping
        # Placement groups of Ray that held such bundles before the workers came, and those of the workers.
        self._known, self._mine = set[str](), set[str]()

    def done(self, place: Place, most: int) -> bool:
        """Wait for the turn, then do the task; False if the workers found no room after all."""
        workers, bundle = place.wait(self._config, most, self._progress, self._ending)
        self._known, self._mine = groups_of(bundle, workers), set()

        def forward(event: dict[str, Any]) -> None:
            if event.get("phase") == "workers":
                # No other run can have started since, so the new groups are this run's.
                self._mine = groups_of(bundle, workers) - self._known
                place.leave()
            self._progress(event)

        with open_channel(forward, self._ending) as channel, scratch_folder() as scratch:
            trainer = self._trainer(channel, workers, bundle, scratch)
            try:
                trainer.fit()
            except WorkerGroupError as error:
                remove_groups(self._mine)  # The controller may have died before it released the room.
                raise failure(self._config, error) from error
            except ControllerError as error:
                if type(error.controller_failure).__name__ == _NO_ROOM:
                    return False
                raise not_started(error) from error
            except (RayActorError, OutOfMemoryError) as error:
                # Ray keeps the room of a lost controller as long as its driver lives.
                if not self.left.is_set():
                    remove_groups(self._mine or groups_of(bundle, workers) - self._known)
                message = f"the workers' controller was lost: {described(root_error(error))}"
                raise RunError(message, final=False) from error
        return True

    def _ending(self) -> bool:
        return self.left.is_set() or self._stopping()

    def _trainer(
        self, channel: WorkerEnd, workers: int, bundle: dict[str, float], scratch: str
    ) -> TorchTrainer:
        config, gpu = self._config, "GPU" in bundle
        # The driver watches for draining nodes itself, in channel.py. A worker that does not answer is lost
        # after as long as the others wait for it.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(max(60.0, config.timeout))
        return TorchTrainer(
            work,
            train_loop_config={"job": Job(config, self._sets.compacted(), self._task, channel)},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=bundle),
            torch_config=GroupConfig(backend="nccl" if gpu else "gloo", timeout_s=int(config.timeout)),
            # diptych saves its own checkpoints and retries by itself, so Ray should do neither.
            run_config=RunConfig(
                name=config.name,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )


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
