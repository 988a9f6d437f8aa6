"""Class-sorted data are judged as shuffled ones; images are read once; those trained on are found."""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.labels import with_labels
from pipelines.plan import Window
from pipelines.reader import read_windows
from training.config import EvaluationConfig, TrainConfig
from training.evaluation.certainty import margin
from training.evaluation.evaluator import Evaluator, Sets
from training.evaluation.sets import ImageCache
from training.gather import LocalGather, ProcessGroupGather
from training.models.encoders import raw_pixels
from training.process import Worker

_CIFAR10 = Path(__file__).parents[4] / "shared/data/cifar10"


def _digits(folder: Path, name: str, order: np.ndarray, rows_per_group: int) -> str:
    """1,797 digits as PNG in that order."""
    pixels, labels = load_digits(return_X_y=True)
    images = []
    for row in order:
        out = io.BytesIO()
        Image.fromarray((pixels[row].reshape(8, 8) * 15).astype(np.uint8)).resize((16, 16)).save(out, "PNG")
        images.append(out.getvalue())
    table = pa.table({"image": images, "label": labels[order]})
    return _written(folder, name, table, rows_per_group)


def _written(folder: Path, name: str, table: pa.Table, rows_per_group: int) -> str:
    (folder / name).mkdir()
    pq.write_table(table, folder / name / "images.parquet", row_group_size=rows_per_group)
    return str(folder / name)


def _orders() -> tuple[np.ndarray, np.ndarray]:
    labels = load_digits(return_X_y=True)[1]
    return np.argsort(labels, kind="stable"), np.random.default_rng(0).permutation(len(labels))


def _config(uri: str, size: int = 16, **evaluation: object) -> TrainConfig:
    data = DataConfig(train=uri, recipe="simclr-cifar", view={"size": size}, evaluation_crop=1.0)
    return TrainConfig(data=data, evaluation=EvaluationConfig(**evaluation))


def _sets(config: TrainConfig, test: str | None = None) -> Sets:
    data = config.data
    train, judged = (
        with_labels(build_index(uri, data), data, lambda done, of: None) if uri else None
        for uri in (data.train, test)
    )
    assert train
    return Sets.of(config, train, judged)


class _Reads:
    """Reads tables, and remembers which samples of which data set."""

    def __init__(self) -> None:
        self.samples: list[tuple[str, int]] = []

    def __call__(self, index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
        for table in read_windows(index, data, windows):
            self.samples += [(index.uri, sample) for sample in table["sample"].to_pylist()]
            yield table


def _measured(config: TrainConfig, sets: Sets, worker: Worker | None = None) -> dict[str, float]:
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    worker = worker or Worker(gather=gather, device=torch.device("cpu"), threads=1, tables=read_windows)
    encoders = {"knn_top1": raw_pixels(config.data.view.size)}
    return Evaluator(config, sets, worker).online(encoders, last=True)


_SEEDS = 4


def _means(config: TrainConfig) -> dict[str, float]:
    """Of several seeds, each of which holds out other images."""
    found = [_measured(each, _sets(each)) for each in (replace(config, seed=seed) for seed in range(_SEEDS))]
    return {key: float(np.mean([values[key] for values in found])) for key in found[0]}


@pytest.mark.parametrize("rows_per_group", [30, 180])
def test_raw_pixels_of_class_sorted_digits_are_as_good_as_of_shuffled_ones(
    tmp_path: Path, rows_per_group: int
) -> None:
    found = {}
    for name, order in zip(("sorted", "shuffled"), _orders(), strict=True):
        uri = _digits(tmp_path, name, order, rows_per_group)
        found[name] = _means(_config(uri, held_out=0.2, train_images=600, diagnostic_images=200))
    for values in found.values():
        assert (values["evaluated_images"], values["bank_images"]) == (359, 600)
        assert values["majority_share"] == pytest.approx(0.1, abs=0.005)
        assert values["knn_top1"] > 0.9
    difference = abs(found["sorted"]["knn_top1"] - found["shuffled"]["knn_top1"])
    assert difference < 2**0.5 * margin(found["shuffled"]["knn_top1"], 359 * _SEEDS)
    # Diagnostics are of a fair sample too, not of two classes.
    assert found["sorted"]["effective_rank"] == pytest.approx(found["shuffled"]["effective_rank"], rel=0.05)


@pytest.mark.skipif(not _CIFAR10.is_dir(), reason="there is no CIFAR-10 beside the project")
def test_raw_pixels_of_class_sorted_photographs_are_as_good_as_of_shuffled_ones(tmp_path: Path) -> None:
    table = pq.read_table(sorted(_CIFAR10.glob("train-*.parquet"))[0])
    labels = table["label"].to_numpy()
    orders = {"sorted": np.argsort(labels, kind="stable"), "shuffled": np.arange(len(labels))}
    found = {}
    for name, order in orders.items():
        config = _config(
            _written(tmp_path, name, table.take(order), 500), 32, held_out=0.2, train_images=2000,
            diagnostic_images=0,
        )  # fmt: skip
        found[name] = _means(config)["knn_top1"]
    assert found["shuffled"] > 0.2
    assert abs(found["sorted"] - found["shuffled"]) < 2**0.5 * margin(found["shuffled"], 1000 * _SEEDS)


def test_images_are_read_once_and_from_memory_afterwards(tmp_path: Path) -> None:
    uri = _digits(tmp_path, "train", _orders()[0], 180)
    config = _config(uri, held_out=0.2, train_images=300, diagnostic_images=100)
    sets, reads = _sets(config), _Reads()
    worker = Worker(gather=LocalGather(), device=torch.device("cpu"), threads=1, tables=reads)
    first = _measured(config, sets, worker)
    # The bank and those held out; the images for diagnostics are of the bank.
    assert len(reads.samples) == len(set(reads.samples)) == 300 + 359
    assert _measured(config, sets, worker) == first
    assert len(reads.samples) == 300 + 359


def test_images_that_do_not_fit_into_the_cache_are_read_anew(tmp_path: Path) -> None:
    uri = _digits(tmp_path, "train", _orders()[0], 180)
    config = _config(uri, held_out=0.2, train_images=300, diagnostic_images=100)
    sets, reads = _sets(config), _Reads()
    worker = Worker(
        gather=LocalGather(), device=torch.device("cpu"), threads=1, tables=reads,
        cache=ImageCache(most_bytes=60_000),
    )  # fmt: skip
    first = _measured(config, sets, worker)
    once = len(reads.samples)
    assert once == 300 + 359 + 100
    assert _measured(config, sets, worker) == pytest.approx(first)
    # What fits, the images for diagnostics, stays.
    assert len(reads.samples) == 2 * once - 100


def _on_ranks(config: TrainConfig) -> dict[str, float]:
    return _measured(config, _sets(config))


def test_any_number_of_ranks_finds_the_same(tmp_path: Path, run_ranks: Callable) -> None:
    uri = _digits(tmp_path, "train", _orders()[0], 180)
    config = _config(uri, held_out=0.2, train_images=300, diagnostic_images=100)
    alone = _on_ranks(config)
    for found in run_ranks(_on_ranks, 3, config):
        assert found == pytest.approx(alone, rel=1e-5)


def test_evaluated_images_that_are_trained_on_are_counted(tmp_path: Path, run_ranks: Callable) -> None:
    order = np.arange(400)
    train, test = _digits(tmp_path, "train", order[:300], 50), _digits(tmp_path, "test", order[280:], 50)
    config = _config(train, diagnostic_images=0)
    values = _measured(config, _sets(config, test))
    assert (values["evaluated_images"], values["trained_on_images"]) == (120, 20)
    assert values["neighbours"] == int(np.bincount(load_digits(return_X_y=True)[1][:300]).min()) // 3
    for found in run_ranks(_on_test, 2, config, test):
        assert found["trained_on_images"] == 20


def _on_test(config: TrainConfig, test: str) -> dict[str, float]:
    return _measured(config, _sets(config, test))
