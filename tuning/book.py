"""What becomes of a search's trials, written down as it happens, so that a search can go on."""

import time
from collections.abc import Callable, Collection
from typing import Any

from pipelines import storage
from tuning.compound import multiply_adds
from tuning.config import SearchConfig
from tuning.space import Point
from tuning.trials import Result, State, Trial, ranked, read_trials, write_trials
from tuning.variants import search_folder, shown_values, trial_config


class Book:
    """The trials of a search, also of an earlier call; `show` gets them, best first, at each change."""

    def __init__(self, search: SearchConfig, show: Callable[[list[Trial]], None]) -> None:
        self.search, self._show = search, show
        self._folder = search_folder(search)
        self._trials = {trial.runs[0]: trial for trial in read_trials(self._folder)}
        self._of: dict[str, Trial] = {}
        times = [result.seconds for trial in self._trials.values() for result in trial.results]
        self._began = time.monotonic() - max(times, default=0.0)
        self._settle()

    def points(self) -> list[Point]:
        """What was tried before, in the order in which it was."""
        return [trial.point for trial in sorted(self._trials.values(), key=lambda trial: trial.number)]

    def stopped(self) -> dict[str, int]:
        """The runs that were stopped early, and after how many images."""
        return {
            storage.join(self._folder, trial.run): trial.images
            for trial in self._trials.values()
            if trial.state == "stopped early"
        }

    def begin(self, key: str, point: Point, member: int | None) -> None:
        """A trial that `key` stands for has begun, or goes on."""
        if key not in self._of:
            self._of[key] = self._known(point, member)
        self._of[key].state = "running"
        self._changed()

    def tell(self, key: str, point: Point, result: dict[str, Any]) -> None:
        """A trial was evaluated."""
        trial = self._of[key]
        trial.values = shown_values(self.search, point)
        run = self._below(result["run"])
        if run not in trial.runs:
            trial.runs.append(run)
        seconds = time.monotonic() - self._began
        trial.add(Result(result["images"], result["accuracy"], result["score"], round(seconds, 1)))
        self._changed()

    def wait(self, keys: Collection[str]) -> None:
        """These trials wait for others."""
        for key in keys:
            self._of[key].state = "waiting"
        self._changed()

    def end(self, key: str, state: State, error: str = "") -> None:
        """A trial is over."""
        trial = self._of[key]
        trial.state, trial.error = state, error
        self._changed()

    def close(self) -> list[Trial]:
        """The trials, best first; those that are not over can go on later."""
        self._settle()
        self._changed()
        return ranked(self._trials.values())

    def _settle(self) -> None:
        for trial in self._trials.values():
            if trial.state in ("running", "waiting"):
                trial.state = "unfinished"

    def _changed(self) -> None:
        write_trials(self._folder, self._trials.values())
        self._show(ranked(self._trials.values()))

    def _known(self, point: Point, member: int | None) -> Trial:
        try:
            config = trial_config(self.search, point, member)
            run, cost = self._below(f"{config.output}/{config.name}"), multiply_adds(config)
        except ValueError:  # The trial itself will say so.
            run, cost = f"no run: {point}", 0
        new = Trial(len(self._trials), shown_values(self.search, point), point, [run], cost)
        trial = self._trials.setdefault(run, new)
        trial.runs, trial.error = trial.runs[:1], ""
        return trial

    def _below(self, run: str) -> str:
        return run.removeprefix(f"{self._folder}/")
