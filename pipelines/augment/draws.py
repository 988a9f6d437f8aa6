"""Every random choice of a view, drawn per sample from (seed, epoch, sample, view). Pure NumPy.

Views are made from these numbers alone, so a view does not depend on its batch, the worker or the device.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from pipelines.config import ViewRecipe
from pipelines.philox import derive_key, uniforms

_VIEWS = 3  # First part of the key's path; pipelines.plan uses others.

# Which of a sample's numbers decides what: fixed, so that one setting of a recipe never changes the draws of
# another.
_ATTEMPTS = 10
_AREA, _RATIO = slice(0, _ATTEMPTS), slice(_ATTEMPTS, 2 * _ATTEMPTS)
_TOP, _LEFT, _FLIP, _JITTER, _GREY, _BLUR, _SIGMA = range(20, 27)
_FACTORS, _ORDER = slice(28, 32), slice(32, 36)
_ROTATE, _ANGLE, _SOLARISE, _SOBEL, _CUTOUT = range(36, 41)
_CENTRE = slice(41, 43)
_COUNT = 43

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True, eq=False)
class Draws:
    """The choices for one view of n samples.

    size: height and width of the image as shown.
    box: top, left, height and width of the crop, in whole pixels of the image as shown.
    angle: rotation in degrees, anticlockwise.
    factors: of brightness, contrast and saturation (1 changes nothing), then the hue shift in turns. If the
    recipe adds brightness, the first is a shift on a scale of 0 to 1 (0 changes nothing).
    order: the order in which these four are applied. sigma: of the blur, in pixels of the view.
    hole: top, left, height and width of the cutout, in whole pixels of the view.
    """

    size: Int[np.ndarray, "n 2"]
    box: Int[np.ndarray, "n 4"]
    flip: Bool[np.ndarray, " n"]
    rotate: Bool[np.ndarray, " n"]
    angle: Float[np.ndarray, " n"]
    jitter: Bool[np.ndarray, " n"]
    factors: Float[np.ndarray, "n 4"]
    order: Int[np.ndarray, "n 4"]
    grey: Bool[np.ndarray, " n"]
    blur: Bool[np.ndarray, " n"]
    sigma: Float[np.ndarray, " n"]
    solarise: Bool[np.ndarray, " n"]
    sobel: Bool[np.ndarray, " n"]
    cutout: Bool[np.ndarray, " n"]
    hole: Int[np.ndarray, "n 4"]


def draw(
    recipe: ViewRecipe,
    *,
    seed: int,
    epoch: int,
    view: int,
    samples: Int[np.ndarray, " n"],
    sizes: Int[np.ndarray, "n 2"],
) -> Draws:
    """Draw view number `view` of `samples`, whose heights and widths are `sizes`."""
    u = uniforms(derive_key(seed, _VIEWS, epoch, view), samples, _COUNT)
    spread = np.array([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
    middle = np.array([1.0 if recipe.brightness_by == "factor" else 0.0, 1.0, 1.0, 0.0])
    return Draws(
        size=sizes,
        box=_centre_box(recipe.centre_crop, sizes) if recipe.centre_crop else _random_box(recipe, u, sizes),
        flip=u[:, _FLIP] < recipe.flip,
        rotate=u[:, _ROTATE] < recipe.rotate,
        angle=_angle(recipe.rotate_degrees, u[:, _ANGLE]),
        jitter=u[:, _JITTER] < recipe.jitter,
        factors=middle + spread * (2 * u[:, _FACTORS] - 1),
        order=np.argsort(u[:, _ORDER], axis=1, kind="stable"),
        grey=u[:, _GREY] < recipe.grey,
        blur=u[:, _BLUR] < recipe.blur,
        sigma=_between(recipe.blur_sigma, u[:, _SIGMA]),
        solarise=u[:, _SOLARISE] < recipe.solarise,
        sobel=u[:, _SOBEL] < recipe.sobel,
        cutout=u[:, _CUTOUT] < recipe.cutout,
        hole=_hole(recipe, u[:, _CENTRE]),
    )


def _random_box(
    recipe: ViewRecipe, u: Float[np.ndarray, "n count"], sizes: Int[np.ndarray, "n 2"]
) -> Int[np.ndarray, "n 4"]:
    """A random resized crop as in torchvision: the first of ten boxes that fits, else a centre crop."""
    height, width = sizes[:, :1], sizes[:, 1:]
    area = height * width * _between(recipe.crop_scale, u[:, _AREA])
    low, high = np.log(recipe.crop_ratio)
    ratio = np.exp(_between((low, high), u[:, _RATIO]))
    heights, widths = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = np.argmax(fits, axis=1)[:, None]
    whole_height, whole_width = _largest_box(recipe, height, width)
    found = fits.any(axis=1, keepdims=True)
    box_height = np.where(found, np.take_along_axis(heights, first, 1), whole_height)
    box_width = np.where(found, np.take_along_axis(widths, first, 1), whole_width)
    free_height, free_width = height - box_height, width - box_width
    top = np.where(found, np.floor(u[:, _TOP : _TOP + 1] * (free_height + 1)), free_height // 2)
    left = np.where(found, np.floor(u[:, _LEFT : _LEFT + 1] * (free_width + 1)), free_width // 2)
    return np.concatenate([top, left, box_height, box_width], axis=1).astype(np.int64)


def _largest_box(
    recipe: ViewRecipe, height: Int[np.ndarray, "n 1"], width: Int[np.ndarray, "n 1"]
) -> tuple[np.ndarray, np.ndarray]:
    """The largest box of the image whose ratio the recipe allows."""
    low, high = recipe.crop_ratio
    ratio = np.clip(width / height, low, high)
    box_height = np.minimum(height, np.maximum(1, np.rint(width / ratio)))
    box_width = np.minimum(width, np.maximum(1, np.rint(height * ratio)))
    return box_height, box_width


def _centre_box(share: float, sizes: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n 4"]:
    side = np.maximum(1, np.rint(share * sizes.min(axis=1, keepdims=True))).astype(np.int64)
    return np.concatenate([(sizes - side) // 2, side, side], axis=1)


def _angle(degrees: tuple[float, float] | None, u: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return _between(degrees, u) if degrees else 90 * (1 + np.floor(3 * u))


def _hole(recipe: ViewRecipe, u: Float[np.ndarray, "n 2"]) -> Int[np.ndarray, "n 4"]:
    """A square centred on a random pixel, clipped to the view (DeVries & Taylor 2017)."""
    side = max(1, round(recipe.cutout_side * recipe.size))
    start = np.floor(recipe.size * u).astype(np.int64) - side // 2
    first, end = start.clip(min=0), (start + side).clip(max=recipe.size)
    return np.concatenate([first, end - first], axis=1)


def _between(bounds: tuple[float, float], u: np.ndarray) -> np.ndarray:
    low, high = bounds
    return low + (high - low) * u
