"""fit(): the training loop, in plain PyTorch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.views import Views
from training.gradients import Backward
from training.optimizers import set_learning_rate


def fit(
    model: nn.Module,
    backward: Backward,
    optimizer: Optimizer,
    views: Iterator[Views],
    *,
    start_step: int,
    stop_step: int,
    rate: Callable[[int], float],
    after_step: Callable[[int, Tensor, float], None],
    device: torch.device,
    clip_norm: float | None = None,
) -> None:
    """Train for steps [start_step, stop_step), however many batches `views` could give.

    `backward(views)` is the loss and leaves its gradients in `model`; `rate(step)` the learning rate.
    Gradients longer than clip_norm, all taken together, are shortened to it. After each step calls
    after_step(steps done, loss, learning rate). Raises RuntimeError where `views` ends early.
    """
    model.train()
    for step in range(start_step, stop_step):
        batch = next(views, None)
        if batch is None:
            raise RuntimeError(f"the data ended at step {step} of {stop_step}")
        set_learning_rate(optimizer, rate(step))
        optimizer.zero_grad(set_to_none=True)
        loss = backward(batch.to(device))
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        after_step(step + 1, loss, rate(step))
