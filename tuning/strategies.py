"""Ray Tune's searchers and schedulers, as a search's config names them."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from tuning.config import SearchConfig
from tuning.space import Distribution, Point, Space, active
from tuning.variants import search_space

# What a trial reports beside Tune's own: how far it is, in evaluations, and how good.
EVALUATIONS, SCORE = "evaluations", "score"

# One trial in so many goes on from a rung to the next, so many times as long (Li et al. 2020; 2018).
_ASHA_ETA, _HYPERBAND_ETA = 4, 3

# The worst quarter follow the best quarter, each value times one of these (Jaderberg et al. 2017).
_POPULATION = {"quantile_fraction": 0.25, "perturbation_factors": (1.2, 0.8)}

# How often Optuna is asked again where it gives a combination that was there before.
_TRIES = 20


def member_number(search: SearchConfig, trial_id: str) -> int | None:
    """Which of a population's members a trial is; None where there is no population."""
    return _number(trial_id) if search.scheduler == "population" else None


def _number(trial_id: str) -> int:
    return int(trial_id.rpartition("_")[2])


def waits(search: SearchConfig) -> bool:
    """Whether all trials must have begun before some can go on."""
    return search.scheduler in ("hyperband", "population")


class _Population(PopulationBasedTraining):
    """Changes that depend on the search's seed, the member and its evaluation alone; ranges are kept."""

    def __init__(self, search: SearchConfig) -> None:
        space = search_space(search)
        self._seed = search.seed

        def explore(point: Point) -> Point:
            return {key: space[key].clipped(value) for key, value in point.items()}

        super().__init__(
            time_attr=EVALUATIONS,
            metric=SCORE,
            mode="max",
            perturbation_interval=1,
            hyperparam_mutations={
                key: list(what.values) if what.kind == "choice" else _sampler(what)
                for key, what in space.items()
            },
            custom_explore_fn=explore,
            synch=True,
            log_config=False,
            **_POPULATION,
        )

    def _checkpoint_or_exploit(self, trial: Any, *args: Any, **kwargs: Any) -> None:
        # It draws from the generators that all of a process shares.
        drawn = f"{self._seed} {_number(trial.trial_id)} {self._trial_state[trial].last_train_time}"
        random.seed(drawn)
        np.random.seed(zlib.crc32(drawn.encode()))
        super()._checkpoint_or_exploit(trial, *args, **kwargs)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._go_on_without(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._go_on_without(tune_controller, trial)

    def _go_on_without(self, controller: Any, member: Any) -> None:
        # Ray looks whether all have come only when one comes: the others would wait for ever for one that
        # has failed.
        state = self._trial_state[member]
        state.last_score, state.last_train_time = None, int(self._next_perturbation_sync)
        others = [other for other in controller.get_live_trials() if other is not member]
        times = [self._trial_state[other].last_train_time for other in others]
        if others and min(times) >= self._next_perturbation_sync:
            self.on_trial_result(controller, others[0], self._trial_state[others[0]].last_result or {})


class _Distinct(OptunaSearch):
    """Never the same combination twice; the search ends where Optuna finds no other."""

    def __init__(self, space: Callable[[Any], None], **settings: Any) -> None:
        super().__init__(space=space, metric=SCORE, mode="max", **settings)
        self._suggested: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        for _ in range(_TRIES):
            point = super().suggest(trial_id)
            if repr(point) not in self._suggested:
                self._suggested.add(repr(point))
                return point
            assert self._ot_study
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.FAIL)
        return Searcher.FINISHED


def searcher(
    search: SearchConfig, points: list[Point], before: list[Point], room: int
) -> SearchAlgorithm | Searcher:
    """What gives Tune `points` or, for tpe, those of trials `before` and then its own; `room` at a time."""
    if search.searcher != "tpe":
        return BasicVariantGenerator(points_to_evaluate=points, max_concurrent=0 if waits(search) else room)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tpe = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=max(2, search.trials // 3))
    distinct = _Distinct(_Suggest(search_space(search)), sampler=tpe, points_to_evaluate=before)
    return distinct if waits(search) else ConcurrencyLimiter(distinct, max_concurrent=room)


@dataclass(frozen=True)
class _Suggest:
    """Asks Optuna for the values whose conditions hold. A class, since Tune saves its searchers."""

    space: Space

    def __call__(self, trial: Any) -> None:
        point: Point = {}
        for key, what in self.space.items():
            if active(self.space, {**point, key: None}).keys() == {*point, key}:
                point[key] = _suggested(trial, key, what)


def _suggested(trial: Any, key: str, what: Distribution) -> Any:
    if what.kind == "choice":
        return trial.suggest_categorical(key, what.values)
    if what.kind == "integers":
        return trial.suggest_int(key, *what.values)
    return trial.suggest_float(key, *what.values, log=what.kind == "loguniform")


def param_space(search: SearchConfig) -> dict[str, Any]:
    """The space as Tune knows it: nothing where Optuna has its own."""
    return {} if search.searcher == "tpe" else {k: _sampler(what) for k, what in search_space(search).items()}


def _sampler(what: Distribution) -> Any:
    if what.kind == "choice":
        return tune.choice(list(what.values))
    low, high = what.values
    if what.kind == "integers":
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if what.kind == "loguniform" else tune.uniform(low, high)


def scheduler(search: SearchConfig, evaluations: int) -> TrialScheduler:
    """What decides after each of a trial's so many evaluations whether it goes on."""
    settings = {"time_attr": EVALUATIONS, "metric": SCORE, "mode": "max", "max_t": evaluations}
    if search.scheduler == "asha":
        return ASHAScheduler(**settings, grace_period=1, reduction_factor=_ASHA_ETA)
    if search.scheduler == "hyperband":
        return HyperBandScheduler(**settings, reduction_factor=_HYPERBAND_ETA)
    return _Population(search) if search.scheduler == "population" else FIFOScheduler()
