"""Collectives over the workers: rows in rank order, and sums."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor


class Gather(Protocol):
    """The collectives that losses and evaluation need."""

    rank: int
    world_size: int

    def rows(self, local: Shaped[Tensor, "n *dims"]) -> Shaped[Tensor, "world_size*n *dims"]:
        """All workers' rows, without gradients; each must pass the same number."""
        ...

    def uneven_rows(self, local: Shaped[Tensor, "n *dims"]) -> Shaped[Tensor, "total *dims"]:
        """All workers' rows, without gradients; each may pass any number."""
        ...

    def total(self, local: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        """Sum over the workers, without gradients."""
        ...


class LocalGather:
    """A single worker."""

    rank = 0
    world_size = 1

    def rows(self, local: Tensor) -> Tensor:
        return local.detach()

    uneven_rows = rows
    total = rows


class ProcessGroupGather:
    """The workers of torch.distributed's default process group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def rows(self, local: Tensor) -> Tensor:
        local = local.detach().contiguous()
        out = local.new_empty(self.world_size * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(out, local)
        return out

    def uneven_rows(self, local: Tensor) -> Tensor:
        counts = self.rows(torch.tensor([len(local)], device=local.device)).tolist()
        padded = local.new_zeros(max(counts), *local.shape[1:])
        padded[: len(local)] = local
        parts = self.rows(padded).split(max(counts)) if max(counts) else [padded]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=False)])

    def total(self, local: Tensor) -> Tensor:
        out = local.detach().clone()
        dist.all_reduce(out)
        return out


def rows_with_gradients(
    local: Float[Tensor, "n *dims"], gather: Gather
) -> Float[Tensor, "world_size*n *dims"]:
    """All workers' rows in rank order; each worker gets its rows' gradients, summed over all workers."""
    return local if gather.world_size == 1 else _Rows.apply(local, gather)


def mean_over_workers(local: Float[Tensor, ""], gather: Gather) -> Float[Tensor, ""]:
    """The mean over the workers, with the gradient of this worker's value alone.

    DistributedDataParallel averages these gradients, which gives the gradient of the mean.
    """
    return _Mean.apply(local, gather)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, gather: Gather) -> Tensor:
        ctx.gather, ctx.count = gather, len(local)
        return gather.rows(local)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        start = ctx.gather.rank * ctx.count
        return ctx.gather.total(upstream[0])[start : start + ctx.count], None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, gather: Gather) -> Tensor:
        return gather.total(local) / gather.world_size

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None
