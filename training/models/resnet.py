"""ResNets and plain nets, ImageNet's and CIFAR's, of any width. He et al. 2015."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_IMAGENET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# From this depth on, the blocks are bottlenecks.
_FIRST_BOTTLENECK_DEPTH = 50

Stem = Literal["imagenet", "cifar"]
Shortcut = Literal["projection", "padding", "none"]


def imagenet_resnet(depth: int, *, width: int, stem: Stem, plain: bool) -> tuple[nn.Module, int]:
    """A network of `depth` layers, counting the missing classifier, and the width of its features.

    Weights are named as in torchvision's ResNet; as there, a bottleneck's 3x3 convolution has the stride.
    `width` multiplies all channels (Chen et al. 2020, table 6), unlike torchvision's wide_resnet50_2.
    """
    block = Bottleneck if depth >= _FIRST_BOTTLENECK_DEPTH else BasicBlock
    shortcut = "none" if plain else "projection"
    trunk = _ImageNetResNet(block, _IMAGENET_BLOCKS[depth], 64 * width, stem, shortcut)
    _initialize(trunk)
    return trunk, 512 * width * block.expansion


def cifar_resnet(depth: int, *, width: int, plain: bool) -> tuple[nn.Module, int]:
    """A network of 6n + 2 layers with 16, 32 and 64 channels times `width`, and the width of its features.

    He et al. 2015, section 4.2.
    """
    blocks, channels, shortcut = (depth - 2) // 6, 16 * width, "none" if plain else "padding"
    trunk = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        *_stage(BasicBlock, channels, channels, blocks, 1, shortcut),
        *_stage(BasicBlock, channels, 2 * channels, blocks, 2, shortcut),
        *_stage(BasicBlock, 2 * channels, 4 * channels, blocks, 2, shortcut),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    _initialize(trunk)
    return trunk, 4 * channels


def _initialize(trunk: nn.Module) -> None:
    """Initialise with variance 2 / fan-out. He et al. 2015, "Delving deep into rectifiers", eq. 14."""
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def zero_last_scales(trunk: nn.Module) -> None:
    """Let each block with a shortcut begin as that shortcut. Goyal et al. 2017, section 5.1."""
    for module in trunk.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.zeros_(last.weight)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, with a shortcut unless it is plain."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(channels, width, stride, shortcut)
        self.plain = shortcut == "none"

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out if self.plain else out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, with a shortcut unless it is plain."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        wide = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.downsample = _downsample(channels, wide, stride, shortcut)
        self.plain = shortcut == "none"

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out if self.plain else out + self.downsample(x))


Block = type[BasicBlock] | type[Bottleneck]


def _downsample(channels: int, width: int, stride: int, shortcut: Shortcut) -> nn.Module:
    """The shortcut's layer, which maps a block's input to the shape of its output."""
    if shortcut == "none" or (stride == 1 and channels == width):
        return nn.Identity()
    if shortcut == "padding":
        return _Padding(stride, width - channels)
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))


class _Padding(nn.Module):
    """Every `stride`-th pixel, with channels of zeros added. He et al. 2015, section 3.3, option A."""

    def __init__(self, stride: int, added_channels: int) -> None:
        super().__init__()
        self.stride, self.added_channels = stride, added_channels

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))


class _ImageNetResNet(nn.Module):
    """A stem, four stages, all but the first of which halve the maps, and the mean of the last maps."""

    def __init__(
        self, block: Block, blocks: tuple[int, ...], channels: int, stem: Stem, shortcut: Shortcut
    ) -> None:
        super().__init__()
        if stem == "cifar":  # Chen et al. 2020, appendix B.9.
            self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        wide = channels * block.expansion
        self.layer1 = _stage(block, channels, channels, blocks[0], 1, shortcut)
        self.layer2 = _stage(block, wide, 2 * channels, blocks[1], 2, shortcut)
        self.layer3 = _stage(block, 2 * wide, 4 * channels, blocks[2], 2, shortcut)
        self.layer4 = _stage(block, 4 * wide, 8 * channels, blocks[3], 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n dim"]:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)


def _stage(
    block: Block, channels: int, width: int, count: int, stride: int, shortcut: Shortcut
) -> nn.Sequential:
    first = block(channels, width, stride, shortcut)
    return nn.Sequential(
        first, *(block(width * block.expansion, width, 1, shortcut) for _ in range(count - 1))
    )
