"""The same global batches of bit-identical views for any number of workers, from any step on."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.config import DataConfig, ViewRecipe
from pipelines.feed import Device, evaluation_recipe, evaluation_views, training_views
from pipelines.index import Index
from pipelines.plan import Plan, evaluation_windows, lanes_of
from pipelines.reader import read_windows
from pipelines.views import Views

# A sample's number to the bytes of its views and its label.
Step = dict[int, tuple[bytes, bytes, int]]

_RECIPES = (ViewRecipe(size=32), ViewRecipe(size=24))
_DEVICE = Device(threads=2)


@pytest.fixture(scope="module")
def plan(index: Index) -> Plan:
    """37 rows in 4 lanes of 2 a step: 4 steps an epoch, 2 windows a lane and epoch."""
    return Plan(rows=index.rows, seed=5, lanes=4, batch_size=8, window_rows=4)


def _by_sample(views: Views) -> Step:
    columns = (*views.images, views.labels)
    return {
        int(sample): (first.numpy().tobytes(), second.numpy().tobytes(), int(label))
        for sample, first, second, label in zip(views.samples, *columns, strict=True)
    }


def _tables(
    index: Index, data: DataConfig, plan: Plan, lanes: range, start: int, stop: int
) -> Iterator[pa.Table]:
    return read_windows(index, data, plan.windows(lanes, start, stop))


def _steps(index: Index, data: DataConfig, plan: Plan, lanes: range, start: int, stop: int) -> list[Step]:
    """The views that the worker serving `lanes` trains on."""
    tables = _tables(index, data, plan, lanes, start, stop)
    views = training_views(tables, plan, lanes, _RECIPES, _DEVICE, start_step=start, stop_step=stop)
    return [_by_sample(step) for step in views]


@pytest.fixture(scope="module")
def alone(index: Index, data: DataConfig, plan: Plan) -> list[Step]:
    """The views that a single worker trains on for a little over two epochs."""
    return _steps(index, data, plan, range(4), 0, 10)


def test_a_step_is_a_whole_batch_of_different_samples(alone: list[Step]):
    assert [len(step) for step in alone] == [8] * 10


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_same_samples_and_bit_identical_views(
    workers: int, alone: list[Step], index: Index, data: DataConfig, plan: Plan
):
    shares = [_steps(index, data, plan, lanes_of(rank, workers, 4), 0, 10) for rank in range(workers)]
    for step, expected in enumerate(alone):
        assert [len(share[step]) for share in shares] == [8 // workers] * workers
        merged = {sample: views for share in shares for sample, views in share[step].items()}
        assert merged == expected


@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_a_resumed_run_gives_the_views_of_the_uninterrupted_one(
    start: int, alone: list[Step], index: Index, data: DataConfig, plan: Plan
):
    assert _steps(index, data, plan, range(4), start, 10) == alone[start:]


def test_a_run_ends_at_its_last_step(alone: list[Step], index: Index, data: DataConfig, plan: Plan):
    assert _steps(index, data, plan, range(4), 0, 3) == alone[:3]


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_views_do_not_depend_on_how_the_stream_is_cut_into_tables(
    rows: int, alone: list[Step], index: Index, data: DataConfig, plan: Plan
):
    whole = pa.concat_tables(_tables(index, data, plan, range(4), 0, 10))
    tables = (whole.slice(start, rows) for start in range(0, whole.num_rows, rows))
    views = training_views(tables, plan, range(4), _RECIPES, _DEVICE, start_step=0, stop_step=10)
    assert [_by_sample(step) for step in views] == alone


def test_a_sample_has_other_views_in_another_epoch(alone: list[Step]):
    first = {sample: views for step in alone[:4] for sample, views in step.items()}
    second = {sample: views for step in alone[4:8] for sample, views in step.items()}
    both = first.keys() & second.keys()
    assert len(both) >= 32 - 5
    assert not [sample for sample in both if set(first[sample][:2]) & set(second[sample][:2])]


def test_two_views_of_a_sample_differ(index: Index, data: DataConfig, plan: Plan):
    recipes = (_RECIPES[0], _RECIPES[0])
    tables = _tables(index, data, plan, range(4), 0, 1)
    (views,) = training_views(tables, plan, range(4), recipes, _DEVICE, start_step=0, stop_step=1)
    first, second = views.images
    assert not [n for n in range(8) if torch.equal(first[n], second[n])]


def test_labels_stay_with_their_samples(alone: list[Step]):
    for step in alone:
        for sample, (_, _, label) in step.items():
            assert label == sample % 10


@pytest.mark.parametrize("workers", [1, 3])
def test_evaluation_yields_every_row_once_with_a_short_last_batch(
    workers: int, index: Index, data: DataConfig
):
    samples, sizes = [], []
    for rank in range(workers):
        windows = evaluation_windows(index.rows, rank, workers, window_rows=10)
        tables = read_windows(index, data, windows)
        for views in evaluation_views(tables, data, _DEVICE, batch_size=4):
            (images,) = views.images
            assert len(images) == len(views.labels) == len(views.samples)
            np.testing.assert_array_equal(views.labels, views.samples % 10)
            samples += views.samples.tolist()
            sizes.append(len(images))
    assert sorted(samples) == list(range(37))
    assert max(sizes) == 4


def test_evaluation_sees_the_same_view_whoever_reads_it(index: Index, data: DataConfig):
    seen = []
    for workers, batch_size in ((1, 37), (3, 5)):
        views_of = {}
        for rank in range(workers):
            windows = evaluation_windows(index.rows, rank, workers, window_rows=9)
            tables = read_windows(index, data, windows)
            for views in evaluation_views(tables, data, _DEVICE, batch_size=batch_size):
                pairs = zip(views.samples.tolist(), views.images[0], strict=True)
                views_of |= {sample: view.numpy().tobytes() for sample, view in pairs}
        seen.append(views_of)
    assert seen[0] == seen[1]


def test_evaluation_tells_of_every_bad_image_also_where_a_whole_batch_or_the_end_is_bad(
    index: Index, data: DataConfig
):
    windows = evaluation_windows(index.rows, 0, 1, window_rows=100)
    table = pa.concat_tables(read_windows(index, data, windows))
    torn, refused = range(4, 8), range(33, 37)
    images, reasons = table["image"].to_pylist(), [None] * 37
    for row in torn:
        images[row] = images[row][: len(images[row]) // 2]
    for row in refused:
        images[row], reasons[row] = None, "no image"
    table = table.drop_columns(["image", "bad"])
    table = table.append_column("image", pa.array(images, pa.large_binary()))
    table = table.append_column("bad", pa.array(reasons, pa.string()))
    batches = list(evaluation_views([table], data, _DEVICE, batch_size=4))
    assert [len(batch.samples) for batch in batches] == [4, 0, *[4] * 6, 1, 0]
    assert [len(batch.quarantined) for batch in batches] == [0, 4, *[0] * 6, 3, 1]
    told = [image.key for batch in batches for image in batch.quarantined]
    assert told == [table["key"][row].as_py() for row in (*torn, *refused)]


def test_evaluation_keeps_the_size_and_normalisation_of_the_training_view():
    view = ViewRecipe(size=40, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    recipe = evaluation_recipe(DataConfig(train="train", view=view, evaluation_crop=0.7))
    assert (recipe.size, recipe.mean, recipe.std) == (view.size, view.mean, view.std)
    assert (recipe.centre_crop, recipe.flip, recipe.jitter, recipe.grey, recipe.blur) == (0.7, 0, 0, 0, 0)
