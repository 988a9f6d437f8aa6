"""View matching: how often a view's nearest other view in the global batch is its partner. Needs no label."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from training.gather import Gather

# Two similarities that differ by no more units of rounding are equal: they were added up in different orders.
_ROUNDING = 16


@dataclass(eq=False)
class Matching:
    """Where a loss leaves the view matching of its batch.

    share: of the global batch's 2N views, those whose nearest other view is their partner; from 0 to 1, the
    same on all workers. None where no loss was computed since it was taken.
    """

    share: Float[Tensor, ""] | None = None

    def take(self) -> float | None:
        """The share, once."""
        share, self.share = self.share, None
        return None if share is None else share.item()


def chance(batch_size: int) -> float:
    """View matching of views that say nothing of their image: one of the 2N - 1 others is the partner."""
    return 1 / (2 * batch_size - 1)


def nearer(
    partner: Float[Tensor, " rows"], others: Float[Tensor, " rows"], largest: float = 1.0
) -> Bool[Tensor, " rows"]:
    """Whether a row is nearer to its partner than to the nearest other row, by more than rounding.

    partner and others are similarities, of `largest` at most. Rows that have collapsed to one point are
    nearest to nobody.
    """
    return partner - others > _ROUNDING * torch.finfo(partner.dtype).eps * largest


def share_of_all(matched: Bool[Tensor, " rows"], gather: Gather) -> Float[Tensor, ""]:
    """The share of all workers' rows that match; ones are added up exactly, on any number of workers."""
    return gather.total(matched.sum().float()) / (len(matched) * gather.world_size)
