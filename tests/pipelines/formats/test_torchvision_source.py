"""Torchvision's data sets are read as lossless PNG with their labels; errors name the fault in a URI."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from pipelines.batches import step_batches
from pipelines.config import DataConfig
from pipelines.formats.torchvision_source import absolute, plain
from pipelines.index import build_index
from pipelines.mixing import batch_rows
from pipelines.plan import evaluation_windows, training_plan
from pipelines.reader import read_windows

_DATA = DataConfig(train="")


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small CIFAR-10 in the original's format, with its checksums patched into torchvision."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    lists = {"train_list": [f"data_batch_{n}" for n in range(1, 6)], "test_list": ["test_batch"]}
    for names in lists.values():
        for name in names:
            values = {
                "data": generator.integers(0, 256, (4, 3072), np.uint8),
                "labels": generator.integers(0, 3, 4).tolist(),
            }
            (folder / name).write_bytes(pickle.dumps(values))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog", "ship"]}))
    # torchvision's class is the real one. It knows the checksums of the whole CIFAR-10, 163 MB, and would
    # refuse a small set of the same format: it is told that set's files instead.
    for attribute, names in lists.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, attribute, [[name, None] for name in names])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return f"torchvision:CIFAR10?root={tmp_path}"


def test_pixels_labels_and_class_names_are_torchvisions(cifar: str):
    index = build_index(f"{cifar}&train=true", _DATA)
    windows = evaluation_windows(index.rows, 0, 1, window_rows=100)
    (table,) = read_windows(index, _DATA, windows)
    expected = torchvision.datasets.CIFAR10(absolute(cifar).partition("root=")[2], train=True)
    assert (index.layout, index.has_labels, index.classes) == ("torchvision", True, ("cat", "dog", "ship"))
    assert table["label"].to_pylist() == [label for _, label in expected]
    assert len(expected) == 20
    for encoded, (image, _) in zip(table["image"].to_pylist(), expected, strict=True):
        decoded = Image.open(io.BytesIO(encoded))
        assert decoded.format == "PNG"
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))


def test_an_epoch_is_a_full_shuffle_of_single_images(cifar: str):
    data = DataConfig(train=f"{cifar}&train=true")
    index = build_index(data.train, data)
    assert len(index.rows) == 1
    plan = training_plan(index, data, seed=1, lanes=2, batch_size=4)
    windows = list(plan.windows(range(2), 0, plan.steps_per_epoch))
    assert {piece.stop - piece.start for window in windows for piece in window.pieces} == {1}
    batches = list(step_batches(read_windows(index, data, windows), windows, 2, 2))
    rows = batch_rows(plan, 0, plan.steps_per_epoch)
    assert [batch.rows.sample.tolist() for batch in batches] == rows.tolist()
    assert sorted(rows.ravel().tolist()) == list(range(20))
    first = int(rows[0, 0])
    with Image.open(io.BytesIO(batches[0].rows.image[0])) as shown:
        root = absolute(cifar).partition("root=")[2]
        np.testing.assert_array_equal(
            np.asarray(shown), np.asarray(torchvision.datasets.CIFAR10(root)[first][0])
        )


def test_arguments_reach_the_class(cifar: str):
    assert build_index(f"{cifar}&train=false", _DATA).rows.sum() == 4


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("torchvision:CIFAR1?root=x", r"no data set 'CIFAR1'; did you mean CIFAR10\?"),
        ("torchvision:CIFAR10?rot=x", r"no argument 'rot'; did you mean root\?"),
        ("torchvision:CIFAR10?root=/nowhere", "not found or corrupted; add download=true"),
        ("torchvision:CIFAR10", "'root'; give it as torchvision:NAME[?]ARGUMENT=VALUE"),
        ("torchvision:FakeData?size=0", "holds no image"),
    ],
)
def test_what_is_wrong_in_a_uri_is_named_with_the_way_out(uri: str, message: str):
    with pytest.raises(ValueError, match=message):
        build_index(uri, _DATA)


def test_a_data_set_that_is_not_there_is_not_downloaded(tmp_path: Path):
    with pytest.raises(ValueError, match="download=true"):
        build_index(f"torchvision:CIFAR10?root={tmp_path}", _DATA)
    assert list(tmp_path.iterdir()) == []


def test_the_root_is_made_absolute_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert absolute("torchvision:A?root=b&split=c") == f"torchvision:A?root={tmp_path}/b&split=c"
    assert absolute("torchvision:FakeData") == "torchvision:FakeData"


def test_a_download_is_no_part_of_what_a_data_set_is():
    assert plain("torchvision:A?root=b&download=true&train=true") == "torchvision:A?root=b&train=true"
