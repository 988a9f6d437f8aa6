"""Projections of two views as the rows that contrastive losses compare."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def unit_rows(first: Float[Tensor, "n dim"], second: Float[Tensor, "n dim"]) -> Float[Tensor, "2n dim"]:
    """Unit vectors of the first view's rows and then of the second's, in float32 or float64.

    Raises ValueError if the two shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"the views' projections must have one shape, got {first.shape} and {second.shape}")
    both = torch.cat([first, second])
    return F.normalize(both if both.dtype == torch.float64 else both.float(), dim=1)
