"""Progress on the terminal: counts, a run's steps, and the phases of its start."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from training.evaluation.certainty import shown, shown_baselines
from training.evaluation.knn import COLLAPSED_RANK
from training.losses.matching import chance


class Startup:
    """Seconds of each phase of a start."""

    def __init__(self, began: float | None = None) -> None:
        """`began` by time.monotonic; unset: now."""
        self._began = self._reached = time.monotonic() if began is None else began
        self._phases: list[tuple[str, float]] = []

    @classmethod
    def of_the_command(cls) -> "Startup":
        """Count from the start of this process."""
        # Field 22: ticks since the machine started. Field 2 is a name that may contain spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = float(fields[19]) / os.sysconf("SC_CLK_TCK")
        return cls(time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks))

    def reached(self, phase: str) -> None:
        """`phase` has ended."""
        now = time.monotonic()
        self._phases.append((phase, now - self._reached))
        self._reached = now

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._phases)
        return f"first step after {self._reached - self._began:.1f} s: {phases}"


# Interval of progress lines if standard error is not a terminal.
_LOG_SECONDS = 30.0


class Bar:
    """A count and its total: a bar on a terminal; in a log, a line every half minute and one at the end."""

    def __init__(
        self, label: str, unit: str, total: int | None = None, done: int = 0, *, delay: float = 0.0
    ) -> None:
        """delay: seconds before it is first shown; if set, a terminal's bar is removed at the end."""
        console = Console(stderr=True)
        self._progress = _Progress(
            TextColumn("{task.description}"), BarColumn(), _Numbers(), console=console,
            transient=delay > 0, redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self._task = self._progress.add_task(label, total=total, completed=done, unit=unit, note="")
        self._is_terminal, self._begins = console.is_terminal, time.monotonic() + delay
        self._logged_at: float | None = None
        self._unlogged = False

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def done(self) -> int:
        return int(self._progress.tasks[0].completed)

    def update(self, count: int, *, total: int | None = None, note: str | None = None) -> None:
        """Add `count`; `note` is shown with it."""
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=count, total=total, **fields)
        now, self._unlogged = time.monotonic(), True
        if now < self._begins:
            return
        if self._is_terminal:
            self._progress.start()
        elif now - (self._logged_at or self._begins) >= _LOG_SECONDS:
            self._log()

    def close(self) -> None:
        """Show the last state."""
        if self._is_terminal:
            self._progress.stop()
        elif self._unlogged and time.monotonic() >= self._begins:
            self._log()

    def _log(self) -> None:
        (task,) = self._progress.tasks
        note = f"; {task.fields['note']}" if task.fields["note"] else ""
        print(f"{task.description}: {_numbers(task)}{note}", file=sys.stderr, flush=True)
        self._logged_at, self._unlogged = time.monotonic(), False


class _Progress(Progress):
    """A bar with its note on a line of its own below, as wide as the terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(task.fields["note"]) for task in self.tasks if task.fields["note"])


class _Numbers(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_numbers(task))


def _numbers(task: Task) -> str:
    """The count, the speed and the time left."""
    unit = f"{task.fields['unit']}s"
    parts = [f"{task.completed:,.0f}" + ("" if task.total is None else f" of {task.total:,.0f}") + f" {unit}"]
    if speed := task.finished_speed or task.speed:
        parts.append(f"{speed:,.1f} {unit}/s")
    if not task.finished and task.time_remaining is not None:
        parts.append(f"{timedelta(seconds=task.time_remaining)} left")
    return ", ".join(parts)


@contextmanager
def counted(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that shows a bar if the work takes longer than a second."""
    with Bar(what, unit, delay=1) as bar:
        yield lambda done, total: bar.update(done - bar.done, total=total)


def warn(message: str) -> None:
    """Print a warning on the terminal."""
    print(f"diptych: warning: {message}", file=sys.stderr)


class RunBar:
    """A run's steps on the terminal, a line for each evaluation, and one for the start."""

    def __init__(self, steps: int, done: int, batch_size: int, startup: Startup) -> None:
        self._steps, self._done, self._chance = steps, done, chance(batch_size)
        self._startup: Startup | None = startup
        self._bar: Bar | None = None

    def __enter__(self) -> "RunBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()

    def show(self, values: dict[str, Any]) -> None:
        if "phase" in values:
            if self._startup:
                self._startup.reached(values["phase"])
            return
        if self._bar is None:  # Not before, so that the speed excludes the start.
            self._bar = Bar("train", "step", self._steps, self._done)
        if "loss" not in values:
            print(f"step {values['step']}: {', '.join(_noted(values))}", flush=True)
            return
        if self._startup:
            self._startup.reached("first step")
            print(self._startup, flush=True)
            self._startup = None
        stages = {key: seconds for key, seconds in values.items() if key.endswith("_seconds")}
        waited = values["data_wait_seconds"] / sum(stages.values())
        note = (
            f"epoch {values['epoch']}, loss {values['loss']:.3f}, {self._matched(values)}learning rate "
            f"{values['learning_rate']:.3g}, {values['images_per_second']:,.0f} images/s, "
            f"{waited:.0%} waiting for data"
        )
        self._bar.update(values["step"] - self._bar.done, note=note)

    def _matched(self, values: dict[str, Any]) -> str:
        """View matching, if the objective has it."""
        if "view_matching" not in values:
            return ""
        return f"views matched {values['view_matching']:.1%} (chance {self._chance:.1%}), "


def _noted(values: dict[str, Any]) -> Iterator[str]:
    """Lines for an evaluation, a restart, a warning or quarantined images."""
    if "knn_top1" in values:
        pixels = f" (raw pixels {shown(values, 'knn_top1_pixels')})" if "knn_top1_pixels" in values else ""
        yield f"kNN accuracy {shown(values, 'knn_top1')}{pixels}"
    if "linear_top1" in values:
        yield f"linear probe accuracy {shown(values, 'linear_top1')}"
    if "top1" in values:
        yield f"classifier accuracy {shown(values, 'top1')}"
    if compared := shown_baselines(values):
        yield compared
    if "knn_top1_test" in values:
        yield f"on the test images {shown(values, 'knn_top1_test')}"
        yield shown_baselines(values, "_test")
    if "waiting" in values:
        yield f"waiting for {values['waiting']}"
    if "restarting" in values:
        yield f"resuming from this step: {values['restarting']}"
    if "moving" in values:
        yield "saved, resuming on other nodes"
    if "warning" in values:
        yield f"warning: {values['warning']}"
    if "rolled_back_to" in values:
        yield (
            f"warning: the loss was not finite several times in a row; restored the weights of step "
            f"{values['rolled_back_to']}"
        )
    if "skipped" in values:
        yield f"{values['skipped']:,} steps skipped so far, because the loss or gradient was not finite"
    if "quarantined" in values:
        yield f"{values['quarantined']:,} images quarantined so far"
    if "effective_rank" in values:
        yield f"effective rank {values['effective_rank']:.1f}"
        if values["effective_rank"] < COLLAPSED_RANK:
            yield "warning: the features have collapsed to a point; try a lower learning rate"
