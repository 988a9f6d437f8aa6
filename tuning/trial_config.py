"""Turn a point of a search space into a trial config, whose hash identifies the trial."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines import storage
from training.config import TrainConfig, config_hash
from training.metrics import read_metrics
from training.run_folder import read_config
from tuning.compound import Coefficients, base_of, doubles_the_cost, next_good_size, on_surface, scaled
from tuning.config import METRICS, SearchConfig
from tuning.space import Distribution, Point, Space, active, drawn_points, with_values

# Two numbers that stand for a point on the surface of alpha, beta and gamma.
_SURFACE = ("compound.u", "compound.v")

# A search for coefficients needs this share of sampled points to be affordable, or it is refused.
_SAMPLE, _LEAST_SHARE = 1000, 0.02

# Searched keys that may change the cost at phi = 0.
_SIZES = ("encoder.", "data.view.size")


def search_space(search: SearchConfig) -> Space:
    """The space a trial is drawn from: config keys, and with `compound` the surface of coefficients."""
    surface = {key: Distribution("uniform", (0.0, 1.0)) for key in _SURFACE} if search.compound else {}
    return search.distributions | surface


def trial_points(search: SearchConfig) -> list[Point]:
    """The points of a random or grid search. TPE draws as many by itself."""
    return search.points(search_space(search), affordable(search))


def affordable(search: SearchConfig) -> Callable[[Point], bool]:
    """Return the test whether a point may be tried; with `compound`, only networks of twice the cost may."""
    if not search.compound:
        return lambda point: True
    space, base = search_space(search), base_of(search.train)

    def costs_twice(point: Point) -> bool:
        values, coefficients = _values_and_coefficients(space, point)
        assert coefficients
        sizes = {key: value for key, value in values.items() if key.startswith(_SIZES)}
        phi_0 = base_of(with_values(search.train, sizes)) if sizes else base
        return doubles_the_cost(phi_0, coefficients)

    return costs_twice


def check_surface(search: SearchConfig) -> None:
    """Raises ValueError if a search for coefficients has too few networks of twice the cost."""
    if not search.compound:
        return
    points = drawn_points(search_space(search), search.seed, _SAMPLE)
    found = sum(map(affordable(search), points))
    if found < _LEAST_SHARE * len(points):
        size = search.train.data.view.size
        raise ValueError(
            f"compound=true: with train.data.view.size={size}, {found} of {len(points)} networks on "
            "alpha * beta^2 * gamma^2 = 2 cost twice phi 0 within 10 %, too few for a search; "
            f"try train.data.view.size={next_good_size(size)}"
        )


def search_folder(search: SearchConfig) -> str:
    """OUTPUT/NAME, the folder of the search."""
    return storage.join(search.output, search.name)


def trial_config(search: SearchConfig, point: Point) -> TrainConfig:
    """The training config of a trial; its run is OUTPUT/NAME/trials/HASH, with the hash of that config.

    Raises ValueError if the point's values do not fit together.
    """
    values, coefficients = _values_and_coefficients(search_space(search), point)
    config = with_values(search.train, values)
    if coefficients:
        config = scaled(config, coefficients, 1.0)
    if search.metric == "linear":
        config = replace(config, evaluation=replace(config.evaluation, linear=True))
    folder = storage.join(search_folder(search), "trials")
    return replace(config, output=folder, name=config_hash(config), workers=config.workers or 1)


def shown_values(search: SearchConfig, point: Point) -> dict[str, Any]:
    """A trial's values by config key, with coefficients in place of the point on their surface."""
    values, coefficients = _values_and_coefficients(search_space(search), point)
    named = coefficients._asdict() if coefficients else {}
    return values | {f"encoder.{key}": value for key, value in named.items()}


def ranking_line(search: SearchConfig, run: str) -> dict[str, Any]:
    """The metrics line that ranks the trial in `run`, a folder below OUTPUT/NAME; empty if there is none."""
    key = METRICS[search.metric]
    lines = read_metrics(storage.join(search_folder(search), run))
    return next((line for line in reversed(lines) if key in line), {})


def best_config(search: SearchConfig, run: str) -> TrainConfig:
    """The config with which `diptych train` repeats the trial in `run`, a folder below OUTPUT/NAME."""
    config, given = read_config(storage.join(search_folder(search), run)), search.train
    return replace(
        config,
        name=f"{search.name}-best",
        output=given.output,
        workers=given.workers,
        evaluation=given.evaluation,
    )


def _values_and_coefficients(space: Space, point: Point) -> tuple[Point, Coefficients | None]:
    """The values of config keys whose conditions hold, and the coefficients if the point has any."""
    values = active(space, point)
    drawn = [values.pop(key) for key in _SURFACE if key in values]
    return values, on_surface(*drawn) if drawn else None
