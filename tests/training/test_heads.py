"""The projector: its size, its scale, and what of it is trained."""

import torch

from training.config import ProjectorConfig
from training.heads import build_projector


def test_the_projector_is_linear_norm_relu_linear_norm() -> None:
    projector = build_projector(ProjectorConfig(hidden_dim=24, dim=12), 8)
    kinds = [type(module).__name__ for module in projector.children()]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert projector(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))).shape == (4, 12)


def test_all_but_the_last_shift_is_trained() -> None:
    projector = build_projector(ProjectorConfig(hidden_dim=24, dim=12), 8)
    trained = sum(parameter.numel() for parameter in projector.parameters() if parameter.requires_grad)
    assert trained == 8 * 24 + 2 * 24 + 24 * 12 + 12


def test_projections_of_a_batch_are_centred_with_unit_variance() -> None:
    torch.manual_seed(0)
    projections = build_projector(ProjectorConfig(hidden_dim=24, dim=12), 8).double()(
        torch.randn(64, 8).double() * 9
    )
    torch.testing.assert_close(projections.mean(0), torch.zeros(12).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(projections.var(0, correction=0), torch.ones(12).double(), rtol=1e-3, atol=0)
