"""fit(): the training loop, in plain PyTorch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.views import Views
from training.errors import NonFiniteError
from training.gradients import Backward
from training.optimizers import set_learning_rate
from training.step_timer import StepTimer

# After so many skipped steps in a row the data are not to blame.
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
    timer: StepTimer | None = None,
) -> None:
    """Train for steps [start_step, stop_step).

    `backward(views)` returns the loss and sets the gradients of `model`; `rate(step)` is the learning rate.
    Gradients whose common norm is above clip_norm are scaled down to it. A step with a loss or gradient that
    is not finite is skipped, and changes nothing. After each step, after_step(steps done, loss, learning
    rate) is called; the loss of a skipped step is NaN. `timer` times the stages of a step.

    Raises NonFiniteError after SKIPPED_IN_A_ROW skipped steps, and RuntimeError where `views` ends early.
    """
    timer = timer or StepTimer()
    model.train()
    # A skipped step also restores the buffers: batch norm's statistics, and those of the objective.
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    skipped = 0
    for step in range(start_step, stop_step):
        with timer("data_wait"):
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
        with timer("backward"):  # Waits for the GPU.
            finite = bool(norm.isfinite() & loss.isfinite())
        if finite:
            with timer("optimizer"):
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
