"""Stochastic depth whose draws are each image's own. Huang et al. 2016.

A generator's draws would depend on which rows stand beside it: on the number of workers, and on whether the
run was resumed. These are drawn from the pixels of the view, which are new in every epoch and the same
wherever they are made.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Weyl's increment and the multipliers of SplitMix64 (Steele et al. 2014), as signed numbers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64

# So many pixels along each side tell one view from all others.
_SIDE = 16


def row_keys(images: Float[Tensor, "n 3 height width"]) -> Int[Tensor, " n"]:
    """A number for each image that depends on its pixels alone."""
    rows, columns = (max(1, side // _SIDE) for side in images.shape[2:])
    pixels = images.detach()[:, :, ::rows, ::columns].float().flatten(1)
    bits = pixels.view(torch.int32).long()
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    # Sums of whole numbers have no order, so they are the same on every device.
    return (_mixed(places * _INCREMENT) * bits).sum(1)


def skip_rows(
    branch: Float[Tensor, "n c h w"], keys: Int[Tensor, " n"], block: int, probability: float
) -> Float[Tensor, "n c h w"]:
    """Zero for some rows; the others divided by their share, so that the mean stays. `probability` < 1."""
    # The upper 53 bits: as many as a float64 holds.
    uniform = (_mixed(_mixed(keys) + block) >> 11 & (1 << 53) - 1).double() / 2**53
    kept = (uniform >= probability).to(branch.dtype) / (1 - probability)
    return branch * kept[:, None, None, None]


def _mixed(numbers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """SplitMix64's finaliser: each bit of the result depends on all of the number's."""
    numbers = (numbers ^ _shifted(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * _SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Int[Tensor, " n"], bits: int) -> Int[Tensor, " n"]:
    """To the right, zeros coming in: torch's own shift repeats the sign."""
    return numbers >> bits & (1 << 64 - bits) - 1
