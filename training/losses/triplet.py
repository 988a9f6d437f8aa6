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

    Row i of `first` and `second` are projections of two views of one image; all other projections in the
    global batch are negatives. All workers get the mean over its rows and their negatives. Gradients are as
    in mean_of_rows. `matching` receives the batch's view matching.

    Chen et al. 2020, table 2. Raises ValueError if the two shapes differ or there is only one pair.
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
    """max(s- - s+ + margin, 0), where s- is the nearest negative that is farther than s+.

    A row without such a negative has no loss. Rows, value and gradient as in margin_triplet.

    Schroff et al. 2015, section 3.2; Chen et al. 2020, section 5.1. Raises ValueError if the two shapes
    differ or there is only one pair.
    """

    def losses(positive: Float[Tensor, " rows"], negatives: Float[Tensor, "rows all"]) -> Tensor:
        return F.relu(semi_hard(positive, negatives) - positive + margin)

    return mean_of_rows(first, second, losses, gather or LocalGather(), matching)
