"""A window of the plan to an Arrow table of encoded images and their sizes; pixels stay encoded."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int
from PIL import Image, UnidentifiedImageError
from pyarrow import fs

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.plan import Piece, Window
from pipelines.sources import Index

# `sample` is the row's number in the index; `label` is -1 where there is none. large_binary, because a
# window may hold more than the 2 GiB that binary's offsets reach.
SCHEMA = pa.schema(
    {
        "image": pa.large_binary(),
        "height": pa.int32(),
        "width": pa.int32(),
        "label": pa.int64(),
        "sample": pa.int64(),
    }
)

_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = range(5, 9)


def read_window(index: Index, data: DataConfig, window: Window) -> pa.Table:
    """The window's rows in their shuffled order, as SCHEMA.

    Raises ValueError, naming file and row, where a file is missing or torn or a row is no image.
    """
    filesystem, _ = storage.resolve(index.uri)
    tables = [_read_piece(filesystem, index, data, piece) for piece in window.pieces]
    return pa.concat_tables(tables).combine_chunks().take(pa.array(window.order()))


def _read_piece(filesystem: fs.FileSystem, index: Index, data: DataConfig, piece: Piece) -> pa.Table:
    path = index.paths[index.file[piece.fragment]]
    group = int(index.row_group[piece.fragment])
    columns = [data.image_column] + ([data.label_column] if index.has_labels else [])
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            table = file.read_row_group(group, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"cannot read {path}, row group {group}: {storage.first_line(error)}") from error
    table = table.slice(piece.start, piece.stop - piece.start)
    images = table[data.image_column]
    if pa.types.is_struct(images.type):
        images = pc.struct_field(images, "bytes")  # pyright: ignore[reportAttributeAccessIssue]
    images = images.cast(pa.large_binary())
    first = int(index.first_sample[piece.fragment]) + piece.start
    size = _sizes(images, f"{path}, row group {group}", piece.start)
    labels = (
        pc.fill_null(table[data.label_column].cast(pa.int64()), -1)
        if index.has_labels
        else np.full(len(table), -1)
    )
    samples = np.arange(first, first + len(table))
    return pa.table([images, size[:, 0], size[:, 1], labels, samples], names=SCHEMA.names).cast(SCHEMA)


def _sizes(images: pa.ChunkedArray, place: str, first_row: int) -> Int[np.ndarray, "n 2"]:
    """Height and width of each image as it is shown, from its header alone."""
    sizes = np.empty((len(images), 2), np.int32)
    for row, encoded in enumerate(images):
        try:
            with Image.open(io.BytesIO(encoded.as_buffer())) as image:
                sizes[row] = _shown_size(image)
        except (UnidentifiedImageError, OSError, AttributeError) as error:
            raise ValueError(f"{place}, row {first_row + row} is not an image that can be decoded") from error
    return sizes


def _shown_size(image: Image.Image) -> tuple[int, int]:
    # A PNG that names no EXIF data in its header would be decoded whole to look for it.
    turned = "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) in _EXIF_SIDEWAYS
    return (image.width, image.height) if turned else (image.height, image.width)
