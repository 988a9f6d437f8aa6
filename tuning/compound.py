"""EfficientNet's compound scaling of a training config: depth, width and resolution together. Pure.

Tan and Le 2019, eq. 3: d = alpha^phi, w = beta^phi, r = gamma^phi with alpha * beta^2 * gamma^2 near 2, so
that the multiply-adds, which grow with d * w^2 * r^2, double with each phi.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

from training.config import TrainConfig
from training.cost import encoder_cost
from training.encoder_config import EFFICIENTNETS, SCALED, Scaling, scaling
from tuning.config import SearchConfig
from tuning.space import with_values

Dimension = Literal["compound", "depth", "width", "resolution"]


class Coefficients(NamedTuple):
    """By how much depth, width and resolution grow with each phi."""

    alpha: float
    beta: float
    gamma: float

    @property
    def growth(self) -> float:
        """By how much multiply-adds grow with each phi."""
        return self.alpha * self.beta**2 * self.gamma**2


# What Tan and Le found for B0 (section 3.3), and what doubles the cost by one dimension alone.
COEFFICIENTS: dict[Dimension, Coefficients] = {
    "compound": Coefficients(1.2, 1.1, 1.15),
    "depth": Coefficients(2.0, 1.0, 1.0),
    "width": Coefficients(1.0, math.sqrt(2), 1.0),
    "resolution": Coefficients(1.0, 1.0, math.sqrt(2)),
}


def coefficients_of(config: TrainConfig) -> Coefficients:
    """Those of the config's encoder; the paper's where it has none."""
    given = [getattr(config.encoder, name) for name in Coefficients._fields]
    if not any(given):
        return COEFFICIENTS["compound"]
    return Coefficients(*(value or 1.0 for value in given))


def scaled(config: TrainConfig, coefficients: Coefficients, phi: float) -> TrainConfig:
    """The config with its EfficientNet, and the views it is shown, scaled to `phi`.

    Raises ValueError for another encoder, or one that was scaled already.
    """
    encoder = config.encoder
    if encoder.name not in (SCALED, "efficientnet-b0"):
        way_out = (
            "set encoder.name=efficientnet-b0" if encoder.name in EFFICIENTNETS else "only EfficientNets"
        )
        raise ValueError(f"encoder.name={encoder.name} cannot be scaled: {way_out}")
    base = _base(config)
    if base.width == base.depth == 1:  # The config says by itself how it was scaled, and can be again.
        said = {
            **coefficients._asdict(),
            "phi": phi,
            "base_size": base.resolution,
            "width": None,
            "depth": None,
        }
    else:
        sizes = {"width": base.width * coefficients.beta**phi, "depth": base.depth * coefficients.alpha**phi}
        said = {**dict.fromkeys((*Coefficients._fields, "phi", "base_size")), **sizes}
    return with_values(
        config,
        {
            "encoder.name": SCALED,
            **{f"encoder.{name}": value for name, value in said.items()},
            "data.view.size": round(base.resolution * coefficients.gamma**phi),
        },
    )


def on_surface(u: float, v: float, growth: float = 2.0) -> Coefficients:
    """Two numbers from 0 to 1 to coefficients of 1 and more whose multiply-adds grow by `growth`.

    Uniform numbers give logarithms that are uniform on that triangle: each way to share the growth out
    between depth, width and resolution is as likely.
    """
    depth, width, resolution = 1 - math.sqrt(u), math.sqrt(u) * v, math.sqrt(u) * (1 - v)
    return Coefficients(growth**depth, growth ** (width / 2), growth ** (resolution / 2))


def scoring(search: SearchConfig) -> Callable[[TrainConfig, float], float]:
    """What trials are ranked by: accuracy; in a search for coefficients set off against cost.

    Raises ValueError where such a search has an encoder that cannot be scaled.
    """
    if not search.compound:
        return lambda config, accuracy: accuracy
    target = 2 * multiply_adds(scaled(search.train, COEFFICIENTS["compound"], 0.0))
    return lambda config, accuracy: score(accuracy, multiply_adds(config), target)


def multiply_adds(config: TrainConfig) -> int:
    """Of the config's encoder, for one of its views."""
    return encoder_cost(config.encoder, config.data.view.size).multiply_adds


def score(accuracy: float, multiply_adds: float, target: float) -> float:
    """Accuracy, set off against cost: ACC * (FLOPS / T)^-0.07 (Tan and Le 2019, section 4)."""
    return accuracy * (multiply_adds / target) ** -0.07


def _base(config: TrainConfig) -> Scaling:
    """What phi = 0 stands for."""
    encoder = config.encoder
    if any(getattr(encoder, name) for name in Coefficients._fields):
        encoder = replace(encoder, phi=0.0)
    base = scaling(encoder)
    return base if encoder.gamma else base._replace(resolution=config.data.view.size)
