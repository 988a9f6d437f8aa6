"""A run that goes on by itself: when a worker is lost, and on more workers when the cluster has grown."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.evaluator import Sets
from training.faults import StoppedError
from training.run import run_uri
from training.runlog import Progress
from training.worker import RunError, fitting_workers, launch

# How often the cluster is looked at for room for more workers, and how long it must have had that.
_LOOK_SECONDS, _STEADY_LOOKS = 5.0, 2

# How long to wait for nodes where too few are left, and for a lost one to be noticed.
_PATIENCE_SECONDS, _SETTLE_SECONDS = 300.0, 2.0


def run_to_its_end(config: TrainConfig, sets: Sets, progress: Progress, stop: Event) -> None:
    """Train on as many workers as the config allows and the cluster has, from checkpoint to checkpoint.

    Raises RunError once it failed more than config.retries times without a new checkpoint in between,
    StoppedError once `stop` was set and the run has saved, and ValueError as launch does.
    """
    checkpoints = Checkpoints(run_uri(config), config.checkpoint.keep)
    failures, reached = 0, checkpoints.latest_step()
    workers = fitting_workers(config)
    while True:
        attempt = Event()
        try:
            with _setting(attempt, stop.is_set, config, workers):
                launch(config, sets, progress, workers=workers, stop=attempt)
            return
        except StoppedError as stopped:
            if stop.is_set():
                raise
            reached = stopped.step
        except RunError as error:
            step = checkpoints.latest_step()
            failures = 1 if step != reached else failures + 1
            reached = step
            if error.final or failures > config.retries or stop.is_set():
                raise
            progress({"step": step or 0, "restarting": f"{error}"})
            time.sleep(_SETTLE_SECONDS)
        workers = _wait_for_room(config)


def _wait_for_room(config: TrainConfig) -> int:
    """How many workers the cluster has room for, once it has enough; ValueError after a while."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return fitting_workers(config)
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_SECONDS)


@contextmanager
def _setting(
    attempt: Event, stopped: Callable[[], bool], config: TrainConfig, workers: int
) -> Iterator[None]:
    """Until the block ends set `attempt` when the user wants to stop or the cluster holds more workers."""
    ended = Event()

    def watch() -> None:
        steady, looked = 0, time.monotonic()
        while not ended.wait(0.2):
            if stopped():
                attempt.set()
                return
            if time.monotonic() - looked < _LOOK_SECONDS:
                continue
            looked = time.monotonic()
            steady = steady + 1 if _room(config) > workers else 0
            if steady == _STEADY_LOOKS:
                attempt.set()
                return

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _room(config: TrainConfig) -> int:
    try:
        return fitting_workers(config)
    except ValueError:
        return 0
