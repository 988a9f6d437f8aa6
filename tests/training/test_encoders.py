"""Encoders against the papers' tables and torchvision."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from training.config import CIFAR_DEPTHS, IMAGENET_DEPTHS, EncoderConfig
from training.encoders import Encoder, build_encoder


def _encoder(name: Any, **fields: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(EncoderConfig(name=name, **fields))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# He et al. 2015, table 6; the table counts the classifier of ten classes too.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", "0.27"),
        ("resnet32", "0.46"),
        ("resnet44", "0.66"),
        ("resnet56", "0.85"),
        ("resnet110", "1.7"),
    ],
)
def test_cifar_resnets_are_as_large_as_in_the_paper(name: str, millions: str) -> None:
    decimals = len(millions.partition(".")[2])
    assert f"{(_parameters(_encoder(name)) + 64 * 10 + 10) / 1e6:.{decimals}f}" == millions


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_cifar_resnets_have_as_many_layers_as_their_name_says(depth: int) -> None:
    layers = [module for module in _encoder(f"resnet{depth}").modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) + 1 == depth  # The classifier is the last.


def test_resnet20_costs_41_million_multiply_adds() -> None:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        _encoder("resnet20").eval()(torch.zeros(1, 3, 32, 32))
    # Other counts of about 40.8 million add batch norm's.
    assert counter.get_total_flops() / 2 == pytest.approx(40.8e6, rel=0.01)


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "resnet50"])
def test_features_are_as_wide_as_the_encoder_says(name: str) -> None:
    encoder = _encoder(name)
    expected = {"resnet18": 512, "resnet50": 2048}.get(name, 64)
    assert encoder(torch.zeros(2, 3, 33, 47)).shape == (2, encoder.dim) == (2, expected)


def test_every_stage_of_a_cifar_resnet_halves_the_maps_and_doubles_the_channels() -> None:
    shapes = []
    encoder = _encoder("resnet20")
    for block in list(encoder.trunk.children())[3:12]:
        block.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    encoder(torch.zeros(2, 3, 32, 32))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
def test_imagenet_resnets_have_torchvisions_weights_but_the_classifier(depth: int) -> None:
    theirs = torchvision.models.get_model(f"resnet{depth}", weights=None).state_dict()
    ours = _encoder(f"resnet{depth}").trunk.state_dict()
    expected = {name: value.shape for name, value in theirs.items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in ours.items()} == expected


def test_torchvisions_weights_give_torchvisions_features() -> None:
    theirs: Any = torchvision.models.resnet18(weights=None).eval()
    encoder = _encoder("resnet18").eval()
    theirs.fc = nn.Identity()
    encoder.trunk.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder(images), theirs(images))


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("imagenet", 8), (None, 8)])
def test_the_cifar_stem_keeps_the_first_maps_at_the_size_of_the_image(stem: str | None, side: int) -> None:
    encoder = _encoder("resnet18", **({"stem": stem} if stem else {}))
    shapes = []
    encoder.trunk.get_submodule("layer1").register_forward_pre_hook(
        lambda _module, inputs: shapes.append(inputs[0].shape)
    )
    encoder(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 64, side, side)]


def test_resnet18_with_the_cifar_stem_has_11_17_million_parameters_with_a_classifier() -> None:
    # github.com/kuangliu/pytorch-cifar's ResNet18 for ten classes has 11,173,962.
    assert _parameters(_encoder("resnet18", stem="cifar")) + 512 * 10 + 10 == 11_173_962


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_the_seed_decides_the_weights(name: str) -> None:
    first, second = _encoder(name).state_dict(), _encoder(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
