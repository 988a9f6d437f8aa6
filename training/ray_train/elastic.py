"""Elastic training: restart a run when a worker is lost, or with more workers when the cluster grows."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import Event
from typing import Any

from training.checkpoint import Checkpoints
from training.config import TrainConfig, most_workers
from training.errors import NoRoomError, RunError, StoppedError
from training.evaluation.evaluator import Sets
from training.lease import Held
from training.metrics import Progress
from training.ray_train.launch import Launch, launch
from training.ray_train.nodes import (
    can_grow,
    fitting_workers,
    or_none,
    requested_nodes,
    wait_for_lost_nodes,
    wait_for_nodes,
)
from training.ray_train.turns import others_wait
from training.trainer import run_uri, train

# Seconds between checks for room for more workers, and the checks in a row that must find it.
_LOOK_SECONDS, _STEADY_LOOKS = 5.0, 2

# Views are prepared some steps ahead of training, which reports its step about once a second.
_STEPS_AHEAD, _SILENT_SECONDS = 8, 5.0

# How long to wait for nodes if too few are left, and for Ray to notice a lost one.
_PATIENCE_SECONDS, _NOTICE_SECONDS = 300.0, 60.0


def run_to_its_end(
    config: TrainConfig,
    sets: Sets,
    progress: Progress,
    stop: Event,
    *,
    until: int | None = None,
    launch: Launch = launch,
    held: Held | None = None,
) -> None:
    """Train on as many workers as the config allows and the cluster has, and resume after failures.

    Trains to step `until`, if that comes before the end, on workers from `launch`, while this command holds
    the lease `held`.

    Raises RunError after more than config.retries failures without a new checkpoint in between, StoppedError
    once `stop` is set and the run has saved, and ClusterLostError and ValueError as launch does.
    """
    checkpoints = Checkpoints(run_uri(config), config.checkpoint.keep)
    failures, reached, careful_until = 0, checkpoints.latest_step(), 0
    tracker, since = _ProgressTracker(progress, config.batch_size), time.time()
    workers = _first_workers(config, progress, reached or 0, stop)
    while True:
        try:
            tracker.begin(reached or 0)
            with _missing_nodes(config, workers) as have_come:
                stopping = _StopCondition(stop, config, tracker, have_come)
                task = partial(train, until=until, careful_until=careful_until, held=held)
                launch(config, sets, tracker, task, workers=workers, stopping=stopping, since=since)
            return
        except StoppedError as stopped:
            if stop.is_set():  # Stopped in the queue, it reports step 0.
                raise StoppedError(max(stopped.step, reached or 0)) from stopped
            reached = stopped.step
            progress({"step": reached, "moving": True})
        except NoRoomError as error:  # Nodes were lost while it waited for its turn.
            progress({"step": reached or 0, "waiting": f"nodes: {error}"})
        except RunError as error:
            step = checkpoints.latest_step()
            failures = 1 if step != reached else failures + 1
            reached = step
            if error.final or failures > config.retries or stop.is_set():
                raise
            # An image may have crashed the worker: the next one decodes images in another process first.
            careful_until = tracker.furthest if error.died else 0
            progress({"step": step or 0, "restarting": f"{error}"})
            wait_for_lost_nodes(_NOTICE_SECONDS, stop)
        workers = _wait_for_room(config, reached or 0, stop)


class _ProgressTracker:
    """Forwards a run's progress, and estimates how far it may have got since.

    workers: their number, once they have started.
    """

    def __init__(self, progress: Progress, batch_size: int) -> None:
        self._progress, self._batch_size = progress, batch_size
        self._step, self._steps_per_second = 0, 0.0
        self._reached = 0
        self.workers: int | None = None

    def begin(self, reached: int) -> None:
        """Start an attempt from the checkpoint of step `reached`."""
        self._reached, self.workers = reached, None

    def __call__(self, values: dict[str, Any]) -> None:
        self.workers = values.get("workers", self.workers)
        if "waiting" in values:  # A run that waits for its turn does not report its step.
            values = {"step": self._reached, **values}
        self._step = max(self._step, values.get("step", 0))
        if "images_per_second" in values:
            self._steps_per_second = values["images_per_second"] / self._batch_size
        self._progress(values)

    @property
    def furthest(self) -> int:
        """The last step whose images a worker may have decoded."""
        return self._step + _STEPS_AHEAD + round(_SILENT_SECONDS * self._steps_per_second)


def _first_workers(config: TrainConfig, progress: Progress, reached: int, stop: Event) -> int:
    """Number of workers to start with: those that fit, once nodes that the run waits for have come."""
    most = most_workers(config)
    if config.wait_for_nodes and _fitting(config) < most:
        progress({"step": reached, "waiting": f"nodes with room for {most} workers"})
        wait_for_nodes(config, partial(fitting_workers, config), most, stop)
        if stop.is_set():
            raise StoppedError(reached)
    return fitting_workers(config)


def _fitting(config: TrainConfig) -> int:
    return or_none(partial(fitting_workers, config))


def _wait_for_room(config: TrainConfig, reached: int, stop: Event) -> int:
    """Wait for room, and return the number of workers that fit; raise ValueError if there is none in time."""
    deadline = time.monotonic() + max(_PATIENCE_SECONDS, config.wait_for_nodes)
    with _missing_nodes(config, 0):
        while not _fitting(config) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            if stop.is_set():
                raise StoppedError(reached)
    return fitting_workers(config)


def _missing_nodes(config: TrainConfig, workers: int) -> AbstractContextManager[Callable[[], bool]]:
    """Request nodes for the missing workers, if the config waits for nodes.

    Yields a function that tells whether all have come.
    """
    missing = most_workers(config) - workers
    if config.wait_for_nodes and missing > 0:
        return requested_nodes(config, missing)
    return nullcontext(lambda: False)


class _StopCondition:
    """Whether an attempt should save and stop, for the user or to use more workers."""

    def __init__(
        self, stop: Event, config: TrainConfig, tracker: _ProgressTracker, have_come: Callable[[], bool]
    ) -> None:
        self._stop, self._config, self._tracker, self._have_come = stop, config, tracker, have_come
        self._steady, self._looked = 0, time.monotonic()

    def __call__(self) -> bool:
        if self._stop.is_set():
            return True
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._steady = self._steady + 1 if self._grown() else 0
        return self._steady >= _STEADY_LOOKS

    def _grown(self) -> bool:
        workers = self._tracker.workers
        if workers is None:
            return False
        return self._have_come() or (can_grow(self._config, workers) and not others_wait())
