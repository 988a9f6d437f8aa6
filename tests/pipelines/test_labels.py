"""A share of each class's images is chosen, and no others are read, in every layout."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.labels import labelled_part, labelled_share, read_labels
from pipelines.plan import Plan, evaluation_windows
from pipelines.reader import read_windows

_COUNTS: list[tuple[int, int]] = []


def _progress(done: int, of: int) -> None:
    _COUNTS.append((done, of))


def _rows(index: Index, data: DataConfig) -> dict[int, tuple[int, str, bytes]]:
    """Label, key and image of every sample that evaluation would read."""
    windows = evaluation_windows(index.rows, 0, 1, window_rows=7)
    return {
        row["sample"]: (row["label"], row["key"], row["image"])
        for table in read_windows(index, data, windows)
        for row in table.to_pylist()
    }


@pytest.fixture(scope="module", params=["parquet", "folder"])
def found(
    request: pytest.FixtureRequest, index: Index, data: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Index, DataConfig]:
    """An index of 37 images, as Parquet in row groups of four or as files in folders of their classes."""
    if request.param == "parquet":
        return index, data
    folder = str(tmp_path_factory.mktemp("folder"))
    for sample, (label, _, content) in _rows(index, data).items():
        storage.write(f"{folder}/{label}/{sample:02}.png", content)
    return build_index(folder, DataConfig(train=folder)), DataConfig(train=folder)


def test_labels_are_those_of_the_rows(found: tuple[Index, DataConfig]) -> None:
    index, data = found
    labels = read_labels(index, data, _progress)
    assert labels.tolist() == [row[0] for _, row in sorted(_rows(index, data).items())]
    assert len(labels) == 37


def test_a_part_reads_its_own_rows_as_the_whole_does(found: tuple[Index, DataConfig]) -> None:
    index, data = found
    part = labelled_part(index, data, 0.5, seed=1, progress=_progress)
    chosen = labelled_share(read_labels(index, data, _progress), 0.5, seed=1)
    whole = _rows(index, data)
    assert part.rows.sum() == len(chosen) == 18
    assert _rows(part, data) == {sample: whole[sample] for sample in chosen.tolist()}
    assert read_labels(part, data, _progress).tolist() == [whole[sample][0] for sample in chosen.tolist()]


def test_a_part_of_a_part_and_a_split_part_keep_the_samples_numbers(found: tuple[Index, DataConfig]) -> None:
    index, data = found
    part = index.only(np.arange(0, 37, 2)).only(np.arange(0, 19, 3))
    whole = _rows(index, data)
    assert _rows(part, data) == {sample: whole[sample] for sample in range(0, 37, 6)}
    kept, held_out = part.split(0.3, seed=0)
    assert _rows(kept, data) | _rows(held_out, data) == _rows(part, data)


def test_a_part_survives_being_written_and_is_trained_on(found: tuple[Index, DataConfig]) -> None:
    index, data = found
    part = Index.from_bytes(index.only(np.arange(5, 35, 3)).to_bytes())
    plan = Plan(part.rows, seed=0, lanes=2, batch_size=4, window_rows=4)
    windows = list(plan.windows(range(2), 0, plan.steps_per_epoch))
    samples = [
        sample for table in read_windows(part, data, windows) for sample in table["sample"].to_pylist()
    ]
    assert len(samples) == len(set(samples)) >= 8
    assert set(samples) <= set(range(5, 35, 3))


def test_labels_of_parquet_are_read_without_its_images(
    index: Index, data: DataConfig, tmp_path: Path
) -> None:
    # The files stay, but for the bytes of every image.
    blind = data.__class__(train=data.train, image_column="nothing")
    assert read_labels(index, blind, _progress).tolist() == [n % 10 for n in range(37)]


# ImageNet's classes have 732 to 1,300 images; the published lists of 1 % and 10 % have 12 or 13, and 128.
@pytest.mark.parametrize(("share", "each"), [(0.01, {12, 13}), (0.1, {128, 129})])
def test_a_share_of_imagenets_labels_has_as_many_of_each_class(share: float, each: set[int]) -> None:
    random = np.random.default_rng(0)
    counts = np.full(1000, 1300)
    counts[:105] = random.integers(732, 1300, 105)
    counts[0] += 1_281_167 - counts.sum()
    labels = random.permutation(np.repeat(np.arange(1000), counts))
    chosen = labelled_share(labels, share, seed=0)
    assert len(chosen) == round(share * 1_281_167)
    assert set(np.bincount(labels[chosen]).tolist()) == each


@given(
    st.lists(st.integers(-1, 4), max_size=60).map(np.array),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.integers(0, 9),
)
def test_a_share_is_balanced_whole_and_within_a_larger_one(
    labels: np.ndarray, share: float, other: float, seed: int
) -> None:
    labels = labels.astype(np.int64)
    share, larger = sorted((share, other))
    chosen = labelled_share(labels, share, seed=seed)
    there = [int((labels == label).sum()) for label in range(5)]
    taken = [int((labels[chosen] == label).sum()) for label in range(5)]
    classes = sum(count > 0 for count in there)
    assert len(chosen) == max(round(share * sum(there)), classes)
    cut = [taken[label] for label in range(5) if taken[label] < there[label]]
    assert all(count >= max(taken) - 1 for count in cut)
    assert all(taken[label] >= 1 for label in range(5) if there[label])
    assert set(chosen.tolist()) <= set(labelled_share(labels, larger, seed=seed).tolist())


def test_a_share_of_the_labels_is_all_of_small_classes_and_as_many_of_the_others() -> None:
    labels = np.random.default_rng(0).permutation([0] * 100 + [1] * 50 + [2] * 3 + [-1] * 40)
    chosen = labelled_share(labels, 0.1, seed=1)
    counts = np.bincount(labels[chosen]).tolist()
    assert counts[2] == 3
    assert sorted(counts[:2]) == [6, 6]
    assert chosen.tolist() == labelled_share(labels, 0.1, seed=1).tolist()
    assert chosen.tolist() != labelled_share(labels, 0.1, seed=2).tolist()
    assert set(chosen) < set(labelled_share(labels, 0.5, seed=1))


def test_progress_counts_the_fragments_file_by_file(index: Index, data: DataConfig) -> None:
    _COUNTS.clear()
    read_labels(index, data, _progress)
    paths = index.fragments["path"].to_pylist()
    ends = [n for n in range(1, len(paths) + 1) if paths[n - 1 : n] != paths[n : n + 1]]
    assert [(n, len(paths)) for n in ends] == _COUNTS
