"""A run goes on from one device to the other, and trains there as it would have here."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_digits import write_small_digits
from torch import Tensor

from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.evaluation.evaluator import Sets
from training.gather import LocalGather
from training.metrics import read_metrics
from training.process import Worker
from training.trainer import run_uri, train

pytestmark = pytest.mark.gpu

_STEPS, _HALF = 8, 4
_DEVICES = {"cpu": torch.device("cpu"), "gpu": torch.device("cuda", 0)}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Convolutions in float32 and not in TF32, which they are by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("digits")
    write_small_digits(folder, 149)
    view = replace(RECIPES["simclr-cifar"][0], size=16)
    return DataConfig(train=str(folder / "train"), test=str(folder / "test"), view=view, window_rows=12)


def _config(data: DataConfig, output: Path, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "batch_size": 24,
        "lanes": 4,
        "steps": _STEPS,
        "precision": "float32",
        # Gentle enough that rounding grows by little from step to step.
        "temperature": 1.0,
        "encoder": {"name": "resnet8"},
        "projector": {"hidden_dim": 32, "dim": 16},
        "optimizer": {"name": "sgd", "learning_rate": 0.001, "scaling": "none", "weight_decay": 1e-4},
        "evaluation": {"neighbours": 10, "batch_size": 32},
        "checkpoint": {"every_steps": _HALF, "keep": 100},
    }
    return TrainConfig(data=data, output=str(output), **{**settings, **fields})


def _train(config: TrainConfig, device: str, until: int | None = None) -> None:
    worker = Worker(gather=LocalGather(), device=_DEVICES[device], threads=2, tables=read_windows)
    assert config.data.test
    sets = [build_index(uri, config.data) for uri in (config.data.train, config.data.test)]
    train(config, Sets.of(config, *sets), worker, lambda _values: None, until=until)


def _saved(config: TrainConfig, step: int) -> dict[str, Any]:
    return Checkpoints(run_uri(config), config.checkpoint.keep).load(step)


def _moved(config: TrainConfig, before: dict[str, Tensor]) -> Tensor:
    """How far all weights, taken together, have moved from `before` to the end."""
    after = _saved(config, _STEPS)["model"]
    return torch.cat(
        [(after[key] - value).flatten() for key, value in before.items() if value.is_floating_point()]
    )


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize(("first", "then"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_a_run_goes_on_on_another_device(
    first: str, then: str, optimizer: str, data: DataConfig, tmp_path: Path
):
    settings = {"name": optimizer, "learning_rate": 0.001, "scaling": "none", "weight_decay": 1e-4}
    staying = _config(data, tmp_path / "staying", optimizer=settings)
    _train(staying, first, until=_HALF)
    moving = replace(staying, output=str(tmp_path / "moving"))
    shutil.copytree(run_uri(staying), run_uri(moving))
    _train(staying, first)
    _train(moving, then)
    before = _saved(staying, _HALF)["model"]
    expected, actual = _moved(staying, before), _moved(moving, before)
    # Pixels differ by a grey level here and there, and sums by their order.
    assert (actual - expected).norm() < 0.05 * expected.norm()
    losses = [
        [line["loss"] for line in read_metrics(run_uri(config)) if "loss" in line]
        for config in (staying, moving)
    ]
    assert len(losses[1]) == _STEPS
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert all(value.device.type == "cpu" for value in _saved(moving, _STEPS)["model"].values())


@pytest.mark.parametrize("fields", [{}, {"objective": "byol", "temperature": 0.1}, {"micro_batch_size": 8}])
def test_a_run_in_bfloat16_learns_what_one_in_float32_does(
    fields: dict[str, Any], data: DataConfig, tmp_path: Path
):
    config = _config(data, tmp_path / "half", precision="auto", **fields)
    _train(config, "gpu")
    exact = replace(config, output=str(tmp_path / "exact"), precision="float32")
    _train(exact, "gpu")
    half, whole = (
        [line["loss"] for line in read_metrics(run_uri(each)) if "loss" in line] for each in (config, exact)
    )
    assert half == pytest.approx(whole, rel=0.02)


def test_compiled_encoders_train_alike(data: DataConfig, tmp_path: Path):
    config = _config(data, tmp_path / "compiled", compile=True)
    _train(config, "gpu")
    plain = replace(config, output=str(tmp_path / "plain"), compile=False)
    _train(plain, "gpu")
    compiled, eager = (
        [line["loss"] for line in read_metrics(run_uri(each)) if "loss" in line] for each in (config, plain)
    )
    assert compiled == pytest.approx(eager, rel=2e-3)


def test_an_efficientnets_skipped_rows_are_the_same_when_resumed(data: DataConfig, tmp_path: Path):
    encoder = {"name": "efficientnet", "width": 0.25, "depth": 0.5, "drop_path": 0.5}
    config = _config(data, tmp_path / "whole", encoder=encoder)
    _train(config, "gpu")
    parts = replace(config, output=str(tmp_path / "parts"))
    _train(parts, "gpu", until=_HALF)
    _train(parts, "gpu")
    whole, resumed = (
        [line["loss"] for line in read_metrics(run_uri(each)) if "loss" in line] for each in (config, parts)
    )
    assert resumed == pytest.approx(whole, rel=2e-3)
