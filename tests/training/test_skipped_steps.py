"""A step whose loss or gradient is not finite leaves a run as it was before it, whatever follows a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_digits import write_small_digits
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from training.config import TrainConfig
from training.evaluation.evaluator import Sets
from training.gather import LocalGather
from training.metrics import read_metrics
from training.objectives import Objective
from training.process import Worker
from training.trainer import run_uri, train

# Step 3 has views that are not a number; step 5 a gradient that is not finite under a loss that is.
_NO_LOSS, _NO_GRADIENT, _STEPS = 3, 5, 6


@contextmanager
def _poisoned() -> Iterator[None]:
    step = 0

    def gradient(value: Tensor) -> Tensor | None:
        return value * torch.inf if step == _NO_GRADIENT else None

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        nonlocal step
        if not isinstance(module, Objective):
            return None
        if not step:
            next(module.encoder.parameters()).register_hook(gradient)
        step += 1
        if step != _NO_LOSS:
            return None
        return (replace(inputs[0], images=tuple(view * torch.nan for view in inputs[0].images)),)

    hook = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


def _same(one: Any, other: Any) -> bool:
    """Whether all tensors in both are the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else True


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "byol", "byol": {"tau_base": 0.9, "predictor_hidden_dim": 32}},
        {"objective": "simclr"},
    ],
    ids=["byol", "simclr"],
)
def test_neither_weights_nor_target_nor_average_move(fields: dict[str, Any], tmp_path: Path) -> None:
    write_small_digits(tmp_path, 49)
    view = replace(RECIPES["simclr-cifar"][0], size=16)
    settings: dict[str, Any] = {
        "batch_size": 24, "lanes": 2, "steps": _STEPS, "encoder": {"name": "resnet8"},
        "projector": {"hidden_dim": 32, "dim": 16},
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "average_decay": 0.9},
        "evaluation": {"diagnostic_images": 0}, "checkpoint": {"every_steps": 1, "keep": 9},
    }  # fmt: skip
    data = DataConfig(train=str(tmp_path / "train"), view=view, window_rows=12)
    config = TrainConfig(data=data, output=str(tmp_path), **settings, **fields)
    worker = Worker(gather=LocalGather(), device=torch.device("cpu"), threads=1, tables=read_windows)
    with _poisoned():
        train(config, Sets(build_index(data.train, data), None, None), worker, lambda _: None)
    skipped = [line["step"] for line in read_metrics(run_uri(config)) if "skipped" in line]
    assert skipped == [_NO_LOSS, _NO_GRADIENT]
    saved = [
        torch.load(tmp_path / f"run/checkpoints/step-{step:09}.pt", weights_only=True)
        for step in range(1, _STEPS + 1)
    ]
    for step, (before, after) in enumerate(pairwise(saved), start=2):
        for part in ("model", "average"):
            assert _same(before[part], after[part]) == (step in skipped), (step, part)
        assert _same(before["optimizer"]["state"], after["optimizer"]["state"]) == (step in skipped)
    if config.objective == "byol":  # It does move in the other steps.
        (key, *_) = [
            key for key in saved[0]["model"] if key.startswith("target_encoder.") and "weight" in key
        ]
        assert not torch.equal(saved[0]["model"][key], saved[1]["model"][key])
