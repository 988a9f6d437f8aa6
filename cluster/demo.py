"""`diptych demo`: train on handwritten digits from an S3 server on this machine."""

import io
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from sklearn.datasets import load_digits

from cluster.objectstore import s3_server
from cluster.train import run_training
from pipelines.shards import EncodedImage, write_shards
from pipelines.storage.scratch import scratch_folder
from training.config import TrainConfig, shipped_config
from training.evaluation.certainty import shown

_BUCKET = "diptych-demo"
_TRAIN_IMAGES, _TEST_IMAGES = 4096, 1024
_SHARD_ROWS, _GROUP_ROWS = 1024, 256


def run_demo(output: str) -> None:
    """Make the images, train, and print the accuracy before and after."""
    with (
        scratch_folder() as folder,
        s3_server(Path(folder), bucket=_BUCKET),
    ):
        train, test = f"s3://{_BUCKET}/train", f"s3://{_BUCKET}/test"
        for uri, count, held_out in ((train, _TRAIN_IMAGES, False), (test, _TEST_IMAGES, True)):
            images = scattered_digits(count, held_out=held_out, seed=0)
            write_shards(images, uri, rows_per_shard=_SHARD_ROWS, rows_per_group=_GROUP_ROWS)
            print(f"{count:,} images packed into {uri}")
        config = _config(train, test, output)
        metrics = run_training(config)
    _print_accuracies([line for line in metrics if "knn_top1" in line])


def _config(train: str, test: str, output: str) -> TrainConfig:
    values = tomllib.loads(shipped_config("demo").read_text())
    data = values.pop("data") | {"train": train, "test": test}
    return TrainConfig(**values, data=data, output=output, name=time.strftime("demo-%Y%m%d-%H%M%S"))


def _print_accuracies(evaluations: list[dict[str, Any]]) -> None:
    print("\nkNN accuracy on held-out digits (chance is 10 %)")
    for label, line, key in (
        ("raw pixels", evaluations[0], "knn_top1_pixels"),
        ("untrained encoder", evaluations[0], "knn_top1"),
        ("trained encoder", evaluations[-1], "knn_top1"),
    ):
        print(f"  {label:<18} {shown(line, key):>13}  {'#' * round(50 * line[key])}")


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
