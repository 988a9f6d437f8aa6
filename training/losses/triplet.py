"""The margin triplet loss, over all negatives or the nearest semi-hard one."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from training.gather import Gather, LocalGather
from training.losses.matching import Matching
from training.losses.rows import mean_of_rows, semi_hard


def margin_triplet(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    *,
    margin: float,
    gather: Gather | None = None,
    matching: Matching | None = None,
) -> Float[Tensor, ""]:
    """max(s- - s+ + margin, 0) for cosine similarities s, over all rows and negatives.

    Row i of `first` and `second` are projections of two views of one image; all other projections of the
    global batch are negatives. All workers get the mean over its rows and their negatives, and the gradient
    of which DistributedDataParallel takes the mean (see mean_of_rows). `matching` gets the batch's view
    matching.

    Chen et al. 2020, table 2. Raises ValueError if the two shapes differ or there is but one pair.
    """

    def losses(positive: Float[Tensor, " rows"], negatives: Float[Tensor, "rows all"]) -> Tensor:
        return F.relu(negatives - positive[:, None] + margin).sum(1) / (negatives.shape[1] - 2)

    return mean_of_rows(first, second, losses, gather or LocalGather(), matching)


def semi_hard_triplet(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    *,
    margin: float,
    gather: Gather | None = None,
    matching: Matching | None = None,
) -> Float[Tensor, ""]:
    """max(s- - s+ + margin, 0) for each row and the nearest of its negatives that are farther than s+.

    A row none of whose negatives is farther than its positive has no loss. Rows, value and gradient as in
    margin_triplet.

    Schroff et al. 2015, section 3.2; Chen et al. 2020, section 5.1. Raises ValueError if the two shapes
    differ or there is but one pair.
    """

    def losses(positive: Float[Tensor, " rows"], negatives: Float[Tensor, "rows all"]) -> Tensor:
        return F.relu(semi_hard(positive, negatives) - positive + margin)

    return mean_of_rows(first, second, losses, gather or LocalGather(), matching)
