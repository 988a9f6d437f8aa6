"""Every encoder that can be named is built, from the seed alone."""

from typing import Any

import pytest
import torch

from training.config.encoder import ENCODERS, EncoderConfig
from training.models.encoders import Encoder, build_encoder, raw_pixels

SMALL = ("resnet8", "plain14", "resnet18", "efficientnet-b0", "torchvision:mobilenet_v3_small")


def _encoder(name: Any, **fields: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(EncoderConfig(name=name, **fields))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_name_is_an_encoder_with_features_as_wide_as_it_says(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(name=name))
        assert encoder(torch.empty(2, 3, 40, 56)).shape == (2, encoder.dim)


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_decides_the_weights(name: str) -> None:
    first, second = _encoder(name).state_dict(), _encoder(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(1)
    third = build_encoder(EncoderConfig(name=name)).state_dict()
    assert any(not torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("name", SMALL)
def test_training_draws_nothing_from_torchs_generator(name: str) -> None:
    encoder = _encoder(name)
    before = torch.get_rng_state()
    encoder(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_gets_a_gradient(name: str) -> None:
    encoder = _encoder(name, **({"drop_path": 0} if name.startswith("efficientnet") else {}))
    encoder(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    without = [key for key, parameter in encoder.named_parameters() if parameter.grad is None]
    assert without == []


def test_raw_pixels_of_small_images_are_the_pixels() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(raw_pixels(16)(images), images.flatten(1))
