"""How a view is made of an image: the recipe, and the named ones."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    low, high = pair
    if not 0 < low <= high:
        raise ValueError(f"needs two numbers with 0 < low <= high, got {low} {high}")
    return pair


def _at_most_one(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[1] > 1:
        raise ValueError(f"is a share of the image's area, at most 1, got {pair[1]}")
    return pair


Range = Annotated[tuple[float, float], AfterValidator(_ascending)]
ShareRange = Annotated[Range, AfterValidator(_at_most_one)]
Deviation = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ViewRecipe:
    """How one view is made of an image: SimCLR's for ImageNet unless set otherwise.

    Chen et al. 2020, appendix A: crop, flip, colour jitter in random order, grey, blur, in this order.
    """

    size: Annotated[int, Field(ge=8)] = 224
    """Height and width of a view, in pixels."""
    centre_crop: Share | None = None
    """Take the centre square of this share of the shorter side; when unset, a random resized crop."""
    crop_scale: ShareRange = (0.08, 1.0)
    """Area of the random crop as a share of the image's, lowest and highest."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the random crop, lowest and highest."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability of colour jitter."""
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Jitter's brightness factor lies within 1 plus or minus this."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Jitter's contrast factor lies within 1 plus or minus this."""
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Jitter's saturation factor lies within 1 plus or minus this."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Jitter's hue shift lies within plus or minus this, in turns of the colour wheel."""
    grey: Probability = 0.2
    """Probability of dropping the colour."""
    blur: Probability = 0.5
    """Probability of Gaussian blur, its kernel a tenth of the view wide."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur, lowest and highest, in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue taken off a view, on a scale of 0 to 1."""
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue that a view is divided by, on a scale of 0 to 1."""


# SimCLR's CIFAR-10 recipe (Chen et al. 2020, appendix B.9): half the jitter's strength, no blur.
_CIFAR = ViewRecipe(size=32, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)

RECIPES: Mapping[str, ViewRecipe] = {"simclr": ViewRecipe(), "simclr-cifar": _CIFAR}
