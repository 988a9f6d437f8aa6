"""Checkpoints written in the background: a step waits only for a copy in memory."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipelines import storage
from training.checkpoint import Checkpoints, DamagedError
from training.errors import UnsavedError

# Seconds between attempts to write a checkpoint, doubled with each: while the run trains, and while it waits
# for the write alone.
_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 5.0, 60.0
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 5.0


@dataclass
class _Snapshot:
    step: int
    saved: dict[str, Any]
    score: float | None
    failed: bool = False


class Saver:
    """Writes one checkpoint at a time in a thread.

    One that cannot be written is kept in memory and retried between steps and with the next checkpoint, which
    replaces it unless it has the best score. Calls warn(message) at the first failure of each checkpoint.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        warn: Callable[[str], None],
        *,
        whole: int | None = None,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        """`whole` is the step of the newest complete checkpoint at the start."""
        self.whole = whole
        self.fault: OSError | None = None
        self.failed_saves = 0
        self._checkpoints, self._warn = checkpoints, warn
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._kept: list[_Snapshot] = []
        self._first_wait = self._next_wait = retry_seconds
        self._retry_at = 0.0

    def save(self, step: int, saved: dict[str, Any], *, score: float | None = None) -> None:
        """Write a copy of `saved`, once the one before it has been tried."""
        self.wait()
        # Keep only the best and the newest in memory.
        self._kept = [each for each in self._kept if each.score is not None and score is None]
        self._kept.append(_Snapshot(step, _copied(saved), score))
        self._start()

    def look(self) -> None:
        """Finish a write that has ended, and retry a failed one when it is due."""
        if self._writing and self._writing.done():
            self._finish()
        if self._kept and not self._writing and time.monotonic() >= self._retry_at:
            self._start()

    def wait(self) -> bool:
        """Wait until each checkpoint has been tried; return whether all are written."""
        while self._writing:
            self._finish()
        return not self._kept

    def insist(self, seconds: float) -> None:
        """Wait until all checkpoints are written; raise UnsavedError if that takes longer."""
        deadline, wait = time.monotonic() + seconds, _PAUSE_SECONDS
        if self.wait():
            return
        assert self.fault
        self._warn(
            f"the run waits up to {seconds:g} s to write its checkpoint: {storage.first_line(self.fault)}; "
            f"{storage.way_out(self.fault)}"
        )
        while time.monotonic() < deadline:
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_PAUSE_SECONDS)
            self._start()
            if self.wait():
                return
        raise UnsavedError(
            f"no checkpoint could be written for {seconds:g} s: {storage.first_line(self.fault)}; "
            f"{_complete(self._newest())}; {storage.way_out(self.fault)}, then: "
            f"diptych train --resume {self._checkpoints.run}"
        )

    def _newest(self) -> int | None:
        """Step of the newest complete checkpoint, as a resume would find it."""
        try:
            with storage.briefly():
                self._checkpoints.check_run()
                saved = self._checkpoints.latest(lambda _: None)
        except DamagedError:
            return None
        except OSError:  # Reading fails too.
            return self.whole
        return saved["step"] if saved else None

    def _start(self) -> None:
        self._writing = self._thread.submit(self._write, self._kept[0])

    def _write(self, snapshot: _Snapshot) -> None:
        with storage.briefly():  # No long waits: retries are scheduled here.
            self._checkpoints.check_run()
            self._checkpoints.write(snapshot.step, snapshot.saved, score=snapshot.score)

    def _finish(self) -> None:
        """Wait for the write and record its outcome; start the next one if it succeeded."""
        assert self._writing
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except OSError as error:
            self._failed(error)
            return
        self.whole = self._kept.pop(0).step
        if self.fault:
            self.fault, self.failed_saves, self._next_wait = None, 0, self._first_wait
            self._warn(f"checkpoints can be written again: that of step {self.whole} is complete")
        if self._kept:
            self._start()

    def _failed(self, error: OSError) -> None:
        self.fault = error
        self._retry_at = time.monotonic() + self._next_wait
        self._next_wait = min(2 * self._next_wait, _LONGEST_RETRY_SECONDS)
        for each in (each for each in self._kept if not each.failed):
            each.failed = True
            self.failed_saves += 1
            self._warn(
                f"the checkpoint of step {each.step} could not be written: {storage.first_line(error)}; "
                f"{_complete(self.whole)}; the write is retried"
            )


def _complete(step: int | None) -> str:
    return "none is complete yet" if step is None else f"that of step {step} is complete"


def _copied(value: Any) -> Any:
    """A copy with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part) for part in value)
    return value
