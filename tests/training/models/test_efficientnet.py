"""EfficientNets against the paper's tables and torchvision's class."""

import math
from typing import Any

import pytest
import torch
import torchvision
from counting import layer_outputs, randomise_statistics, with_classifier
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models._utils import _make_divisible
from torchvision.models.efficientnet import MBConvConfig

from training.config.encoder import EFFICIENTNETS, EncoderConfig
from training.models.efficientnet import EfficientNet, round_channels
from training.models.encoders import Encoder, build_encoder


def _encoder(name: str, **fields: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(EncoderConfig(name=name, **fields))


# Tan and Le 2019, table 2: parameters in millions, multiply-adds in 1e9, and how far off the printed numbers
# are: B1 costs 0.687, B2 has 9.11 million, B4 costs 4.39, B5 10.27 and B7 37.75, in torchvision's count too.
@pytest.mark.parametrize(
    ("name", "millions", "billions", "off"),
    [
        ("efficientnet-b0", "5.3", "0.39", (0, 0)),
        ("efficientnet-b1", "7.8", "0.70", (0, -0.01)),
        ("efficientnet-b2", "9.2", "1.0", (-0.1, 0)),
        ("efficientnet-b3", "12", "1.8", (0, 0)),
        ("efficientnet-b4", "19", "4.2", (0, 0.2)),
        ("efficientnet-b5", "30", "9.9", (0, 0.4)),
        ("efficientnet-b6", "43", "19", (0, 0)),
        ("efficientnet-b7", "66", "37", (0, 1)),
    ],
)
def test_the_named_models_weigh_and_cost_what_the_paper_prints(
    name: str, millions: str, billions: str, off: tuple[float, float]
) -> None:
    config = EncoderConfig(name=name)
    count, multiply_adds = with_classifier(config, EFFICIENTNETS[name].resolution)
    assert _rounded_like(millions, count / 1e6) == pytest.approx(float(millions) + off[0])
    assert _rounded_like(billions, multiply_adds / 1e9) == pytest.approx(float(billions) + off[1])


def _rounded_like(printed: str, value: float) -> float:
    return round(value, len(printed.partition(".")[2]))


@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_the_named_models_weigh_and_cost_what_torchvision_publishes(name: str) -> None:
    published = torchvision.models.get_model_weights(name.replace("-", "_")).IMAGENET1K_V1.meta
    # torchvision counted B2 at 288 pixels and not at the paper's 260.
    size = 288 if name == "efficientnet-b2" else EFFICIENTNETS[name].resolution
    count, multiply_adds = with_classifier(EncoderConfig(name=name), size)
    assert count == published["num_params"]
    assert round(multiply_adds / 1e9, 3) == pytest.approx(published["_ops"], abs=0.002)


@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_torchvisions_class_with_the_papers_batch_norm_takes_the_weights_and_gives_the_same_features(
    name: str,
) -> None:
    encoder = _encoder(name, drop_path=0).eval()
    theirs: Any = torchvision.models.get_model(name.replace("-", "_"), weights=None).eval()
    theirs.classifier = nn.Identity()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    randomise_statistics(encoder)
    theirs.load_state_dict(encoder.trunk.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mine, others = layer_outputs(encoder.trunk, images), layer_outputs(theirs, images)
    assert list(mine) == list(others)
    assert all(torch.equal(mine[layer], others[layer]) for layer in mine)
    with torch.no_grad():
        assert torch.equal(encoder(images), theirs(images))


# github.com/tensorflow/tpu, models/official/efficientnet/efficientnet_builder.py: batch_norm_epsilon=1e-3 and
# batch_norm_momentum=0.99, which is 0.01 in PyTorch's sense, for all of them.
@pytest.mark.parametrize("name", [*EFFICIENTNETS, "efficientnet"])
def test_batch_norms_have_the_papers_epsilon_and_momentum(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(name=name))
    norms = [(m.eps, m.momentum) for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) >= 49
    assert set(norms) == {(1e-3, 0.01)}


# torchvision's copy of table 1.
TABLE = (
    (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1),
)  # fmt: skip


@pytest.mark.parametrize(("width", "depth"), [(0.5, 0.7), (1.0, 1.0), (1.37, 1.21), (0.83, 2.6)])
def test_a_freely_scaled_model_has_the_layers_that_torchvision_would_give_it(
    width: float, depth: float
) -> None:
    head = _make_divisible(1280 * width, 8)
    with torch.device("meta"):
        stages = [MBConvConfig(*row, width_mult=width, depth_mult=depth) for row in TABLE]
        theirs: Any = torchvision.models.EfficientNet(stages, dropout=0.0, last_channel=head)
        encoder = build_encoder(EncoderConfig(name="efficientnet", width=width, depth=depth))
    theirs.classifier = nn.Identity()
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in encoder.trunk.state_dict().items()} == expected
    assert encoder.dim == head


@pytest.mark.parametrize("name", ["efficientnet-b1", "efficientnet-b4"])
def test_the_named_multipliers_set_by_hand_give_the_named_model(name: str) -> None:
    width, depth, _ = EFFICIENTNETS[name]
    with torch.device("meta"):
        named = build_encoder(EncoderConfig(name=name)).state_dict()
        free = build_encoder(EncoderConfig(name="efficientnet", width=width, depth=depth)).state_dict()
    assert {key: value.shape for key, value in named.items()} == {k: v.shape for k, v in free.items()}


def test_coefficients_give_the_model_of_their_powers() -> None:
    with torch.device("meta"):
        scaled = build_encoder(EncoderConfig(name="efficientnet", alpha=1.2, beta=1.1, phi=2))
        by_hand = build_encoder(EncoderConfig(name="efficientnet", depth=1.2**2, width=1.1**2))
    assert {k: v.shape for k, v in scaled.state_dict().items()} == {
        k: v.shape for k, v in by_hand.state_dict().items()
    }


@given(st.floats(min_value=0.1, max_value=5000))
def test_channels_are_rounded_as_torchvision_rounds_them(channels: float) -> None:
    rounded = round_channels(channels)
    assert rounded == _make_divisible(channels, 8)
    assert rounded % 8 == 0
    assert rounded >= 0.9 * channels


def test_skipping_grows_from_block_to_block_as_in_torchvision() -> None:
    theirs: Any = torchvision.models.efficientnet_b0(weights=None)
    encoder = _encoder("efficientnet-b0")
    expected = [m.p for m in theirs.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert [m.skip for m in encoder.modules() if hasattr(m, "skip")] == pytest.approx(expected)
    assert expected[0] == 0
    assert expected[-1] == pytest.approx(0.2 * 15 / 16)


def test_stochastic_depth_leaves_evaluation_as_it_is_and_changes_training() -> None:
    skipping, never = _encoder("efficientnet-b0"), _encoder("efficientnet-b0", drop_path=0)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(skipping(images), never(images))
        never.load_state_dict(skipping.state_dict())
        assert torch.equal(skipping.eval()(images), never.eval()(images))


# efficientnet_model.py of the same: conv_kernel_initializer's deviation is the root of two over kernel height
# times width times the kernel's last dimension, which in a depthwise one of TensorFlow is 1.
def test_weights_are_drawn_as_in_the_papers_code() -> None:
    torch.manual_seed(0)
    depthwise = 0
    for module in EfficientNet(width=1.0, depth=1.0, drop_path=0).modules():
        if isinstance(module, nn.Conv2d):
            depthwise += module.groups > 1
            last = 1 if module.groups > 1 else module.out_channels
            deviation = math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * last))
            error = 4 / math.sqrt(2 * module.weight.numel())  # Four standard errors.
            assert module.weight.std().item() == pytest.approx(deviation, rel=error)
            assert module.bias is None or not module.bias.any()
    assert depthwise == 16
