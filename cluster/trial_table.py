"""The trials of a search as a table on the terminal, while they run and afterwards."""

import math
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from tuning.trials import Trial

# More rows than a terminal has lines would scroll at each change.
_ROWS = 20

_COLOURS = {"running": "cyan", "finished": "green", "failed": "red"}


def trial_table(trials: Sequence[Trial], count: int, most: int | None = None) -> Table:
    """A table with a row for each trial, at most `most`; the search will have `count` trials."""
    ended = sum(trial.state in ("finished", "stopped early", "failed") for trial in trials)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    table = Table(title=f"{ended} of {count} trials have ended", title_justify="left", box=None)
    for heading in ("trial", "accuracy", "score", "images", "state"):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    for key in keys:
        table.add_column(key, justify="right", overflow="fold")
    for trial in trials[:most]:
        accuracy = "" if trial.accuracy is None else f"{trial.accuracy:.1%}"
        score = "" if trial.score is None else f"{trial.score:.3f}"
        values = [escape(shown(trial.values[key])) if key in trial.values else "" for key in keys]
        table.add_row(
            str(trial.number), accuracy, score, f"{trial.images:,}", trial.state, *values,
            style=_COLOURS.get(trial.state),
        )  # fmt: skip
    return table


def shown(value: object) -> str:
    """A value as a person writes it."""
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def described(trial: Trial) -> str:
    """A trial's values in one line."""
    return ", ".join(f"{key}={shown(value)}" for key, value in trial.values.items())


class LiveTrials:
    """The table, redrawn at each change; without a terminal, a line for each evaluation."""

    def __init__(self, count: int) -> None:
        self._count, self._console = count, Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._printed: dict[int, tuple[int, str]] = {}

    def __enter__(self) -> "LiveTrials":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, trials: Sequence[Trial]) -> None:
        if self._live:
            self._live.update(trial_table(trials, self._count, _ROWS), refresh=True)
            return
        for trial in trials:
            state = trial.images, trial.error
            if self._printed.get(trial.number, (0, "")) != state:
                self._printed[trial.number] = state
                found = f"failed: {trial.error}" if trial.error else f"{trial.accuracy:.1%}"
                self._console.print(
                    f"trial {trial.number}: {found} after {trial.images:,} images ({described(trial)})",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
