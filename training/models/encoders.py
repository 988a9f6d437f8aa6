"""Encoders by name, their cost, and raw pixels as a baseline."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.config.encoder import (
    CIFAR_DEPTHS,
    RESNETS,
    TIMM,
    TORCHVISION,
    EncoderConfig,
    depth_of,
    scaling,
)
from training.models.resnet import cifar_resnet, imagenet_resnet, zero_last_scales

_PIXELS_SIDE = 32


class Encoder(nn.Module):
    """A network from images to features, and the features' width."""

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.dim = dim

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n dim"]:
        return self.trunk(images)


def build_encoder(config: EncoderConfig) -> Encoder:
    """The encoder of `config`, with weights drawn from torch's global generator."""
    if config.name in RESNETS:
        return Encoder(*_resnet(config))
    # Importing torchvision takes a second and a half in every process, and timm longer.
    if config.name.startswith(TORCHVISION):
        from training.models.torchvision_models import torchvision_trunk

        return Encoder(*torchvision_trunk(config.name.removeprefix(TORCHVISION)))
    if config.name.startswith(TIMM):
        from training.models.timm_models import timm_trunk

        return Encoder(*timm_trunk(config.name.removeprefix(TIMM)))
    from training.models.efficientnet import EfficientNet

    multipliers = scaling(config)
    trunk = EfficientNet(width=multipliers.width, depth=multipliers.depth, drop_path=config.drop_path)
    return Encoder(trunk, trunk.dim)


def raw_pixels(size: int) -> Encoder:
    """Pixels as features, scaled down to 32 a side: a baseline for other encoders."""
    side = min(size, _PIXELS_SIDE)
    return Encoder(nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten()), 3 * side * side)


def _resnet(config: EncoderConfig) -> tuple[nn.Module, int]:
    depth, plain, width = depth_of(config.name), config.name.startswith("plain"), int(config.width)
    if depth in CIFAR_DEPTHS:
        trunk, dim = cifar_resnet(depth, width=width, plain=plain)
    else:
        trunk, dim = imagenet_resnet(depth, width=width, stem=config.stem, plain=plain)
    if config.zero_init_residual:
        zero_last_scales(trunk)
    return trunk, dim


class Cost(NamedTuple):
    """Number of parameters, and of multiply-adds for one image, without a classifier."""

    parameters: int
    multiply_adds: int


def encoder_cost(config: EncoderConfig, size: int, device: str = "meta") -> Cost:
    """The cost of the encoder with images of `size` pixels a side.

    On the device "meta" nothing is computed; on "cpu" an image is encoded, and random numbers are drawn.
    """
    with torch.device(device):
        encoder = build_encoder(config).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.empty(1, 3, size, size))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)  # FlopCounterMode counts a multiply-add as two.
