"""Images of benchmarks: those of the user's Parquet files, or a few that come with scikit-learn."""

import io
import sys
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from pipelines.shards import EncodedImage

_PHOTOGRAPHS = 128
_SMALL_IMAGES = {"train": 4096, "test": 1024}

_SIDE = 32

_GROUP_ROWS = 256

# Of most of ImageNet's photographs; an image of this size and quality has about as many bytes as theirs.
_WIDTH, _HEIGHT, _QUALITY = 500, 375, 97


def read_images(folder: Path, pattern: str) -> Iterator[bytes]:
    """The encoded images in the folder's Parquet files; exits where there are none."""
    return (content for content, _, _ in _rows(folder, pattern))


def write_photographs(folder: Path, source: Path | None) -> None:
    """JPEG photographs in one Parquet file: the first in `source`, or pieces of scikit-learn's two."""
    images = islice(_rows(source, "*.parquet"), _PHOTOGRAPHS) if source else _pieces(_PHOTOGRAPHS)
    _write(images, folder / "photographs.parquet")


def write_small_images(folder: Path, source: Path | None) -> None:
    """Training and test images of 32 pixels, named like CIFAR-10's: the first in `source`, or digits."""
    for part, count in _SMALL_IMAGES.items():
        images = islice(_rows(source, f"{part}-*.parquet"), count) if source else _digits(part, count)
        _write(images, folder / f"{part}-00000-of-00001.parquet")


def _rows(folder: Path, pattern: str) -> Iterator[EncodedImage]:
    """Bytes, label and number of each image of the Parquet files; exits where there are none."""
    files = sorted(folder.glob(pattern))
    if not files:
        sys.exit(f"{folder} holds no {pattern}; give a folder of Parquet files with a column image")
    columns = ["image", "label"]  # The second need not be there.
    tables = (table for file in files for table in pq.ParquetFile(file).iter_batches(256, columns=columns))
    for number, row in enumerate(row for table in tables for row in table.to_pylist()):
        image = row["image"]
        yield image["bytes"] if isinstance(image, dict) else image, row.get("label", 0), str(number)


def _pieces(count: int) -> Iterator[EncodedImage]:
    """Pieces of a temple and of a flower, each at a place of its own and half of them mirrored."""
    generator = np.random.default_rng(0)
    photographs = load_sample_images().images
    for number in range(count):
        label = number % len(photographs)
        pixels = photographs[label]
        top = generator.integers(pixels.shape[0] - _HEIGHT + 1)
        left = generator.integers(pixels.shape[1] - _WIDTH + 1)
        piece = pixels[top : top + _HEIGHT, left : left + _WIDTH][:, :: generator.choice([1, -1])]
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(piece)).save(out, "JPEG", quality=_QUALITY)
        yield out.getvalue(), label, str(number)


def _digits(part: str, count: int) -> Iterator[EncodedImage]:
    """Handwritten digits as PNG, again and again; every fifth is for testing.

    The demo's, on coloured canvases, would leave kNN at chance after so few epochs.
    """
    digits, labels = (np.asarray(each) for each in load_digits(return_X_y=True))
    which = [number for number in range(len(labels)) if (number % 5 == 0) == (part == "test")]
    for number, digit in enumerate(islice(cycle(which), count)):
        pixels = Image.fromarray((255 / 16 * digits[digit].reshape(8, 8)).astype(np.uint8))
        out = io.BytesIO()
        pixels.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).convert("RGB").save(out, "PNG")
        yield out.getvalue(), int(labels[digit]), str(number)


def _write(images: Iterable[EncodedImage], path: Path) -> None:
    content, labels, keys = (list(column) for column in zip(*images, strict=True))
    path.parent.mkdir(exist_ok=True)
    table = pa.table({"image": pa.array(content, pa.binary()), "label": labels, "key": keys})
    pq.write_table(table, path, row_group_size=_GROUP_ROWS)
