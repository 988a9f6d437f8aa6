"""Which images a report shows, where it places them, and what it says is near."""

import io
import re

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from cluster.digits import scattered_digits
from pipelines.preview import contact_sheet
from pipelines.reader import SCHEMA
from pipelines.recipes import RECIPES
from pipelines.sources import Index
from training.report_images import Look, choose, nearest, project
from training.report_pictures import feature_map, neighbours, queries, views_sheet


def _index(*rows: int) -> Index:
    fragments = {"path": [f"file-{number}" for number in range(len(rows))], "rows": rows}
    return Index("/images", "parquet", pa.table({**fragments, "first_sample": np.cumsum(rows) - rows}), False)


def _samples(index: Index) -> list[int]:
    return index.samples.tolist()


def _look(features: np.ndarray, labels: np.ndarray, classes: tuple[str, ...] = ()) -> Look:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(out, "JPEG")
    return Look(7, "test images", [out.getvalue()] * len(features), features, labels, classes)


def _clouds(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features of three classes that lie far apart, and their classes."""
    labels = np.arange(count) % 3
    centres = generator.normal(size=(3, 16))
    return (5 * centres[labels] + generator.normal(size=(count, 16))).astype(np.float32), labels


def test_as_many_images_as_wanted_are_chosen_each_once_and_always_the_same() -> None:
    index = _index(*[1000] * 40)
    chosen = _samples(choose(index, 500, seed=3))
    assert len(chosen) == len(set(chosen)) == 500
    assert chosen == _samples(choose(index, 500, seed=3)) != _samples(choose(index, 500, seed=4))
    assert max(chosen) < 40_000
    # A row group is read for each of the fragments.
    assert len({sample // 1000 for sample in chosen}) == 32


@pytest.mark.parametrize("rows", [(300,), (3, 200, 90), (1,) * 700, (20,) * 40])
def test_few_fragments_or_many_give_as_many_images_as_they_can(rows: tuple[int, ...]) -> None:
    chosen = _samples(choose(_index(*rows), 500, seed=0))
    assert len(chosen) == len(set(chosen)) >= min(200, sum(rows))
    assert len(chosen) <= 500
    assert set(chosen) <= set(range(sum(rows)))


def test_neighbours_are_scikit_learns() -> None:
    features = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
    order, similarity = nearest(features, 5)
    search = NearestNeighbors(n_neighbors=6, metric="cosine").fit(features)
    distances, theirs = search.kneighbors(features)
    np.testing.assert_array_equal(order, theirs[:, 1:])
    np.testing.assert_allclose(similarity, 1 - distances[:, 1:], atol=1e-5)


def test_no_image_is_its_own_neighbour_and_two_have_one_each() -> None:
    order, _ = nearest(np.ones((2, 4), np.float32), 8)
    assert order.tolist() == [[1], [0]]


@pytest.mark.parametrize(("count", "method"), [(3, "PCA"), (11, "PCA"), (12, "t-SNE"), (200, "t-SNE")])
def test_the_projection_is_named_always_the_same_and_keeps_groups_together(count: int, method: str) -> None:
    features, labels = _clouds(count, np.random.default_rng(0))
    points, named = project(features)
    again, _ = project(features)
    assert named.startswith(method)
    np.testing.assert_array_equal(points, again)
    assert np.isfinite(points).all()
    if count > 12:
        found = NearestNeighbors(n_neighbors=4).fit(points).kneighbors(points)[1][:, 1:]
        assert (labels[found] == labels[:, None]).mean() > 0.95


@pytest.mark.parametrize("features", [np.ones((50, 8)), np.zeros((50, 8)), np.eye(2)])
def test_features_that_are_one_point_are_not_projected(features: np.ndarray) -> None:
    with pytest.raises(ValueError, match="there is nothing to project"):
        project(features.astype(np.float32))


def test_how_many_neighbours_are_of_the_same_class_is_said_beside_chance() -> None:
    features, labels = _clouds(90, np.random.default_rng(0))
    content = neighbours(_look(features, labels))
    search = NearestNeighbors(n_neighbors=9, metric="cosine").fit(features)
    theirs = search.kneighbors(features)[1][:, 1:]
    share = (labels[theirs] == labels[:, None]).mean()
    # Of the 89 others 29 are of the same class.
    assert f"{share:.0%} of the 8 nearest are; by chance it would be {29 / 89:.0%}" in content


def test_classes_are_named_and_escaped() -> None:
    features, labels = _clouds(30, np.random.default_rng(0))
    look = _look(features, labels, ("<a>", "b & c", "d"))
    for content in (feature_map(look), neighbours(look)):
        assert "<a>" not in content
        assert "&lt;a&gt;" in content
        assert "b &amp; c" in content


def test_every_class_has_a_query_before_any_has_two() -> None:
    assert queries(np.array([2, 2, 0, 2, 1])) == [2, 4, 0, 1, 3]
    assert queries(np.full(20, -1)) == list(range(8))
    assert queries(np.arange(100)) == list(range(8))


def test_a_contact_sheet_is_cut_into_its_images_and_views() -> None:
    rows = [
        {"key": key, "path": "digits", "label": label, "image": content, "sample": sample, "height": 32,
         "width": 32, "orientation": 1, "bad": None}
        for sample, (content, label, key) in enumerate(scattered_digits(5, held_out=False, seed=0))
    ]  # fmt: skip
    sheet = contact_sheet(pa.Table.from_pylist(rows, schema=SCHEMA), RECIPES["simclr-cifar"], seed=0)
    content = views_sheet(sheet, 2)
    alts = re.findall('alt="([^"]*)"', content)
    assert alts[:4] == ["Image 1", "First view of image 1", "Second view of image 1", "Image 2"]
    assert len(alts) == 15
    whole = np.asarray(Image.open(io.BytesIO(sheet)))
    # The pixels between the tiles are white, and all else is in the tiles.
    assert (whole[96:100] == 255).all()
    assert (whole[:, 96:100] == 255).all()
    assert whole.shape[:2] == (3 * 100 - 4, 5 * 100 - 4)


def test_a_sheet_of_a_run_with_labels_shows_its_one_view() -> None:
    rows = [
        {"key": key, "path": "digits", "label": label, "image": content, "sample": sample, "height": 32,
         "width": 32, "orientation": 1, "bad": None}
        for sample, (content, label, key) in enumerate(scattered_digits(4, held_out=False, seed=0))
    ]  # fmt: skip
    sheet = contact_sheet(pa.Table.from_pylist(rows, schema=SCHEMA), RECIPES["simclr-cifar"][:1], seed=0)
    alts = re.findall('alt="([^"]*)"', views_sheet(sheet, 1))
    assert alts == [f"{what} {n}" for n in range(1, 5) for what in ("Image", "First view of image")]
