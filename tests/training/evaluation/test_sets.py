"""Which images a run trains on and is judged by: a share of the labels changes nothing of the latter."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.train import labels_known, training_index
from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.labels import with_labels
from training.config import TrainConfig
from training.evaluation.sets import Sets
from training.objective_builder import count_classes

_ROWS, _CLASSES = 600, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """600 rows of six classes, in class order."""
    return _written(tmp_path_factory.mktemp("rows"), np.arange(_ROWS) // (_ROWS // _CLASSES))


def _written(folder: Path, labels: Any) -> DataConfig:
    column = pa.array(labels, pa.int64())
    table = pa.table({"image": [b"no image"] * len(column), "label": column})
    pq.write_table(table, folder / "0.parquet", row_group_size=50)
    return DataConfig(train=str(folder))


def _config(data: DataConfig, objective: str = "supervised", **fields: Any) -> TrainConfig:
    return TrainConfig(data=data, objective=objective, seed=3, **fields)


def _sets(config: TrainConfig) -> Sets:
    """As `diptych train` has them, and again when it resumes from the index that it has kept."""
    index = labels_known(training_index(config), config)
    first, again = (Sets.of(config, listed, None) for listed in (index, Index.from_bytes(index.to_bytes())))
    assert first.train.samples.tolist() == again.train.samples.tolist()
    return first


def test_a_baseline_with_few_labels_is_judged_by_the_images_of_a_run_without_any(data: DataConfig) -> None:
    evaluation = {"held_out": 0.25}
    without = _sets(_config(data, "simclr", evaluation=evaluation))
    assert without.held_out
    judged = without.held_out.samples.tolist()
    assert len(judged) == 150
    for labels in (None, 0.02, 0.1, 0.9):
        sets = _sets(_config(data, evaluation=evaluation, supervised={"labels": labels}))
        assert sets.held_out
        assert sets.held_out.samples.tolist() == judged
        trained = sets.train.samples
        assert not set(trained.tolist()) & set(judged)
        assert len(trained) == round((labels or 1) * 450)
        each = np.bincount(trained // 100, minlength=_CLASSES)
        assert each.max() - each.min() <= 1
        assert sets.samples[0].samples.tolist() == trained.tolist()


def test_a_share_of_the_labels_grows_by_what_is_added(data: DataConfig) -> None:
    few, more = (
        set(_sets(_config(data, supervised={"labels": labels})).train.samples.tolist())
        for labels in (0.05, 0.4)
    )
    assert few < more


def test_labels_that_are_all_missing_are_told_in_one_line(tmp_path: Path) -> None:
    data = _written(tmp_path, [None] * 60)
    for fields in ({"supervised": {"labels": 0.1}}, {"supervised": {"labels": 0.1, "classes": 3}}):
        with pytest.raises(
            ValueError, match=r"^a share of the labels needs labels, but none of the 60 images of"
        ):
            _sets(_config(data, **fields))
    config = _config(data)
    with pytest.raises(ValueError, match=r"^no image of .* has a label; choose their column by"):
        count_classes(config, training_index(config))


@pytest.mark.parametrize("classes", [None, 4])
def test_one_class_alone_is_refused(tmp_path: Path, classes: int | None) -> None:
    data = _written(tmp_path, [7] * 60)
    config = _config(data, supervised={"classes": classes}, evaluation={"held_out": 0.1})
    with pytest.raises(ValueError, match=r"^all images of .* are of one class: .*; give images of two"):
        count_classes(config, labels_known(training_index(config), config))


def test_one_folder_of_images_is_one_class(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    index = build_index(str(tmp_path), DataConfig(train=str(tmp_path)))
    with pytest.raises(ValueError, match=r"are of one class"):
        count_classes(_config(DataConfig(train=str(tmp_path))), index)


def test_labels_that_are_all_different_hold_out_nothing_and_say_so(tmp_path: Path) -> None:
    data = _written(tmp_path, range(60))
    index = with_labels(build_index(data.train, data), data, lambda done, of: None)
    with pytest.raises(
        ValueError, match=rf"^the labels of {tmp_path} are all different, .*--data.label-column, or leave out"
    ):
        Sets.of(_config(data, "simclr", evaluation={"held_out": 0.1}), index, None)
    data = _written(tmp_path, [*range(59), 0])
    index = with_labels(build_index(data.train, data), data, lambda done, of: None)
    with pytest.raises(
        ValueError, match=r"has 60 images, too few to hold out 10% of them and train on one im"
    ):
        Sets.of(_config(data, "simclr", evaluation={"held_out": 0.1}), index, None)
