"""Encoders, from images to features: ResNets, and the raw pixels to compare them with."""

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import CIFAR_DEPTHS, EncoderConfig

_PIXELS_SIDE = 32


class Encoder(nn.Module):
    """A trunk and the width of the features that it gives."""

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.dim = dim

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n dim"]:
        return self.trunk(images)


def build_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that `config` names, its weights drawn from torch's global generator."""
    depth = int(config.name.removeprefix("resnet"))
    if depth in CIFAR_DEPTHS:
        return _cifar_resnet(depth)
    trunk: torchvision.models.ResNet = getattr(torchvision.models, config.name)(weights=None)
    if config.stem == "cifar":
        _use_cifar_stem(trunk)
    dim = trunk.fc.in_features
    trunk.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return Encoder(trunk, dim)


def raw_pixels(size: int) -> Encoder:
    """The pixels themselves as features, scaled down to 32 a side: a baseline for others."""
    side = min(size, _PIXELS_SIDE)
    return Encoder(nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten()), 3 * side * side)


def _use_cifar_stem(resnet: torchvision.models.ResNet) -> None:
    """A 3x3 convolution of stride 1 and no pooling. Chen et al. 2020, appendix B.9."""
    resnet.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]


def _cifar_resnet(depth: int) -> Encoder:
    """He et al. 2015, section 4.2: 6n + 2 layers of 16, 32 and 64 channels, shortcuts without weights."""
    blocks_per_stage = (depth - 2) // 6
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width in (16, 32, 64):
        for block in range(blocks_per_stage):
            stride = 2 if width > 16 and block == 0 else 1
            layers.append(_CifarBlock(channels, width, stride))
            channels = width
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Encoder(trunk, channels)


class _CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights.

    Where the size changes, the shortcut is every `stride`-th pixel, with channels of zeros added.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.added_channels = width - channels

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.added_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.added_channels))
        return torch.relu(residual + shortcut)
