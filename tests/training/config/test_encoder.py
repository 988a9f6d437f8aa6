"""Which encoders there are, what scales them, and which settings are refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.config import DataConfig
from training.config import TrainConfig
from training.config.encoder import (
    EFFICIENTNETS,
    EncoderConfig,
    drop_path,
    efficientnet_resolution,
    scaling,
)


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"name": "resnet19"}, "no such encoder; there are resnet1"),
        ({"name": "efficientnet-b8"}, "no such encoder; there are efficientnet-b"),
        ({"name": "resnet18", "stem": "cifer"}, "'imagenet' or 'cifar'"),
        ({"name": "resnet20", "stem": "cifar"}, "encoder.stem has no effect on resnet20; leave it out"),
        ({"name": "plain110", "stem": "cifar"}, "encoder.stem has no effect on plain110"),
        ({"name": "efficientnet-b3", "stem": "cifar"}, "encoder.stem has no effect on efficientnet-b3"),
        (
            {"name": "efficientnet-b3", "width": 1.0},
            "encoder.width has no effect on efficientnet-b3; leave it out, or set encoder.name=efficientnet",
        ),
        ({"name": "efficientnet-b3", "phi": 1.0}, "encoder.phi has no effect on efficientnet-b3"),
        ({"name": "resnet18", "depth": 2.0}, "encoder.depth has no effect on resnet18"),
        ({"name": "resnet18", "alpha": 2.0}, "encoder.alpha has no effect on resnet18"),
        ({"name": "resnet18", "drop_path": 0.1}, "encoder.drop_path has no effect on resnet18"),
        ({"name": "resnet18", "width": 1.5}, "encoder.width=1.5 on resnet18 must be whole; try 1, 2 or 4"),
        ({"name": "torchvision:vgg11", "width": 2.0}, "encoder.width has no effect on torchvision:vgg11"),
        (
            {"name": "plain20", "zero_init_residual": True},
            "encoder.zero_init_residual has no effect on plain20",
        ),
        (
            {"name": "efficientnet-b0", "zero_init_residual": True},
            "zero_init_residual has no effect on efficientnet-b0; leave it out ",
        ),
        ({"name": "efficientnet", "width": 0.0}, "width"),
        ({"name": "efficientnet", "width": 1.1, "beta": 1.1}, "encoder.beta and encoder.width both set"),
        ({"name": "efficientnet", "depth": 1.1, "alpha": 1.1}, "encoder.alpha and encoder.depth both set"),
        ({"name": "efficientnet", "phi": 2.0}, "encoder.phi has no effect without alpha, beta or gamma"),
        ({"name": "efficientnet", "base_size": 32}, "encoder.base_size has no effect without encoder.gamma"),
        ({"name": "efficientnet", "drop_path": 1.1}, "drop_path"),
    ],
)
def test_a_setting_that_is_wrong_or_has_no_effect_is_refused(fields: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ValidationError, match=culprit):
        EncoderConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"name": "resnet50", "stem": "cifar", "width": 4},
        {"name": "plain20", "width": 2},
        {"name": "resnet20", "zero_init_residual": True},
        {"name": "resnet50", "zero_init_residual": False},
        {"name": "efficientnet-b7", "drop_path": 0.0},
        {"name": "efficientnet", "width": 0.5, "alpha": 1.2, "gamma": 1.1, "phi": 3, "base_size": 32},
        {"name": "torchvision:convnext_tiny"},
    ],
)
def test_a_setting_that_has_an_effect_is_accepted(fields: dict[str, Any]) -> None:
    EncoderConfig(**fields)


# Tan and Le 2019, section 3.3: with phi = 1, alpha 1.2, beta 1.1, gamma 1.15.
def test_coefficients_come_to_their_powers() -> None:
    config = EncoderConfig(name="efficientnet", alpha=1.2, beta=1.1, gamma=1.15, phi=2)
    assert scaling(config) == (pytest.approx(1.21), pytest.approx(1.44), round(224 * 1.3225))
    first = EncoderConfig(name="efficientnet", alpha=1.2, beta=1.1, gamma=1.15)
    assert scaling(first) == (1.1, 1.2, round(224 * 1.15))


def test_what_is_unset_scales_nothing() -> None:
    assert scaling(EncoderConfig(name="efficientnet")) == (1, 1, 224) == EFFICIENTNETS["efficientnet-b0"]
    assert scaling(EncoderConfig(name="efficientnet", beta=1.1, phi=3)) == (pytest.approx(1.331), 1, 224)
    assert scaling(EncoderConfig(name="efficientnet", gamma=1.5, phi=0)) == (1, 1, 224)


def test_named_models_have_the_papers_multipliers_and_no_others() -> None:
    assert scaling(EncoderConfig(name="efficientnet-b4")) == (1.4, 1.8, 380)
    assert drop_path(EncoderConfig(name="efficientnet-b4")) == 0.2
    assert drop_path(EncoderConfig(name="efficientnet-b4", drop_path=0)) == 0


def test_only_efficientnets_have_a_resolution() -> None:
    config = EncoderConfig(name="efficientnet", gamma=1.25, base_size=32, phi=1)
    assert efficientnet_resolution(config) == 40
    with pytest.raises(ValueError, match="resnet50 has no resolution of its own"):
        efficientnet_resolution(EncoderConfig())


def _run(size: int, **encoder: Any) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(train="somewhere", view={"size": size}),  # pyright: ignore[reportArgumentType]
        encoder=EncoderConfig(**encoder),
    )


def test_gamma_and_the_views_size_must_agree() -> None:
    scaled = {"name": "efficientnet", "gamma": 1.25, "phi": 1.0, "base_size": 32}
    assert _run(40, **scaled).data.view.size == 40
    with pytest.raises(
        ValidationError, match=r"views of 40 pixels, and data\.view\.size=32; set --data\.view\.size 40"
    ):
        _run(32, **scaled)
    assert _run(32, name="efficientnet-b5").data.view.size == 32


def test_a_torchvision_model_is_asked_whether_it_takes_the_views() -> None:
    assert _run(32, name="torchvision:mobilenet_v3_small").encoder.name == "torchvision:mobilenet_v3_small"
    with pytest.raises(ValidationError, match=r"vit_b_16 does not accept images of data\.view\.size=32"):
        _run(32, name="torchvision:vit_b_16")
    with pytest.raises(ValidationError, match="no classification model 'resnet19'"):
        _run(32, name="torchvision:resnet19")
