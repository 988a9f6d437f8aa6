"""NT-Logistic: classifies each pair alone as two views of one image or not."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from training.gather import Gather, LocalGather
from training.losses.matching import Matching
from training.losses.rows import mean_of_rows, semi_hard


def nt_logistic(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    *,
    temperature: float,
    gather: Gather | None = None,
    matching: Matching | None = None,
) -> Float[Tensor, ""]:
    """-log sigmoid(s+ / T) - log sigmoid(-s- / T) for cosine similarities s, over all rows and negatives.

    Row i of `first` and `second` are projections of two views of one image; all other projections in the
    global batch are negatives. All workers get the mean over its rows and their negatives. Gradients are as
    in mean_of_rows. `matching` receives the batch's view matching.

    Chen et al. 2020, table 2. Raises ValueError if the two shapes differ or there is only one pair.
    """

    def losses(positive: Float[Tensor, " rows"], negatives: Float[Tensor, "rows all"]) -> Tensor:
        apart = F.softplus(negatives / temperature).sum(1) / (negatives.shape[1] - 2)
        return F.softplus(-positive / temperature) + apart

    return mean_of_rows(first, second, losses, gather or LocalGather(), matching)


def semi_hard_nt_logistic(
    first: Float[Tensor, "n dim"],
    second: Float[Tensor, "n dim"],
    *,
    temperature: float,
    gather: Gather | None = None,
    matching: Matching | None = None,
) -> Float[Tensor, ""]:
    """-log sigmoid(s+ / T) - log sigmoid(-s- / T), where s- is the nearest negative that is farther than s+.

    A row without such a negative has the first term alone. Rows, value and gradient as in nt_logistic.

    Chen et al. 2020, section 5.1 and table 4. Raises ValueError if the two shapes differ or there is
    only one pair.
    """

    def losses(positive: Float[Tensor, " rows"], negatives: Float[Tensor, "rows all"]) -> Tensor:
        apart = F.softplus(semi_hard(positive, negatives) / temperature)
        return F.softplus(-positive / temperature) + apart

    return mean_of_rows(first, second, losses, gather or LocalGather(), matching)
