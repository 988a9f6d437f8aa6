"""A run's metrics.jsonl: one JSON object a line, each step once; written by rank 0, read by everyone."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.plan import Plan
from pipelines.storage.checksums import encode_lines
from pipelines.storage.growing import SEGMENT_BYTES, START, GrowingFile
from training.lease import Held
from training.metrics_table import Metrics, joined, read_blocks
from training.tensorboard import TensorBoard

_FILE = "metrics.jsonl"


class MetricsLog:
    """The lines of RUN/metrics.jsonl: each is encoded once and appended, or written with its segment."""

    def __init__(self, run: str, resume_step: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Keeps the lines that an earlier part of the run left up to `resume_step`.

        The first flush drops the others. last_step: step of the last line, None where there is none. skipped:
        number of lines of skipped steps.
        """
        uri = storage.join(run, _FILE)
        self.last_step: int | None = None
        self.skipped, keep, ended = 0, START, True
        for block in read_blocks(uri) if resume_step else ():
            beyond = np.flatnonzero(block.metrics.column("step") > resume_step)
            kept = block.metrics[: beyond[0]] if beyond.size else block.metrics
            if kept:
                self.last_step, keep = kept[-1]["step"], block.end(len(kept))
                self.skipped += len(kept.having("skipped"))
                ended = beyond.size > 0 or block.content.endswith(b"\n")
            if beyond.size:
                break
        self._file = GrowingFile(uri, keep, segment_bytes)
        if not ended:
            self._file.write(b"\n")

    def append(self, **values: Any) -> None:
        self._file.write(encode_lines([values]))

    def flush(self) -> None:
        """Write the new lines and have them on the disk. Raises OSError; the next flush tries again."""
        self._file.flush()


def read_metrics(run: str) -> Metrics:
    """The lines of the run's metrics, none where there are none; ValueError where one is damaged."""
    uri = storage.join(run, _FILE)
    return joined(uri, read_blocks(uri))


# What a worker does, for who reads its log.
LOG = logging.getLogger("diptych")

Progress = Callable[[dict[str, Any]], None]

# Seconds between steps that are shown, and between writes of the metrics.
_SHOW_SECONDS, _WRITE_SECONDS = 1.0, 30.0


class RunLog:
    """The lines of metrics.jsonl and what `progress` hears, about once a second.

    And the run's other files for people. One that cannot be written ends no step: a warning says so once, and
    each later write tries it again.
    """

    def __init__(
        self,
        run: str,
        plan: Plan,
        steps: int,
        start_step: int,
        progress: Progress,
        held: Held | None = None,
    ) -> None:
        """`held` is the lease under which the run is written, if there is one."""
        self._run, self._plan, self._steps, self._progress = run, plan, steps, progress
        self._held = held
        storage.make_folder(run)
        self._metrics, self._board = MetricsLog(run, start_step), TensorBoard(run, start_step)
        self._kept: dict[str, Callable[[], None]] = {}
        self._unwritten: set[str] = set()
        self.last_step, self._skipped = start_step, self._metrics.skipped
        self._stepped_at = self._written_at = time.monotonic()
        self._shown_at = -math.inf

    def begin(self, workers: int, *, resumed: bool) -> None:
        """Note that so many workers take over at the step so far, and which steps before it are not noted."""
        last = self._metrics.last_step or 0
        self._append({"step": self.last_step, "epoch": self._epoch(self.last_step), "workers": workers})
        if resumed and last < self.last_step:
            self.warn(f"metrics.jsonl lacks steps {last + 1} to {self.last_step}: they could not be written")

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
        self._tell(done, **values)
        self.write()
        self._stepped_at = time.monotonic()

    def warn(self, message: str) -> None:
        """Note a warning, after the steps so far."""
        self.note(self.last_step, warning=message)

    def keep(self, name: str, write: Callable[[], None]) -> None:
        """Have `write` called for the file `name` of the run, at each write of the log until it succeeds."""
        self._kept[name] = write

    def write(self) -> None:
        """Write all of it; the training waits no longer than a moment for a storage that is away."""
        with storage.briefly():
            self._write()

    def _write(self) -> None:
        """Raises UnsavedError where another process has taken the run over."""
        files = {"metrics.jsonl": self._metrics.flush, **self._kept, "tensorboard": self._board.flush}
        for name, flush in files.items():
            try:
                storage.check_folder(self._run)
                if self._held:
                    self._held.check()
                flush()
            except OSError as error:
                self._failed(name, error)
                if storage.transient(error):
                    break  # The other files are in the same place.
            else:
                self._unwritten.discard(name)
                self._kept.pop(name, None)
        self._written_at = time.monotonic()

    def end(self) -> None:
        """Write what is still to be written, waiting for the storage, and say what could not be."""
        self._write()
        if self._unwritten:
            missing = ", ".join(sorted(self._unwritten))
            self._tell(self.last_step, warning=f"{self._run} is complete but for {missing}")

    def _failed(self, name: str, error: OSError) -> None:
        if name not in self._unwritten:
            self._unwritten.add(name)
            reason = storage.first_line(error)
            self._tell(self.last_step, warning=f"{name} could not be written: {reason}; it is tried again")

    def _tell(self, done: int, **values: Any) -> None:
        line = {"step": done, "epoch": self._epoch(done), **values}
        LOG.info("step %d: %s", done, ", ".join(f"{key} {value}" for key, value in values.items()))
        self._append(line)
        self._progress({**line, "steps": self._steps})

    def _append(self, line: dict[str, Any]) -> None:
        self._metrics.append(**line)
        self._board.append(line)

    def _epoch(self, done: int) -> int:
        """Number of the epoch, from 1, that the last of `done` steps belongs to; 0 before the first."""
        return -(-done // self._plan.steps_per_epoch)
