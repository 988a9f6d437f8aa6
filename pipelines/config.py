"""Settings of a data set: where it is, how it is read, and the recipes of its views."""

from collections.abc import Mapping
from dataclasses import asdict, field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator
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


def _within_a_turn(pair: tuple[float, float]) -> tuple[float, float]:
    low, high = pair
    if not -360 <= low <= high <= 360:
        raise ValueError(f"needs two angles with -360 <= low <= high <= 360, got {low} {high}")
    return pair


Degrees = Annotated[tuple[float, float], AfterValidator(_within_a_turn)]
Deviation = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ViewRecipe:
    """How one view is made from an image. The defaults are SimCLR's for ImageNet.

    Steps in order: crop, flip, rotation, colour jitter in random order, grey, blur, solarisation, Sobel,
    normalisation, cutout. Crop to blur follow Chen et al. 2020, appendix A; solarisation Grill et al. 2020,
    appendix B; rotation, cutout and Sobel Chen et al. 2020, figure 4.
    """

    size: Annotated[int, Field(ge=8)] = 224
    """Height and width of a view, in pixels."""
    centre_crop: Share | None = None
    """Crop a centre square whose side is this share of the shorter side; unset: a random resized crop."""
    crop_scale: ShareRange = (0.08, 1.0)
    """Area of the random crop as a share of the image's area, lowest and highest."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the random crop, lowest and highest."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How the crop is resized, antialiased when it shrinks; SimCLR's and BYOL's code use bicubic."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    rotate: Probability = 0.0
    """Probability of a rotation."""
    rotate_degrees: Degrees | None = None
    """Angle of the rotation, lowest and highest, anticlockwise; unset: 90, 180 or 270 degrees."""
    jitter: Probability = 0.8
    """Probability of colour jitter."""
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Jitter's brightness factor lies within 1 plus or minus this, or its shift within plus or minus this."""
    brightness_by: Literal["factor", "shift"] = "factor"
    """How jitter changes brightness: multiply by a factor, or, as in BYOL's code, add a shift on a scale of 0
    to 1."""
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
    solarise: Probability = 0.0
    """Probability of inverting the bright values."""
    solarise_threshold: Share = 0.5
    """Values of at least this are inverted, on a scale of 0 to 1."""
    sobel: Probability = 0.0
    """Probability of replacing each channel by the magnitude of its Sobel gradient."""
    cutout: Probability = 0.0
    """Probability of setting a square at a random position to the mean (DeVries & Taylor 2017)."""
    cutout_side: Share = 0.5
    """Side of that square as a share of the view's side."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue to subtract from a view, on a scale of 0 to 1."""
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue to divide a view by, on a scale of 0 to 1."""


# The blur kernel is a tenth of the view, and an odd number of pixels: at least three.
_SMALLEST_BLURRED = 20

_DETAILS = {
    "rotate": ("rotate_degrees",),
    "jitter": ("brightness", "brightness_by", "contrast", "saturation", "hue"),
    "blur": ("blur_sigma",),
    "solarise": ("solarise_threshold",),
    "cutout": ("cutout_side",),
}


def idle_settings(view: ViewRecipe, other: ViewRecipe, recipe: ViewRecipe) -> list[str]:
    """An error message for each setting of `view` that differs from the named recipe but has no effect.

    A setting that both views share is not idle if it has an effect on the `other`.
    """
    differs = {name for name, value in asdict(view).items() if value != asdict(recipe)[name]}
    idle = [
        f"{detail} has no effect with {choice}=0; leave it out or set {choice} above 0"
        for choice, details in _DETAILS.items()
        for detail in details
        if not getattr(view, choice)
        and detail in differs
        and not (getattr(other, choice) and getattr(other, detail) == getattr(view, detail))
    ]
    if view.centre_crop:
        crop = ("crop_scale", "crop_ratio")
        idle += [
            f"{name} has no effect with centre_crop; leave out one of them"
            for name in crop
            if name in differs
        ]
    if view.blur and view.size < _SMALLEST_BLURRED:
        idle.append(
            f"blur has no effect at size={view.size}, where a tenth of the view is one pixel; set it to 0"
        )
    return idle


# Grill et al. 2020, appendix B: weaker jitter than SimCLR, brightness as a shift, two different views.
_BYOL = ViewRecipe(brightness=0.4, brightness_by="shift", contrast=0.4, saturation=0.2, hue=0.1)
# SimCLR's CIFAR-10 recipe (Chen et al. 2020, appendix B.9): half the jitter's strength, no blur.
_SIMCLR_CIFAR = ViewRecipe(size=32, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)
_SUPERVISED = ViewRecipe(jitter=0.0, grey=0.0, blur=0.0)
_EVALUATION = replace(_SUPERVISED, centre_crop=0.875, flip=0.0)

# The first and the second view of each recipe.
RECIPES: Mapping[str, tuple[ViewRecipe, ViewRecipe]] = {
    "simclr": (ViewRecipe(), ViewRecipe()),
    "simclr-cifar": (_SIMCLR_CIFAR, _SIMCLR_CIFAR),
    "byol": (replace(_BYOL, blur=1.0), replace(_BYOL, blur=0.1, solarise=0.2)),
    "supervised": (_SUPERVISED, _SUPERVISED),
    "evaluation": (_EVALUATION, _EVALUATION),
}


def _recipe_name(name: str) -> str:
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    return name


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Which images, and how they are read and augmented."""

    train: str
    """Training images: Parquet files, WebDataset tars or a folder of images (class = first folder), by path,
    pattern with *, file://, s3://, gs:// or az://."""
    test: str | None = None
    """Labelled held-out images, for evaluation only; unset: no evaluation."""
    image_column: str = "image"
    """Parquet column with the encoded image: bytes, or a struct with a field `bytes`."""
    key_column: str = "key"
    """Parquet column with an image's name; may be missing."""
    label_column: str = "label"
    """Parquet column with the class as a whole number from 0; training without labels does not need it."""
    key_dot: Literal["first", "last"] = "first"
    """The dot at which the key of a file's name in a tar ends: first, as in WebDataset, or last."""
    image_ending: str | None = None
    """Ending of the image to use when a tar has several images under one key, such as left.jpg; unset: the
    one whose ending has no second dot."""
    recipe: Annotated[str, AfterValidator(_recipe_name)] = "simclr"
    """Named recipe of the two views: simclr, simclr-cifar, byol, supervised or evaluation."""
    view: ViewRecipe = field(default_factory=ViewRecipe)
    """How both views are made; unset fields come from the recipe."""
    second_view: ViewRecipe = field(default_factory=ViewRecipe)
    """How the second view is made; unset fields come from `view` if set there, else from the recipe."""
    evaluation_crop: Share = 0.875
    """Side of the centre crop for evaluation, as a share of the shorter side."""
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """Images with more pixels are quarantined: decoding them could exhaust the memory."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Stop the run once more than this share of the training images is bad."""
    window_bytes: Annotated[int, Field(ge=1)] = 1 << 27
    """Bytes of encoded images of a lane that are read and shuffled together (default 128 MiB). A worker holds
    one such window for each of its lanes, and a few more ahead. If images are read one by one, as from a
    folder, a window is at most 1,024 images, which is enough."""
    window_rows: Annotated[int, Field(ge=1)] | None = None
    """Images of a lane that are read and shuffled together; unset: as many as window_bytes hold."""

    @property
    def views(self) -> tuple[ViewRecipe, ViewRecipe]:
        """The recipes of the first and the second view."""
        return self.view, self.second_view

    @model_validator(mode="before")
    @classmethod
    def _start_from_recipe(cls, given: Any) -> Any:
        """Fill the views' unset fields from the named recipe; the second view's from `view` first."""
        values = getattr(given, "kwargs", given)
        if not isinstance(values, Mapping):
            return given
        both, own = _fields(values.get("view")), _fields(values.get("second_view"))
        if both is None or own is None:
            return given
        first, second = RECIPES.get(str(values.get("recipe")), RECIPES["simclr"])
        filled = {**values, "view": {**asdict(first), **both}}
        try:
            ViewRecipe(**filled["view"])
        except ValidationError:
            return filled  # Reports an error in `view` once, not for the second view too.
        return {**filled, "second_view": {**asdict(second), **both, **own}}

    @model_validator(mode="after")
    def _refuse_idle_settings(self) -> "DataConfig":
        if self.view.size != self.second_view.size:
            raise ValueError(
                f"view.size={self.view.size} and second_view.size={self.second_view.size}: both views go "
                "through one encoder and need one size; set the same for both"
            )
        if self.window_rows is not None and self.window_bytes != DataConfig.window_bytes:
            raise ValueError(
                f"window_bytes={self.window_bytes} has no effect beside window_rows={self.window_rows}; "
                "leave out one of them"
            )
        for name, view, other, recipe in zip(
            ("view", "second_view"), self.views, self.views[::-1], RECIPES[self.recipe], strict=True
        ):
            if idle := idle_settings(view, other, recipe):
                raise ValueError(f"{name}: {idle[0]}")
        return self


def _fields(view: Any) -> Mapping[str, Any] | None:
    """The fields that are set for a view; None if `view` is not a table of fields."""
    if isinstance(view, ViewRecipe):
        return asdict(view)
    if view is None:
        return {}
    return view if isinstance(view, Mapping) else None
