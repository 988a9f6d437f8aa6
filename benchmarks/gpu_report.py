"""What a section of gpu.py is given, and what it leaves: lines as they come, a text and a JSON file."""

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import spread

NEEDS_CUDA = "needs CUDA"


@dataclass(frozen=True)
class Setting:
    """Where the sections run, on what, and how thoroughly. `small`: a dry run that says nothing of speed."""

    device: torch.device
    small: bool
    photographs: Path | None
    cifar10: Path | None
    output: Path
    runs: Path
    rounds: int
    batch_size: int
    epochs: int
    threads: int

    @property
    def gpu(self) -> int | None:
        """As pipelines take it."""
        return self.device.index if self.device.type == "cuda" else None


class Report:
    """One section's lines and results; `folder` gets NAME.txt and NAME.json with each that is added."""

    def __init__(self, name: str, folder: Path, seconds: float, machine: Mapping[str, Any]) -> None:
        self._place = folder / name
        self._started, self._seconds = time.monotonic(), seconds
        self._lines: list[str] = []
        self._found: dict[str, Any] = {
            "section": name, "status": "cut off", "machine": dict(machine), "results": [], "skipped": [],
        }  # fmt: skip

    @property
    def left(self) -> float:
        """Seconds that the section still has."""
        return self._seconds - (time.monotonic() - self._started)

    def say(self, line: str) -> None:
        """Print and keep a line."""
        print(line, flush=True)
        self._lines.append(line)
        self._write()

    def note(self, what: str, **values: Any) -> None:
        """Keep values that a line has said."""
        self._found["results"].append({"what": what, **values})
        self._write()

    def measured(self, what: str, values: Sequence[float], unit: str, form: str, **others: Any) -> None:
        """Print the median, the lowest and the highest of the rounds, and keep them all."""
        more = "".join(f"; {name.replace('_', ' ')} {value}" for name, value in others.items())
        self.say(f"  {what:<44} {spread(values, form)} {unit}{more}")
        self.note(what, unit=unit, values=list(values), **others)

    def skip(self, what: str, why: str) -> None:
        """Say what was not looked at, and why."""
        self._found["skipped"].append({"what": what, "why": why})
        self.say(f"  {what:<44} skipped: {why}")

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether so many seconds are left; if not, `what` is skipped."""
        if self.left > seconds:
            return True
        self.skip(what, "no time left")
        return False

    @contextmanager
    def part(self, what: str) -> Any:
        """A part whose failure is kept, and does not stop what comes after it in the section."""
        try:
            yield
        except (Exception, SystemExit):  # A command's own way to end.
            self.failed(what, traceback.format_exc())

    def failed(self, what: str, trace: str) -> None:
        """Keep a failure; the section's status is that from now on."""
        self._found["status"] = "failed"
        self._found.setdefault("errors", []).append({"what": what, "traceback": trace})
        self.say(f"  {what:<44} FAILED: {trace.strip().splitlines()[-1]}")
        self._lines.append(trace)
        self._write()

    def finish(self) -> bool:
        """Whether nothing failed."""
        if self._found["status"] != "failed":
            skipped = self._found["skipped"] and not self._found["results"]
            self._found["status"] = "skipped" if skipped else "done"
        self._found["seconds"] = round(time.monotonic() - self._started, 1)
        self._write()
        return self._found["status"] != "failed"

    def _write(self) -> None:
        self._place.with_suffix(".txt").write_text("\n".join(self._lines) + "\n")
        self._place.with_suffix(".json").write_text(json.dumps(self._found, indent=1) + "\n")


def finished(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_each(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The mean of as many calls as so many seconds hold, of one at least."""
    finished(device)
    started, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - started < seconds:
        work()
        finished(device)
        calls += 1
    return (time.perf_counter() - started) / calls


def in_turns(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    first: int = 0,
) -> dict[str, list[float]]:
    """Seconds of each for each round, in turns; a round before them warms up.

    The `first` calls of a turn are not timed.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            for _ in range(first):
                work()
            each = seconds_each(work, device, seconds)
            if number:
                found[name].append(each)
    return found
