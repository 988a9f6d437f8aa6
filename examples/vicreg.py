"""An objective of one's own: VICReg (Bardes et al. 2022), in a file beside diptych and not in it.

From the folder that this file is in:

    diptych train --objective vicreg:VICReg --objective-options.variance 25 --data.train FOLDER
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.views import Views
from training import Encoder, Gather, Objective, rows_with_gradients


class VICReg(Objective):
    """Two views' embeddings are alike, each number of them varies, and no two numbers vary together."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        gather: Gather,
        dim: int = 512,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
    ) -> None:
        super().__init__(encoder)
        self.expander = nn.Sequential(
            nn.Linear(encoder.dim, dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.ReLU(inplace=True),
            nn.Linear(dim, dim),
        )
        self._weights = invariance, variance, covariance
        self._gather = gather

    def embed(self, views: Views) -> list[Tensor]:
        return list(self.expander(self.encoder(torch.cat(views.images))).chunk(2))

    def loss(self, embedded: list[Tensor], views: Views) -> Tensor:
        # Each worker computes the loss of the whole batch; every row's gradient goes back to its own worker.
        first, second = (rows_with_gradients(rows.float(), self._gather) for rows in embedded)
        invariance, variance, covariance = self._weights
        return (
            invariance * F.mse_loss(first, second)
            + variance * (_too_little(first) + _too_little(second)) / 2
            + covariance * (_together(first) + _together(second))
        )


def _too_little(rows: Tensor) -> Tensor:
    """How far the standard deviations fall short of 1. Equation 1."""
    return F.relu(1 - (rows.var(dim=0) + 1e-4).sqrt()).mean()


def _together(rows: Tensor) -> Tensor:
    """The squared covariances of different numbers. Equation 4."""
    covariance = rows.T.cov()
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / rows.shape[1]
