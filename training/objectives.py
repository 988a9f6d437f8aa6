"""Objectives: modules whose forward is the loss."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.views import Views
from training.encoders import Encoder
from training.gather import Gather
from training.losses import nt_xent


class SimCLR(nn.Module):
    """Agreement between projections of two views against all others. Chen et al. 2020."""

    def __init__(self, encoder: Encoder, projector: nn.Module, *, temperature: float, gather: Gather) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.temperature = temperature
        self._gather = gather

    def forward(self, views: Views) -> Float[Tensor, ""]:
        # Both views in one forward: apart, each would be normalised by other batch statistics.
        projections = self.projector(self.encoder(torch.cat(views.images)))
        first, second = projections.chunk(2)
        return nt_xent(first, second, temperature=self.temperature, gather=self._gather)
