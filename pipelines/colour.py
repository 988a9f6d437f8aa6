"""Colour jitter and grey of a view as two 3 x 3 matrices, so that the pixels are touched once.

Brightness, saturation and hue are linear in a pixel; contrast adds a share of the mean grey, which is
linear in the view's mean colour. So any order of them is `A pixel + B mean`, exactly but for two things:
the result is clamped once rather than after each step, and hue is a rotation about the grey axis where
torchvision shifts it in HSV, which is not linear.
"""

import numpy as np
from jaxtyping import Float

from pipelines.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws

# ITU-R BT.601's weights of red, green and blue in a grey value, as PIL and torchvision use them.
_LUMA = np.array([0.299, 0.587, 0.114])
_TO_GREY = np.tile(_LUMA, (3, 1))


def colour_matrices(draws: Draws) -> tuple[Float[np.ndarray, "n 3 3"], Float[np.ndarray, "n 3 3"]]:
    """Per sample A and B: a pixel's colour becomes A pixel + B mean, with the mean colour of the view."""
    n = len(draws.flip)
    rows = np.arange(n)
    brightness, contrast, saturation, hue = np.where(draws.jitter[:, None], draws.factors, (1, 1, 1, 0)).T
    steps = np.empty((n, 4, 3, 3))
    steps[:, BRIGHTNESS] = brightness[:, None, None] * np.eye(3)
    steps[:, CONTRAST] = contrast[:, None, None] * np.eye(3)
    steps[:, SATURATION] = _towards_grey(saturation)
    steps[:, HUE] = _hue_rotation(hue)
    # Contrast pulls towards the mean grey of the view as the steps before it left it.
    pull = np.zeros((n, 4))
    pull[:, CONTRAST] = 1 - contrast
    pixel, mean = np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 3, 3))
    for kind in draws.order.T:
        step, grey = steps[rows, kind], pull[rows, kind][:, None, None] * (_TO_GREY @ (pixel + mean))
        pixel, mean = step @ pixel, step @ mean + grey
    pixel[draws.grey], mean[draws.grey] = _TO_GREY @ pixel[draws.grey], _TO_GREY @ mean[draws.grey]
    return pixel.astype(np.float32), mean.astype(np.float32)


def _towards_grey(factor: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n 3 3"]:
    return factor[:, None, None] * np.eye(3) + (1 - factor)[:, None, None] * _TO_GREY


def _hue_rotation(turns: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n 3 3"]:
    """Rotation about the grey axis (1, 1, 1), red towards green."""
    angle = 2 * np.pi * turns
    along = np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    cosine, sine = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return cosine * np.eye(3) + (1 - cosine) * along + sine * across
