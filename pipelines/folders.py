"""Folders of image files: a fragment is one file, its class the first folder below the root."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipelines.layout import IMAGE_ENDINGS, ROWS, Listing, Place, reading

ENDINGS = IMAGE_ENDINGS


def index_files(root: str, files: list[Place], done: Callable[[], None]) -> Listing:
    """One fragment a file; there are labels if no file lies in the root itself."""
    below = [file.path.removeprefix(root).lstrip("/") for file in files]
    has_labels = all("/" in path for path in below)
    folders = [path.split("/", 1)[0] if has_labels else "" for path in below]
    classes, labels = np.unique(folders, return_inverse=True)
    for _ in files:
        done()
    fragments = pa.table(
        {
            "path": [file.path for file in files],
            "rows": np.ones(len(files), np.int64),
            "label": labels.astype(np.int64) if has_labels else np.full(len(files), -1),
            "key": below,
        }
    )
    return Listing(fragments, has_labels, tuple(classes.tolist()) if has_labels else ())


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
    return Listing(listing.fragments.set_column(at, "label", labels), True, tuple(classes))


def read_pieces(filesystem: fs.FileSystem, pieces: list[dict], pool: Executor) -> pa.Table:
    """The files' bytes, as layout.ROWS."""

    def read(piece: dict) -> bytes:
        def whole() -> bytes:
            with filesystem.open_input_file(piece["path"]) as file:
                return file.read()

        return reading(whole, piece["path"])

    columns = {name: [piece[name] for piece in pieces] for name in ("label", "path", "key")}
    return pa.table({"image": list(pool.map(read, pieces)), **columns}, schema=ROWS)
