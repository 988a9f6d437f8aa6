"""The plan gives the same global batches to any number of workers, from any step on."""

from itertools import cycle
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.mixing import batch_rows
from pipelines.philox import permutation
from pipelines.plan import Line, Plan, Window, check_lanes, evaluation_windows, lanes_of

_seeded = settings(derandomize=True, deadline=None, max_examples=60)
_fragments = st.lists(st.integers(0, 40), min_size=1, max_size=9).map(np.array)


@st.composite
def _plans(draw: st.DrawFn, *, of_fragments: bool = False) -> Plan:
    """Plans of both kinds, or only those that permute fragments."""
    random_access = not of_fragments and draw(st.booleans())
    rows = draw(_fragments)
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    batch_size = lanes * draw(st.integers(1, 5))
    assume(rows.sum() >= batch_size)
    seed, window_rows = draw(st.integers(0, 2**40)), draw(st.integers(1, 50))
    return Plan(rows, seed, lanes, batch_size, window_rows, random_access=random_access)


def _read(rows: np.ndarray, window: Window) -> list[int]:
    """The numbers of the rows that are read for a window, counted over the fragments as they are listed."""
    first = np.concatenate([[0], np.cumsum(rows)])
    return [
        int(first[piece.fragment]) + row for piece in window.pieces for row in range(piece.start, piece.stop)
    ]


def _batches(plan: Plan, lanes: range, start: int, stop: int) -> list[list[int]]:
    """The rows that the worker of `lanes` trains on in each step: a fixed number of every lane."""
    left: dict[int, list[int]] = {lane: [] for lane in lanes}
    lines: dict[int, list[int]] = {lane: [] for lane in lanes}
    for lane, window in zip(cycle(lanes), plan.windows(lanes, start, stop), strict=False):
        left[lane] += _read(plan.rows, window)
        rows, left[lane] = left[lane][: window.size], left[lane][window.size :]
        lines[lane] += [rows[position] for position in window.order()[window.skip :]]
    share = plan.batch_size // plan.lanes
    assert min(len(line) for line in lines.values()) >= share * (stop - start)
    return [
        [sample for line in lines.values() for sample in line[share * step : share * (step + 1)]]
        for step in range(stop - start)
    ]


@_seeded
@given(_plans())
def test_an_epoch_visits_no_row_twice_and_leaves_out_less_than_a_batch(plan: Plan):
    total = int(plan.rows.sum())
    batches = _batches(plan, range(plan.lanes), 0, plan.steps_per_epoch)
    visited = [sample for batch in batches for sample in batch]
    assert len(set(visited)) == len(visited)
    assert set(visited) <= set(range(total))
    assert total - len(visited) < plan.batch_size


@_seeded
@given(_plans())
def test_a_global_batch_is_the_same_set_of_rows_for_any_number_of_workers(plan: Plan):
    stop = 2 * plan.steps_per_epoch + 1
    alone = _batches(plan, range(plan.lanes), 0, stop)
    for workers in (n for n in range(2, plan.lanes + 1) if plan.lanes % n == 0):
        shares = [_batches(plan, lanes_of(rank, workers, plan.lanes), 0, stop) for rank in range(workers)]
        for step in range(stop):
            assert {len(share[step]) for share in shares} == {plan.batch_size // workers}
            assert sorted(sample for share in shares for sample in share[step]) == sorted(alone[step])


@_seeded
@given(_plans(), st.data())
def test_resuming_at_a_step_gives_exactly_the_rest(plan: Plan, data: st.DataObject):
    stop = data.draw(st.integers(1, 3 * plan.steps_per_epoch))
    start = data.draw(st.integers(0, stop - 1))
    workers = data.draw(st.sampled_from([n for n in range(1, plan.lanes + 1) if plan.lanes % n == 0]))
    lanes = lanes_of(workers - 1, workers, plan.lanes)
    assert _batches(plan, lanes, start, stop) == _batches(plan, lanes, 0, stop)[start:]


@_seeded
@given(_plans())
def test_a_window_has_whole_batches_and_no_more_rows_than_asked_where_a_batch_fits(plan: Plan):
    share = plan.batch_size // plan.lanes
    for window in plan.windows(range(plan.lanes), 0, plan.steps_per_epoch):
        assert window.rows % share == 0
        assert window.rows <= max(share, plan.window_rows)


@_seeded
@given(_plans())
def test_no_row_is_read_twice_in_an_epoch(plan: Plan):
    windows = plan.windows(range(plan.lanes), 0, plan.steps_per_epoch)
    read = [sample for window in windows for sample in _read(plan.rows, window)]
    assert len(set(read)) == len(read)


@_seeded
@given(_plans(of_fragments=True))
def test_a_fragment_is_read_in_one_piece_by_a_lane(plan: Plan):
    for lane in range(plan.lanes):
        windows = plan.windows(range(lane, lane + 1), 0, plan.steps_per_epoch)
        fragments = [piece.fragment for window in windows for piece in window.pieces]
        assert len(set(fragments)) == len(fragments)


@_seeded
@given(_plans(of_fragments=True))
def test_lanes_share_a_fragment_only_at_their_ends(plan: Plan):
    read = []
    for lane in range(plan.lanes):
        windows = plan.windows(range(lane, lane + 1), 0, plan.steps_per_epoch)
        read.append(list(dict.fromkeys(piece.fragment for window in windows for piece in window.pieces)))
    for lane, fragments in enumerate(read):
        elsewhere = {fragment for other in read[:lane] + read[lane + 1 :] for fragment in other}
        assert not elsewhere & set(fragments[1:-1])


@_seeded
@given(_plans(), st.data())
def test_the_rows_that_mixing_counts_are_those_that_are_trained_on(plan: Plan, data: st.DataObject):
    step = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    rows = batch_rows(plan, step, 3)
    assert 1 <= len(rows) <= 3
    assert rows.tolist() == _batches(plan, range(plan.lanes), step, step + len(rows))


def test_with_random_access_neighbours_are_parted():
    plan = Plan(np.full(4, 250), 0, lanes=2, batch_size=20, window_rows=20, random_access=True)
    (first, *_) = _batches(plan, range(2), 0, 1)
    assert {row // 250 for row in first} == {0, 1, 2, 3}
    assert len({row // 50 for row in first}) > 10


def test_of_single_images_random_access_is_the_same_plan():
    plans = [Plan(np.ones(90, np.int64), 5, 3, 6, 8, random_access=access) for access in (False, True)]
    first, second = (_batches(plan, range(3), 0, 2 * plan.steps_per_epoch) for plan in plans)
    assert first == second


def test_two_epochs_differ_in_order_and_in_batches():
    plan = Plan(rows=np.full(20, 30), seed=0, lanes=4, batch_size=40, window_rows=50)
    batches = _batches(plan, range(4), 0, 2 * plan.steps_per_epoch)
    first, second = batches[: plan.steps_per_epoch], batches[plan.steps_per_epoch :]
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}


def test_a_lane_reads_other_fragments_in_another_epoch():
    plan = Plan(rows=np.full(200, 10), seed=0, lanes=4, batch_size=40, window_rows=50)
    read = []
    for epoch in range(2):
        start = epoch * plan.steps_per_epoch
        windows = plan.windows(range(1), start, start + plan.steps_per_epoch)
        read.append({piece.fragment for window in windows for piece in window.pieces})
    # A quarter of a quarter of the 200 fragments, give or take.
    assert 5 <= len(read[0] & read[1]) <= 20


def test_two_seeds_differ():
    plans = [Plan(rows=np.full(20, 30), seed=seed, lanes=4, batch_size=40, window_rows=50) for seed in (0, 1)]
    first, second = (_batches(plan, range(4), 0, 3) for plan in plans)
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}


def test_a_run_sees_the_images_that_it_always_has():
    plan = Plan(rows=np.array([5, 3, 4]), seed=7, lanes=2, batch_size=4, window_rows=4)
    # Three steps each of two epochs; another order would be another run's under the same config.
    assert _batches(plan, range(2), 0, 6) == [
        [3, 2, 8, 9], [0, 1, 7, 6], [5, 4, 11, 10], [3, 2, 11, 5], [0, 1, 9, 10], [4, 8, 6, 7],
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 10_000])
def test_the_fragments_order_is_a_permutation_by_the_key(count: int):
    line = Line.of(np.ones(count, np.int64), (3, 5))
    assert np.array_equal(line.order, permutation((3, 5), count))


class _Counted(np.ndarray):
    """Row counts that note how often they are added up."""

    sums = 0

    def sum(self, *args: Any, **kwargs: Any) -> Any:
        _Counted.sums += 1
        return super().sum(*args, **kwargs)


def test_however_many_windows_are_listed_the_rows_are_added_up_once():
    plan = Plan(np.full(50, 20).view(_Counted), seed=0, lanes=4, batch_size=8, window_rows=10)
    assert len(list(plan.windows(range(4), 0, 3 * plan.steps_per_epoch))) > 200
    assert _Counted.sums == 1


def test_a_window_is_shuffled():
    plan = Plan(rows=np.array([400]), seed=0, lanes=1, batch_size=4, window_rows=400)
    (window,) = plan.windows(range(1), 0, plan.steps_per_epoch)
    assert np.abs(np.corrcoef(window.order(), np.arange(400))[0, 1]) < 0.1


def test_a_position_is_the_epoch_and_the_step_within_it():
    plan = Plan(rows=np.array([25]), seed=0, lanes=2, batch_size=8, window_rows=8)
    assert [plan.position(step) for step in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]


@pytest.mark.parametrize(("lanes", "workers"), [(8, 1), (8, 2), (6, 3), (4, 4)])
def test_every_lane_has_one_worker(lanes: int, workers: int):
    served = [lane for rank in range(workers) for lane in lanes_of(rank, workers, lanes)]
    assert sorted(served) == list(range(lanes))


def test_lanes_that_do_not_divide_the_batch_are_refused_with_a_batch_size_that_fits():
    with pytest.raises(ValueError, match=r"batch_size=30 .*lanes=8; try --batch-size 24"):
        Plan(rows=np.array([100]), seed=0, lanes=8, batch_size=30, window_rows=8)


def test_workers_that_do_not_divide_the_lanes_are_refused_with_numbers_that_fit():
    with pytest.raises(ValueError, match=r"lanes=8 .*workers=3; try --workers out of 1, 2, 4, 8"):
        check_lanes(64, 8, workers=3)


def test_a_data_set_smaller_than_a_batch_is_refused_with_a_batch_size_that_fits():
    with pytest.raises(ValueError, match=r"23 images.*batch_size=32 .*lanes=8; try --batch-size 16"):
        Plan(rows=np.array([20, 3]), seed=0, lanes=8, batch_size=32, window_rows=8)


def test_a_data_set_smaller_than_the_lanes_is_not_told_a_batch_size_that_fails_too():
    with pytest.raises(ValueError, match="3 images") as refused:
        Plan(rows=np.array([3]), seed=0, lanes=8, batch_size=32, window_rows=8)
    assert "try --batch-size 8" not in str(refused.value)


@_seeded
@given(_fragments, st.integers(1, 5), st.integers(1, 50))
def test_a_sweep_visits_every_row_once_in_order_over_the_workers(rows: np.ndarray, workers: int, window: int):
    visited = []
    for rank in range(workers):
        for read in evaluation_windows(rows, rank, workers, window_rows=window):
            assert read.rows <= 2 * window
            assert read.rows == read.rows_read
            visited += _read(rows, read)
    assert visited == list(range(int(rows.sum())))


def test_a_sweep_of_a_few_rows_of_each_fragment_reads_no_more_at_once_than_a_window():
    few, whole = np.full(500, 3), np.full(500, 100)
    windows = list(evaluation_windows(few, 0, 1, window_rows=1000, rows_read=whole))
    assert sum(window.rows for window in windows) == 1500
    assert {sum(int(whole[piece.fragment]) for piece in window.pieces) for window in windows} == {1000}
    # One that is larger than a window is read alone, and once.
    assert [
        len(window.pieces) for window in evaluation_windows(few, 0, 1, window_rows=50, rows_read=whole)
    ] == [1] * 500
    (window,) = evaluation_windows(np.array([9000]), 0, 1, window_rows=50, rows_read=np.array([100_000]))
    assert window.rows == 9000
