"""LARS, parameter groups, and the learning rate's warm-up and cosine decay."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from training.config import OptimizerConfig, TrainConfig

_TRUST = 1e-3


class LARS(Optimizer):
    """SGD with momentum that scales each layer's step to the norm of its weights.

    You et al. 2017, algorithm 1, with SimCLR's choices: the trust ratio is 0.001 times the norm of the
    weights over that of the decayed gradient, and groups with `adapt=False` are plain SGD with momentum.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float, weight_decay: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        update = gradient.add(parameter, alpha=group["weight_decay"])
        if group["adapt"]:
            weight_norm, update_norm = parameter.norm(), update.norm()
            # Do not scale where all weights or all updates of a layer are zero.
            both = (weight_norm > 0) & (update_norm > 0)
            update.mul_(torch.where(both, _TRUST * weight_norm / update_norm, 1.0))
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        # The momentum includes the learning rate, as in the paper. torch's SGD applies the rate afterwards,
        # which differs while the rate changes.
        state["momentum_buffer"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
        parameter.sub_(state["momentum_buffer"])


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimiser, without weight decay (and with LARS without adaptation) for biases and batch norm."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay}
    others = {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}
    if config.name == "lars":
        groups = [weights, {**others, "adapt": False}]
        return LARS(groups, lr=0.0, momentum=config.momentum, weight_decay=0.0)
    if config.name == "sgd":
        return SGD([weights, others], lr=0.0, momentum=config.momentum, nesterov=config.nesterov)
    return AdamW([weights, others], lr=0.0, betas=(config.momentum, 0.999))


def peak_learning_rate(config: TrainConfig) -> float:
    """The learning rate after warm-up, scaled to batch_size. Chen et al. 2020, appendix B.1."""
    share = config.batch_size / 256
    scale = {"linear": share, "sqrt": math.sqrt(share), "none": 1.0}[config.optimizer.scaling]
    return config.optimizer.learning_rate * scale


def learning_rate(step: int, *, peak: float, steps: int, warmup_steps: int) -> float:
    """Linear warm-up from zero, then cosine decay to zero; `step` counts from 0.

    As in SimCLR's and BYOL's code, the rate of the first step is zero if there is a warm-up. Loshchilov and
    Hutter 2017, eq. 5.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * peak * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all groups of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def load_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load another optimizer's state of each weight, but keep this one's settings."""
    settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
