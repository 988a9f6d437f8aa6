"""Handwritten digits as small Parquet data sets, for runs within this process."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits

from pipelines.shards import write_shards


def small_digits(start: int, stop: int) -> Iterator[tuple[bytes, int, str]]:
    """PNGs of 24 pixels a side, grey as RGB."""
    digits: Any = load_digits()
    for row in range(start, stop):
        image = Image.fromarray((digits.images[row] * 15).astype("uint8")).resize((24, 24)).convert("RGB")
        out = io.BytesIO()
        image.save(out, "PNG")
        yield out.getvalue(), int(digits.target[row]), f"digit-{row}"


def write_small_digits(folder: Path, train_images: int) -> None:
    """So many in FOLDER/train, and 50 others in FOLDER/test."""
    write_shards(small_digits(0, train_images), str(folder / "train"), rows_per_shard=60, rows_per_group=25)
    write_shards(small_digits(500, 550), str(folder / "test"), rows_per_shard=60, rows_per_group=25)
