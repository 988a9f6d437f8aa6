"""The next point to try: from a given list, or drawn by Optuna's TPE from the scores so far."""

import logging
from typing import Any

import optuna
from ray.tune.search import Searcher

from tuning.config import SearchConfig
from tuning.space import Distribution, Point, active, drawn_points
from tuning.trial_config import affordable, search_space

# Keys of a trial's report to Ray Tune: the number of evaluations, the score, whether it has finished.
EVALUATIONS, SCORE, FINISHED = "evaluations", "score", "finished"

# How often Optuna is asked for a point that was not tried before.
_TRIES = 20

# The same in a search for coefficients, where only a few in a hundred points may be tried.
_TRIES_ON_THE_SURFACE = 200


class TrialSlots:
    """Slots for `size` trials at the same time; `all_started` is set when no new trial will start."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.running: set[str] = set()
        self.paused: set[str] = set()
        self.all_started = False

    @property
    def free(self) -> bool:
        """Whether another trial may run."""
        return len(self.running) < self.size

    def occupy(self, trial_id: str) -> None:
        """Occupy a slot for a trial that starts or resumes."""
        self.paused.discard(trial_id)
        self.running.add(trial_id)

    def pause(self, trial_id: str) -> None:
        """Free the slot of a trial that pauses."""
        self.running.discard(trial_id)
        self.paused.add(trial_id)

    def release(self, trial_id: str) -> None:
        """Free the slot of a trial that ended."""
        self.running.discard(trial_id)
        self.paused.discard(trial_id)


class PointSearcher(Searcher):
    """Suggests `points` in order, then, with TPE, points that Optuna draws; each when a trial slot is free.

    TPE's draws depend only on the seed, the number of earlier draws, and the scores so far.
    """

    def __init__(self, search: SearchConfig, points: list[Point], slots: TrialSlots) -> None:
        super().__init__(metric=SCORE, mode="max")
        self._search, self._space, self._slots = search, search_space(search), slots
        self._given, self._affordable = points, affordable(search)
        self._count = search.trials if search.searcher == "tpe" else len(points)
        self._points: dict[str, Point] = {}
        self._scores: dict[str, float] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next point; None while no slot is free; FINISHED once all trials have ended.

        It does not finish earlier, because Tune then ends the workers of paused trials.
        """
        if self._slots.all_started:
            ended = not self._slots.running and not self._slots.paused
            return Searcher.FINISHED if ended else None
        if not self._slots.free:
            return None
        point = self._next()
        self._slots.all_started = point is None
        if point is not None:
            self._points[trial_id] = point
            self._slots.occupy(trial_id)
        return point

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record the score of an evaluation."""
        if SCORE in result:
            self._scores[trial_id] = result[SCORE]

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record the last score, and release the trial's slot."""
        self.on_trial_result(trial_id, result or {})
        self._slots.release(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a search resumes from its trial log."""

    def _next(self) -> Point | None:
        """The next point, or None if there is no other."""
        number = len(self._points)
        if number < min(self._count, len(self._given)):
            return self._given[number]
        return self._drawn(number) if number < self._count else None

    def _drawn(self, number: int) -> Point | None:
        study = self._study(number)
        tried = list(self._points.values())
        for _ in range(_TRIES_ON_THE_SURFACE if self._search.compound else _TRIES):
            trial = study.ask()
            point = self._ask(trial)
            if point not in tried and self._affordable(point):
                return point
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        # Where few points are left, Optuna suggests the best ones again and again.
        others = drawn_points(self._space, self._search.seed, number + 1, self._affordable)
        return next((point for point in others if point not in tried), None)

    def _study(self, number: int) -> optuna.Study:
        """A study of the trials so far, whose sampler is seeded for draw `number`."""
        optuna.logging.set_verbosity(logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=(self._search.seed + 1_000_003 * number) % 2**32,
            n_startup_trials=max(2, self._search.trials // 3),
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for trial_id, score in self._scores.items():
            point = self._points[trial_id]
            ranges = {key: _optuna_distribution(self._space[key]) for key in point}
            params = {key: _optuna_value(self._space[key], value) for key, value in point.items()}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=score))
        return study

    def _ask(self, trial: optuna.Trial) -> Point:
        """A value for each key whose condition holds."""
        point: Point = {}
        for key, distribution in self._space.items():
            if key in active(self._space, {**point, key: None}):
                point[key] = _suggested(trial, key, distribution)
        return point


def _suggested(trial: optuna.Trial, key: str, distribution: Distribution) -> Any:
    if distribution.kind == "choice":
        return distribution.values[trial.suggest_categorical(key, range(len(distribution.values)))]
    if distribution.kind == "integers":
        return trial.suggest_int(key, *distribution.values, step=distribution.step)
    return trial.suggest_float(key, *distribution.values, log=distribution.kind == "loguniform")


def _optuna_value(distribution: Distribution, value: Any) -> Any:
    """The value for Optuna; a choice is given by its number, because Optuna takes no lists as choices."""
    return distribution.values.index(value) if distribution.kind == "choice" else value


def _optuna_distribution(distribution: Distribution) -> optuna.distributions.BaseDistribution:
    if distribution.kind == "choice":
        return optuna.distributions.CategoricalDistribution(range(len(distribution.values)))
    if distribution.kind == "integers":
        return optuna.distributions.IntDistribution(*distribution.values, step=distribution.step)
    return optuna.distributions.FloatDistribution(*distribution.values, log=distribution.kind == "loguniform")
