"""fit(): the training loop, in plain PyTorch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.views import Views
from training.optimizers import set_learning_rate


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    views: Iterator[Views],
    *,
    start_step: int,
    stop_step: int,
    rate: Callable[[int], float],
    after_step: Callable[[int, Tensor, float], None],
    device: torch.device,
) -> None:
    """Train for steps [start_step, stop_step), however many batches `views` could give.

    `model(views)` is the loss; `rate(step)` the learning rate. After each step calls
    after_step(steps done, loss, learning rate). On a GPU the forward pass runs in bfloat16.
    Raises RuntimeError where `views` ends early.
    """
    model.train()
    for step in range(start_step, stop_step):
        batch = next(views, None)
        if batch is None:
            raise RuntimeError(f"the data ended at step {step} of {stop_step}")
        set_learning_rate(optimizer, rate(step))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(batch.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        after_step(step + 1, loss.detach(), rate(step))
