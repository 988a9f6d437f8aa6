"""fit(): the training loop, in plain PyTorch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.views import Views
from training.errors import NonFiniteError
from training.gradients import Backward
from training.optimizers import set_learning_rate
from training.step_timer import Stages

# After so many steps that had to be skipped it is not the data that is to blame.
SKIPPED_IN_A_ROW = 3


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
    stages: Stages | None = None,
) -> None:
    """Train for steps [start_step, stop_step), however many batches `views` could give.

    `backward(views)` is the loss and leaves its gradients in `model`; `rate(step)` the learning rate.
    Gradients longer than clip_norm, all taken together, are shortened to it. A step whose gradients are not
    finite changes nothing. After each step calls after_step(steps done, loss, learning rate); the loss is
    not finite where the step was skipped. `stages` get a step's times. Raises NonFiniteError after several
    skipped steps in a row, and RuntimeError where `views` ends early.
    """
    stages = stages or Stages()
    model.train()
    # Batch norm's statistics, and what an objective keeps, have seen what is then skipped.
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    skipped = 0
    for step in range(start_step, stop_step):
        with stages("data_wait"):
            batch = next(views, None)
        if batch is None:
            raise RuntimeError(f"the data ended at step {step} of {stop_step}")
        set_learning_rate(optimizer, rate(step))
        optimizer.zero_grad(set_to_none=True)
        _copy(buffers, before)
        loss = backward(batch.to(device))
        # Gradients are the same on all workers, so all of them skip the same steps.
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        with stages("backward"):  # A GPU has finished it here.
            finite = bool(norm.isfinite() & loss.isfinite())
        if finite:
            with stages("optimizer"):
                if clip_norm is not None:
                    nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
                optimizer.step()
            skipped = 0
        else:
            skipped += 1
            _copy(before, buffers)
            loss = torch.full_like(loss, torch.nan)
        after_step(step + 1, loss, rate(step))
        if skipped == SKIPPED_IN_A_ROW:
            raise NonFiniteError(step + 2 - skipped, step + 1)


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for value, place in zip(source, target, strict=True):
        place.copy_(value)
