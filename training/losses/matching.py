"""View matching: how often a view's nearest other view in the global batch is its partner; label-free."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from training.gather import Gather

# Similarities within so many units of rounding count as equal: they were summed in different orders.
_ROUNDING = 16


@dataclass(eq=False)
class Matching:
    """Receives the view matching of a loss's batch.

    share: the share of the global batch's 2N views whose nearest other view is their partner, from 0 to 1;
    the same on all workers. None if no loss was computed since the last `take`.
    """

    share: Float[Tensor, ""] | None = None

    def take(self) -> float | None:
        """Return the share and reset it to None."""
        share, self.share = self.share, None
        return None if share is None else share.item()


def chance(batch_size: int) -> float:
    """View matching of random features: one of the 2N - 1 other views is the partner."""
    return 1 / (2 * batch_size - 1)


def nearer(
    partner: Float[Tensor, " rows"], others: Float[Tensor, " rows"], largest: float = 1.0
) -> Bool[Tensor, " rows"]:
    """Whether a row is nearer to its partner than to the nearest other row, by more than rounding.

    `partner` and `others` are similarities of at most `largest`. Rows that have collapsed to one point match
    no row.
    """
    return partner - others > _ROUNDING * torch.finfo(partner.dtype).eps * largest


def share_of_all(matched: Bool[Tensor, " rows"], gather: Gather) -> Float[Tensor, ""]:
    """The share of all workers' rows that match; the count is exact on any number of workers."""
    return gather.total(matched.sum().float()) / (len(matched) * gather.world_size)
