"""Rows from every worker, in rank order."""

from typing import Protocol

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor


class Gather(Protocol):
    """What the loss and the evaluation need of the other workers."""

    rank: int
    world_size: int

    def rows(self, local: Shaped[Tensor, "n *dims"]) -> Shaped[Tensor, "world_size*n *dims"]:
        """Every worker's rows, the same number of each, without gradients."""
        ...

    def uneven_rows(self, local: Shaped[Tensor, "n *dims"]) -> Shaped[Tensor, "total *dims"]:
        """Every worker's rows, however many each has, without gradients."""
        ...

    def total(self, local: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        """Sum over the workers, without gradients."""
        ...


class LocalGather:
    """The only worker there is."""

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
