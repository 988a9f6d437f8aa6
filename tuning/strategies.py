"""Ray Tune's searchers and schedulers, as a search's config names them."""

import random
import zlib
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import FIFOScheduler, HyperBandScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from tuning.asha import ASHA
from tuning.combinations import Combinations
from tuning.config import SearchConfig
from tuning.room import EVALUATIONS, SCORE, Room
from tuning.space import Distribution, Point
from tuning.variants import search_space

# HyperBand's eta: one trial in so many goes on, so many times as far (Li et al. 2018, section 3.1).
_ETA = 3

# The worst quarter follow the best quarter, each value times one of these (Jaderberg et al. 2017).
_POPULATION = {"quantile_fraction": 0.25, "perturbation_factors": (1.2, 0.8)}


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


def searcher(search: SearchConfig, points: list[Point], room: Room) -> SearchAlgorithm | Searcher:
    """What gives Tune `points` and then, for tpe, its own."""
    if waits(search):
        return BasicVariantGenerator(points_to_evaluate=points)
    return Combinations(search, points, room)


def param_space(search: SearchConfig) -> dict[str, Any]:
    """The space as Tune knows it, where it is Tune that takes points of it."""
    return {k: _sampler(what) for k, what in search_space(search).items()} if waits(search) else {}


def _sampler(what: Distribution) -> Any:
    if what.kind == "choice":
        return tune.choice(list(what.values))
    low, high = what.values
    if what.kind == "integers":
        return tune.randint(low, high + 1) if what.step == 1 else tune.qrandint(low, high, what.step)
    return tune.loguniform(low, high) if what.kind == "loguniform" else tune.uniform(low, high)


def scheduler(search: SearchConfig, evaluations: int, room: Room) -> TrialScheduler:
    """What decides after each of a trial's so many evaluations whether it goes on."""
    if search.scheduler == "asha":
        return ASHA(evaluations, room)
    if search.scheduler == "hyperband":
        return HyperBandScheduler(
            time_attr=EVALUATIONS, metric=SCORE, mode="max", max_t=evaluations, reduction_factor=_ETA
        )
    return _Population(search) if search.scheduler == "population" else FIFOScheduler()
