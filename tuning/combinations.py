"""What the trials of a search try, one after the other: given points, or Optuna's TPE."""

import logging
from typing import Any

import optuna
from ray.tune.search import Searcher

from tuning.config import SearchConfig
from tuning.room import SCORE, Room
from tuning.space import Distribution, Point, active, drawn_points
from tuning.variants import offered, search_space

# How often Optuna is asked again where it gives a combination that was there before.
_TRIES = 20

# The same where all but a few in a hundred combinations may cost too much.
_TRIES_ON_THE_SURFACE = 200


class Combinations(Searcher):
    """`points`, and for tpe what Optuna makes of how they did; each when there is room for its trial.

    What TPE draws depends on the seed, on how many were drawn before and on their scores so far alone.
    """

    def __init__(self, search: SearchConfig, points: list[Point], room: Room) -> None:
        super().__init__(metric=SCORE, mode="max")
        self._search, self._space, self._room = search, search_space(search), room
        self._first, self._offered = points, offered(search)
        self._count = search.trials if search.searcher == "tpe" else len(points)
        self._points: dict[str, Point] = {}
        self._scores: dict[str, float] = {}

    def suggest(self, trial_id: str) -> Any:
        if self._room.all_begun:
            over = not self._room.running and not self._room.waiting
            return Searcher.FINISHED if over else None
        if not self._room.free:
            return None
        point = self._next()
        self._room.all_begun = point is None
        if point is not None:
            self._points[trial_id] = point
            self._room.run(trial_id)
        return point

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._score(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._score(trial_id, result or {})
        self._room.leave(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what a search goes on from is its book."""

    def _score(self, trial_id: str, result: dict[str, Any]) -> None:
        if SCORE in result:
            self._scores[trial_id] = result[SCORE]

    def _next(self) -> Point | None:
        """None where there is no other."""
        number = len(self._points)
        if number < min(self._count, len(self._first)):
            return self._first[number]
        return self._drawn(number) if number < self._count else None

    def _drawn(self, number: int) -> Point | None:
        study = self._study(number)
        before = list(self._points.values())
        for _ in range(_TRIES_ON_THE_SURFACE if self._search.compound else _TRIES):
            trial = study.ask()
            point = self._ask(trial)
            if point not in before and self._offered(point):
                return point
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        # Where few are left, Optuna gives those that did well over and over.
        others = drawn_points(self._space, self._search.seed, number + 1, self._offered)
        return next((point for point in others if point not in before), None)

    def _study(self, number: int) -> optuna.Study:
        optuna.logging.set_verbosity(logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=(self._search.seed + 1_000_003 * number) % 2**32,
            n_startup_trials=max(2, self._search.trials // 3),
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for trial_id, score in self._scores.items():
            point = self._points[trial_id]
            ranges = {key: _range(self._space[key]) for key in point}
            params = {key: _as_optuna_knows(self._space[key], value) for key, value in point.items()}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=score))
        return study

    def _ask(self, trial: optuna.Trial) -> Point:
        """The values whose conditions hold."""
        point: Point = {}
        for key, what in self._space.items():
            if key in active(self._space, {**point, key: None}):
                point[key] = _suggested(trial, key, what)
        return point


def _suggested(trial: optuna.Trial, key: str, what: Distribution) -> Any:
    if what.kind == "choice":
        return what.values[trial.suggest_categorical(key, range(len(what.values)))]
    if what.kind == "integers":
        return trial.suggest_int(key, *what.values, step=what.step)
    return trial.suggest_float(key, *what.values, log=what.kind == "loguniform")


def _as_optuna_knows(what: Distribution, value: Any) -> Any:
    """A choice is its number: Optuna takes no list for one."""
    return what.values.index(value) if what.kind == "choice" else value


def _range(what: Distribution) -> optuna.distributions.BaseDistribution:
    if what.kind == "choice":
        return optuna.distributions.CategoricalDistribution(range(len(what.values)))
    if what.kind == "integers":
        return optuna.distributions.IntDistribution(*what.values, step=what.step)
    return optuna.distributions.FloatDistribution(*what.values, log=what.kind == "loguniform")
