"""The heads: their layers, their scale, and what of them is trained."""

import pytest
import torch
from torch import nn

from training.config import ProjectorConfig
from training.config.objective import BYOLConfig, ObjectiveName
from training.models.heads import build_classifier, build_predictor, build_projector


def _layers(head: nn.Module) -> str:
    names = {"Linear": "linear", "BatchNorm1d": "norm", "ReLU": "relu"}
    return " ".join(names[type(module).__name__] for module in head.children())


@pytest.mark.parametrize(
    ("config", "objective", "layers"),
    [
        (ProjectorConfig(), "simclr", "linear norm relu linear norm"),
        (ProjectorConfig(layers=3), "simclr", "linear norm relu linear norm relu linear norm"),
        (ProjectorConfig(kind="linear"), "simclr", "linear norm"),
        (ProjectorConfig(kind="none"), "simclr", ""),
        (ProjectorConfig(), "byol", "linear norm relu linear"),
        (ProjectorConfig(layers=3), "byol", "linear norm relu linear norm relu linear"),
        (ProjectorConfig(kind="linear"), "byol", "linear"),
        (ProjectorConfig(kind="none"), "byol", ""),
    ],
)
def test_projectors_are_the_papers(config: ProjectorConfig, objective: ObjectiveName, layers: str) -> None:
    assert _layers(build_projector(config, 8, objective)) == layers


# ResNet-18's features are 512 wide, ResNet-50's 2,048 and those of ResNet-50 four times as wide 8,192.
@pytest.mark.parametrize("features", [512, 2048, 8192])
@pytest.mark.parametrize(("objective", "hidden_dim", "dim"), [("simclr", None, 128), ("byol", 4096, 256)])
def test_unset_widths_are_the_papers(
    objective: ObjectiveName, hidden_dim: int | None, dim: int, features: int
) -> None:
    with torch.device("meta"):
        projector = build_projector(ProjectorConfig(), features, objective)
    shapes = [tuple(module.weight.shape) for module in projector if isinstance(module, nn.Linear)]
    assert shapes == [(hidden_dim or features, features), (dim, hidden_dim or features)]
    assert projector.dim == dim


@pytest.mark.parametrize("kind", ["non-linear", "linear", "none"])
def test_a_projector_knows_the_width_of_what_it_gives(kind: str) -> None:
    config = ProjectorConfig(kind=kind, **({} if kind == "none" else {"dim": 12}))  # pyright: ignore
    projector = build_projector(config, 8, "simclr")
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert projector(features).shape == (4, projector.dim) == (4, 8 if kind == "none" else 12)


def test_all_of_simclrs_projector_but_the_last_shift_is_trained() -> None:
    projector = build_projector(ProjectorConfig(hidden_dim=24, dim=12), 8, "simclr")
    trained = sum(parameter.numel() for parameter in projector.parameters() if parameter.requires_grad)
    assert trained == 8 * 24 + 2 * 24 + 24 * 12 + 12


@pytest.mark.parametrize("kind", ["non-linear", "linear"])
def test_projections_of_a_batch_are_centred_with_unit_variance(kind: str) -> None:
    torch.manual_seed(0)
    projector = build_projector(ProjectorConfig(kind=kind, dim=12), 8, "simclr").double()  # pyright: ignore
    projections = projector(torch.randn(64, 8).double() * 9)
    torch.testing.assert_close(projections.mean(0), torch.zeros(12).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(projections.var(0, correction=0), torch.ones(12).double(), rtol=1e-3, atol=0)


def test_the_predictor_leads_from_projections_to_projections() -> None:
    predictor = build_predictor(BYOLConfig(), 12)
    assert _layers(predictor) == "linear norm relu linear"
    shapes = [tuple(module.weight.shape) for module in predictor if isinstance(module, nn.Linear)]
    assert shapes == [(4096, 12), (12, 4096)]
    assert build_predictor(BYOLConfig(predictor_hidden_dim=7), 12)[0].weight.shape == (7, 12)


def test_the_classifier_gives_a_logit_for_each_class_with_a_bias() -> None:
    classifier = build_classifier(8, 10)
    assert classifier(torch.zeros(3, 8)).tolist() == [classifier.bias.tolist()] * 3
    assert classifier.weight.shape == (10, 8)


def test_supervised_training_has_no_projector() -> None:
    with pytest.raises(ValueError, match="objective=supervised has no projector"):
        build_projector(ProjectorConfig(), 8, "supervised")
