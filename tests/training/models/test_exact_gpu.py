"""Exact steps on a GPU: the same bits in one process and in two that share it."""

from collections.abc import Callable
from typing import Any

import pytest
from exact_steps import STEPS, steps_config, trained

pytestmark = pytest.mark.gpu

_HEAD = {"projector": {"hidden_dim": 32, "dim": 16}}
_SGD = {"optimizer": {"name": "sgd", "learning_rate": 3.0}}
_ADAMW = {"optimizer": {"name": "adamw", "learning_rate": 0.3}}
_ROWS: dict[str, dict[str, Any]] = {
    "simclr, lars": {**_HEAD, "encoder": {"name": "resnet18"}, "optimizer": {"name": "lars"}},
    "simclr, bottlenecks": {**_HEAD, **_SGD, "encoder": {"name": "resnet50"}},
    "simclr, efficientnet": {**_HEAD, **_ADAMW, "encoder": {"name": "efficientnet-b0"}},
    "simclr, convnext": {**_HEAD, **_ADAMW, "encoder": {"name": "torchvision:convnext_tiny"}},
    "simclr, micro-batches": {**_HEAD, **_SGD, "micro_batch_size": 16},
    "dcl": {**_HEAD, **_SGD, "simclr": {"loss": "dcl"}},
    "margin-semi-hard": {**_HEAD, **_SGD, "simclr": {"loss": "margin-semi-hard", "margin": 1.0}},
    "byol": {**_HEAD, **_SGD, "objective": "byol"},
    "supervised": {**_SGD, "objective": "supervised", "supervised": {"classes": 10}},
}


def test_eight_lanes_have_the_same_bits_in_one_process_and_in_two(run_ranks: Callable) -> None:
    configs = {name: steps_config(32, lanes=8, batch_size=32, **fields) for name, fields in _ROWS.items()}
    alone = trained(configs, "cuda:0")
    assert all(len({digest for _, digest in steps}) == STEPS for steps in alone.values())
    assert trained(configs, "cuda:0") == alone
    for rank, found in enumerate(run_ranks(trained, 2, configs, "cuda:0")):
        assert [name for name in configs if found[name] != alone[name]] == [], f"rank {rank}"
