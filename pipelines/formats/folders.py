"""Folders of image files: a fragment is one file, its class the first folder below the root, or label=3/."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipelines.config import DataConfig
from pipelines.formats.base import (
    IMAGE_ENDINGS,
    ROWS,
    Files,
    Listing,
    name_labels,
    partition_values,
    reading,
    value_labels,
)

ENDINGS = IMAGE_ENDINGS


def index_files(files: Files, data: DataConfig, done: Callable[[], None]) -> Listing:
    """One fragment a file; there are labels if no file lies in the root itself."""
    below = files.below
    outside = next((path for path in below if "/" not in path), None)
    values = partition_values(below, data.label_column)
    if outside is not None:
        labels, classes = np.full(len(below), -1), ()
    elif None not in values:
        labels, classes = value_labels([value for value in values if value is not None])
    elif any(value is not None for value in values):
        outside = below[values.index(None)]
        labels, classes = np.full(len(below), -1), ()
    else:
        labels, classes = name_labels([path.partition("/")[0] for path in below])
    for _ in below:
        done()
    fragments = pa.table(
        {
            "path": [place.path for place in files.places],
            "rows": np.ones(len(below), np.int64),
            "label": labels,
            "key": below,
        }
    )
    no_labels = f"{outside} lies outside the class folders of {files.root}" if outside else None
    return Listing(fragments, no_labels, classes)


def relabel(listing: Listing, classes: Sequence[str], uri: str) -> Listing:
    """The listing with the numbers that another data set gives to the classes of the same names.

    Raises ValueError for a class that it does not have.
    """
    number = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in listing.classes if name not in number]
    if unknown:
        raise ValueError(
            f"{uri} has classes that the training images have not: {', '.join(unknown[:5])}; their "
            "folders must have the same names"
        )
    numbers = np.array([number[name] for name in listing.classes])
    labels = pa.array(numbers[listing.fragments["label"].to_numpy()])
    at = listing.fragments.schema.get_field_index("label")
    return replace(
        listing, fragments=listing.fragments.set_column(at, "label", labels), classes=tuple(classes)
    )


def read_pieces(filesystem: fs.FileSystem, pieces: list[dict], pool: Executor) -> pa.Table:
    """The files' bytes, as layout.ROWS."""

    def read(piece: dict) -> bytes:
        def whole() -> bytes:
            with filesystem.open_input_file(piece["path"]) as file:
                return file.read()

        return reading(whole, piece["path"])

    columns = {name: [piece[name] for piece in pieces] for name in ("label", "path", "key")}
    return pa.table({"image": list(pool.map(read, pieces)), **columns}, schema=ROWS)
