"""NT-Xent that our own could be on a GPU: its blocks compiled, or multiplied in bfloat16. For one worker."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from training.losses.rows import unit_rows

_SIDE, _SMALLEST_SIDE = 4096, 64


def blockwise_nt_xent(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    *,
    temperature: float,
    compiled: bool = False,
    half: bool = False,
) -> Float[Tensor, ""]:
    """nt_xent of one worker. `half`: products of bfloat16 with sums in float32, which takes a GPU."""
    return _Blockwise.apply(unit_rows(first, second), temperature, _Kernels(compiled, half))


@contextmanager
def sides(side: int | None) -> Iterator[None]:
    """Have nt_xent take blocks of this side meanwhile; None: its own."""
    module: Any = sys.modules["training.losses.nt_xent"]
    before = module._GPU_SIDE, module._CPU_SIDE
    if side is not None:
        module._GPU_SIDE = module._CPU_SIDE = side
    try:
        yield
    finally:
        module._GPU_SIDE, module._CPU_SIDE = before


class _Kernels:
    """What is done to a block: in one process all blocks of a kind share what was compiled."""

    def __init__(self, compiled: bool, half: bool) -> None:
        self.sums = _compiled(_sums) if compiled else _sums
        self.weighted = _compiled(_weighted) if compiled else _weighted
        self.half = half


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


class _Blockwise(torch.autograd.Function):
    """As training.losses.nt_xent's: sums of every row's negatives, and the blocks again for the gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Float[Tensor, "2n dim"], temperature: float, kernels: _Kernels) -> Tensor:
        scale = math.sqrt(math.log2(math.e) / temperature)
        rows = rows * scale
        sums = rows.new_zeros(len(rows))
        for block, columns, masked, offset, pairs in _blocks(rows):
            across, down = kernels.sums(rows[block], rows[columns], offset, pairs, masked, kernels.half)
            sums[block] += across
            if block != columns:
                sums[columns] += down
        exponents = (rows * rows.roll(len(rows) // 2, dims=0)).sum(1)
        ctx.save_for_backward(rows, sums, exponents)
        ctx.factor, ctx.kernels = temperature * scale * len(rows), kernels
        return F.softplus(sums.log() - exponents * math.log(2)).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        rows, sums, exponents = ctx.saved_tensors
        shares = (sums + exponents.exp2()).reciprocal()
        gradient, kernels = torch.zeros_like(rows), ctx.kernels
        for block, columns, masked, offset, pairs in _blocks(rows):
            across, down = kernels.weighted(
                rows[block],
                rows[columns],
                shares[block],
                shares[columns],
                offset,
                pairs,
                masked,
                kernels.half,
            )
            gradient[block] += across
            if block != columns:
                gradient[columns] += down
        lacking = sums * shares
        lacking = lacking + lacking.roll(len(rows) // 2)
        gradient.addcmul_(lacking[:, None], rows.roll(len(rows) // 2, dims=0), value=-1)
        return gradient * (upstream[0] / ctx.factor), None, None


def _blocks(rows: Tensor) -> Iterator[tuple[slice, slice, bool, Tensor, Tensor]]:
    """Blocks on and right of the diagonal; whether one has pairs that are no negatives; its place."""
    total = len(rows)
    side = max(_SMALLEST_SIDE, min(_SIDE, total // 2))
    pairs = torch.tensor(total // 2, device=rows.device)
    for start in range(0, total, side):
        for first in range(start, total, side):
            block, columns = slice(start, min(start + side, total)), slice(first, min(first + side, total))
            masked = any(abs(first - start - distance) < side for distance in (0, total // 2))
            yield block, columns, masked, torch.tensor(start - first, device=rows.device), pairs


def _exponentials(
    block: Tensor, columns: Tensor, offset: Tensor, pairs: Tensor, masked: bool, half: bool
) -> Tensor:
    """Zero where a row meets itself or its positive."""
    found = torch.exp2(_product(block, columns.T, half))
    if masked:
        rows = torch.arange(len(block), device=block.device)[:, None]
        distance = rows - torch.arange(len(columns), device=block.device) + offset
        found = torch.where(distance % pairs == 0, 0.0, found)
    return found


def _sums(
    block: Tensor, columns: Tensor, offset: Tensor, pairs: Tensor, masked: bool, half: bool
) -> tuple[Tensor, Tensor]:
    found = _exponentials(block, columns, offset, pairs, masked, half)
    return found.sum(1), found.sum(0)


def _weighted(
    block: Tensor, columns: Tensor, block_shares: Tensor, column_shares: Tensor,
    offset: Tensor, pairs: Tensor, masked: bool, half: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = _exponentials(block, columns, offset, pairs, masked, half)
    weight = (block_shares[:, None] + column_shares) * found
    return _product(weight, columns, half), _product(weight.T, block, half)


def _product(left: Tensor, right: Tensor, half: bool) -> Tensor:
    if half:
        return torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32)
    return left @ right
