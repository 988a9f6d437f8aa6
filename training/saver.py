"""Checkpoints written while training goes on: a step waits for a copy in memory at most."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from pipelines import storage
from training.checkpoint import Checkpoints


class Saver:
    """Writes one checkpoint at a time in a thread.

    One that cannot be written is lost alone: the last good one stays, and warn(message) hears of it.
    """

    def __init__(self, checkpoints: Checkpoints, warn: Callable[[str], None]) -> None:
        self._checkpoints, self._warn = checkpoints, warn
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[int, Future[None]] | None = None

    def save(self, step: int, saved: dict[str, Any], *, score: float | None = None) -> None:
        """Write a copy of `saved`, after the one before it has been written."""
        self.wait()
        copied = _copied(saved)
        self._writing = step, self._thread.submit(self._checkpoints.write, step, copied, score=score)

    def wait(self) -> bool:
        """Whether the last checkpoint was written, once that is known; true where there was none."""
        if self._writing is None:
            return True
        step, future = self._writing
        self._writing = None
        try:
            future.result()
        except OSError as error:
            self._warn(f"the checkpoint of step {step} could not be written: {storage.first_line(error)}")
            return False
        return True


def _copied(value: Any) -> Any:
    """The same, its tensors copied into the CPU's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part) for part in value)
    return value
