"""Batches follow the plan, and another image of the window stands in for a bad one."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pipelines.batches import Batch, Rows, ShuffledWindow, step_batches
from pipelines.config import DataConfig
from pipelines.index import Index
from pipelines.plan import Plan
from pipelines.reader import read_windows


def _batches(index: Index, data: DataConfig, plan: Plan, start: int, bad: dict[int, str]) -> Iterator[Batch]:
    """The batches of a single worker, with some samples marked as bad by the reader."""
    stop = plan.steps_per_epoch

    def tables() -> Iterator[pa.Table]:
        for table in read_windows(index, data, plan.windows(range(plan.lanes), start, stop)):
            rows = table.to_pylist()
            for row in rows:
                if row["sample"] in bad:
                    row |= {"bad": bad[row["sample"]], "image": None, "height": 0, "width": 0}
            yield pa.Table.from_pylist(rows, schema=table.schema)

    windows = plan.windows(range(plan.lanes), start, stop)
    return step_batches(tables(), windows, plan.lanes, plan.lane_batch_size)


def _content(rows: Rows) -> list[tuple[int, bytes, int, int, int]]:
    """Sample, bytes, label and size of each row."""
    columns = zip(rows.sample, rows.image, rows.label, rows.height, rows.width, strict=True)
    return [
        (int(sample), image.tobytes(), int(label), int(height), int(width))
        for sample, image, label, height, width in columns
    ]


@pytest.fixture(scope="module")
def plan(index: Index) -> Plan:
    """37 rows in 2 lanes of 2 a step; a window is 3 steps."""
    return Plan(rows=index.rows, seed=5, lanes=2, batch_size=4, window_rows=6)


@pytest.fixture(scope="module")
def whole(index: Index, data: DataConfig, plan: Plan) -> list[Rows]:
    return [batch.rows for batch in _batches(index, data, plan, 0, {})]


def test_without_bad_images_a_row_shows_its_own(whole: list[Rows], encoded: list[bytes]):
    for rows in whole:
        assert not rows.quarantined
        for sample, image, label, _, _ in _content(rows):
            assert (image, label) == (encoded[sample], sample % 10)


def test_a_bad_image_is_replaced_by_one_of_its_lanes_window_and_all_else_stays(
    index: Index, data: DataConfig, plan: Plan, whole: list[Rows]
):
    bad = {int(whole[step].sample[place]): f"torn {step}" for step, place in ((0, 0), (0, 1), (1, 3), (7, 2))}
    found = [batch.rows for batch in _batches(index, data, plan, 0, bad)]
    for step, (rows, before) in enumerate(zip(found, whole, strict=True)):
        np.testing.assert_array_equal(rows.sample, before.sample)
        first = step // 3 * 3
        for place, (now, then) in enumerate(zip(_content(rows), _content(before), strict=True)):
            if now[0] not in bad:
                assert now == then
                continue
            lane = slice(0, 2) if place < 2 else slice(2, 4)
            others = [row[1:] for batch in whole[first : first + 3] for row in _content(batch[lane])]
            assert now[1:] in others
            assert now[1] != then[1]
    reasons = [image.reason for rows in found for image in rows.quarantined]
    assert reasons == ["torn 0", "torn 0", "torn 1", "torn 7"]


@pytest.mark.parametrize("start", [1, 2, 4])
def test_a_resume_within_a_window_finds_the_same_stand_ins(
    index: Index, data: DataConfig, plan: Plan, whole: list[Rows], start: int
):
    bad = {int(sample): "torn" for rows in whole[1:6] for sample in rows.sample[:1]}
    once = [_content(batch.rows) for batch in _batches(index, data, plan, 0, bad)]
    assert [_content(batch.rows) for batch in _batches(index, data, plan, start, bad)] == once[start:]


def test_images_that_do_not_decode_are_replaced_as_if_their_headers_had_told(
    index: Index, data: DataConfig, plan: Plan, whole: list[Rows]
):
    bad = {int(whole[0].sample[0]): "torn", int(whole[1].sample[3]): "torn"}
    told = [_content(batch.rows) for batch in _batches(index, data, plan, 0, bad)]
    found = []
    for batch in _batches(index, data, plan, 0, {}):
        places = [place for place, sample in enumerate(batch.rows.sample) if int(sample) in bad]
        repaired = batch.without(dict.fromkeys(places, "torn"))
        assert [image.reason for image in repaired.rows.quarantined] == ["torn"] * len(places)
        found.append(_content(repaired.rows))
    assert found == told


def _window(count: int, bad: list[int]) -> ShuffledWindow:
    rows = Rows(
        image=np.array([None if n in bad else np.full(3, n, np.uint8) for n in range(count)], object),
        label=np.arange(count), path=np.array(["f"] * count, object),
        key=np.array([f"k{n}" for n in range(count)], object), sample=np.arange(count),
        height=np.ones(count, int), width=np.ones(count, int), orientation=np.ones(count, int),
        bad=np.array(["torn" if n in bad else None for n in range(count)], object),
    )  # fmt: skip
    return ShuffledWindow(rows, {})


def test_the_stand_in_is_the_first_good_image_from_half_a_window_on():
    rows, shown = _window(8, [1, 2, 5, 6]).batch(0, 8)
    assert shown.tolist() == [0, 7, 7, 3, 4, 3, 3, 7]
    assert rows.label.tolist() == shown.tolist()
    assert rows.sample.tolist() == list(range(8))


def test_a_stand_in_that_does_not_decode_is_replaced_in_turn():
    window = _window(8, [1])
    batch = Batch((window,), 0, 4)
    assert [int(image[0]) for image in batch.rows.image] == [0, 5, 2, 3]
    repaired = batch.without({1: "broken"})
    assert [int(image[0]) for image in repaired.rows.image] == [0, 6, 2, 3]
    # Row 5 itself is reported in its own turn.
    assert [image.key for image in repaired.rows.quarantined] == ["k1"]
    assert [image.key for image in Batch((window,), 4, 8).rows.quarantined] == ["k5"]


def test_a_window_without_a_good_image_ends_the_run_by_name():
    with pytest.raises(ValueError, match=r"all 4 images that are read together are bad: k0 of f: torn"):
        _window(4, [0, 1, 2, 3]).batch(0, 2)


def test_rows_keep_arrows_own_memory(index: Index, data: DataConfig, plan: Plan):
    (table, *_) = read_windows(index, data, plan.windows(range(2), 0, 3))
    rows = Rows.of(table.slice(1, 3))
    assert [image.tobytes() for image in rows.image] == table["image"].to_pylist()[1:4]
    content = table["image"].chunk(0).buffers()[2]
    assert all(0 <= image.ctypes.data - content.address < content.size for image in rows.image)
    marked = rows.marked({1: "torn"})
    assert (len(marked.good), len(rows.good)) == (2, 3)
    assert replace(rows, bad=marked.bad).first_bad.endswith(": torn")
