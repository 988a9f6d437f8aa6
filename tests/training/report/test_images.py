"""What the page shows of images: views, the feature map, and neighbours."""

import base64
import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from cluster.digits import scattered_digits
from pipelines.config import RECIPES
from pipelines.inspection import contact_sheet
from pipelines.reader import SCHEMA
from training.report.features import FeatureSample
from training.report.images import Tile, feature_map, neighbours, queries, view_columns
from training.report.page import render_template


def _clouds(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features of three classes that lie far apart, and their classes."""
    labels = np.arange(count) % 3
    centres = generator.normal(size=(3, 16))
    return (5 * centres[labels] + generator.normal(size=(count, 16))).astype(np.float32), labels


def _sample(features: np.ndarray, labels: np.ndarray, classes: tuple[str, ...] = ()) -> FeatureSample:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(out, "JPEG")
    return FeatureSample(7, "test images", [out.getvalue()] * len(features), features, labels, classes)


def test_how_many_neighbours_are_of_the_same_class_is_said_beside_chance() -> None:
    features, labels = _clouds(90, np.random.default_rng(0))
    found = neighbours(_sample(features, labels))
    search = NearestNeighbors(n_neighbors=9, metric="cosine").fit(features)
    theirs = search.kneighbors(features)[1][:, 1:]
    share = (labels[theirs] == labels[:, None]).mean()
    # Of the 89 others 29 are of the same class.
    assert f"{share:.0%} of the 8 nearest have the same class; by chance {29 / 89:.0%} would" in found.about
    for row in found.rows:
        assert [cell.same for cell in row[1:]] == [cell.name == row[0].name for cell in row[1:]]


def test_classes_are_named_and_escaped() -> None:
    features, labels = _clouds(30, np.random.default_rng(0))
    sample = _sample(features, labels, ("<a>", "b & c", "d"))
    shown: dict[str, Any] = {"feature_map": feature_map(sample), "neighbours": neighbours(sample)}
    for part, values in shown.items():
        content = render_template(f"{part}.html", pixelated=False, **{part: values})
        assert "<a>" not in content
        assert "&lt;a&gt;" in content
        assert "b &amp; c" in content


def test_every_class_has_a_query_before_any_has_two() -> None:
    assert queries(np.array([2, 2, 0, 2, 1])) == [2, 4, 0, 1, 3]
    assert queries(np.full(20, -1)) == list(range(8))
    assert queries(np.arange(100)) == list(range(8))


def _sheet(images: int, views: int) -> bytes:
    rows = [
        {"key": key, "path": "digits", "label": label, "image": content, "sample": sample, "height": 32,
         "width": 32, "orientation": 1, "bad": None}
        for sample, (content, label, key) in enumerate(scattered_digits(images, held_out=False, seed=0))
    ]  # fmt: skip
    return contact_sheet(pa.Table.from_pylist(rows, schema=SCHEMA), RECIPES["simclr-cifar"][:views], seed=0)


def _pixels(tile: Tile) -> np.ndarray:
    content = base64.b64decode(tile.source.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def test_a_contact_sheet_is_cut_into_its_images_and_views() -> None:
    sheet = _sheet(5, 2)
    shown = view_columns(sheet, 2)
    assert [len(column) for column in shown.columns] == [3] * 5
    names = ["Image 1", "First view of image 1", "Second view of image 1"]
    assert [tile.alt for tile in shown.columns[0]] == names
    whole = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB")).astype(int)
    for x, column in enumerate(shown.columns):
        for y, tile in enumerate(column):
            # A JPEG's pixels are close to the PNG's.
            assert np.abs(_pixels(tile) - whole[100 * y : 100 * y + 96, 100 * x : 100 * x + 96]).mean() < 3


def test_a_sheet_of_a_run_with_labels_shows_its_one_view() -> None:
    alts = [tile.alt for column in view_columns(_sheet(4, 1), 1).columns for tile in column]
    assert alts == [f"{what} {n}" for n in range(1, 5) for what in ("Image", "First view of image")]


def test_an_image_that_is_not_square_is_shown_without_bars() -> None:
    sheet = Image.new("RGBA", (96, 2 * 100 - 4))
    sheet.paste(Image.new("RGB", (96, 40), "red"), (0, 28))
    sheet.paste(Image.new("RGB", (96, 96), "blue"), (0, 100))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    ((image, view),) = view_columns(out.getvalue(), 1).columns
    assert _pixels(image).shape == (40, 96, 3)
    assert np.abs(_pixels(image) - (255, 0, 0)).max() < 3
    assert _pixels(view).shape == (96, 96, 3)
