"""From a point of a search's space to the training config of a trial, whose hash is the trial's identity."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines import storage
from training.checkpoint import Checkpoints, checkpoint_bytes
from training.config import TrainConfig, config_hash
from training.metrics import read_metrics
from training.record import read_config
from tuning.compound import base_of, doubles_the_cost, next_good_size, on_surface, scaled
from tuning.config import METRICS, SearchConfig
from tuning.space import Distribution, Point, Space, active, drawn_points, with_values
from tuning.trials import Trial

# Two numbers that stand for a point of the surface of alpha, beta and gamma.
_SURFACE = ("compound.u", "compound.v")

# Points that are looked at before a search for coefficients, and how many of them it must be able to try.
_LOOKS, _LEAST_SHARE = 1000, 0.02

# Searched keys that may change what phi = 0 costs.
_SIZES = ("encoder.", "data.view.size")

# A population's members wait for each other: none is more evaluations ahead than one.
_AHEAD = 2


def search_space(search: SearchConfig) -> Space:
    """All that is drawn for a trial: values of config keys, and a point of the surface of coefficients."""
    surface = {key: Distribution("uniform", (0.0, 1.0)) for key in _SURFACE} if search.compound else {}
    return search.distributions | surface


def trial_points(search: SearchConfig) -> list[Point]:
    """The points that are tried, where none is chosen by how those before it did."""
    return search.points(search_space(search), offered(search))


def offered(search: SearchConfig) -> Callable[[Point], bool]:
    """Whether the search may try a point: one for coefficients tries networks of twice the cost alone."""
    if not search.compound:
        return lambda point: True
    space, base = search_space(search), base_of(search.train)

    def costs_twice(point: Point) -> bool:
        values = active(space, point)
        coefficients = on_surface(*(values[key] for key in _SURFACE))
        sizes = {key: value for key, value in values.items() if key.startswith(_SIZES)}
        phi_0 = base_of(with_values(search.train, sizes)) if sizes else base
        return doubles_the_cost(phi_0, coefficients)

    return costs_twice


def check_surface(search: SearchConfig) -> None:
    """Raises ValueError where a search for coefficients has too few networks of twice the cost to offer."""
    if not search.compound:
        return
    points = drawn_points(search_space(search), search.seed, _LOOKS)
    found = sum(map(offered(search), points))
    if found < _LEAST_SHARE * len(points):
        size = search.train.data.view.size
        raise ValueError(
            f"compound=true: with train.data.view.size={size}, {found} of {len(points)} networks on "
            "alpha * beta^2 * gamma^2 = 2 cost twice phi 0 within 10 %, too few to search among; "
            f"try train.data.view.size={next_good_size(size)}"
        )


def search_folder(search: SearchConfig) -> str:
    """OUTPUT/NAME, where the search is written."""
    return storage.join(search.output, search.name)


def trial_config(
    search: SearchConfig, point: Point, member: int | None = None, branch: str | None = None
) -> TrainConfig:
    """The training config of a trial; its run is OUTPUT/NAME/trials/HASH, with the hash of that config.

    `member` is the number of a population's member, which has a seed of its own; `branch` the checkpoint it
    goes on from. Raises ValueError where the point's values do not go together.
    """
    values = active(search_space(search), point)
    drawn = [values.pop(key) for key in _SURFACE if key in values]
    config = with_values(search.train, values)
    if drawn:
        config = scaled(config, on_surface(*drawn), 1.0)
    if search.metric == "linear":
        config = replace(config, evaluation=replace(config.evaluation, linear=True))
    if member is not None:
        config = replace(
            config,
            seed=config.seed + member,
            branch_from=branch or config.branch_from,
            checkpoint=_kept(config),
        )
    folder = storage.join(search_folder(search), "trials")
    return replace(config, output=folder, name=config_hash(config), workers=config.workers or 1)


def shown_values(search: SearchConfig, point: Point) -> dict[str, Any]:
    """A trial's values by config key, with coefficients for the point of their surface."""
    values = active(search_space(search), point)
    drawn = [values.pop(key) for key in _SURFACE if key in values]
    coefficients = on_surface(*drawn)._asdict() if drawn else {}
    return values | {f"encoder.{key}": value for key, value in coefficients.items()}


def branched(search: SearchConfig, run: str, step: int) -> str:
    """The URI of a copy of the checkpoint that `run` has at `step`: its own goes with time."""
    name = run.rpartition("/")[2]
    copy = storage.join(search_folder(search), "branches", f"{name}-step-{step:09}.pt")
    if not storage.exists(copy):
        content = checkpoint_bytes(Checkpoints(run, keep=1).uri(step))
        if content is None:
            raise ValueError(f"{run} has no checkpoint of step {step} any more")
        storage.write(copy, content)
    return copy


def judged_line(search: SearchConfig, trial: Trial) -> dict[str, Any]:
    """The line of the trial's metrics that it is ranked by; empty where there is none."""
    key = METRICS[search.metric]
    lines = read_metrics(storage.join(search_folder(search), trial.run))
    return next((line for line in reversed(lines) if key in line), {})


def best_config(search: SearchConfig, run: str) -> TrainConfig:
    """What `diptych train` would take to do the trial in `run`, a folder below OUTPUT/NAME, again."""
    config, users = read_config(storage.join(search_folder(search), run)), search.train
    # What a search sets for its trials alone.
    own = ["output", "workers", "evaluation"]
    if search.scheduler == "population":
        own += ["seed", "branch_from", "checkpoint"]
    return replace(config, name=f"{search.name}-best", **{name: getattr(users, name) for name in own})


def _kept(config: TrainConfig) -> Any:
    """Checkpoints stay until a member that goes on from them has begun."""
    keep = max(config.checkpoint.keep, _AHEAD)
    return replace(config.checkpoint, keep=keep, every_steps=10**9, every_minutes=None)
