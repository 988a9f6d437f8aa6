"""The images of a page: their views, a map of their features, and their nearest neighbours."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from pipelines.inspection import GAP
from training.report.features import FeatureSample, jpeg, nearest, project
from training.report.page import colour

# The rows of a contact sheet of pipelines.preview.
_TILES = ("Image", "First view of image", "Second view of image")
_TILE_SIDE = 128

_MAP_WIDTH, _MAP_HEIGHT, _MAP_MARGIN = 1000, 640, 8

# Neighbours that are shown, and images whose neighbours are.
_NEIGHBOURS, _QUERIES = 8, 8

# With more classes the map has no legend; the pointer still names an image's class.
_MOST_IN_LEGEND = 20

# Images this small are magnified with sharp pixels.
_PIXELATED_BELOW = 64


@dataclass(frozen=True)
class Tile:
    """An image of the views' sheet. source: its data URI."""

    alt: str
    source: str


@dataclass(frozen=True)
class ViewColumns:
    """A column of tiles per image. below: what the views below the images are."""

    columns: list[list[Tile]]
    below: str


@dataclass(frozen=True)
class Point:
    """An image of the feature map. x, y: of its upper left corner. colour: of its frame; empty for none."""

    x: str
    y: str
    name: str
    source: str
    colour: str


@dataclass(frozen=True)
class FeatureMap:
    """Images at their features' projections. side: of an image, in units of width and height.

    legend: (colour, class).
    """

    about: str
    points: list[Point]
    side: str
    legend: list[tuple[str, str]]
    width: int = _MAP_WIDTH
    height: int = _MAP_HEIGHT


@dataclass(frozen=True)
class Cell:
    """An image in a row of neighbours. same: whether its class is the first one's."""

    name: str
    text: str
    source: str
    same: bool


@dataclass(frozen=True)
class Neighbours:
    """Rows of an image and its neighbours; the first image's name is the row's heading."""

    about: str
    rows: list[list[Cell]]


def view_columns(sheet: bytes, views: int) -> ViewColumns:
    """The contact sheet of images and their one or two views, cut into tiles so that a phone can wrap it."""
    with Image.open(io.BytesIO(sheet)) as opened:
        image = opened.convert("RGBA")
    names = _TILES[: 1 + views]
    pitch = (image.height + GAP) // len(names)
    columns = [
        [
            Tile(f"{name} {number}", _source(_tile(image, x, row * pitch, pitch - GAP)))
            for row, name in enumerate(names)
        ]
        for number, x in enumerate(range(0, image.width, pitch), 1)
    ]
    below = "the two views that the encoder learns to match" if views == 2 else "the view it is trained on"
    return ViewColumns(columns, below)


def feature_map(sample: FeatureSample) -> FeatureMap:
    """The images at their features' projections; raises ValueError as project does."""
    places, method = project(sample.features)
    labelled = bool((sample.labels >= 0).any())
    about = (
        f"{len(places)} {sample.subset} as the encoder sees them after {sample.step:,} steps. {method}, of "
        "the features' directions. Images close to each other have similar features; distances between "
        "groups, and the axes, have no meaning."
        + (" The frame's colour is the class: choose one below to see it alone." if labelled else "")
    )
    side = float(np.clip(np.sqrt(0.5 * _MAP_WIDTH * _MAP_HEIGHT / len(places)), 24, 64))
    points = [_point(sample, image, x, y) for image, (x, y) in enumerate(_corners(places, side).tolist())]
    return FeatureMap(about, points, f"{side:.1f}", _legend(sample))


def neighbours(sample: FeatureSample) -> Neighbours:
    """A few images and, right of each, those with the most similar features."""
    order, similarity = nearest(sample.features, _NEIGHBOURS)
    labelled = sample.labels >= 0
    about = f"Left: an image; then its nearest among the {len(order)}, with their cosine similarity."
    if labelled.any():
        same = (sample.labels[order] == sample.labels[:, None])[labelled].mean()
        by_chance = _same_class_pairs(sample.labels[labelled])
        about += (
            f" Framed in green: the same class. Over all images, {same:.0%} of the {order.shape[1]} nearest "
            f"have the same class; by chance {by_chance:.0%} would."
        )
    rows = [_row(sample, query, order[query], similarity[query]) for query in queries(sample.labels)]
    return Neighbours(about, rows)


def queries(labels: Int[np.ndarray, " n"]) -> list[int]:
    """The first image of each of a few classes; without labels, the first images."""
    _, firsts = np.unique(labels, return_index=True)
    firsts = firsts[labels[firsts] >= 0]
    others = np.setdiff1d(np.arange(len(labels)), firsts)
    return np.concatenate([firsts, others])[:_QUERIES].tolist()


def pixelated(sample: FeatureSample) -> bool:
    """Whether the images are so small that magnified pixels look better than blurred ones."""
    return Image.open(io.BytesIO(sample.thumbnails[0])).width < _PIXELATED_BELOW


def _tile(sheet: Image.Image, x: int, y: int, side: int) -> bytes:
    """A JPEG of a square of the sheet, without its transparent bars: they would be black or white ones."""
    tile = sheet.crop((x, y, x + side, y + side))
    return jpeg(tile.crop(tile.getchannel("A").getbbox()).convert("RGB"), _TILE_SIDE)


def _corners(places: Float[np.ndarray, "n 2"], side: float) -> Float[np.ndarray, "n 2"]:
    """The upper left corners of the images' squares, so that all lie within the map."""
    low, high = places.min(0), places.max(0)
    room = np.array([_MAP_WIDTH, _MAP_HEIGHT]) - side - 2 * _MAP_MARGIN
    return _MAP_MARGIN + (places - low) / np.maximum(high - low, 1e-12) * room


def _point(sample: FeatureSample, image: int, x: float, y: float) -> Point:
    label = int(sample.labels[image])
    frame = colour(label) if label >= 0 else ""
    source = _source(sample.thumbnails[image])
    return Point(f"{x:.1f}", f"{y:.1f}", sample.class_name(image), source, frame)


def _legend(sample: FeatureSample) -> list[tuple[str, str]]:
    labels, firsts = np.unique(sample.labels, return_index=True)
    entries = [
        (colour(label), sample.class_name(first))
        for label, first in zip(labels.tolist(), firsts.tolist(), strict=True)
        if label >= 0
    ]
    return entries if len(entries) <= _MOST_IN_LEGEND else []


def _same_class_pairs(labels: Int[np.ndarray, " n"]) -> float:
    """Share of all pairs of images that have the same class."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / max(1, len(labels) * (len(labels) - 1)))


def _row(
    sample: FeatureSample, query: int, order: Int[np.ndarray, " k"], similarity: Float[np.ndarray, " k"]
) -> list[Cell]:
    cells = [_cell(sample, query, "", same=False)]
    for image, near in zip(order.tolist(), similarity.tolist(), strict=True):
        same = bool(sample.labels[image] == sample.labels[query] >= 0)
        cells.append(_cell(sample, image, f"{near:.3f}", same=same))
    return cells


def _cell(sample: FeatureSample, image: int, text: str, *, same: bool) -> Cell:
    return Cell(sample.class_name(image) or "image", text, _source(sample.thumbnails[image]), same)


def _source(content: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
