"""Progress on the terminal: counts, warnings, and the phases of a run's start."""

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
