"""Projections of two views as the rows that contrastive losses compare."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from training.gather import Gather, mean_over_workers, rows_with_gradients
from training.losses.matching import Matching, nearer, share_of_all

# Rows of the similarity matrix that exist at a time.
CHUNK = 512

NO_NEGATIVES = "one pair has no negatives; a batch needs two or more images"

# Losses of some rows, of their similarities with their positives and with their negatives; the latter are
# -inf where a pair is no negative.
RowLosses = Callable[[Float[Tensor, " rows"], Float[Tensor, "rows all"]], Float[Tensor, " rows"]]


def unit_rows(first: Float[Tensor, "n dim"], second: Float[Tensor, "n dim"]) -> Float[Tensor, "2n dim"]:
    """Unit vectors of the first view's rows and then of the second's, in float32 or float64.

    Raises ValueError if the two shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"the views' projections must have one shape, got {first.shape} and {second.shape}")
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
    """Mean of `losses` over the global batch's 2N rows, of the cosine similarities with every other.

    Every worker has its own rows' losses with all workers' rows, and the others' rows get their gradients
    back, summed over the workers. So DistributedDataParallel's mean over workers is the gradient of the mean
    over all rows, which is the value that all workers get. In float32 or float64; backward computes the
    similarities again, so that memory grows with N alone. `matching` gets the batch's view matching.

    Raises ValueError if the two shapes differ or there is but one pair.
    """
    with torch.autocast(first.device.type, enabled=False):
        local = unit_rows(first, second)
        everyone = rows_with_gradients(local, gather)
        if len(everyone) == 2:
            raise ValueError(NO_NEGATIVES)
        offset = gather.rank * len(local)
        matched = torch.zeros(len(local), dtype=torch.bool, device=local.device)

        def some(start: int) -> Float[Tensor, ""]:
            positive, negatives = similarities(local, local, everyone, start, offset)
            total = losses(positive, negatives).sum()
            # Last, since backward computes all of this again up to what it needs.
            if matching is not None:
                matched[start : start + CHUNK] = nearer(positive.detach(), negatives.detach().amax(1))
            return total

        total = local.new_zeros(())
        for start in range(0, len(local), CHUNK):
            total = total + checkpoint(some, start, use_reentrant=False, preserve_rng_state=False)
        if matching is not None:
            matching.share = share_of_all(matched, gather)
        return mean_over_workers(total / len(local), gather)


def semi_hard(
    positive: Float[Tensor, " rows"], negatives: Float[Tensor, "rows all"]
) -> Float[Tensor, " rows"]:
    """The nearest of each row's negatives that are farther than its positive; -inf where there is none.

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
    """Of rows [start, start + CHUNK): with their positives, and with their negatives or else -inf.

    `local` are what rows are compared with, this worker's part of `everyone`, which begins at `offset`.
    """
    chunk = rows[start : start + CHUNK]
    all_similarities = chunk @ everyone.T
    own = torch.arange(start, start + len(chunk), device=rows.device)
    positives = (own + len(rows) // 2) % len(rows)
    columns = torch.stack([own, positives], dim=1) + offset
    return (chunk * local[positives]).sum(1), all_similarities.scatter(1, columns, -torch.inf)
