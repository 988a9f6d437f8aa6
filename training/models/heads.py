"""Heads between an encoder's features and the loss."""

from itertools import pairwise

from torch import nn

from training.config.objective import BYOLConfig, ProjectorConfig


class Head(nn.Sequential):
    """A sequence of layers and the width of its output, `dim`."""

    def __init__(self, dim: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.dim = dim


def build_projector(config: ProjectorConfig, features_dim: int, objective: str) -> Head:
    """The head whose output the loss compares: linear layers with batch norm and ReLU between them.

    SimCLR's has batch norm after the last layer too, without a bias, since a shift common to all projections
    carries no information (the authors' code). BYOL's has none there (Grill et al. 2020, section 3.3).

    Raises ValueError for an objective that has no projector.
    """
    if objective not in ("simclr", "byol"):
        raise ValueError(f"objective={objective} has no projector; use its encoder")
    widths = config.widths(objective, features_dim)
    if not widths:
        return Head(features_dim)
    return _perceptron(features_dim, *widths, last_norm=objective == "simclr")


def build_predictor(config: BYOLConfig, dim: int) -> Head:
    """The head that predicts a view's target from the other's projection. Grill et al. 2020, section 3.3."""
    return _perceptron(dim, config.predictor_hidden_dim, dim, last_norm=False)


def build_classifier(features_dim: int, classes: int) -> nn.Linear:
    """A linear layer from features to the logits of the classes."""
    return nn.Linear(features_dim, classes)


def _perceptron(*dims: int, last_norm: bool) -> Head:
    """Linear layers of these widths, with batch norm and ReLU between them."""
    layers: list[nn.Module] = []
    for width, next_width in pairwise(dims):
        if layers:
            layers += [nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(width, next_width, bias=False))
    if last_norm:
        norm = nn.BatchNorm1d(dims[-1])
        norm.bias.requires_grad_(False)
        layers.append(norm)
    return Head(dims[-1], *layers)
