"""Runs with `exact` on real ranks: the same bits of weights and losses on any number of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_digits import write_small_digits
from torch import Tensor

from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from training.checkpoint import Checkpoints
from training.config import TrainConfig, worker_counts
from training.evaluation.evaluator import Sets
from training.gather import LocalGather, ProcessGroupGather
from training.metrics import read_metrics
from training.models.exact import tree_sum
from training.process import Worker
from training.trainer import run_uri, train

_STEPS = 3
_SGD = {"name": "sgd", "learning_rate": 3.0}
_BYOL = {"objective": "byol", "byol": {"predictor_hidden_dim": 24}}
_SUPERVISED = {"objective": "supervised"}
_EFFICIENTNET = {"encoder": {"name": "efficientnet-b0"}}

# Steep enough that rounding, were there any, would grow.
_ROWS: dict[str, dict[str, Any]] = {
    "simclr sgd average": {"optimizer": {**_SGD, "average_decay": 0.5}},
    "simclr resnet18 lars": {"encoder": {"name": "resnet18"}, "optimizer": {"name": "lars"}},
    "simclr efficientnet adamw": {
        **_EFFICIENTNET,
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
    },
    "simclr clipped": {"optimizer": {**_SGD, "clip_norm": 0.5}},
    "simclr micro-batches": {"batch_size": 16, "micro_batch_size": 8},
    "dcl": {"simclr": {"loss": "dcl"}},
    "nt-logistic": {"simclr": {"loss": "nt-logistic"}},
    "nt-logistic-semi-hard": {"simclr": {"loss": "nt-logistic-semi-hard"}},
    "margin": {"simclr": {"loss": "margin"}},
    "margin-semi-hard": {"simclr": {"loss": "margin-semi-hard", "margin": 1.0}},
    "byol": _BYOL,
    "byol together": {"objective": "byol", "byol": {"predictor_hidden_dim": 24, "views_apart": False}},
    "byol micro-batches": {**_BYOL, "batch_size": 16, "micro_batch_size": 8},
    "byol efficientnet, an image a lane": {**_BYOL, **_EFFICIENTNET, "batch_size": 4},
    "supervised": _SUPERVISED,
    "supervised efficientnet, an image a lane": {**_SUPERVISED, **_EFFICIENTNET, "batch_size": 4},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("digits")
    write_small_digits(folder, 96)
    view = replace(RECIPES["simclr-cifar"][0], size=17)
    return DataConfig(train=str(folder / "train"), test=str(folder / "test"), view=view, window_rows=12)


def _config(data: DataConfig, output: Path, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "batch_size": 8,
        "lanes": 4,
        "steps": _STEPS,
        "exact": True,
        "encoder": {"name": "resnet8"},
        "optimizer": _SGD,
        "evaluation": {"neighbours": 5, "diagnostic_images": 0},
        "checkpoint": {"every_steps": 1, "keep": 9},
    }
    if fields.get("objective") != "supervised":
        settings["projector"] = {"hidden_dim": 32, "dim": 16}
    return TrainConfig(data=data, output=str(output), **{**settings, **fields})


def _train(config: TrainConfig, threads: int = 1) -> None:
    """Train in this process, or as the rank that it is."""
    torch.set_num_threads(threads)
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    worker = Worker(gather=gather, device=torch.device("cpu"), threads=1, tables=read_windows)
    index, test = (build_index(uri, config.data) for uri in (config.data.train, config.data.test or ""))
    train(config, Sets.of(config, index, test), worker, lambda _values: None)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)


def _losses(config: TrainConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(run_uri(config)) if "loss" in line]


def _tensors(saved: Any) -> list[Tensor]:
    """All tensors in a checkpoint, in order."""
    if isinstance(saved, Tensor):
        return [saved]
    parts = saved.values() if isinstance(saved, dict) else saved if isinstance(saved, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _assert_same(config: TrainConfig, expected: TrainConfig) -> None:
    assert _losses(config) == _losses(expected)
    for step in range(1, _STEPS + 1):
        ours, theirs = (_tensors(Checkpoints(run_uri(of), 9).load(step)) for of in (config, expected))
        assert len(ours) == len(theirs) > 20
        differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)]
        assert not differing, f"step {step}: {len(differing)} of {len(ours)} tensors differ"


def test_the_tree_adds_up_as_by_hand_and_workers_lanes_are_its_branches() -> None:
    a, b, c, d, e, f, g, h = lanes = list(torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)))
    expected = ((a + e) + (c + g)) + ((b + f) + (d + h))
    assert not torch.equal(expected, a + b + c + d + e + f + g + h)
    for workers in (1, 2, 4, 8):
        assert torch.equal(tree_sum([tree_sum(lanes[rank::workers]) for rank in range(workers)]), expected)


def test_other_numbers_of_workers_are_refused_with_those_that_fit(data: DataConfig, tmp_path: Path) -> None:
    config = _config(data, tmp_path, lanes=12, batch_size=24, workers=3)
    with pytest.raises(ValueError, match=r"workers=3; try --workers out of 1, 2, 4$"):
        worker_counts(config)
    assert worker_counts(replace(config, workers="2:12")) == [2, 4]
    assert worker_counts(replace(config, workers=3, exact=False)) == [3]


@pytest.mark.parametrize(
    "fields", [{"compile": True}, {"precision": "bfloat16"}, {"objective": "own:Objective", "projector": {}}]
)
def test_what_cannot_be_exact_is_refused_by_name(
    fields: dict[str, Any], data: DataConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="exact=true"):
        _config(data, tmp_path, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("row", _ROWS)
def test_every_checkpoint_and_loss_has_the_same_bits_on_any_number_of_ranks(
    row: str, data: DataConfig, tmp_path: Path, run_ranks: Callable
) -> None:
    alone = _config(data, tmp_path / "1", **_ROWS[row])
    _train(alone)
    first, *_, last = (Checkpoints(run_uri(alone), 9).load(step)["model"] for step in range(1, _STEPS + 1))
    assert not all(torch.equal(first[key], last[key]) for key in first)
    for ranks in (2, 4):
        config = replace(alone, output=str(tmp_path / str(ranks)))
        run_ranks(_train, ranks, config)
        _assert_same(config, alone)
