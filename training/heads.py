"""Heads between an encoder's features and the loss."""

from torch import nn

from training.config import ProjectorConfig


def build_projector(config: ProjectorConfig, features_dim: int) -> nn.Module:
    """SimCLR's non-linear head (Chen et al. 2020, section 4.2), with batch norm after each layer.

    The last batch norm has no bias: a shift common to all projections carries no information.
    """
    last_norm = nn.BatchNorm1d(config.dim)
    last_norm.bias.requires_grad_(False)
    return nn.Sequential(
        nn.Linear(features_dim, config.hidden_dim, bias=False),
        nn.BatchNorm1d(config.hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(config.hidden_dim, config.dim, bias=False),
        last_norm,
    )
