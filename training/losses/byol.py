"""BYOL's loss: how far a prediction is from the target's projection."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from training.gather import Gather, LocalGather, mean_over_workers


def byol_loss(
    prediction: Float[Tensor, "n dim"], target: Float[Tensor, "n dim"], *, gather: Gather | None = None
) -> Float[Tensor, ""]:
    """Mean squared distance between unit vectors, in [0, 4], over the global batch.

    The caller detaches `target`. All workers get the same value, and the gradient of their own rows' mean:
    DistributedDataParallel's mean over workers is the global one's. Computed in float32 or float64.

    Grill et al. 2020, eq. 2. Raises ValueError if the two shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have one shape, got {prediction.shape} and {target.shape}"
        )
    difference = _unit(prediction) - _unit(target)
    return mean_over_workers(difference.square().sum(1).mean(), gather or LocalGather())


def _unit(rows: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1)
