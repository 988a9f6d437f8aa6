"""Which images a report shows, where it places them, and what it says is near."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.neighbors import NearestNeighbors

from pipelines.index import Index
from training.report.features import choose_images, nearest, project


def _index(*rows: int) -> Index:
    fragments = {"path": [f"file-{number}" for number in range(len(rows))], "rows": rows}
    return Index("/images", "parquet", pa.table({**fragments, "first_sample": np.cumsum(rows) - rows}), False)


def _samples(index: Index) -> list[int]:
    return index.samples.tolist()


def _clouds(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features of three classes that lie far apart, and their classes."""
    labels = np.arange(count) % 3
    centres = generator.normal(size=(3, 16))
    return (5 * centres[labels] + generator.normal(size=(count, 16))).astype(np.float32), labels


def test_as_many_images_as_wanted_are_chosen_each_once_and_always_the_same() -> None:
    index = _index(*[1000] * 40)
    chosen = _samples(choose_images(index, 500, seed=3))
    assert len(chosen) == len(set(chosen)) == 500
    assert (
        chosen == _samples(choose_images(index, 500, seed=3)) != _samples(choose_images(index, 500, seed=4))
    )
    assert max(chosen) < 40_000
    # A row group is read for each of the fragments.
    assert len({sample // 1000 for sample in chosen}) == 32


@pytest.mark.parametrize("rows", [(300,), (3, 200, 90), (1,) * 700, (20,) * 40])
def test_few_fragments_or_many_give_as_many_images_as_they_can(rows: tuple[int, ...]) -> None:
    chosen = _samples(choose_images(_index(*rows), 500, seed=0))
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
