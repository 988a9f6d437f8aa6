"""Mixing describes the plan's own batches; a full shuffle follows the hypergeometric distribution."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import hypergeom

from pipelines.config import DataConfig
from pipelines.index import build_index
from pipelines.mixing import Mixing, batch_rows, measure, run_mixing
from pipelines.plan import Plan
from pipelines.shards import write_shards

_ROWS, _CLASSES = 20_000, 100
_SORTED = np.arange(_ROWS) * _CLASSES // _ROWS


def _plan(window_rows: int, *, group: int = 200, random_access: bool = False, batch_size: int = 64) -> Plan:
    rows = np.full(_ROWS // group, group)
    return Plan(rows, 3, 8, batch_size, window_rows, random_access=random_access)


def _measured(plan: Plan, labels: np.ndarray = _SORTED) -> Mixing:
    found = measure(plan, labels.__getitem__)
    assert found
    return found


def test_a_full_shuffle_has_the_classes_that_the_hypergeometric_says():
    labels = np.repeat(np.arange(40), np.arange(1, 41))  # 820 images of classes of 1 to 40.
    plan = Plan(np.ones(820, np.int64), 0, 2, 32, 16)
    counts = np.arange(1, 41)
    found = _measured(plan, labels)
    assert found.shuffled_classes == pytest.approx(sum(1 - hypergeom.pmf(0, 820, n, 32) for n in counts))
    assert found.shuffled_same_class == pytest.approx(sum(n * (n - 1) for n in counts) / (820 * 819))


def test_classes_and_pairs_are_those_of_the_batches():
    plan = _plan(400)
    found = _measured(plan)
    classes, pairs = [], []
    for part in range(1, 16, 2):  # In the middle of each eighth of an epoch.
        for rows in batch_rows(plan, plan.steps_per_epoch * part // 16, 4):
            labels = _SORTED[rows]
            same = labels[:, None] == labels[None, :]
            classes.append(len(set(labels.tolist())))
            pairs.append((same.sum() - 64) / (64 * 63))
    assert len(classes) > 24
    assert found.classes == pytest.approx(np.mean(classes))
    assert found.same_class == pytest.approx(np.mean(pairs))


def test_larger_windows_mix_better_and_random_access_as_a_full_shuffle():
    small, large = _measured(_plan(200)), _measured(_plan(2400))
    assert small.share < 0.5 < large.share
    assert small.is_poor
    assert not large.is_poor
    single = _measured(_plan(200, random_access=True))
    assert single.share == pytest.approx(1, abs=0.05)
    assert single.same_class == pytest.approx(single.shuffled_same_class, abs=0.005)


def test_images_in_a_random_order_are_not_called_poor():
    labels = np.random.default_rng(0).permutation(_SORTED)
    assert not _measured(_plan(200), labels).is_poor


def test_of_few_classes_it_is_the_pairs_that_tell():
    labels = np.arange(_ROWS) * 5 // _ROWS
    found = _measured(_plan(200), labels)
    assert found.share > 0.7
    assert found.is_poor


def test_images_without_a_label_do_not_count():
    plan = _plan(200)
    assert measure(plan, lambda rows: np.full(len(rows), -1)) is None
    assert _measured(plan, np.where(_SORTED < 50, _SORTED, -1)).classes < _measured(plan).classes


def test_labels_are_asked_for_in_few_fragments_however_many_there_are():
    asked = []

    def labels_of(rows: np.ndarray) -> np.ndarray:
        asked.append(np.unique(rows // 5))
        return _SORTED[rows]

    plan = _plan(2000, group=5, batch_size=2048)
    found = measure(plan, labels_of, images=128, fragments=100)
    assert found
    assert found.images == 128
    # One batch, and as many images to know a full shuffle by.
    assert len(asked) == 1
    assert len(asked[0]) <= 256
    # 100 classes evenly: 128 images have 100 * (1 - 0.99^128) of them, give or take what a sample does.
    assert found.shuffled_classes == pytest.approx(72, abs=8)


def test_a_run_measures_it_from_the_labels_of_its_files(tmp_path: Path):
    rows = ((b"image", n // 20, str(n)) for n in range(400))
    write_shards(rows, str(tmp_path), rows_per_shard=100, rows_per_group=20)
    data = DataConfig(train=str(tmp_path))
    index = build_index(data.train, data)
    plan = Plan(index.rows, 0, 2, 16, 20)
    labels = np.arange(400) // 20
    found, expected = run_mixing(plan, index, data), measure(plan, labels.__getitem__)
    assert found
    assert expected
    assert found.is_poor
    assert (found.classes, found.same_class) == (expected.classes, expected.same_class)
    # The same of a part of the rows, as a held-out set leaves it.
    part = index.only(np.arange(0, 400, 2))
    found = run_mixing(Plan(part.rows, 0, 2, 16, 20), part, data)
    assert found
    assert found.is_poor


def test_without_labels_nothing_is_said(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for number in range(40):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"image")
    data = DataConfig(train=str(tmp_path / "images"))
    index = build_index(data.train, data)
    assert run_mixing(Plan(index.rows, 0, 2, 16, 20), index, data) is None
