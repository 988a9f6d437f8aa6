"""The trials of a search, and their log OUTPUT/NAME/trials.jsonl: a JSON object per line, best first."""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from pipelines import storage
from pipelines.storage.checksums import encode_lines, read_lines
from training.errors import UnsavedError
from training.lease import Held
from tuning.compound import multiply_adds
from tuning.config import SearchConfig
from tuning.space import Point
from tuning.trial_config import search_folder, shown_values, trial_config

State = Literal["waiting", "running", "finished", "stopped early", "unfinished", "failed"]

_FILE = "trials.jsonl"


@dataclass(frozen=True)
class Result:
    """An evaluation of a trial: images trained on, accuracy, score, and seconds since the search began."""

    images: int
    accuracy: float
    score: float
    seconds: float


@dataclass
class Trial:
    """One trial: its values, its run, and its results.

    `point` holds the drawn values, `values` those by config key that follow from them. `run` is the folder
    below OUTPUT/NAME that it trains in. `multiply_adds` are those of the encoder for one view.
    """

    number: int
    values: dict[str, Any]
    point: Point
    run: str
    multiply_adds: int
    state: State = "running"
    error: str = ""
    results: list[Result] = field(default_factory=list)

    @property
    def score(self) -> float | None:
        return self.results[-1].score if self.results else None

    @property
    def accuracy(self) -> float | None:
        return self.results[-1].accuracy if self.results else None

    @property
    def images(self) -> int:
        return self.results[-1].images if self.results else 0

    def add(self, result: Result) -> None:
        """Add a result; one that a resumed search reports again keeps its time."""
        known = {old.images: old for old in self.results}
        if old := known.get(result.images):
            result = Result(result.images, result.accuracy, result.score, old.seconds)
        known[result.images] = result
        self.results = sorted(known.values(), key=lambda one: one.images)


class TrialLog:
    """The trial log of a search, with the trials of earlier calls; written to its folder at each change.

    `show` is then called with the trials, best first. `key` is Ray Tune's ID of a trial. `held` is the lease
    under which they are written, if any; once another process has taken it, `taken_over` is true and nothing
    is written or shown.
    """

    def __init__(
        self, search: SearchConfig, show: Callable[[list[Trial]], None], held: Held | None = None
    ) -> None:
        self.search, self.taken_over = search, False
        self._show, self._held = show, held
        self._folder = search_folder(search)
        self._by_run = {trial.run: trial for trial in read_trials(self._folder)}
        self._by_key: dict[str, Trial] = {}
        times = [result.seconds for trial in self._by_run.values() for result in trial.results]
        self._began = time.monotonic() - max(times, default=0.0)
        self._mark_unfinished()

    def points(self) -> list[Point]:
        """The points that were tried so far, in order."""
        return [trial.point for trial in sorted(self._by_run.values(), key=lambda trial: trial.number)]

    def stopped_early(self) -> dict[str, int]:
        """The URI of each run that was stopped early, and the number of images it trained on."""
        return {
            storage.join(self._folder, trial.run): trial.images
            for trial in self._by_run.values()
            if trial.state == "stopped early"
        }

    def start(self, key: str, point: Point) -> None:
        """Record that a trial starts or resumes."""
        if key not in self._by_key:
            self._by_key[key] = self._trial(point)
        self._by_key[key].state = "running"
        self._changed()

    def record(self, key: str, *, images: int, accuracy: float, score: float) -> None:
        """Record an evaluation of a trial."""
        seconds = round(time.monotonic() - self._began, 1)
        self._by_key[key].add(Result(images, accuracy, score, seconds))
        self._changed()

    def pause(self, keys: Collection[str]) -> None:
        """Record that these trials wait."""
        for key in keys:
            self._by_key[key].state = "waiting"
        self._changed()

    def end(self, key: str, state: State, error: str = "") -> None:
        """Record that a trial ended."""
        trial = self._by_key[key]
        trial.state, trial.error = state, error
        self._changed()

    def close(self) -> list[Trial]:
        """The trials, best first; those that have not ended are marked as unfinished."""
        self._mark_unfinished()
        self._changed()
        return ranked(self._by_run.values())

    def _mark_unfinished(self) -> None:
        for trial in self._by_run.values():
            if trial.state in ("running", "waiting"):
                trial.state = "unfinished"

    def _changed(self) -> None:
        try:
            if self._held:
                self._held.check()
        except UnsavedError:  # Ray Tune would not end for that; it asks whether to end after each change.
            self.taken_over = True
            return
        write_trials(self._folder, self._by_run.values())
        self._show(ranked(self._by_run.values()))

    def _trial(self, point: Point) -> Trial:
        """The trial of a point: that of an earlier call, or a new one."""
        try:
            config = trial_config(self.search, point)
            run = f"{config.output}/{config.name}".removeprefix(f"{self._folder}/")
            cost = multiply_adds(config)
        except ValueError:  # The trial itself reports the error.
            run, cost = f"no run: {point}", 0
        new = Trial(len(self._by_run), shown_values(self.search, point), point, run, cost)
        trial = self._by_run.setdefault(run, new)
        trial.error = ""
        return trial


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Sort best first: by score, equal ones by start; those without a score are last."""
    return sorted(trials, key=lambda trial: (-(trial.score or 0.0), not trial.results, trial.number))


def read_trials(folder: str) -> list[Trial]:
    """Read the trials of the search in `folder`, best first; none if none was started."""
    return [_parsed(line) for line in read_lines(storage.join(folder, _FILE))]


def write_trials(folder: str, trials: Iterable[Trial]) -> None:
    """Write all trials, replacing the file."""
    storage.write(storage.join(folder, _FILE), encode_lines(_line(trial) for trial in ranked(trials)))


def _line(trial: Trial) -> dict[str, Any]:
    values = asdict(trial)
    first = {key: values.pop(key) for key in ("number", "state", "run")}
    return {**first, "accuracy": trial.accuracy, "score": trial.score, "images": trial.images, **values}


def _parsed(line: dict[str, Any]) -> Trial:
    known = {field.name: line[field.name] for field in fields(Trial) if field.name in line}
    results = [Result(**result) for result in line["results"]]
    return Trial(**{**known, "results": results})
