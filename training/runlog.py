"""What rank 0 writes down of a run in metrics.jsonl, and shows of it."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.plan import Plan
from training.metrics import MetricsLog
from training.tensorboard import TensorBoard

# What a worker does, for who reads its log.
LOG = logging.getLogger("diptych")

Progress = Callable[[dict[str, Any]], None]

# Seconds between steps that are shown, and between writes of the metrics.
_SHOW_SECONDS, _WRITE_SECONDS = 1.0, 30.0


class RunLog:
    """The lines of metrics.jsonl and what `progress` hears, about once a second."""

    def __init__(self, run: str, plan: Plan, steps: int, start_step: int, progress: Progress) -> None:
        self._plan, self._steps, self._progress = plan, steps, progress
        self._metrics, self._board = MetricsLog(run, start_step), TensorBoard(run, start_step)
        self.last_step, self._skipped = start_step, self._metrics.count("skipped")
        self._stepped_at = self._written_at = time.monotonic()
        self._shown_at = -math.inf

    def begin(self, workers: int) -> None:
        """Write down that so many workers go on from the step so far."""
        self._append({"step": self.last_step, "epoch": self._epoch(self.last_step), "workers": workers})

    def step(
        self,
        done: int,
        loss: float,
        rate: float,
        spent: Mapping[str, float],
        view_matching: float | None = None,
    ) -> None:
        """Note a step; a loss that is not finite is that of one that was skipped."""
        now = time.monotonic()
        line: dict[str, Any] = {"step": done, "epoch": self._epoch(done)}
        if math.isfinite(loss):
            images_per_second = self._plan.batch_size / (now - self._stepped_at)
            line |= {"loss": loss, "learning_rate": rate, "images_per_second": images_per_second, **spent}
            if view_matching is not None:
                line["view_matching"] = view_matching
        else:
            self._skipped += 1
            line |= {"skipped": self._skipped}
        self._append(line)
        self.last_step, self._stepped_at = done, now
        if done == self._steps or now - self._shown_at > _SHOW_SECONDS:
            self._progress({**line, "steps": self._steps})
            self._shown_at = now
        if now - self._written_at > _WRITE_SECONDS:
            self.write()

    def note(self, done: int, **values: Any) -> None:
        """Write down and show what was found after `done` steps, other than the steps themselves."""
        line = {"step": done, "epoch": self._epoch(done), **values}
        LOG.info("step %d: %s", done, ", ".join(f"{key} {value}" for key, value in values.items()))
        self._append(line)
        self._progress({**line, "steps": self._steps})
        self.write()
        self._stepped_at = time.monotonic()

    def write(self) -> None:
        self._metrics.flush()
        self._board.flush()
        self._written_at = time.monotonic()

    def _append(self, line: dict[str, Any]) -> None:
        self._metrics.append(**line)
        self._board.append(line)

    def _epoch(self, done: int) -> int:
        """Number of the epoch, from 1, that the last of `done` steps belongs to; 0 before the first."""
        return -(-done // self._plan.steps_per_epoch)
