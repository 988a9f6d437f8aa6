"""Tables of jobs, nodes and trials on the terminal."""

import math
import time
from collections.abc import Sequence
from datetime import datetime
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from cluster.ray_cluster import address, cluster
from cluster.staging import ENTRYPOINT, Staged
from tuning.trials import Trial


def print_staged(job: Staged, address: str) -> None:
    """Print what a submission would send, install and run."""
    print(f"{address}: {job.why}")
    for name, content in sorted(job.files.items()):
        print(f"{len(content):>9,}  {name}")
    print(f"{job.size:>9,}  bytes in {len(job.files)} files would be sent")
    print(f"runs: {job.entrypoint}")


def print_jobs(jobs: list[Any]) -> None:
    """Print a line for each job."""
    rows = [("job", "status", "started", "took", "command")]
    for job in jobs:
        rows.append((job.submission_id, str(job.status), _time(job.start_time), _took(job), _command(job)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *cells, command in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), command]))


def print_job(job: Any) -> None:
    """Print all details of a job."""
    rows = {
        "job": job.submission_id,
        "status": str(job.status),
        "command": _command(job),
        "started": _time(job.start_time),
        "took": _took(job),
        "exit code": "" if job.driver_exit_code is None else str(job.driver_exit_code),
        "message": (job.message or "").splitlines()[0] if job.message else "",
    }
    for key, value in rows.items():
        if value:
            print(f"{key:9}  {value}")


def _command(job: Any) -> str:
    return job.entrypoint.replace(ENTRYPOINT, "diptych")


def _time(milliseconds: int | None) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1e3):%Y-%m-%d %H:%M:%S}" if milliseconds else ""


def _took(job: Any) -> str:
    if not job.start_time:
        return ""
    seconds = int((job.end_time or time.time() * 1e3) - job.start_time) // 1000
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def print_nodes() -> bool:
    """Print the nodes; returns whether there is a cluster."""
    there = address()
    if there is None:
        return False
    with cluster(cpus=0):
        import ray

        table = Table(title=f"cluster at {there}", title_justify="left", box=None)
        for heading in ("node", "address", "state", "CPUs", "GPUs", "memory, GB"):
            table.add_column(
                heading, justify="right" if heading in ("CPUs", "GPUs", "memory, GB") else "left"
            )
        for node in sorted(ray.nodes(), key=lambda node: (not node["Alive"], node["NodeID"])):
            resources = node["Resources"]
            table.add_row(
                node["NodeID"][:8], node["NodeManagerAddress"], "alive" if node["Alive"] else "dead",
                f"{resources.get('CPU', 0):g}", f"{resources.get('GPU', 0):g}",
                f"{resources.get('memory', 0) / 1e9:.1f}",
            )  # fmt: skip
    Console().print(table)
    return True


# With more rows than the terminal has lines, it would scroll at each change.
_ROWS = 20

_COLOURS = {"running": "cyan", "finished": "green", "failed": "red"}


def trial_table(trials: Sequence[Trial], count: int, most: int | None = None) -> Table:
    """A table with a row for each trial, at most `most`; `count` is the number of trials to come in all."""
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
    """A value as text, with three significant digits for a float."""
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def described(trial: Trial) -> str:
    """A trial's values in one line."""
    return ", ".join(f"{key}={shown(value)}" for key, value in trial.values.items())


class LiveTrials:
    """The table of trials, redrawn at each change; without a terminal, a line for each evaluation."""

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
