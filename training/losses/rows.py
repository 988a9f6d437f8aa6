"""The rows that contrastive losses compare, their similarities, and the mean of a loss over them."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from training.gather import Gather, mean_over_workers, rows_with_gradients
from training.losses.matching import Matching, nearer, share_of_all

# Rows of the similarity matrix in memory at a time.
CHUNK = 512

NO_NEGATIVES = "one pair has no negatives; a batch needs two or more images"

# Losses of some rows, given their similarities with their positives and with all rows, which are -inf for
# pairs that are not negatives.
RowLosses = Callable[[Float[Tensor, " rows"], Float[Tensor, "rows all"]], Float[Tensor, " rows"]]


def unit_rows(first: Float[Tensor, "n dim"], second: Float[Tensor, "n dim"]) -> Float[Tensor, "2n dim"]:
    """Unit vectors of the first view's rows and then of the second's, in float32 or float64.

    Raises ValueError if the two shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"the views' projections must have the same shape, got {first.shape} and {second.shape}"
        )
    return unit(torch.cat([first, second]))


def unit(rows: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Unit vectors of the rows, in float32 or float64."""
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1)


def mean_of_rows(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    losses: RowLosses,
    gather: Gather,
    matching: Matching | None = None,
) -> Float[Tensor, ""]:
    """Mean of `losses` of the cosine similarities, over the global batch's 2N rows.

    Each worker computes the losses of its own rows against all rows, and returns the gradients of the others'
    rows to their workers, which sum them. DistributedDataParallel then averages the gradients to that of the
    mean over all rows, the value that all workers get. Computed in float32 or float64. Backward recomputes
    the similarities, so that memory grows linearly with N. `matching` receives the batch's view matching.

    Raises ValueError if the two shapes differ or there is only one pair.
    """
    with torch.autocast(first.device.type, enabled=False):
        local = unit_rows(first, second)
        everyone = rows_with_gradients(local, gather)
        if len(everyone) == 2:
            raise ValueError(NO_NEGATIVES)
        offset = gather.rank * len(local)
        matched = torch.zeros(len(local), dtype=torch.bool, device=local.device)

        def chunk_loss(start: int) -> Float[Tensor, ""]:
            positive, negatives = similarities(local, local, everyone, start, offset)
            total = losses(positive, negatives).sum()
            # Last, since backward stops recomputing once it has what it needs.
            if matching is not None:
                matched[start : start + CHUNK] = nearer(positive.detach(), negatives.detach().amax(1))
            return total

        total = local.new_zeros(())
        for start in range(0, len(local), CHUNK):
            total = total + checkpoint(chunk_loss, start, use_reentrant=False, preserve_rng_state=False)
        if matching is not None:
            matching.share = share_of_all(matched, gather)
        return mean_over_workers(total / len(local), gather)


def semi_hard(
    positive: Float[Tensor, " rows"], negatives: Float[Tensor, "rows all"]
) -> Float[Tensor, " rows"]:
    """Similarity of each row's nearest negative that is farther than its positive; -inf if there is none.

    Schroff et al. 2015, section 3.2.
    """
    return negatives.masked_fill(negatives >= positive[:, None], -torch.inf).amax(1)


def similarities(
    rows: Float[Tensor, "2n dim"],
    local: Float[Tensor, "2n dim"],
    everyone: Float[Tensor, "all dim"],
    start: int,
    offset: int,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows all"]]:
    """Similarities of rows [start, start + CHUNK) with their positives, and with all rows.

    The latter are -inf for pairs that are not negatives. `local` is this worker's part of `everyone`, the
    rows to compare with, and begins at `offset` in it.
    """
    chunk = rows[start : start + CHUNK]
    all_similarities = chunk @ everyone.T
    own = torch.arange(start, start + len(chunk), device=rows.device)
    positives = (own + len(rows) // 2) % len(rows)
    columns = torch.stack([own, positives], dim=1) + offset
    return (chunk * local[positives]).sum(1), all_similarities.scatter(1, columns, -torch.inf)
