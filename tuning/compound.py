"""EfficientNet's compound scaling of a training config: depth, width and resolution together. Pure.

Tan and Le 2019, eq. 3: d = alpha^phi, w = beta^phi, r = gamma^phi with alpha * beta^2 * gamma^2 near 2, so
that the multiply-adds, which grow with d * w^2 * r^2, double with each phi. Layers, channels (in eights) and
the sides of feature maps are whole numbers, so with small images the cost may grow 7 times instead.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

from training.config import TrainConfig
from training.config.encoder import EFFICIENTNETS, SCALED, Scaling, scaling
from training.models.encoders import encoder_cost
from tuning.config import SearchConfig
from tuning.space import with_values

Dimension = Literal["compound", "depth", "width", "resolution"]


class Coefficients(NamedTuple):
    """Factors by which depth, width and resolution grow with each phi."""

    alpha: float
    beta: float
    gamma: float

    @property
    def growth(self) -> float:
        """Factor by which multiply-adds grow with each phi."""
        return self.alpha * self.beta**2 * self.gamma**2


# Factor by which the cost should grow with each phi, and the relative error that is accepted.
_GROWTH, _TOLERANCE = 2.0, 0.1

# Tan and Le's for B0 (section 3.3), and those that double the cost by one dimension alone.
COEFFICIENTS: dict[Dimension, Coefficients] = {
    "compound": Coefficients(1.2, 1.1, 1.15),
    "depth": Coefficients(2.0, 1.0, 1.0),
    "width": Coefficients(1.0, math.sqrt(2), 1.0),
    "resolution": Coefficients(1.0, 1.0, math.sqrt(2)),
}


def coefficients_of(config: TrainConfig) -> Coefficients:
    """The coefficients of the config's encoder; the paper's if it has none."""
    given = [getattr(config.encoder, name) for name in Coefficients._fields]
    if not any(given):
        return COEFFICIENTS["compound"]
    return Coefficients(*(value or 1.0 for value in given))


def scaled(config: TrainConfig, coefficients: Coefficients, phi: float) -> TrainConfig:
    """The config with its EfficientNet and its views scaled to `phi`.

    Raises ValueError for another encoder, or one whose name fixes its scale.
    """
    encoder = config.encoder
    if encoder.name not in (SCALED, "efficientnet-b0"):
        way_out = (
            "set encoder.name=efficientnet-b0" if encoder.name in EFFICIENTNETS else "only EfficientNets can"
        )
        raise ValueError(f"encoder.name={encoder.name} cannot be scaled: {way_out}")
    base = base_of(config)
    fields = {
        "name": SCALED,
        **dict.fromkeys((*Coefficients._fields, "phi", "base_size", "width", "depth")),
        **_scale_fields(base, coefficients, phi),
    }
    size = round(base.resolution * coefficients.gamma**phi)
    values = {f"encoder.{name}": value for name, value in fields.items()}
    return with_values(config, values | {"data.view.size": size})


def _scale_fields(base: Scaling, coefficients: Coefficients, phi: float) -> dict[str, float]:
    """The encoder's fields that set its scale."""
    if base.width == base.depth == 1:  # Coefficients and phi, so that the result can be scaled again.
        return {**coefficients._asdict(), "phi": phi, "base_size": base.resolution}
    return {"width": base.width * coefficients.beta**phi, "depth": base.depth * coefficients.alpha**phi}


def on_surface(u: float, v: float, growth: float = _GROWTH) -> Coefficients:
    """Coefficients of at least 1 whose multiply-adds grow by `growth`, from two numbers in [0, 1].

    Uniform numbers give logarithms that are uniform on that triangle: each way to divide the growth between
    depth, width and resolution is equally likely.
    """
    depth, width, resolution = 1 - math.sqrt(u), math.sqrt(u) * v, math.sqrt(u) * (1 - v)
    return Coefficients(growth**depth, growth ** (width / 2), growth ** (resolution / 2))


def doubles_the_cost(base: Scaling, coefficients: Coefficients) -> bool:
    """Whether phi = 1 has twice the multiply-adds of `base` (phi = 0) within 10 %, as measured.

    False if it turns the last feature maps from 1 x 1 into 2 x 2: their kernels then see more than one
    position for the first time, which is more than a scaling.
    """
    from training.models.efficientnet import count_multiply_adds, last_map_side  # Imports torchvision.

    alpha, beta, gamma = coefficients
    grown = Scaling(base.width * beta, base.depth * alpha, round(base.resolution * gamma))
    if last_map_side(base.resolution) == 1 < last_map_side(grown.resolution):
        return False
    growth = count_multiply_adds(*grown) / count_multiply_adds(*base)
    return abs(growth / _GROWTH - 1) <= _TOLERANCE


def next_good_size(size: int) -> int:
    """The next larger side of a view, in pixels, that can grow without all feature maps growing: 32 k + 4.

    An EfficientNet halves a view's side five times and rounds up, so at a multiple of 32 one more pixel makes
    all of its maps larger.
    """
    stride = 32
    return next(side for side in range(size + 1, size + stride + 1) if side % stride == 4)


def scoring(search: SearchConfig) -> Callable[[TrainConfig, float], float]:
    """Return the function that scores a trial by its config and accuracy: the accuracy, or `score`.

    Raises ValueError if such a search has an encoder that cannot be scaled.
    """
    if not search.compound:
        return lambda config, accuracy: accuracy
    target = 2 * multiply_adds(scaled(search.train, COEFFICIENTS["compound"], 0.0))
    return lambda config, accuracy: score(accuracy, multiply_adds(config), target)


def multiply_adds(config: TrainConfig) -> int:
    """Multiply-adds of the config's encoder for one view."""
    return encoder_cost(config.encoder, config.data.view.size).multiply_adds


def score(accuracy: float, multiply_adds: float, target: float) -> float:
    """Accuracy weighed against cost: ACC * (FLOPS / T)^-0.07 (Tan and Le 2019, section 4)."""
    return accuracy * (multiply_adds / target) ** -0.07


def base_of(config: TrainConfig) -> Scaling:
    """Width, depth and resolution at phi = 0."""
    encoder = config.encoder
    if any(getattr(encoder, name) for name in Coefficients._fields):
        encoder = replace(encoder, phi=0.0)
    base = scaling(encoder)
    return base if encoder.gamma else base._replace(resolution=config.data.view.size)
