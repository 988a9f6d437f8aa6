"""BYOL's loss: how far a prediction is from the target's projection; and how often it is nearest to it."""

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

    The caller detaches `target`. All workers get the same value, and the gradient of their own rows' mean:
    DistributedDataParallel's mean over workers is the global one's. Computed in float32 or float64.

    Grill et al. 2020, eq. 2. Raises ValueError if the two shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have one shape, got {prediction.shape} and {target.shape}"
        )
    difference = unit(prediction) - unit(target)
    return mean_over_workers(difference.square().sum(1).mean(), gather or LocalGather())


@torch.no_grad()
def predictions_matched(
    prediction: Float[Tensor, "2n dim"], target: Float[Tensor, "2n dim"], *, gather: Gather | None = None
) -> Float[Tensor, ""]:
    """View matching: how often, of all other views' targets, the partner's is the nearest to a prediction.

    Row i of both is of the same view, whose partner is n rows away. From 0 to 1, over the global batch's 2N
    views, the same on all workers. Gathers the targets; the similarities are 2n * 2N * dim multiply-adds, in
    float32 or float64, and exist 512 rows at a time.
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
