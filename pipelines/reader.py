"""Read pieces of fragments into an Arrow table of encoded images and their sizes, without decoding."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from pyarrow import fs

from pipelines import storage
from pipelines.choice import packed, unpacked
from pipelines.config import DataConfig
from pipelines.formats import folders, parquet, tars, torchvision_source
from pipelines.formats.base import CONNECTIONS, ROWS, Layout
from pipelines.images.conversion import to_png_elsewhere
from pipelines.images.header import read_header
from pipelines.images.orientation import UPRIGHT
from pipelines.images.pillow import BadImageError
from pipelines.index import Index
from pipelines.plan import Piece, Window

# `sample` is the row's number in the index. `height` and `width` are those of the image as shown;
# `orientation` is the EXIF orientation in which it is stored. `bad` is the reason why the image cannot be
# used, or null. For a bad image, `image` is null, and `height` and `width` are 0.
SCHEMA = pa.schema(
    [
        *ROWS,
        pa.field("sample", pa.int64()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("orientation", pa.int8()),
        pa.field("bad", pa.string()),
    ]
)

_SPAN = (("start", pa.int64()), ("stop", pa.int64()), ("chosen", pa.binary()))

# Tables to read ahead.
_TABLES_AHEAD = 2


@dataclass(frozen=True, eq=False)
class Reading:
    """One reading job, independent of the index that it comes from.

    pieces: the index's row of each fragment, plus the rows [start, stop) to read; if only some of those are
    wanted, `chosen` has their positions, counted from `start` and packed.
    """

    uri: str
    layout: Layout
    has_labels: bool
    pieces: pa.Table

    @classmethod
    def of(cls, index: Index, pieces: Sequence[Piece]) -> "Reading":
        rows = index.fragments.take(pa.array([piece.fragment for piece in pieces], pa.int64()))
        spans = [(piece.start, piece.stop, None) for piece in pieces]
        if "chosen" in rows.column_names:
            chosen = rows["chosen"].to_pylist()
            spans = [_span(piece, bits) for piece, bits in zip(pieces, chosen, strict=True)]
            rows = rows.drop_columns(["chosen", "fragment_rows"])
        for number, (name, kind) in enumerate(_SPAN):
            rows = rows.append_column(name, pa.array([span[number] for span in spans], kind))
        return cls(index.uri, index.layout, index.has_labels, rows)


def _span(piece: Piece, bits: bytes | None) -> tuple[int, int, bytes | None]:
    """(start, stop, chosen) to read for a piece; `bits`: the chosen rows of its fragment, None for all."""
    if bits is None:
        return piece.start, piece.stop, None
    places = unpacked(bits)[piece.start : piece.stop]
    first, last = int(places[0]), int(places[-1])
    return first, last + 1, None if last - first + 1 == len(places) else packed(places - first)


def read_windows(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
    """The rows of the windows' pieces as SCHEMA. Reads in this process; stream.stream_windows uses Ray."""
    return (read_pieces(Reading.of(index, window.pieces), data) for window in windows if window.pieces)


def ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same tables, fetched a few ahead in a thread, so that the caller does not wait for them."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, tables, None) for _ in range(_TABLES_AHEAD))
        while (table := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, tables, None))
            yield table
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_pieces(reading: Reading, data: DataConfig, *, own_bytes: bool = False) -> pa.Table:
    """The rows of all pieces in order, as SCHEMA.

    An image that DALI cannot decode is converted to PNG, or, with `own_bytes`, left unchanged. Raises
    ValueError, naming the file, if one is missing or damaged; a bad image is only marked.
    """
    filesystem, _ = storage.resolve(reading.uri)
    pieces = reading.pieces.to_pylist()
    if not pieces:
        return SCHEMA.empty_table()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        table = _read(reading, filesystem, pieces, data, pool)
    wanted = [_wanted(piece) for piece in pieces]
    if reading.pieces["chosen"].null_count < len(pieces):
        lengths = [piece["stop"] - piece["start"] for piece in pieces]
        starts = np.cumsum(lengths) - lengths
        table = table.take(
            pa.array(np.concatenate([s + rows for s, rows in zip(starts, wanted, strict=True)]))
        )
    samples = [
        piece["first_sample"] + piece["start"] + rows for piece, rows in zip(pieces, wanted, strict=True)
    ]
    table = table.append_column("sample", pa.array(np.concatenate(samples)))
    return _with_headers(table, data.max_pixels, own_bytes)


def _wanted(piece: dict) -> Int[np.ndarray, " rows"]:
    """Positions of the wanted rows among those read for a piece, ascending."""
    if piece["chosen"] is None:
        return np.arange(piece["stop"] - piece["start"])
    return unpacked(piece["chosen"])


def _read(
    reading: Reading, filesystem: fs.FileSystem, pieces: list[dict], data: DataConfig, pool: Executor
) -> pa.Table:
    if reading.layout == "parquet":
        return parquet.read_pieces(filesystem, pieces, data, reading.has_labels, pool)
    if reading.layout == "tar":
        return tars.read_pieces(filesystem, pieces, pool)
    if reading.layout == "torchvision":
        return torchvision_source.read_pieces(pieces, reading.has_labels)
    return folders.read_pieces(filesystem, pieces, pool)


def _with_headers(table: pa.Table, max_pixels: int, own_bytes: bool) -> pa.Table:
    """Add the columns from the images' headers; drop the bytes of bad images."""
    columns = {name: np.zeros(len(table), np.int32) for name in ("height", "width", "orientation")}
    columns["orientation"] += UPRIGHT
    reasons: list[str | None] = [None] * len(table)
    changed: dict[int, bytes | None] = {}
    for row, image in enumerate(table["image"]):
        try:
            # Cast: Arrow's bytes are signed, so none would equal 0xFF.
            content = memoryview(image.as_buffer()).cast("B") if image.is_valid else None
            header = read_header(content, max_pixels=max_pixels)
            orientation = header.orientation
            if content and header.for_pillow and not own_bytes:
                changed[row], orientation = to_png_elsewhere(content, header), UPRIGHT
        except BadImageError as bad:
            changed[row], reasons[row] = None, str(bad)
            continue
        for name, value in zip(columns, (header.height, header.width, orientation), strict=True):
            columns[name][row] = value
    if changed:
        at = table.schema.get_field_index("image")
        images = (
            changed[row] if row in changed else image.as_py() for row, image in enumerate(table["image"])
        )
        table = table.set_column(at, "image", pa.array(images, pa.large_binary()))
    for name, column in (columns | {"bad": pa.array(reasons, pa.string())}).items():
        table = table.append_column(name, pa.array(column))
    return table.cast(SCHEMA)
