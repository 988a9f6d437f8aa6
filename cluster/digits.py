"""Handwritten digits on coloured canvases: images to try diptych on, made from scikit-learn's."""

import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from PIL import Image
from sklearn.datasets import load_digits

from cluster.terminal import Bar
from pipelines import storage
from pipelines.shards import EncodedImage

SIDE = 32
_SMALLEST, _LARGEST = 14, 26
_LEAST_CONTRAST = 0.4
_LUMA = np.array([0.299, 0.587, 0.114])
_HELD_OUT = 5  # Every fifth digit is for testing.


def scattered_digits(count: int, *, held_out: bool, seed: int) -> Iterator[EncodedImage]:
    """`count` PNGs of a digit on a canvas, labelled; held-out ones use digits that the others do not.

    The digits are scikit-learn's 1,797 of 8 x 8 pixels (Alpaydin and Kaynak 1998).
    """
    digits, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    mine = np.flatnonzero((np.arange(len(labels)) % _HELD_OUT == 0) == held_out)
    generator = np.random.default_rng([seed, held_out])
    for number in range(count):
        which = mine[number % len(mine)]
        canvas = _scatter(digits[which].reshape(8, 8) / 16, generator)
        yield _png(canvas), int(labels[which]), f"{'test' if held_out else 'train'}/{number:05}.png"


def write_digits(dest: str, count: int, *, by_class: bool) -> None:
    """Write `count` PNG files, with `by_class` in a folder for each digit.

    Raises ValueError if `dest` exists or cannot be written.
    """
    folder = storage.absolute(dest)
    try:
        if storage.exists(folder):
            raise ValueError(f"{dest} exists; name a new folder")
        with Bar(f"digits to {dest}", "image", count, delay=1) as bar:
            for image, label, key in scattered_digits(count, held_out=False, seed=0):
                name = key.rpartition("/")[2]
                storage.write(storage.join(folder, f"{label}/{name}" if by_class else name), image)
                bar.update(1)
    except OSError as error:
        raise ValueError(f"cannot write {dest}: {storage.first_line(error)}; choose another") from error
    print(f"{count:,} images in {dest}")


def _scatter(
    digit: Float[np.ndarray, "8 8"], generator: np.random.Generator
) -> Float[np.ndarray, "side side 3"]:
    """The digit as ink on paper, in two colours of different brightness."""
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
