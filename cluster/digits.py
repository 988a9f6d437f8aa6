"""The demo's images: real handwritten digits at random place, size and colour on coloured canvases."""

import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.shards import EncodedImage

SIDE = 32
_SMALLEST, _LARGEST = 14, 26
_LEAST_CONTRAST = 0.4
_LUMA = np.array([0.299, 0.587, 0.114])
_HELD_OUT = 5  # Every fifth digit is for testing.


def scattered_digits(count: int, *, held_out: bool, seed: int) -> Iterator[EncodedImage]:
    """`count` canvases as PNG with the digit as label; held-out ones show digits that the others do not.

    The digits are scikit-learn's 1,797 of 8 x 8 pixels (Alpaydin and Kaynak 1998).
    """
    digits, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    mine = np.flatnonzero((np.arange(len(labels)) % _HELD_OUT == 0) == held_out)
    generator = np.random.default_rng([seed, held_out])
    for number in range(count):
        which = mine[number % len(mine)]
        canvas = _scatter(digits[which].reshape(8, 8) / 16, generator)
        yield _png(canvas), int(labels[which]), f"{'test' if held_out else 'train'}/{number:05}.png"


def _scatter(
    digit: Float[np.ndarray, "8 8"], generator: np.random.Generator
) -> Float[np.ndarray, "side side 3"]:
    """The digit as ink on paper, in two colours that differ in brightness as well."""
    size = int(generator.integers(_SMALLEST, _LARGEST + 1))
    top, left = generator.integers(0, SIDE - size + 1, 2)
    stroke = Image.fromarray((digit * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    ink = np.zeros((SIDE, SIDE, 1))
    ink[top : top + size, left : left + size, 0] = np.asarray(stroke) / 255
    paper, colour = generator.random((2, 3))
    while abs((paper - colour) @ _LUMA) < _LEAST_CONTRAST:
        paper, colour = generator.random((2, 3))
    return paper * (1 - ink) + colour * ink + generator.normal(0, 0.02, (SIDE, SIDE, 3))


def _png(pixels: Float[np.ndarray, "height width 3"]) -> bytes:
    out = io.BytesIO()
    Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)).save(out, "PNG")
    return out.getvalue()
