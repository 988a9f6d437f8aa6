"""SimCLR's step as one worker does it, on views that are in memory already; and its arithmetic."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from benchmarks.gpu_report import finished
from pipelines.views import Views
from training.config import OptimizerConfig
from training.cost import encoder_cost
from training.encoder_config import EncoderConfig
from training.encoders import build_encoder
from training.gradients import whole_batch
from training.heads import build_projector
from training.losses import nt_xent
from training.objective_config import ProjectorConfig
from training.objectives import SimCLR
from training.optimizers import build_optimizer, set_learning_rate
from training.stages import Stages

_LEARNING_RATE, _TEMPERATURE = 0.01, 0.1

# Batches that are held in memory, and taken again and again.
_HELD = 2


def step_flops(encoder: str, size: int) -> int:
    """FLOPs of an image in a step, multiply-adds counting as two: two views, forward and twice that backward.

    Of the encoder alone; the first layer, which needs no gradient of its input, is counted as the others.
    """
    return 2 * 3 * 2 * encoder_cost(EncoderConfig(name=encoder), size).multiply_adds


@dataclass
class Trainer:
    """Networks, NT-Xent and LARS; a call is a step. In bfloat16 on a GPU, channels last."""

    encoder: str
    device: torch.device
    compiled: bool = False
    stages: Stages = field(default_factory=Stages)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        network = build_encoder(EncoderConfig(name=self.encoder))
        projector = build_projector(ProjectorConfig(), network.dim, "simclr")
        self.model = SimCLR(network, projector, partial(nt_xent, temperature=_TEMPERATURE))
        self.model.to(self.device)
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if self.compiled:
            network.compile()
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        set_learning_rate(self.optimizer, _LEARNING_RATE)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.backward = whole_batch(self.model, dtype=dtype, stages=self.stages)

    def __call__(self, views: Views) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(views)
        self.optimizer.step()


def held_views(batch_size: int, size: int, device: torch.device) -> Iterator[Views]:
    """The same few batches of noise on the device, for ever."""
    torch.manual_seed(1)

    def view() -> torch.Tensor:
        noise = torch.randn(batch_size, 3, size, size, device=device)
        return noise.contiguous(memory_format=torch.channels_last)

    nothing = torch.full((batch_size,), -1)
    held = [Views((view(), view()), nothing, np.arange(batch_size)) for _ in range(_HELD)]
    while True:
        yield from held


def step_seconds(trainer: Trainer, batch_size: int, size: int, *, steps: int, warm_up: int) -> list[float]:
    """Seconds of each step after the warm-up; each is waited for."""
    trainer.model.train()
    seconds = []
    for number, views in zip(range(warm_up + steps), held_views(batch_size, size, trainer.device)):  # noqa: B905
        finished(trainer.device)
        started = time.perf_counter()
        trainer(views)
        finished(trainer.device)
        if number >= warm_up:
            seconds.append(time.perf_counter() - started)
    return seconds
