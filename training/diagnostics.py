"""What tells a collapsed or a lopsided representation from a good one, without labels."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

# Below this effective rank the features are one point, or nearly.
COLLAPSED_RANK = 1.5

# Rows of the matrix of distances that exist at a time.
_CHUNK = 1024


def alignment(first: Float[Tensor, "n dim"], second: Float[Tensor, "n dim"]) -> float:
    """Mean squared distance between the unit features of two views of an image, in [0, 4]; less is better.

    Wang and Isola 2020, section 4.1.1, with alpha = 2.
    """
    return float((F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(1).mean())


def uniformity(features: Float[Tensor, "n dim"]) -> float:
    """Log of the mean Gaussian potential of all pairs of unit features, in [-4, 0]; less is better.

    0 where all features are one; there must be two at least. Wang and Isola 2020, section 4.1.2, with t = 2.
    """
    n, unit = len(features), F.normalize(features, dim=1)
    total = features.new_zeros((), dtype=torch.float64)
    for start in range(0, n, _CHUNK):
        squared = (2 - 2 * unit[start : start + _CHUNK] @ unit.T).clamp_min(0)
        total += (-2 * squared).exp().sum(dtype=torch.float64)
    # Less the n pairs of a feature with itself, whose potential is 1.
    return math.log(max(float(total) - n, 1e-300) / (n * (n - 1)))


def effective_rank(features: Float[Tensor, "n dim"]) -> float:
    """How many directions the features fill, from 1 (collapsed) to their width.

    The exponential of the entropy of the singular values, as shares of their sum, of the unit features.
    Roy and Vetterli 2007, definition 1.
    """
    values = torch.linalg.svdvals(F.normalize(features, dim=1).double())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
