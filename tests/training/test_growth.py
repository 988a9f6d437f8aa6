"""A run of 2,000 steps takes no more memory at its end than after its first steps, and no more files."""

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_digits import write_small_digits
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from training.config import TrainConfig
from training.evaluation.evaluator import Sets
from training.gather import LocalGather
from training.objectives import Objective
from training.process import Worker
from training.trainer import train

pytestmark = pytest.mark.slow

_STEPS, _LOOKS = 2000, (500, 1000, 1500, 1999)

# For what the allocator keeps: lines of metrics and TensorBoard's events leave the memory with each flush.
_KIB_A_STEP = 4.0


def _measured(config: TrainConfig) -> list[tuple[int, int, int]]:
    """Train; step, resident memory in KiB and open files at each of the looks."""
    found: list[tuple[int, int, int]] = []
    steps = 0

    def look(module: nn.Module, _inputs: Any) -> None:
        nonlocal steps
        if not isinstance(module, Objective):
            return
        steps += 1
        if steps in _LOOKS:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") // 1024
            found.append((steps, memory, len(os.listdir("/proc/self/fd"))))

    cpu = torch.device("cpu")
    worker = Worker(gather=LocalGather(), device=cpu, threads=1, tables=read_windows)
    train_index, test_index = (build_index(uri, config.data) for uri in (config.data.train, config.data.test))
    hook = register_module_forward_pre_hook(look)
    try:
        train(config, Sets(train_index, None, test_index), worker, lambda _: None)
    finally:
        hook.remove()
    return found


def test_neither_memory_nor_open_files_grow_over_2000_steps(tmp_path: Path) -> None:
    write_small_digits(tmp_path, 149)
    data = DataConfig(
        train=str(tmp_path / "train"), test=str(tmp_path / "test"), window_rows=12,
        view=replace(RECIPES["simclr-cifar"][0], size=16),
    )  # fmt: skip
    settings: dict[str, Any] = {
        "batch_size": 8, "lanes": 2, "steps": _STEPS, "encoder": {"name": "resnet8"},
        "projector": {"hidden_dim": 32, "dim": 16},
        "optimizer": {"name": "sgd", "learning_rate": 0.001, "scaling": "none"},
        "evaluation": {"every_epochs": 10, "diagnostic_images": 8, "neighbours": 10},
        "checkpoint": {"every_steps": 25, "keep": 2},
    }  # fmt: skip
    found = _measured(TrainConfig(data=data, output=str(tmp_path), **settings))
    print("step, KiB of memory, open files:", *found)
    assert [step for step, _, _ in found] == list(_LOOKS)
    (first, memory, files), *_, (last, memory_later, files_later) = found
    assert files_later <= files
    assert memory_later - memory < _KIB_A_STEP * (last - first)
