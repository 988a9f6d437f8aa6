"""What rank 0 writes down of a run in metrics.jsonl, and shows of it."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pipelines.plan import Plan
from training.metrics import MetricsLog
from training.tensorboard import TensorBoard

Progress = Callable[[dict[str, Any]], None]

# Seconds between looks at the loss, which would make a GPU wait, and between writes of the metrics.
_LOOK_SECONDS, _WRITE_SECONDS = 1.0, 30.0


class RunLog:
    """The lines of metrics.jsonl and what `progress` hears, about once a second."""

    def __init__(self, run: str, plan: Plan, steps: int, start_step: int, progress: Progress) -> None:
        self._plan, self._steps, self._progress = plan, steps, progress
        self._metrics, self._board = MetricsLog(run, start_step), TensorBoard(run, start_step)
        self._pending: list[tuple[dict[str, Any], Tensor]] = []
        self.last_step, self._skipped = start_step, self._metrics.count("skipped")
        self._stepped_at = self._last_look = self._last_write = time.monotonic()

    def step(self, done: int, loss: Tensor, rate: float, spent: Mapping[str, float]) -> None:
        now = time.monotonic()
        self.last_step = done
        values = {
            "step": done,
            "epoch": self._epoch(done),
            "learning_rate": rate,
            "images_per_second": self._plan.batch_size / (now - self._stepped_at),
            **spent,
        }
        self._pending.append((values, loss))
        self._stepped_at = now
        if done == self._steps or now - self._last_look > _LOOK_SECONDS:
            self._look()
        if now - self._last_write > _WRITE_SECONDS:
            self.write()

    def note(self, done: int, **values: Any) -> None:
        """Write down and show what was found after `done` steps, other than the steps themselves."""
        self._look()
        line = {"step": done, "epoch": self._epoch(done), **values}
        self._append(line)
        self._progress({**line, "steps": self._steps})
        self.write()
        self._stepped_at = time.monotonic()

    def write(self) -> None:
        self._look()
        self._metrics.flush()
        self._board.flush()
        self._last_write = time.monotonic()

    def _look(self) -> None:
        """Read the losses of the steps since the last look."""
        line = None
        for values, loss in self._pending:
            value = loss.item()
            if not math.isfinite(value):
                self._skipped += 1
                self._append({"step": values["step"], "epoch": values["epoch"], "skipped": self._skipped})
                continue
            line = {"step": values["step"], "epoch": values["epoch"], "loss": value, **values}
            self._append(line)
        self._pending.clear()
        if line:
            self._progress({**line, "steps": self._steps})
        self._last_look = time.monotonic()

    def _append(self, line: dict[str, Any]) -> None:
        self._metrics.append(**line)
        self._board.append(line)

    def _epoch(self, done: int) -> int:
        """Number of the epoch, from 1, that the last of `done` steps belongs to; 0 before the first."""
        return -(-done // self._plan.steps_per_epoch)
