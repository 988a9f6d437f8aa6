"""Self-tests of a group of workers: correct gradients, and the speed of their connection."""

import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from training.gather import Gather
from training.losses import nt_xent

# Rows of each worker, and the dimension of a projection.
_ROWS, _DIM, _TEMPERATURE = 16, 32, 0.1

_BYTES, _ROUNDS = 16 * 2**20, 5


def gradient_error(gather: Gather, device: torch.device) -> float:
    """Largest difference between the gathered NT-Xent's gradients and one process's, relative to the largest.

    All workers call it and get the same value. Computed in float64, so that only an error in the collectives
    or the loss exceeds 1e-12. The reference is the full matrix of the whole batch, Chen et al. 2020, eq. 1.
    """
    first, second = _projections(gather.world_size, device)
    here = slice(gather.rank * _ROWS, (gather.rank + 1) * _ROWS)
    mine = first[here].clone().requires_grad_(), second[here].clone().requires_grad_()
    nt_xent(*mine, temperature=_TEMPERATURE, gather=gather).backward()
    together = torch.cat([gather.rows(_gradient(view)) for view in mine]) / gather.world_size
    whole = first.requires_grad_(), second.requires_grad_()
    _whole_batch(*whole).backward()
    alone = torch.cat([_gradient(view) for view in whole])
    return float((together - alone).abs().max() / alone.abs().max())


def all_gather_rate(gather: Gather, device: torch.device) -> float:
    """Bytes per second that each worker receives as all gather 16 MiB from each; the median of five runs."""
    rows = torch.ones(_BYTES // 4, device=device)
    seconds = []
    for _ in range(_ROUNDS + 1):
        began = time.perf_counter()
        float(gather.rows(rows)[-1])  # Waits for a GPU.
        seconds.append(time.perf_counter() - began)
    return (gather.world_size - 1) * _BYTES / statistics.median(seconds[1:])


def _projections(world_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, world_size * _ROWS, _DIM, generator=generator, dtype=torch.float64)
    return first.to(device), second.to(device)


def _whole_batch(first: Tensor, second: Tensor) -> Tensor:
    rows = F.normalize(torch.cat([first, second]), dim=1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = (rows @ rows.T / _TEMPERATURE).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows), device=rows.device).roll(len(first)))


def _gradient(view: Tensor) -> Tensor:
    assert view.grad is not None
    return view.grad
