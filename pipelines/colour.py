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
    pixel = np.tile(np.eye(3), (n, 1, 1))
    mean = np.zeros((n, 3, 3))
    for position in range(4):
        kind = draws.order[:, position]
        factor = np.take_along_axis(draws.factors, kind[:, None], axis=1)[:, 0]
        step = np.tile(np.eye(3), (n, 1, 1))
        offset = np.zeros((n, 3, 3))
        for which, matrix in (
            (BRIGHTNESS, factor[:, None, None] * np.eye(3)),
            (CONTRAST, factor[:, None, None] * np.eye(3)),
            (SATURATION, _towards_grey(factor)),
            (HUE, _hue_rotation(factor)),
        ):
            chosen = draws.jitter & (kind == which)
            step[chosen] = matrix[chosen]
            if which == CONTRAST:
                # Contrast pulls towards the mean grey of the view as the steps before left it.
                grey_of_mean = (1 - factor)[:, None, None] * (_TO_GREY @ (pixel + mean))
                offset[chosen] = grey_of_mean[chosen]
        pixel, mean = step @ pixel, step @ mean + offset
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
