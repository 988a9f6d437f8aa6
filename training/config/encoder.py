"""Settings of the encoder, and the sizes that EfficientNet's coefficients give."""

from collections.abc import Set
from dataclasses import fields
from difflib import get_close_matches
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from pipelines.config import STRICT, Probability

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
IMAGENET_DEPTHS = (18, 34, 50, 101, 152)
RESNETS = tuple(f"{kind}{depth}" for kind in ("resnet", "plain") for depth in IMAGENET_DEPTHS + CIFAR_DEPTHS)
TORCHVISION, TIMM = "torchvision:", "timm:"


class Scaling(NamedTuple):
    """An EfficientNet's size relative to B0: channels, layers, and the side of its images in pixels."""

    width: float
    depth: float
    resolution: int


# Tan and Le's released models, which they rounded by hand: no phi gives them.
EFFICIENTNETS = {
    "efficientnet-b0": Scaling(1.0, 1.0, 224),
    "efficientnet-b1": Scaling(1.0, 1.1, 240),
    "efficientnet-b2": Scaling(1.1, 1.2, 260),
    "efficientnet-b3": Scaling(1.2, 1.4, 300),
    "efficientnet-b4": Scaling(1.4, 1.8, 380),
    "efficientnet-b5": Scaling(1.6, 2.2, 456),
    "efficientnet-b6": Scaling(1.8, 2.6, 528),
    "efficientnet-b7": Scaling(2.0, 3.1, 600),
}
SCALED = "efficientnet"
ENCODERS = (*RESNETS, *EFFICIENTNETS, SCALED)

_COEFFICIENTS = ("alpha", "beta", "gamma")


def _checked_name(name: str) -> str:
    """The name, if there is such an encoder; other libraries' are checked later: imports take seconds."""
    if name in ENCODERS or name.startswith((TORCHVISION, TIMM)):
        return name
    from torchvision.models import list_models

    if name in list_models():
        raise ValueError(f"no such encoder; did you mean {TORCHVISION}{name}?")
    near = get_close_matches(name, ENCODERS, 3) or ("resnet50", "plain34", "efficientnet-b0")
    raise ValueError(
        f"no such encoder; there are {', '.join(near)} and others, {TORCHVISION}NAME or {TIMM}NAME"
    )


Multiplier = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncoderConfig:
    """The network that turns images into features."""

    name: Annotated[str, AfterValidator(_checked_name)] = "resnet50"
    """The network: resnet18 to 152 (ImageNet's), resnet8 to 110 (CIFAR's), plain... (the same without
    shortcuts), efficientnet-b0 to -b7, efficientnet (scaled freely), torchvision:NAME, or timm:NAME, which
    needs `pip install timm`."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of an ImageNet ResNet or plain net: a 7x7 convolution and pooling (imagenet), or a 3x3
    convolution alone (cifar)."""
    zero_init_residual: bool = False
    """Start the scale of the last batch norm in each ResNet block at 0, so that the block first outputs its
    input, as in SimCLR's and BYOL's code (Goyal et al. 2017, section 5.1); else at 1."""
    width: Multiplier = 1.0
    """Factor on all channels of a ResNet or plain net (a whole number) or of efficientnet."""
    depth: Multiplier = 1.0
    """Factor on the number of layers in each stage of efficientnet."""
    alpha: Multiplier | None = None
    """Compound scaling of efficientnet: its depth is alpha ** phi. Unset: `depth`."""
    beta: Multiplier | None = None
    """Compound scaling of efficientnet: its width is beta ** phi. Unset: `width`."""
    gamma: Multiplier | None = None
    """Compound scaling of efficientnet: data.view.size must be base_size * gamma ** phi. Unset: any size."""
    phi: float = 1.0
    """Compound scaling of efficientnet: the exponent of alpha, beta and gamma."""
    base_size: Annotated[int, Field(ge=8)] = 224
    """Side of the views that gamma scales, in pixels."""
    drop_path: Probability = 0.2
    """Stochastic depth: the probability that training skips the last block of an EfficientNet; it rises from
    0 at the first block."""

    def __post_init__(self) -> None:
        changed = _changed(self)
        if idle := changed - _settings(self.name):
            raise ValueError(_no_effect(min(idle), self.name))
        if self.width % 1 and self.name in RESNETS:
            raise ValueError(f"encoder.width={self.width:g} on {self.name} must be whole; try 1, 2 or 4")
        _check_coefficients(self, changed)


def depth_of(name: str) -> int:
    """Number of layers with weights in a ResNet or plain net, as in its name."""
    return int(name.removeprefix("resnet").removeprefix("plain"))


def scaling(config: EncoderConfig) -> Scaling:
    """An EfficientNet's multipliers and resolution: d = alpha^phi, w = beta^phi, r = gamma^phi.

    Tan and Le 2019, eq. 3. Those of B0 to B7 come from a table.
    """
    if config.name in EFFICIENTNETS:
        return EFFICIENTNETS[config.name]
    width = config.beta**config.phi if config.beta else config.width
    depth = config.alpha**config.phi if config.alpha else config.depth
    size = config.base_size * (config.gamma**config.phi if config.gamma else 1)
    return Scaling(width, depth, round(size))


def efficientnet_resolution(config: EncoderConfig) -> int:
    """Side of the views that an EfficientNet is designed for, in pixels; ValueError for other encoders."""
    if config.name != SCALED and config.name not in EFFICIENTNETS:
        raise ValueError(f"{config.name} has no resolution of its own; only EfficientNets have")
    return scaling(config).resolution


def check_view_size(config: EncoderConfig, size: int) -> None:
    """Raise ValueError where the encoder does not accept views of `size` pixels a side."""
    if config.name.startswith(TORCHVISION):
        from training.models.torchvision_models import (
            check_size,  # Takes seconds to import.
        )

        check_size(config.name.removeprefix(TORCHVISION), size)
    if config.name.startswith(TIMM):
        from training.models.timm_models import check_timm_size

        check_timm_size(config.name.removeprefix(TIMM), size)
    if config.gamma is not None and size != (needed := efficientnet_resolution(config)):
        raise ValueError(
            f"encoder.gamma asks for views of {needed} pixels, and data.view.size={size}; "
            f"set --data.view.size {needed}"
        )


def _changed(config: EncoderConfig) -> set[str]:
    """Fields whose value is not the default."""
    return {field.name for field in fields(config) if getattr(config, field.name) != field.default}


def _settings(name: str) -> set[str]:
    """Fields that have an effect on the encoder of that name."""
    if name in RESNETS:
        stem = {"stem"} if depth_of(name) in IMAGENET_DEPTHS else set()
        # A plain net whose scales start at 0 would output nothing.
        shortcuts = set() if name.startswith("plain") else {"zero_init_residual"}
        return {"name", "width", *stem, *shortcuts}
    if name == SCALED:
        return {"name", "width", "depth", *_COEFFICIENTS, "phi", "base_size", "drop_path"}
    return {"name", "drop_path"} if name in EFFICIENTNETS else {"name"}


def _no_effect(field: str, name: str) -> str:
    fixed = name in EFFICIENTNETS and field not in ("stem", "zero_init_residual")
    way_out = f"leave it out, or set encoder.name={SCALED}" if fixed else "leave it out"
    return f"encoder.{field} has no effect on {name}; {way_out}"


def _check_coefficients(config: EncoderConfig, changed: Set[str]) -> None:
    """Raise ValueError where a multiplier is set twice, or a field lacks the coefficient that it needs."""
    for coefficient, multiplier in (("alpha", "depth"), ("beta", "width")):
        if {coefficient, multiplier} <= changed:
            raise ValueError(
                f"encoder.{coefficient} and encoder.{multiplier} both set the {multiplier}; leave out one"
            )
    if "phi" in changed and changed.isdisjoint(_COEFFICIENTS):
        raise ValueError("encoder.phi has no effect without alpha, beta or gamma; set one or leave it out")
    if "base_size" in changed and config.gamma is None:
        raise ValueError("encoder.base_size has no effect without encoder.gamma; set it or leave it out")
