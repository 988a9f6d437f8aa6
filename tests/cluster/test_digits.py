"""The demo's images."""

import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from cluster.demo import SIDE, scattered_digits


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_same_seed_gives_the_same_bytes() -> None:
    first, again, other = (list(scattered_digits(20, held_out=False, seed=seed)) for seed in (4, 4, 5))
    assert first == again
    assert first != other


def test_labels_are_those_of_the_digits_and_held_out_ones_are_every_fifth() -> None:
    target = load_digits(return_X_y=True)[1]
    held_out = [label for _, label, _ in scattered_digits(50, held_out=True, seed=0)]
    others = [label for _, label, _ in scattered_digits(50, held_out=False, seed=0)]
    assert held_out == target[::5][:50].tolist()
    assert others == np.delete(target, np.arange(0, len(target), 5))[:50].tolist()


def test_raw_pixels_say_little_of_the_digit() -> None:
    train, test = (list(scattered_digits(1000, held_out=held_out, seed=0)) for held_out in (False, True))
    x, y = ([pixels(content).ravel() for content, _, _ in rows] for rows in (train, test))
    model = KNeighborsClassifier(20).fit(x, [label for _, label, _ in train])
    assert model.score(y, [label for _, label, _ in test]) < 0.3
    assert x[0].shape == (SIDE * SIDE * 3,)
