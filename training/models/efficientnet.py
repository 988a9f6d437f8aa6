"""EfficientNets of any width and depth, from one base table (Tan and Le 2019), and stochastic depth.

A random generator's draws would depend on the other rows of the batch, and so on the number of workers and on
whether the run was resumed. Here they depend on the pixels of the view, which change with every epoch and are
the same on every worker.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

# Weyl's increment and the multipliers of SplitMix64 (Steele et al. 2014), as signed numbers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64

# So many pixels along each side distinguish a view from all others.
_SIDE = 16


def row_keys(images: Float[Tensor, "n 3 height width"]) -> Int[Tensor, " n"]:
    """A number for each image that depends on its pixels alone."""
    rows, columns = (max(1, side // _SIDE) for side in images.shape[2:])
    pixels = images.detach()[:, :, ::rows, ::columns].float().flatten(1)
    bits = pixels.view(torch.int32).long()
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    # Integer sums do not depend on the order, so they are the same on every device.
    return (_mixed(places * _INCREMENT) * bits).sum(1)


def skip_rows(
    branch: Float[Tensor, "n c h w"], keys: Int[Tensor, " n"], block: int, probability: float
) -> Float[Tensor, "n c h w"]:
    """Set some rows to zero and divide the others by their share, to keep the mean. `probability` < 1."""
    # The upper 53 bits, as many as a float64 holds.
    uniform = (_mixed(_mixed(keys) + block) >> 11 & (1 << 53) - 1).double() / 2**53
    kept = (uniform >= probability).to(branch.dtype) / (1 - probability)
    return branch * kept[:, None, None, None]


def _mixed(numbers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """SplitMix64's finaliser: each bit of the result depends on all of the number's."""
    numbers = (numbers ^ _shifted(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * _SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Int[Tensor, " n"], bits: int) -> Int[Tensor, " n"]:
    """Logical shift to the right; torch's own shift repeats the sign."""
    return numbers >> bits & (1 << 64 - bits) - 1


class _Stage(NamedTuple):
    expansion: int
    kernel: int
    stride: int
    channels: int
    layers: int


# Tan and Le 2019, table 1, stages 2 to 8. The paper gives input sizes, so its strides show a row later.
_BASE = (
    _Stage(1, 3, 1, 16, 1),
    _Stage(6, 3, 2, 24, 2),
    _Stage(6, 5, 2, 40, 2),
    _Stage(6, 3, 2, 80, 3),
    _Stage(6, 5, 1, 112, 3),
    _Stage(6, 5, 2, 192, 4),
    _Stage(6, 3, 1, 320, 1),
)
_STEM, _HEAD = 32, 1280

# As in the paper's code, where TensorFlow's momentum is 0.99. torchvision has 1e-5 and 0.1 up to B4.
NORM_EPS, _NORM_MOMENTUM = 1e-3, 0.01


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and at least 90 % of `channels`, as in the paper's code."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def last_map_side(size: int) -> int:
    """Side of the last feature maps for a view of `size` pixels a side."""
    return math.ceil(size / (2 * math.prod(stage.stride for stage in _BASE)))


def count_multiply_adds(width: float, depth: float, size: int) -> int:
    """Multiply-adds of an EfficientNet for an image of `size` pixels a side.

    Takes microseconds. encoders.encoder_cost counts the same number by running the network, which takes a
    quarter of a second.
    """
    channels, side = round_channels(_STEM * width), math.ceil(size / 2)
    total = 3 * 3**2 * channels * side**2
    for stage in _BASE:
        outgoing = round_channels(width * stage.channels)
        for layer in range(math.ceil(depth * stage.layers)):
            wide = channels * stage.expansion
            total += channels * wide * side**2 if stage.expansion != 1 else 0
            side = math.ceil(side / stage.stride) if layer == 0 else side
            per_pixel = stage.kernel**2 * wide + wide * outgoing
            total += per_pixel * side**2 + 2 * wide * _squeezed(channels)
            channels = outgoing
    return total + channels * round_channels(_HEAD * width) * side**2


def _squeezed(channels: int) -> int:
    """Hidden width of a block's squeeze and excitation."""
    return max(1, channels // 4)


class EfficientNet(nn.Module):
    """EfficientNet without a classifier, with torchvision's names of weights; `dim` is the features' width.

    In training, a row skips block i of n with probability i / n times `drop_path`.
    """

    def __init__(self, *, width: float, depth: float, drop_path: float) -> None:
        super().__init__()
        channels = round_channels(_STEM * width)
        self.dim = round_channels(_HEAD * width)
        layers: list[nn.Module] = [Conv2dNormActivation(3, channels, 3, stride=2, activation_layer=nn.SiLU)]
        blocks, number = sum(math.ceil(depth * stage.layers) for stage in _BASE), 0
        for stage in _BASE:
            outgoing, stage_blocks = round_channels(width * stage.channels), []
            for layer in range(math.ceil(depth * stage.layers)):
                stride = stage.stride if layer == 0 else 1
                skip = drop_path * number / blocks
                stage_blocks.append(_Block(channels, outgoing, stage, stride, number, skip))
                channels, number = outgoing, number + 1
            layers.append(nn.Sequential(*stage_blocks))
        layers.append(Conv2dNormActivation(channels, self.dim, 1, activation_layer=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.draws = drop_path > 0
        _initialize(self)

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n dim"]:
        keys = row_keys(images) if self.training and self.draws else None
        stem, *stages, head = self.features
        x = stem(images)
        for stage in stages:
            for block in stage.children():
                x = block(x, keys)
        return self.avgpool(head(x)).flatten(1)


def _initialize(trunk: nn.Module) -> None:
    """Initialise with variance 2 / fan-out of the kernel's own group, as the paper's code and timm do.

    torchvision counts all channels of a depthwise convolution, so its weights start too small by the square
    root of their number.
    """
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = NORM_EPS, _NORM_MOMENTUM


class _Block(nn.Module):
    """MBConv: 1x1 expansion, depthwise convolution, excitation, 1x1 projection; a shortcut for equal shapes.

    Sandler et al. 2018, figure 4d. Excitation, a quarter of the input's channels wide: Hu et al. 2018.
    """

    def __init__(
        self, channels: int, width: int, stage: _Stage, stride: int, number: int, skip: float
    ) -> None:
        super().__init__()
        wide = channels * stage.expansion
        layers: list[nn.Module] = []
        if stage.expansion != 1:
            layers.append(Conv2dNormActivation(channels, wide, 1, activation_layer=nn.SiLU))
        layers += [
            Conv2dNormActivation(
                wide, wide, stage.kernel, stride=stride, groups=wide, activation_layer=nn.SiLU
            ),
            SqueezeExcitation(wide, _squeezed(channels), activation=nn.SiLU),
            Conv2dNormActivation(wide, width, 1, activation_layer=None),
        ]
        self.block = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and channels == width
        self.number, self.skip = number, skip

    def forward(
        self, x: Float[Tensor, "n c h w"], keys: Int[Tensor, " n"] | None
    ) -> Float[Tensor, "n d h2 w2"]:
        out = self.block(x)
        if not self.has_shortcut:
            return out
        if keys is not None and self.skip:
            out = skip_rows(out, keys, self.number, self.skip)
        return out + x
