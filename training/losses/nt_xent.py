"""NT-Xent and its decoupled form (DCL) over the global batch, without the 2N x 2N matrix."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from training.gather import Gather, LocalGather
from training.losses.matching import Matching, nearer
from training.losses.rows import NO_NEGATIVES, unit_rows

# Side of the blocks of similarities, two of which are in memory at a time: small enough for a CPU's cache,
# large enough to keep all of a GPU's units busy.
_CPU_SIDE, _GPU_SIDE = 512, 4096

# The largest exponents 1 / temperature whose sums over any batch stay well within float32 and float64.
_FLOAT_EXPONENT, _DOUBLE_EXPONENT = 50, 500


def nt_xent(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    *,
    temperature: float,
    gather: Gather | None = None,
    matching: Matching | None = None,
) -> Float[Tensor, ""]:
    """NT-Xent of the global batch: row i of `first` and `second` are projections of two views of one image.

    All other projections of all workers are negatives. All workers get the same value, the mean over the
    global batch's 2N projections. Each gets `world_size` times the gradient of that mean with respect to its
    own rows, so that DistributedDataParallel averages them to the gradient of the global loss. Every worker
    must pass the same number of rows. Computed in float32, or in float64 if the projections are float64 or
    the temperature is below 0.02. `matching` receives the batch's view matching.

    Chen et al. 2020, eq. 1. Raises ValueError if the two shapes differ, the temperature is below 0.002 or
    there is only one pair.
    """
    return _loss(first, second, temperature, gather, matching, decoupled=False)


def dcl(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    *,
    temperature: float,
    gather: Gather | None = None,
    matching: Matching | None = None,
) -> Float[Tensor, ""]:
    """Decoupled contrastive loss: NT-Xent without the positive in the denominator.

    A row with a near positive therefore still learns from its negatives, which matters in small batches. The
    loss may be below zero. Rows, value, gradient, precision, matching and errors as in nt_xent.

    Yeh et al. 2022, eq. 6.
    """
    return _loss(first, second, temperature, gather, matching, decoupled=True)


def _loss(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    temperature: float,
    gather: Gather | None,
    matching: Matching | None,
    *,
    decoupled: bool,
) -> Float[Tensor, ""]:
    if temperature * _DOUBLE_EXPONENT < 1:
        raise ValueError(f"temperature={temperature} is below {1 / _DOUBLE_EXPONENT:g}; try 0.1")
    with torch.autocast(first.device.type, enabled=False):
        rows = unit_rows(first, second)
        exact = rows if temperature * _FLOAT_EXPONENT >= 1 else rows.double()
        loss, share = _NTXent.apply(
            exact, temperature, gather or LocalGather(), decoupled, matching is not None
        )
        if matching is not None:
            matching.share = share
        return loss.to(rows.dtype)


class _NTXent(torch.autograd.Function):
    """Forward keeps the sum of each row's negatives; backward recomputes these, and gathers nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        local: Float[Tensor, "2n dim"],
        temperature: float,
        gather: Gather,
        decoupled: bool,
        matches: bool,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]:
        # Scaled so that 2 to the power of a product is exp(similarity / temperature): exp2 takes a third of
        # exp's time. Unit vectors bound the exponents, so no maximum has to be subtracted.
        scale = math.sqrt(math.log2(math.e) / temperature)
        everyone = gather.rows(local * scale)
        if len(everyone) == 2:
            raise ValueError(NO_NEGATIVES)
        # This worker's rows first: the block of similarities among them is symmetric.
        own_first = -gather.rank * len(local)
        everyone = everyone.roll(own_first, dims=0)
        exponents = _positive_exponents(everyone, gather.world_size)
        own, largest = _negatives(everyone, len(local), with_largest=matches)
        matched = None
        if largest is not None:
            matched = nearer(exponents[: len(local)], largest.log2(), max(1.0, scale**2))
        negatives, share = _of_all(own, matched, gather)
        negatives = negatives.roll(own_first)
        if share is not None:
            ctx.mark_non_differentiable(share)
        # The denominator of each row's probabilities.
        ctx.save_for_backward(everyone, negatives, negatives if decoupled else negatives + exponents.exp2())
        ctx.temperature, ctx.scale, ctx.world_size = temperature, scale, gather.world_size
        losses = negatives.log() - exponents * math.log(2)
        if not decoupled:
            # log(1 + negatives / positive) stays precise where the positive is nearly all of the sum.
            losses = F.softplus(losses)
        # Back in rank order, so that all workers sum in the same order.
        return losses.roll(-own_first).mean(), share

    @staticmethod
    def backward(
        ctx: Any, *upstream: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, "2n dim"], None, None, None, None]:
        everyone, negatives, sums = ctx.saved_tensors
        rows = len(everyone) // ctx.world_size
        shares = sums.reciprocal()
        with torch.autocast(everyone.device.type, enabled=False):
            gradient = _weighted_negatives(everyone, shares, rows)
            # 1 minus the positive's probability, in the row's loss and in its positive's; 1 where the loss is
            # decoupled.
            lacking = (negatives * shares)[:rows]
            lacking = lacking + lacking.roll(rows // 2)
            gradient.addcmul_(lacking[:, None], everyone[:rows].roll(rows // 2, dims=0), value=-1)
        # Divided by this worker's rows alone, since DistributedDataParallel averages over the workers.
        return gradient * (upstream[0] / (ctx.temperature * ctx.scale * rows)), None, None, None, None


def _of_all(
    negatives: Float[Tensor, " rows"], matched: Bool[Tensor, " rows"] | None, gather: Gather
) -> tuple[Float[Tensor, " all"], Float[Tensor, ""] | None]:
    """All workers' sums in rank order, and the share of all rows that match, in one gather."""
    columns = negatives[:, None]
    if matched is not None:
        columns = torch.stack([negatives, matched.to(negatives.dtype)], dim=1)
    sums, *ones = gather.rows(columns).unbind(1)
    return sums, ones[0].mean() if ones else None


def _positive_exponents(everyone: Float[Tensor, "all dim"], world_size: int) -> Float[Tensor, " all"]:
    """Base-2 logarithm of each row's exponential with its positive."""
    views = everyone.view(world_size, 2, len(everyone) // world_size // 2, -1)
    return (views[:, :1] * views[:, 1:]).sum(-1).expand(-1, 2, -1).flatten()


def _negatives(
    everyone: Float[Tensor, "all dim"], rows: int, *, with_largest: bool
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"] | None]:
    """Sum of the exponentials of each of the first `rows` with its negatives, and the largest of them."""
    sums = everyone.new_zeros(rows)
    largest = torch.zeros_like(sums) if with_largest else None
    for block, columns, mirrored, exponentials in _blocks(everyone, rows):
        sums[block] += exponentials.sum(1)
        if mirrored:
            sums[columns] += exponentials.sum(0)
        if largest is not None:
            torch.maximum(largest[block], exponentials.amax(1), out=largest[block])
            if mirrored:
                torch.maximum(largest[columns], exponentials.amax(0), out=largest[columns])
    return sums, largest


def _weighted_negatives(
    everyone: Float[Tensor, "all dim"], shares: Float[Tensor, " all"], rows: int
) -> Float[Tensor, "rows dim"]:
    """Sum of the negatives of each of the first `rows`, weighted by p_ij + p_ji.

    p_ij is the exponential of i and j times shares_i: a pair counts in the losses of both its rows.
    """
    gradient = torch.zeros_like(everyone[:rows])
    weights = _buffer(everyone, rows)
    for block, columns, mirrored, exponentials in _blocks(everyone, rows):
        weight = weights[: exponentials.shape[0], : exponentials.shape[1]]
        torch.add(shares[block, None], shares[columns], out=weight).mul_(exponentials)
        gradient[block].addmm_(weight, everyone[columns])
        if mirrored:
            gradient[columns].addmm_(weight.T, everyone[block])
    return gradient


def _blocks(
    everyone: Float[Tensor, "all dim"], rows: int
) -> Iterator[tuple[slice, slice, bool, Float[Tensor, "block columns"]]]:
    """Exponentials of the first `rows` with all rows, block by block; zero for pairs that are not negatives.

    Yields a block's rows, its columns, whether it also stands for its mirror image, which is then skipped,
    and the exponentials, which the next block overwrites.
    """
    total, buffer = len(everyone), _buffer(everyone, rows)
    side = len(buffer)
    for start in range(0, rows, side):
        block = slice(start, min(start + side, rows))
        for first in (*range(start, rows, side), *range(rows, total, side)):
            columns = slice(first, min(first + side, rows if first < rows else total))
            out = buffer[: block.stop - start, : columns.stop - first]
            torch.mm(everyone[block], everyone[columns].T, out=out).exp2_()
            if first < rows:
                # The row itself and its positive; a diagonal outside the block is empty.
                for distance in (0, rows // 2, -rows // 2):
                    out.diagonal(start - first + distance).zero_()
            yield block, columns, start < first < rows, out


def _buffer(everyone: Float[Tensor, "all dim"], rows: int) -> Float[Tensor, "side side"]:
    side = min(rows, _GPU_SIDE if everyone.is_cuda else _CPU_SIDE)
    return everyone.new_empty(side, side)
