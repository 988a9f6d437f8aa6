"""Exact steps on noise, in one process or as one of several ranks, for the tests that compare their bits."""

import hashlib
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.config import RECIPES, DataConfig
from pipelines.index import Index
from pipelines.plan import lanes_of
from pipelines.views import Views
from training.config import TrainConfig
from training.determinism import deterministic
from training.gather import Gather, LocalGather, ProcessGroupGather
from training.gradients import micro_batches, whole_batch
from training.loop import fit
from training.models.exact import exact_lanes, make_exact
from training.objective_builder import build_objective
from training.objectives import Objective
from training.optimizers import build_optimizer

STEPS = 2
_NO_DATA = Index("", "folder", pa.table({}))

# Loss, and digest of all weights, after each step.
Steps = list[tuple[float, str]]


class GatherThroughMemory(ProcessGroupGather):
    """Lets ranks share a GPU, which NCCL refuses: gloo gathers what is copied to the CPU."""

    def rows(self, local: Tensor) -> Tensor:
        return super().rows(local.cpu()).to(local.device)


def steps_config(size: int, **fields: Any) -> TrainConfig:
    """An exact config whose views have `size` pixels a side, and which needs no images."""
    view = replace(RECIPES["simclr-cifar"][0], size=size)
    settings: dict[str, Any] = {"data": DataConfig(train="nowhere", view=view), "exact": True}
    settings |= {"batch_size": 8, "lanes": 4, "encoder": {"name": "resnet8"}, **fields}
    return TrainConfig(**settings)


def noise(config: TrainConfig, gather: Gather, step: int) -> Views:
    """This rank's part of a step's batch."""
    generator, size = torch.Generator().manual_seed(step), config.data.view.size
    shape = (1 if config.objective == "supervised" else 2, config.batch_size, 3, size, size)
    images = torch.randn(shape, generator=generator)
    rows = np.arange(config.batch_size).reshape(config.lanes, -1)
    mine = rows[list(lanes_of(gather.rank, gather.world_size, config.lanes))].reshape(-1)
    views = tuple(view[mine].contiguous(memory_format=torch.channels_last) for view in images)
    return Views(views, torch.arange(config.batch_size)[mine] % 10, mine)


def plain_objective(config: TrainConfig) -> Objective:
    """The objective before it is made exact, with the config's own first weights."""
    torch.manual_seed(config.seed)
    objective = build_objective(config, _NO_DATA, LocalGather())
    return objective.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def trained(configs: dict[str, TrainConfig], device: str = "cpu") -> dict[str, Steps]:
    """The steps of each config, as this rank has them."""
    gather = LocalGather()
    if dist.is_initialized():
        gather = ProcessGroupGather() if device == "cpu" else GatherThroughMemory()
    return {name: _steps(config, gather, torch.device(device)) for name, config in configs.items()}


def _steps(config: TrainConfig, gather: Gather, device: torch.device) -> Steps:
    found: Steps = []
    objective = plain_objective(config).to(device)
    make_exact(objective, exact_lanes(config, gather))
    average = None
    if (decay := config.optimizer.average_decay) is not None:
        average = AveragedModel(objective, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    backward = whole_batch(objective, dtype=torch.float32)
    if config.micro_batch_size:
        lanes, parts = config.lanes // gather.world_size, config.batch_size // config.micro_batch_size
        backward = micro_batches(
            objective, lanes=lanes, parts=parts, gather=LocalGather(), dtype=torch.float32
        )

    def after_step(done: int, loss: Tensor, _rate: float) -> None:
        objective.after_step(done - 1, STEPS)
        if average:
            average.update_parameters(objective)
        found.append((loss.item(), _digest(objective, average)))

    with deterministic(exact=True, device=device):
        fit(
            objective, backward, build_optimizer(objective, config.optimizer),
            (noise(config, gather, step) for step in range(STEPS)),
            start_step=0, stop_step=STEPS, rate=lambda _step: config.optimizer.learning_rate / 10,
            after_step=after_step, device=device, clip_norm=config.optimizer.clip_norm,
        )  # fmt: skip
    return found


def _digest(*modules: nn.Module | None) -> str:
    saved = io.BytesIO()
    for module in filter(None, modules):
        for value in module.state_dict().values():
            saved.write(value.contiguous().cpu().numpy().tobytes())
    return hashlib.blake2b(saved.getbuffer()).hexdigest()
