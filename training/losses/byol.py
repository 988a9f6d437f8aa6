"""BYOL's loss, the distance of a prediction from the target's projection, and its view matching."""

import torch
from jaxtyping import Float
from torch import Tensor

from training.gather import Gather, LocalGather, mean_over_workers
from training.losses.matching import nearer, share_of_all
from training.losses.rows import CHUNK, similarities, unit


def byol_loss(
    prediction: Float[Tensor, "n dim"], target: Float[Tensor, "n dim"], *, gather: Gather | None = None
) -> Float[Tensor, ""]:
    """Mean squared distance between unit vectors, in [0, 4], over the global batch.

    The caller detaches `target`. All workers get the same value, and each the gradient of its own rows' mean;
    DistributedDataParallel averages these to the gradient of the global mean. Computed in float32 or float64.

    Grill et al. 2020, eq. 2. Raises ValueError if the two shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have the same shape, got {prediction.shape} and {target.shape}"
        )
    difference = unit(prediction) - unit(target)
    return mean_over_workers(difference.square().sum(1).mean(), gather or LocalGather())


@torch.no_grad()
def predictions_matched(
    prediction: Float[Tensor, "2n dim"], target: Float[Tensor, "2n dim"], *, gather: Gather | None = None
) -> Float[Tensor, ""]:
    """View matching: the share of predictions whose nearest target among all other views is the partner's.

    Row i of both belongs to the same view, whose partner is n rows away. The share is from 0 to 1, over the
    global batch's 2N views, and the same on all workers. Gathers the targets. The similarities take
    2n * 2N * dim multiply-adds, in float32 or float64; 512 rows of them are in memory at a time.
    """
    gather = gather or LocalGather()
    with torch.autocast(prediction.device.type, enabled=False):
        rows, local = unit(prediction), unit(target)
        everyone, offset = gather.rows(local), gather.rank * len(local)
        matched = []
        for start in range(0, len(rows), CHUNK):
            partner, others = similarities(rows, local, everyone, start, offset)
            matched.append(nearer(partner, others.amax(1)))
        return share_of_all(torch.cat(matched), gather)
