"""ResNets and plain nets against the papers' tables and torchvision."""

from typing import Any

import pytest
import torch
import torchvision
from counting import layer_outputs, parameters, randomise_statistics, with_classifier
from torch import nn

from training.config.encoder import CIFAR_DEPTHS, IMAGENET_DEPTHS, EncoderConfig
from training.models.encoders import Encoder, build_encoder


def _encoder(name: str, **fields: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(EncoderConfig(name=name, **fields))


def _shape_only(name: str, **fields: Any) -> Encoder:
    with torch.device("meta"):
        return build_encoder(EncoderConfig(name=name, **fields))


def _images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# He et al. 2015, table 6; the table counts the classifier of ten classes too.
@pytest.mark.parametrize(
    ("depth", "millions"), [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")]
)
@pytest.mark.parametrize("kind", ["resnet", "plain"])
def test_cifar_nets_are_as_large_as_in_the_paper(kind: str, depth: int, millions: str) -> None:
    count, _ = with_classifier(EncoderConfig(name=f"{kind}{depth}"), 32, classes=10)
    assert f"{count / 1e6:.{len(millions) - 2}f}" == millions


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_cifar_nets_have_as_many_layers_as_their_name_says(depth: int) -> None:
    layers = [module for module in _shape_only(f"resnet{depth}").modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) + 1 == depth  # The classifier is the last.


def test_resnet20_costs_41_million_multiply_adds() -> None:
    _, multiply_adds = with_classifier(EncoderConfig(name="resnet20"), 32, classes=10)
    # 40.55 million in the convolutions; other counts of about 40.8 million add batch norm's.
    assert multiply_adds == pytest.approx(40.8e6, rel=0.01)


# He et al. 2015, table 1, in 1e9. The paper cuts digits off where it does not round, and has the bottleneck's
# stride in its first convolution, where torchvision's nets and these have it in the second, which costs more.
@pytest.mark.parametrize(
    ("depth", "paper", "stride_costs"),
    [(18, 1.8, 0.0), (34, 3.6, 0.0), (50, 3.8, 0.231), (101, 7.6, 0.231), (152, 11.3, 0.231)],
)
def test_imagenet_resnets_cost_what_the_papers_table_says(
    depth: int, paper: float, stride_costs: float
) -> None:
    _, multiply_adds = with_classifier(EncoderConfig(name=f"resnet{depth}"), 224)
    assert multiply_adds / 1e9 - stride_costs == pytest.approx(paper, abs=0.07)


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
def test_imagenet_resnets_weigh_and_cost_what_torchvision_publishes(depth: int) -> None:
    published = torchvision.models.get_model_weights(f"resnet{depth}").IMAGENET1K_V1.meta
    count, multiply_adds = with_classifier(EncoderConfig(name=f"resnet{depth}"), 224)
    assert count == published["num_params"]
    assert round(multiply_adds / 1e9, 3) == published["_ops"]


# Chen et al. 2020, table 6, in millions, without the classifier.
@pytest.mark.parametrize(("width", "millions"), [(1, 24), (2, 94), (4, 375)])
def test_a_wider_resnet50_is_as_large_as_in_the_simclr_paper(width: int, millions: int) -> None:
    encoder = _shape_only("resnet50", width=width)
    assert round(parameters(encoder) / 1e6) == millions
    assert encoder.dim == 2048 * (width or 1)


@pytest.mark.parametrize("depth", [18, 50])
def test_width_multiplies_all_channels_of_every_layer(depth: int) -> None:
    narrow, wide = (_shape_only(f"resnet{depth}", width=width).state_dict() for width in (1, 2))
    for name, weight in narrow.items():
        incoming = 1 if name == "trunk.conv1.weight" else 2
        scales = (2, incoming, 1, 1)[: weight.dim()]
        assert wide[name].shape == tuple(a * b for a, b in zip(weight.shape, scales, strict=True))


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "plain8", "resnet18", "plain18", "resnet50"])
def test_features_are_as_wide_as_the_encoder_says(name: str) -> None:
    encoder = _encoder(name)
    expected = {"resnet18": 512, "plain18": 512, "resnet50": 2048}.get(name, 64)
    assert encoder(torch.zeros(2, 3, 33, 47)).shape == (2, encoder.dim) == (2, expected)


def test_every_stage_of_a_cifar_resnet_halves_the_maps_and_doubles_the_channels() -> None:
    shapes = []
    encoder = _encoder("resnet20")
    for block in list(encoder.trunk.children())[3:12]:
        block.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    encoder(torch.zeros(2, 3, 32, 32))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_a_cifar_block_that_halves_adds_every_second_pixel_and_channels_of_zeros() -> None:
    block: Any = list(_encoder("resnet8").trunk.children())[4].eval()
    nn.init.zeros_(block.bn2.weight)  # Nothing but the shortcut is left.
    maps = torch.rand(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    out = block(maps)
    assert torch.equal(out[:, :16], maps[:, :, ::2, ::2])
    assert not out[:, 16:].any()


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
def test_torchvisions_class_takes_a_resnets_weights_and_gives_its_features(depth: int) -> None:
    encoder = _encoder(f"resnet{depth}").eval()
    theirs: Any = torchvision.models.get_model(f"resnet{depth}", weights=None).eval()
    theirs.fc = nn.Identity()
    randomise_statistics(encoder)
    theirs.load_state_dict(encoder.trunk.state_dict(), strict=True)
    mine, others = layer_outputs(encoder.trunk, _images()), layer_outputs(theirs, _images())
    assert list(mine) == list(others)
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    with torch.no_grad():
        assert torch.equal(encoder(_images()), theirs(_images()))


@pytest.mark.parametrize("depth", [*CIFAR_DEPTHS, 18, 34, 50])
def test_a_plain_net_is_the_resnet_less_its_shortcuts(depth: int) -> None:
    plain, residual = _shape_only(f"plain{depth}").state_dict(), _shape_only(f"resnet{depth}").state_dict()
    expected = {name: value.shape for name, value in residual.items() if "downsample" not in name}
    assert {name: value.shape for name, value in plain.items()} == expected


@pytest.mark.parametrize("name", ["plain8", "plain18", "plain50"])
def test_a_plain_net_is_its_layers_one_after_the_other(name: str) -> None:
    encoder = _encoder(name, **({} if name == "plain8" else {"stem": "cifar"})).eval()
    images = _images(16)
    layers = [m for m in encoder.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    with torch.no_grad():
        x = images
        for convolution, norm in zip(convolutions, norms, strict=True):
            x = norm(convolution(x)).relu()
        torch.testing.assert_close(encoder(images), x.mean((2, 3)))


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("imagenet", 8)])
@pytest.mark.parametrize("name", ["resnet18", "plain18"])
def test_the_cifar_stem_keeps_the_first_maps_at_the_size_of_the_image(
    name: str, stem: str, side: int
) -> None:
    encoder = _encoder(name, stem=stem)
    shapes = []
    encoder.trunk.get_submodule("layer1").register_forward_pre_hook(
        lambda _module, inputs: shapes.append(inputs[0].shape)
    )
    encoder(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 64, side, side)]


def test_resnet18_with_the_cifar_stem_has_11_17_million_parameters_with_a_classifier() -> None:
    # github.com/kuangliu/pytorch-cifar's ResNet18 for ten classes has 11,173,962.
    count, _ = with_classifier(EncoderConfig(name="resnet18", stem="cifar"), 32, classes=10)
    assert count == 11_173_962


@pytest.mark.parametrize("name", ["resnet56", "plain56", "resnet50"])
def test_weights_are_drawn_with_variance_two_over_the_fan_out(name: str) -> None:
    for module in _encoder(name).modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            spread = (2 / fan_out) ** 0.5
            error = 4 / (2 * module.weight.numel()) ** 0.5  # Four standard errors of a standard deviation.
            assert module.weight.std().item() == pytest.approx(spread, rel=error)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zeroed_scales_are_those_that_torchvision_zeroes(name: str) -> None:
    torch.manual_seed(0)
    theirs: Any = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
    mine = _encoder(name, zero_init_residual=True).trunk.state_dict()
    zeroed = {key for key, value in theirs.state_dict().items() if key.endswith("weight") and not value.any()}
    assert {key for key, value in mine.items() if key.endswith("weight") and not value.any()} == zeroed
    assert len(zeroed) == {"resnet18": 8, "resnet50": 16}[name]
    unset = _encoder(name).trunk.state_dict()
    assert all(torch.equal(mine[key], unset[key]) for key in mine if key not in zeroed)


def test_blocks_with_zeroed_scales_pass_their_input_on() -> None:
    encoder = _encoder("resnet8", zero_init_residual=True)
    stem, blocks = encoder.trunk[:3], list(encoder.trunk.children())[3:6]  # pyright: ignore[reportIndexIssue]
    maps = stem(_images(16))
    assert torch.equal(blocks[0](maps), maps)
    pooled = maps[:, :, ::4, ::4].mean((2, 3))  # Two of the three blocks take every second pixel.
    torch.testing.assert_close(encoder(_images(16))[:, :16], pooled)


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_features_stay_channels_last_through_the_trunk(name: str) -> None:
    encoder = _encoder(name).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    strays = []

    def look(module: nn.Module, _inputs: Any, maps: torch.Tensor) -> None:
        if maps.shape[1] > 1 and not maps.is_contiguous(memory_format=torch.channels_last):
            strays.append(module)

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(look)
    encoder(_images().contiguous(memory_format=torch.channels_last))
    assert strays == []
