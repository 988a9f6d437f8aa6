"""Counts of images by size, format and fault, for `diptych data inspect`; contact sheets of views."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps

from pipelines.augment.dali import Request, make_views
from pipelines.batches import Rows
from pipelines.config import DataConfig, ViewRecipe
from pipelines.feed import make_request
from pipelines.images.conversion import shown
from pipelines.images.decoding import faults
from pipelines.images.header import image_format
from pipelines.index import Index
from pipelines.mixing import MIXING_ADVICE, Mixing
from pipelines.packing import all_readings
from pipelines.quarantine import WAY_OUT
from pipelines.reader import Reading, read_pieces

# The values that are counted for each good image.
_COUNTED = ("labels", "formats", "heights", "widths", "pixels")
_EXAMPLES = 3

# Images that a task reads at a time. It does so up to 16 times, because starting a task takes time, but each
# core gets several tasks, so that all cores finish together.
_READ_ROWS, _READINGS, _TASKS_PER_CORE = 512, 16, 8

# With few fragments, rows of the same ones meet in every window. Each file of a folder is a request.
_FEW_FRAGMENTS, _MANY_FILES = 16, 1000


@dataclass
class Survey:
    """Counts of each value among the good images, their total bytes, and the bad images by reason.

    bad: for each reason, the number of images and a few examples, as (key, path). row_labels: the labels of
    all rows, also of bad images, in the order of the readings.
    """

    labels: Counter = field(default_factory=Counter)
    formats: Counter = field(default_factory=Counter)
    heights: Counter = field(default_factory=Counter)
    widths: Counter = field(default_factory=Counter)
    pixels: Counter = field(default_factory=Counter)
    bytes: int = 0
    bad: dict[str, tuple[int, list[tuple[str, str]]]] = field(default_factory=dict)
    row_labels: list[Int[np.ndarray, " rows"]] = field(default_factory=list)

    @property
    def images(self) -> int:
        """The number of good images."""
        return self.formats.total()

    @property
    def bad_images(self) -> int:
        return sum(count for count, _ in self.bad.values())

    def add(self, other: "Survey") -> None:
        """Add the counts of `other`."""
        for name in _COUNTED:
            getattr(self, name).update(getattr(other, name))
        self.bytes += other.bytes
        self.row_labels += other.row_labels
        for reason, (count, examples) in other.bad.items():
            before, known = self.bad.get(reason, (0, []))
            self.bad[reason] = before + count, (known + examples)[:_EXAMPLES]


def survey_jobs(index: Index, cores: int) -> Iterator[tuple[Reading, ...]]:
    """Yield all rows of the index in order, as the readings of one task after another."""
    tasks = int(index.rows.sum()) / _READ_ROWS / (_TASKS_PER_CORE * cores)
    together = max(1, min(_READINGS, int(tasks)))
    readings = all_readings(index, _READ_ROWS)
    while job := tuple(islice(readings, together)):
        yield job


def survey_all(readings: Iterable[Reading], data: DataConfig, *, decode: bool) -> Survey:
    """The survey of several readings, one after another."""
    found = Survey()
    for reading in readings:
        found.add(survey(reading, data, decode=decode))
    return found


def survey(reading: Reading, data: DataConfig, *, decode: bool) -> Survey:
    """Count the images of the reading; with `decode`, images whose pixels cannot be decoded are bad too."""
    rows = Rows.of(read_pieces(reading, data, own_bytes=True))
    if decode:
        rows = rows.marked(_broken(rows))
    found = Survey(row_labels=[rows.label])
    for bad in rows.quarantined:
        count, examples = found.bad.get(bad.reason, (0, []))
        found.bad[bad.reason] = count + 1, (examples + [(bad.key, bad.path)])[:_EXAMPLES]
    good = rows.good
    found.labels.update(good.label.tolist())
    found.formats.update(image_format(image.tobytes()) for image in good.image)
    found.heights.update(good.height.tolist())
    found.widths.update(good.width.tolist())
    found.pixels.update(good.sizes.prod(axis=1).tolist())
    found.bytes = sum(len(image) for image in good.image)
    return found


def _broken(rows: Rows) -> dict[int, str]:
    """The reason for each good row that training could not decode."""
    good = np.flatnonzero(~rows.is_bad).tolist()
    found = faults(rows.image[row].tobytes() for row in good)
    return {row: fault for row, fault in zip(good, found, strict=True) if fault}


def report(
    index: Index, found: Survey, classes: Sequence[str], window_rows: int, mixing: Mixing | None = None
) -> dict[str, Any]:
    """The survey, the layout of the index and hints, as values for JSON.

    window_rows, mixing: of the plan of a run.
    """
    return {
        "uri": index.uri,
        "layout": index.layout,
        "files": len(index.paths),
        "fragments": len(index.rows),
        "largest_fragment_rows": int(index.rows.max()),
        "images": found.images,
        "bad_images": found.bad_images,
        "bytes": found.bytes,
        "mean_bytes": round(found.bytes / max(1, found.images)),
        "height": median_spread(found.heights),
        "width": median_spread(found.widths),
        "pixels": median_spread(found.pixels),
        "formats": dict(found.formats.most_common()),
        "classes": _classes(found.labels, classes) if index.has_labels else {},
        "no_labels": index.no_labels,
        "window_rows": window_rows,
        "mixing": asdict(mixing) if mixing else None,
        "bad": [
            {"reason": reason, "images": count, "examples": [f"{key} of {path}" for key, path in examples]}
            for reason, (count, examples) in sorted(found.bad.items(), key=lambda item: -item[1][0])
        ],
        "hints": hints(index, found, window_rows, mixing),
    }


def median_spread(counts: Counter) -> dict[str, int]:
    """Minimum, median (the lower of two) and maximum of the counted values; empty if there are none."""
    if not counts:
        return {}
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    median = values[int(np.searchsorted(ends, (ends[-1] + 1) // 2))]
    return {"min": values[0], "median": median, "max": values[-1]}


def _classes(labels: Counter, names: Sequence[str]) -> dict[str, int]:
    """The number of images of each class, by its name, or by its number if it has no name."""
    numbers = sorted({*labels, *range(len(names))})
    return {names[n] if 0 <= n < len(names) else str(n): labels[n] for n in numbers}


def hints(index: Index, found: Survey, window_rows: int, mixing: Mixing | None = None) -> list[str]:
    """Properties of the layout that cost time or memory in training, each with a way out."""
    said = []
    largest, mean = int(index.rows.max()), found.bytes / max(1, found.images)
    if largest > window_rows:
        said.append(
            f"a row group has up to {largest:,} rows, {largest * mean / 2**20:,.0f} MiB, and is read whole, "
            f"but a window has {window_rows:,}; `diptych data pack` it"
        )
    if index.layout == "folder" and len(index.paths) > _MANY_FILES:
        said.append(f"{len(index.paths):,} files take as many requests per epoch; `diptych data pack` them")
    if mixing and mixing.is_poor:
        said.append(f"images are stored by class, so batches would be mixed badly: {MIXING_ADVICE}")
    if not index.has_labels and len(index.rows) < _FEW_FRAGMENTS and found.images > window_rows:
        said.append(
            f"only {len(index.rows)} fragments, and no labels that show whether images are stored by class: "
            "if they are, `diptych data pack` shuffles them"
        )
    return said


# Pixels between the pictures of a sheet, and the smallest side of a picture.
GAP = 4
_SMALLEST_SIDE = 96


def contact_sheet(
    table: pa.Table, recipes: tuple[ViewRecipe, ...], *, seed: int, epoch: int = 0, images: int = 12
) -> bytes:
    """A PNG of the first good images of `table` (reader.SCHEMA), with a view of each recipe below each image.

    Its background is transparent. Raises ValueError if there is no good image.
    """

    def request(rows: Rows) -> Request:
        if not len(good := rows.good[:images]):
            raise ValueError(f"none of {len(rows)} images can be shown: {rows.first_bad}; {WAY_OUT}")
        return make_request(good, recipes, seed=seed, epoch=epoch, tag=good)

    def repair(failed: Request, broken: Mapping[int, str]) -> Request:
        return request(failed.tag.marked(broken))

    made = make_views(iter([request(Rows.of(table))]), recipes, batch_size=images, threads=1, repair=repair)
    views, good = next(made)
    size = recipes[0].size
    tiles = [
        [
            _fitted(content.data, orientation, size)
            for content, orientation in zip(good.image, good.orientation, strict=True)
        ]
    ]
    tiles += [[pixels(view, recipe) for view in batch] for batch, recipe in zip(views, recipes, strict=True)]
    return _grid(tiles, size)


def _fitted(content: memoryview, orientation: int, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """The whole image, scaled into a transparent square, which fits light and dark pages."""
    image = shown(content, orientation).convert("RGB").convert("RGBA")
    return np.asarray(ImageOps.pad(image, (size, size), color=(0, 0, 0, 0)))


def pixels(view: Float[torch.Tensor, "3 size size"], recipe: ViewRecipe) -> UInt8[np.ndarray, "size size 3"]:
    """A normalised view as an RGB image."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    scaled = (view * std + mean).clamp(0, 1) * 255
    return scaled.round().byte().permute(1, 2, 0).numpy()


def _grid(rows: list[list[np.ndarray]], size: int) -> bytes:
    scale = max(1, -(-_SMALLEST_SIDE // size))
    pitch = size * scale + GAP
    sheet = Image.new("RGBA", (pitch * len(rows[0]) - GAP, pitch * len(rows) - GAP))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((size * scale, size * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (x * pitch, y * pitch))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()
