"""Loss and gradients of a step: of the whole batch at once, or by micro-batches with the same result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.views import Views
from training.gather import Gather
from training.objectives import Objective
from training.step_timer import StepTimer

# Fills the parameters' gradients and returns the loss.
Backward = Callable[[Views], Float[Tensor, ""]]


def whole_batch(model: nn.Module, *, dtype: torch.dtype, timer: StepTimer | None = None) -> Backward:
    """Backward for a model whose output is the loss; its forward pass runs in `dtype` where that is safe."""
    time = timer or StepTimer()

    def backward(views: Views) -> Float[Tensor, ""]:
        with time("forward"), _autocast(views, dtype):
            loss = model(views)
        with time("backward"):
            loss.backward()
        return loss.detach()

    return backward


def micro_batches(
    objective: Objective,
    *,
    lanes: int,
    parts: int,
    gather: Gather,
    dtype: torch.dtype,
    timer: StepTimer | None = None,
) -> Backward:
    """Gradient caching: gradients of the whole batch with the memory of one of `parts` micro-batches.

    A micro-batch takes an equal part of each of this worker's `lanes`, so it has the same images on any
    number of workers. First all micro-batches are embedded without gradients, and the loss of all embeddings
    gives the gradient of each. Then each is embedded again and its gradient propagated back. The result is
    exact except for batch norm, whose statistics are a micro-batch's. Gao et al. 2021, section 3.2.
    """
    time = timer or StepTimer()

    def backward(views: Views) -> Float[Tensor, ""]:
        with time("forward"):
            return two_passes(views)

    def two_passes(views: Views) -> Float[Tensor, ""]:
        pieces = split(views, lanes, parts)
        states, embedded = [], []
        with torch.no_grad(), _running_statistics_kept(objective), _autocast(views, dtype):
            for piece in pieces:
                states.append(_random_state(piece))
                embedded.append([_full_precision(rows) for rows in objective.embed(piece)])
        leaves = [[rows.requires_grad_() for rows in piece] for piece in embedded]
        joined = [torch.cat(rows) for rows in zip(*leaves, strict=True)]
        loss = objective.loss(joined, _joined(views, pieces))
        with time("backward"):
            loss.backward()
        for piece, state, rows in zip(pieces, states, leaves, strict=True):
            _set_random_state(piece, state)
            with _autocast(views, dtype):
                again = objective.embed(piece)
            # BYOL's targets have no gradient.
            pairs = [(out, leaf.grad) for out, leaf in zip(again, rows, strict=True) if leaf.grad is not None]
            with time("backward"):
                torch.autograd.backward(
                    [out for out, _ in pairs], [gradient.to(out.dtype) for out, gradient in pairs]
                )
        _average_gradients(objective, gather)
        return loss.detach()

    return backward


def split(views: Views, lanes: int, parts: int) -> list[Views]:
    """Split the batch, whose rows are ordered by lane, into equal parts of each lane."""
    rows = torch.arange(len(views.labels)).view(lanes, parts, -1)
    pieces = []
    for part in range(parts):
        chosen = rows[:, part].reshape(-1)
        images = tuple(
            view[chosen.to(view.device)].contiguous(memory_format=torch.channels_last)
            for view in views.images
        )
        pieces.append(
            replace(views, images=images, labels=views.labels[chosen], samples=views.samples[chosen.numpy()])
        )
    return pieces


def _joined(views: Views, pieces: list[Views]) -> Views:
    """All views in the order of the pieces, which is that of their embeddings."""
    return replace(
        views,
        images=tuple(map(torch.cat, zip(*(piece.images for piece in pieces), strict=True))),
        labels=torch.cat([piece.labels for piece in pieces]),
        samples=np.concatenate([piece.samples for piece in pieces]),
    )


def _full_precision(rows: Tensor) -> Tensor:
    """Rows in float32 or float64, as losses are computed."""
    return rows if rows.dtype == torch.float64 else rows.float()


def _autocast(views: Views, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(views.images[0].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep batch norm's running statistics unchanged, so that images embedded twice count once."""
    norms: list[Any] = [part for part in module.modules() if getattr(part, "running_mean", None) is not None]
    momenta = [part.momentum for part in norms]
    for part in norms:
        part.momentum = 0.0
    yield
    for part, momentum in zip(norms, momenta, strict=True):
        part.momentum = momentum


def _random_state(views: Views) -> list[Tensor]:
    """The random state, restored so that both passes drop the same."""
    device = views.images[0].device
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(views: Views, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], views.images[0].device)


def _average_gradients(module: nn.Module, gather: Gather) -> None:
    """Average the gradients over the workers, as DistributedDataParallel does."""
    if gather.world_size == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = gather.total(torch.cat([gradient.reshape(-1) for gradient in gradients])) / gather.world_size
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
