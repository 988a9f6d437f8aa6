"""Contrastive losses over the global batch: pure functions."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from training.gather import Gather, LocalGather

# Rows of the similarity matrix that exist at a time.
_CHUNK = 512


def nt_xent(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    *,
    temperature: float,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """NT-Xent of the global batch: row i of `first` and `second` are projections of two views of one image.

    Every other projection of every worker is a negative. All workers get the same value, the mean over
    the global batch's 2N projections; each gets `world_size` times the gradient of that mean with respect
    to its own rows, so that DistributedDataParallel's mean over workers is the gradient of the global
    loss. Every worker must bring the same number of rows. Computed in float32, or in float64 where the
    projections are; no 2N x 2N matrix is ever held.

    Chen et al. 2020, eq. 1. Raises ValueError if the two shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"the views' projections must have one shape, got {first.shape} and {second.shape}")
    with torch.autocast(first.device.type, enabled=False):
        both = torch.cat([first, second])
        both = both if both.dtype == torch.float64 else both.float()
        return _NTXent.apply(F.normalize(both, dim=1), temperature, gather or LocalGather())


class _NTXent(torch.autograd.Function):
    """Forward keeps every row's log-sum-exp; backward recomputes the similarities, without communication."""

    @staticmethod
    def forward(
        ctx: Any, local: Float[Tensor, "2n dim"], temperature: float, gather: Gather
    ) -> Float[Tensor, ""]:
        n = len(local) // 2
        # Each worker's rows as (first, second) pairs of views: row i's positive is i + n within its worker.
        everyone = gather.rows(local)
        offset = gather.rank * len(local)
        lse = torch.cat(
            [
                _similarities(local, everyone, start, offset, temperature).logsumexp(dim=1)
                for start in range(0, len(local), _CHUNK)
            ]
        )
        every_lse = gather.rows(lse)
        pairs = everyone.view(gather.world_size, 2, n, -1)
        positives = (pairs[:, 0] * pairs[:, 1]).sum(-1) / temperature
        ctx.save_for_backward(local, everyone, lse, every_lse)
        ctx.temperature, ctx.offset, ctx.world_size = temperature, offset, gather.world_size
        return every_lse.mean() - positives.mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Float[Tensor, ""]) -> tuple[Float[Tensor, "2n dim"], None, None]:
        local, everyone, lse, every_lse = ctx.saved_tensors
        n = len(local) // 2
        gradient = torch.empty_like(local)
        for start in range(0, len(local), _CHUNK):
            similarity = _similarities(local, everyone, start, ctx.offset, ctx.temperature)
            rows = slice(start, start + len(similarity))
            # A pair's similarity stands in its row's log-sum-exp and in its column's.
            weights = (similarity - lse[rows, None]).exp_() + (similarity - every_lse).exp_()
            gradient[rows] = weights @ everyone
        gradient -= 2 * local.roll(n, dims=0)
        scale = ctx.world_size / (ctx.temperature * len(everyone))
        return gradient * (upstream[0] * scale), None, None


def _similarities(
    local: Float[Tensor, "rows dim"],
    everyone: Float[Tensor, "all dim"],
    start: int,
    offset: int,
    temperature: float,
) -> Float[Tensor, "chunk all"]:
    """Rows [start, start + _CHUNK) of the matrix of similarities over temperature, -inf with themselves."""
    chunk = local[start : start + _CHUNK]
    similarity = (chunk / temperature) @ everyone.T
    own = torch.arange(len(chunk), device=local.device)
    similarity[own, offset + start + own] = -torch.inf
    return similarity
