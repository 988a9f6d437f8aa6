"""The trials of a search, as OUTPUT/NAME/trials.jsonl keeps them: one JSON object a line, the best first."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipelines import storage
from pipelines.json_lines import encode_lines, read_lines

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
    """One combination, and what became of it.

    `runs` are the folders below OUTPUT/NAME that it trained in: one, but for population-based training, which
    begins another with each change of its values. `point` is what was drawn, which gave `values` by config
    key. `multiply_adds` are those of the encoder for one view.
    """

    number: int
    values: dict[str, Any]
    point: dict[str, Any]
    runs: list[str]
    multiply_adds: int
    state: State = "running"
    error: str = ""
    results: list[Result] = field(default_factory=list)

    @property
    def run(self) -> str:
        return self.runs[-1]

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
        """Note an evaluation; one that is told of again, by a search that goes on, keeps its time."""
        known = [old for old in self.results if old.images != result.images]
        again = [old for old in self.results if old.images == result.images]
        if again:
            result = Result(result.images, result.accuracy, result.score, again[0].seconds)
        self.results = sorted([*known, result], key=lambda one: one.images)


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The best first: by score, and the first begun among equals; those that were never judged last."""
    return sorted(trials, key=lambda trial: (-(trial.score or 0.0), not trial.results, trial.number))


def read_trials(folder: str) -> list[Trial]:
    """The trials that a search in `folder` has begun, best first."""
    return [_trial(line) for line in read_lines(storage.join(folder, _FILE))]


def write_trials(folder: str, trials: Iterable[Trial]) -> None:
    """Write them whole."""
    storage.write(storage.join(folder, _FILE), encode_lines(_line(trial) for trial in ranked(trials)))


def _line(trial: Trial) -> dict[str, Any]:
    known = {"run": trial.run, "accuracy": trial.accuracy, "score": trial.score, "images": trial.images}
    fields = asdict(trial)
    return {"number": fields.pop("number"), "state": fields.pop("state"), **known, **fields}


def _trial(line: dict[str, Any]) -> Trial:
    fields = {key: value for key, value in line.items() if key in Trial.__dataclass_fields__}
    results: Any = [Result(**result) for result in line["results"]]
    return Trial(**{**fields, "results": results})
