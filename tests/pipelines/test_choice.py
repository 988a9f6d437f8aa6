"""Which rows are held out and sampled: the same however rows are grouped, of each class in proportion."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.choice import held_out_places, packed, sampled_places, unpacked
from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.labels import with_labels
from pipelines.plan import evaluation_windows
from pipelines.reader import Reading, read_windows

_seeded = settings(deadline=None, derandomize=True)

_labels = st.lists(st.integers(0, 6), min_size=1, max_size=200).map(np.array)
_seeds = st.integers(0, 2**63 - 1)


@_seeded
@given(_labels, st.floats(0.01, 0.99), _seeds)
def test_each_class_is_held_out_in_proportion_and_none_is_lost(labels: np.ndarray, share: float, seed: int):
    sizes = Counter(labels.tolist())
    wanted = max(1, round(share * len(labels)))
    if wanted > len(labels) - len(sizes):
        with pytest.raises(ValueError, match="cannot hold out"):
            held_out_places(np.arange(len(labels)), labels, share, seed)
        return
    places = held_out_places(np.arange(len(labels)), labels, share, seed)
    assert len(places) == wanted
    assert sorted(set(places.tolist())) == places.tolist()
    held = Counter(labels[places].tolist())
    for label, size in sizes.items():
        assert held[label] < size
    # Every class gives the same share, rounded up or down, except those that give all but one.
    least = [(held[label] - 1) / size for label, size in sizes.items()]
    most = [(held[label] + 1) / size for label, size in sizes.items() if held[label] < size - 1]
    assert not most or max(least) < min(most)


@_seeded
@given(_labels, st.integers(1, 250), st.integers(1, 250), _seeds)
def test_a_sample_is_exact_in_proportion_and_has_all_of_a_smaller_one(
    labels: np.ndarray, count: int, less: int, seed: int
):
    rows = np.arange(len(labels))
    chosen = sampled_places(rows, labels, count, seed)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, len(labels))
    sizes, taken = Counter(labels.tolist()), Counter(labels[chosen].tolist())
    least = [(taken[label] - 1) / size for label, size in sizes.items()]
    most = [(taken[label] + 1) / size for label, size in sizes.items() if taken[label] < size]
    assert not most or max(least) < min(most)
    smaller = sampled_places(rows, labels, min(count, less), seed)
    assert set(smaller.tolist()) <= set(chosen.tolist())


def test_rows_are_known_by_their_samples_numbers_alone():
    samples, labels = np.arange(1000), np.arange(1000) % 7
    whole = held_out_places(samples, labels, 0.1, seed=5)
    # Rows of a part are ranked among themselves as they are in the whole: by their numbers, not their places.
    half = labels < 3
    part = held_out_places(samples[half], labels[half], 0.1, seed=5)
    chosen = samples[half][part]
    per_class = {label: [row for row in chosen.tolist() if labels[row] == label] for label in range(3)}
    for label, rows in per_class.items():
        of_whole = [row for row in whole.tolist() if labels[row] == label]
        assert set(rows) <= set(of_whole) or set(rows) >= set(of_whole)
    assert whole.tolist() != held_out_places(samples, labels, 0.1, seed=6).tolist()


def test_without_labels_all_rows_are_one_class():
    places = held_out_places(np.arange(10_000), None, 0.1, seed=0)
    assert len(places) == 1000
    # A fair draw has 100 of each thousand, with a deviation of 9.
    assert np.abs(np.histogram(places, 10, (0, 10_000))[0] - 100).max() < 40


def test_a_long_tail_is_held_out_and_sampled_as_it_is():
    """Sizes by Zipf's law: the classes of one to ten images have a third of all."""
    sizes = np.maximum(1, 3000 // np.arange(1, 1001))
    labels = np.repeat(np.arange(1000), sizes)
    rows, rare = np.arange(len(labels)), sizes <= 10
    held_out = np.bincount(labels[held_out_places(rows, labels, 0.05, seed=0)], minlength=1000)
    assert abs(held_out[0] - 150) <= 3
    sample = np.bincount(labels[sampled_places(rows, labels, 1000, seed=0)], minlength=1000)
    assert abs(sample[0] - 1000 * 3000 / len(labels)) <= 3
    assert abs(sample[rare].sum() - 1000 * sizes[rare].sum() / len(labels)) <= 20
    # Of two images each, one in a hundred is held out, not every second one.
    assert len(held_out_places(np.arange(1000), np.arange(1000) // 2, 0.01, seed=0)) == 10


def test_imagenet_in_class_order_keeps_all_classes_in_proportion():
    """1.28 million rows, 1,000 classes in order, as row groups of 1,000 would cut them."""
    labels = np.repeat(np.arange(1000), 1281)
    fragments = pa.table(
        {"path": ["f"] * 1281, "rows": [1000] * 1281, "first_sample": np.arange(1281) * 1000}
    )
    index = Index("u", "parquet", fragments, labels=labels)
    kept, held_out = index.split(0.1, seed=0)
    assert held_out.rows.sum() == 128_100
    assert set(np.bincount(labels[held_out.samples], minlength=1000)) == {128, 129}
    bank = kept.sample(100_000, seed=0)
    assert set(np.bincount(labels[bank.samples], minlength=1000)) <= {99, 100, 101}
    assert not set(bank.samples.tolist()) & set(held_out.samples.tolist())
    # And small, because every worker gets it: one bit per row, without the labels.
    assert len(pickle.dumps(held_out)) < 300_000


@_seeded
@given(st.sets(st.integers(0, 500), min_size=1).map(sorted))
def test_packed_places_come_back(places: list[int]):
    bits = packed(np.array(places))
    assert unpacked(bits).tolist() == places
    assert len(bits) <= places[-1] // 8 + 1


def test_a_job_over_a_large_row_group_is_a_span_and_a_bit_a_row():
    fragments = pa.table({"path": ["f"], "rows": [100_000], "row_group": [0], "first_sample": [0]})
    kept, _ = Index("u", "parquet", fragments).split(0.1, seed=0)
    (window, *_) = evaluation_windows(kept.rows, 0, 1, window_rows=100_000)
    assert len(pickle.dumps(Reading.of(kept, window.pieces))) < 20_000


def _written(folder: Path, name: str, rows_per_file: list[int], rows_per_group: int) -> DataConfig:
    """The same 120 rows in class order, cut into files and row groups."""
    table = pa.table({"image": [bytes([row]) for row in range(120)], "label": np.arange(120) // 12})
    (folder / name).mkdir()
    ends = np.cumsum(rows_per_file)
    for number, (start, end) in enumerate(zip(ends - rows_per_file, ends, strict=True)):
        part = table.slice(start, end - start)
        pq.write_table(part, folder / name / f"{number:02}.parquet", row_group_size=rows_per_group)
    return DataConfig(train=str(folder / name))


@pytest.mark.parametrize("rows_per_file", [[120], [40, 40, 40], [7, 100, 13]])
@pytest.mark.parametrize("rows_per_group", [1, 12, 50, 120])
def test_any_grouping_of_the_same_rows_gives_the_same_sets(
    tmp_path: Path, rows_per_file: list[int], rows_per_group: int
):
    data = _written(tmp_path, "images", rows_per_file, rows_per_group)
    index = with_labels(build_index(data.train, data), data, lambda done, of: None)
    labels = np.arange(120) // 12
    expected = held_out_places(np.arange(120), labels, 0.25, seed=3)
    kept, held_out = index.split(0.25, seed=3)
    assert held_out.samples.tolist() == expected.tolist()
    assert kept.labels is not None
    assert kept.labels.tolist() == np.delete(labels, expected).tolist()
    bank = kept.sample(30, seed=3)
    assert Counter(labels[bank.samples].tolist()) == dict.fromkeys(range(10), 3)
    for workers in (1, 2, 3):
        read = [
            row
            for rank in range(workers)
            for table in read_windows(bank, data, _sweep(bank, rank, workers))
            for row in table.select(["sample", "label"]).to_pylist()
        ]
        assert [row["sample"] for row in read] == bank.samples.tolist()
        assert [row["label"] for row in read] == labels[bank.samples].tolist()


def _sweep(index: Index, rank: int, workers: int):
    return evaluation_windows(index.rows, rank, workers, window_rows=20, rows_read=index.rows_read)


def test_labels_are_kept_with_an_index_and_not_read_again(tmp_path: Path):
    data = _written(tmp_path, "images", [120], 50)
    index = with_labels(build_index(data.train, data), data, lambda done, of: None)
    again = Index.from_bytes(index.split(0.25, seed=0)[0].to_bytes())
    (tmp_path / "images" / "00.parquet").unlink()
    assert with_labels(again, data, lambda done, of: None) is again
    assert again.labels is not None
    assert again.labels.tolist() == (again.samples // 12).tolist()
