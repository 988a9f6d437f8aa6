"""Folders of image files: a fragment is a file, its class the first folder below the root, or label=3/."""

from collections.abc import Sequence
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
    Labels,
    Listing,
    name_labels,
    partition_values,
    reading,
    value_labels,
)

ENDINGS = IMAGE_ENDINGS


def index_files(files: Files, data: DataConfig) -> Listing:
    """One fragment per file, without a request. Images have labels if no file lies in the root itself."""
    below = files.below
    values = partition_values(below, data.label_column)
    outside = next((path for path in below if "/" not in path), None)
    if outside is None and any(value is not None for value in values):
        outside = below[values.index(None)] if None in values else None
    labels, classes = (np.full(len(below), -1), ()) if outside else _labels(below, values)
    fragments = pa.table(
        {"path": files.paths, "rows": np.ones(len(below), np.int64), "label": labels, "key": below}
    )
    no_labels = f"{outside} lies outside the class folders of {files.root}" if outside else None
    return Listing(fragments, no_labels, classes)


def _labels(below: list[str], values: list[str | None]) -> Labels:
    """The labels by the label=3 folders if there are some, else by the first folders."""
    named = [value for value in values if value is not None]
    return value_labels(named) if named else name_labels([path[: path.index("/")] for path in below])


def relabel(listing: Listing, classes: Sequence[str], uri: str) -> Listing:
    """The listing with the label numbers that another data set gives to classes of the same names.

    Raises ValueError for a class that the other data set lacks.
    """
    number = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in listing.classes if name not in number]
    if unknown:
        raise ValueError(
            f"{uri} has classes that the training images do not have: {', '.join(unknown[:5])}; their "
            "folders must have the same names"
        )
    numbers = np.array([number[name] for name in listing.classes])
    labels = pa.array(numbers[listing.fragments["label"].to_numpy()])
    at = listing.fragments.schema.get_field_index("label")
    return replace(
        listing, fragments=listing.fragments.set_column(at, "label", labels), classes=tuple(classes)
    )


def read_pieces(filesystem: fs.FileSystem, pieces: list[dict], pool: Executor) -> pa.Table:
    """The content of the files, as base.ROWS."""

    def read(piece: dict) -> bytes:
        def whole() -> bytes:
            with filesystem.open_input_file(piece["path"]) as file:
                return file.read()

        return reading(whole, piece["path"])

    columns = {name: [piece[name] for piece in pieces] for name in ("label", "path", "key")}
    return pa.table({"image": list(pool.map(read, pieces)), **columns}, schema=ROWS)
