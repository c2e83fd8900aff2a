"""The convolutions of well-known networks, computed from the definitions of their architectures.

Each function walks an image through one network, batch left out, and records every convolution on
the way; a shape that does not fit where it is used is an error, so the layers chain. Fully
connected layers are left out, but those applied at every pixel are 1x1 convolutions and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gpuconv.problem import output_extent

Shape = tuple[int, int, int]  # C, H, W


@dataclass(frozen=True)
class Layer:
    """One convolution of a network. Filters are square, and so are strides and dilations.

    A transposed one spreads every pixel over a filter's extents, `stride` apart.
    """

    name: str
    channels: int  # C
    height: int  # H
    width: int  # W
    filters: int  # K
    filter: int  # R = S
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    transposed: bool = False

    @property
    def output(self) -> Shape:
        """K, P, Q."""
        if self.transposed:
            reach = self.dilation * (self.filter - 1) + 1 - 2 * self.padding
            height, width = ((n - 1) * self.stride + reach for n in (self.height, self.width))
            return self.filters, height, width
        height, width = (
            output_extent(n, self.filter, self.stride, self.padding, self.padding, self.dilation)
            for n in (self.height, self.width)
        )
        return self.filters, height, width

    @property
    def macs(self) -> int:
        """Products of one image."""
        if self.transposed:
            pixels = self.channels * self.height * self.width
            return pixels * self.filters // self.groups * self.filter**2
        return math.prod(self.output) * self.channels // self.groups * self.filter**2


class Walk:
    """An image's way through a network: what the steps make of its shape, and what they cost."""

    def __init__(self, channels: int, size: int) -> None:
        self.shape: Shape = (channels, size, size)
        self.layers: list[Layer] = []

    def conv(
        self,
        name: str,
        filters: int,
        filter: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        at: Shape | None = None,
    ) -> Shape:
        """A convolution of the current image (or of a branch's, `at`); "same" where no padding."""
        shape = at or self.shape
        if padding is None:
            padding = dilation * (filter - 1) // 2
        layer = Layer(name, *shape, filters, filter, stride, padding, dilation, groups)
        if shape[0] % groups or filters % groups:
            raise ValueError(f"{name}: groups={groups} do not divide {shape[0]} and {filters}")
        if min(layer.output) < 1:
            raise ValueError(f"{name}: {shape} is too small")
        self.layers.append(layer)
        if at is None:
            self.shape = layer.output
        return layer.output

    def depthwise(self, name: str, filter: int, stride: int = 1) -> Shape:
        """One filter per channel."""
        channels = self.shape[0]
        return self.conv(name, channels, filter, stride, groups=channels)

    def transposed(
        self, name: str, filters: int, filter: int, stride: int, padding: int = 0
    ) -> Shape:
        """A transposed convolution of the current image: `stride` times its extents, about."""
        layer = Layer(name, *self.shape, filters, filter, stride, padding, transposed=True)
        self.layers.append(layer)
        self.shape = layer.output
        return layer.output

    def pool(self, size: int, stride: int, padding: int = 0) -> Shape:
        channels, *extents = self.shape
        height, width = (output_extent(n, size, stride, padding, padding, 1) for n in extents)
        self.shape = (channels, height, width)
        return self.shape

    def add(self, branch: Shape) -> None:
        """The sum of the image and a branch."""
        if branch != self.shape:
            raise ValueError(f"{branch} cannot be added to {self.shape}")

    def concatenate(self, branch: Shape) -> None:
        """Another image's channels; it is cropped to the same extents where it is larger."""
        if branch[1] < self.shape[1] or branch[2] < self.shape[2]:
            raise ValueError(f"{branch} is too small beside {self.shape}")
        self.shape = (self.shape[0] + branch[0], *self.shape[1:])

    def upsample(self) -> None:
        """Twice the extents, interpolated."""
        channels, height, width = self.shape
        self.shape = (channels, 2 * height, 2 * width)


def vgg16(size: int = 224) -> list[Layer]:
    walk = Walk(3, size)
    for block, (channels, depth) in enumerate(
        ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1
    ):
        for i in range(1, depth + 1):
            walk.conv(f"conv{block}_{i}", channels, 3)
        walk.pool(2, 2)
    return walk.layers


def resnet50(size: int = 224, *, groups: int = 1, width_per_group: int = 64) -> list[Layer]:
    """The stride is in the 3x3 filter, as in every implementation since "v1.5"."""
    walk = Walk(3, size)
    walk.conv("conv1", 64, 7, 2)
    walk.pool(3, 2, 1)
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        planes = 64 << (stage - 1)
        width = planes * width_per_group // 64 * groups
        for block in range(depth):
            stride = 2 if stage > 1 and block == 0 else 1
            name = f"layer{stage}.{block}"
            came = walk.shape
            walk.conv(f"{name}.conv1", width, 1)
            walk.conv(f"{name}.conv2", width, 3, stride, groups=groups)
            walk.conv(f"{name}.conv3", 4 * planes, 1)
            if block == 0:
                came = walk.conv(f"{name}.downsample", 4 * planes, 1, stride, at=came)
            walk.add(came)
    return walk.layers


def resnext50(size: int = 224) -> list[Layer]:
    """32 groups of 4 channels."""
    return resnet50(size, groups=32, width_per_group=4)


def mobilenet_v2(size: int = 224) -> list[Layer]:
    walk = Walk(3, size)
    walk.conv("stem", 32, 3, 2)
    block = 0
    for expand, channels, depth, first_stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for i in range(depth):
            block += 1
            came = walk.shape
            if expand > 1:
                walk.conv(f"block{block}.expand", expand * came[0], 1)
            walk.depthwise(f"block{block}.depthwise", 3, first_stride if i == 0 else 1)
            walk.conv(f"block{block}.project", channels, 1)
            if i:
                walk.add(came)
    walk.conv("head", 1280, 1)
    return walk.layers


def efficientnet_b0(size: int = 224) -> list[Layer]:
    """The two layers of squeeze-and-excitation are convolutions of a 1x1 image."""
    walk = Walk(3, size)
    walk.conv("stem", 32, 3, 2)
    block = 0
    for expand, filter, channels, depth, first_stride in (
        (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2),
        (6, 5, 112, 3, 1), (6, 5, 192, 4, 2), (6, 3, 320, 1, 1),
    ):  # fmt: skip
        for i in range(depth):
            block += 1
            came = walk.shape
            if expand > 1:
                walk.conv(f"block{block}.expand", expand * came[0], 1)
            walk.depthwise(f"block{block}.depthwise", filter, first_stride if i == 0 else 1)
            wide = walk.shape[0]
            squeezed = walk.conv(f"block{block}.squeeze", max(came[0] // 4, 1), 1, at=(wide, 1, 1))
            walk.conv(f"block{block}.excite", wide, 1, at=squeezed)
            walk.conv(f"block{block}.project", channels, 1)
            if i:
                walk.add(came)
    walk.conv("head", 1280, 1)
    return walk.layers


def convnext_t(size: int = 224) -> list[Layer]:
    walk = Walk(3, size)
    for stage, (channels, depth) in enumerate(((96, 3), (192, 3), (384, 9), (768, 3)), start=1):
        if stage == 1:
            walk.conv("stem", channels, 4, 4, padding=0)
        else:
            walk.conv(f"downsample{stage - 1}", channels, 2, 2, padding=0)
        for i in range(depth):
            came = walk.shape
            walk.depthwise(f"stage{stage}.{i}.depthwise", 7)
            walk.conv(f"stage{stage}.{i}.expand", 4 * channels, 1)
            walk.conv(f"stage{stage}.{i}.project", channels, 1)
            walk.add(came)
    return walk.layers


def replknet31b(size: int = 224) -> list[Layer]:
    """As it is deployed: the parallel 5x5 filters merged into the large ones."""
    widths, large = (128, 256, 512, 1024), (31, 29, 27, 13)
    walk = Walk(3, size)
    walk.conv("stem.0", widths[0], 3, 2)
    walk.depthwise("stem.1", 3)
    walk.conv("stem.2", widths[0], 1)
    walk.depthwise("stem.3", 3, 2)
    for stage, (channels, filter, depth) in enumerate(
        zip(widths, large, (2, 2, 18, 2), strict=True), start=1
    ):
        for i in range(depth):
            name, came = f"stage{stage}.{i}", walk.shape
            walk.conv(f"{name}.pw1", channels, 1)
            walk.depthwise(f"{name}.large", filter)
            walk.conv(f"{name}.pw2", channels, 1)
            walk.add(came)
            walk.conv(f"{name}.ffn1", 4 * channels, 1)
            walk.conv(f"{name}.ffn2", channels, 1)
            walk.add(came)
        if stage < 4:
            walk.conv(f"transition{stage}.0", widths[stage], 1)
            walk.depthwise(f"transition{stage}.1", 3, 2)
    return walk.layers


def unet(size: int = 572) -> list[Layer]:
    """Unpadded, so that every step shrinks; the up-convolutions are transposed ones."""
    walk = Walk(1, size)
    skips: list[Shape] = []
    for level in range(5):
        channels = 64 << level
        walk.conv(f"down{level}.0", channels, 3, padding=0)
        walk.conv(f"down{level}.1", channels, 3, padding=0)
        if level < 4:
            skips.append(walk.shape)
            walk.pool(2, 2)
    for level in reversed(range(4)):
        channels = 64 << level
        walk.transposed(f"up{level}.upconv", channels, 2, 2)
        walk.concatenate(skips[level])
        walk.conv(f"up{level}.0", channels, 3, padding=0)
        walk.conv(f"up{level}.1", channels, 3, padding=0)
    walk.conv("head", 2, 1)
    return walk.layers


def sdxl_block(size: int = 128) -> list[Layer]:
    """The second block of each half, the mirror halves of the middle of the network.

    `size` is the latent image's: 128 for pictures of 1024. The attention between is no convolution.
    """
    walk = Walk(320, size)
    walk.conv("down0.downsample", 320, 3, 2)
    skips = [walk.shape]

    def resnet(name: str, channels: int) -> None:
        came = walk.shape
        walk.conv(f"{name}.conv1", channels, 3)
        walk.conv(f"{name}.conv2", channels, 3)
        if came[0] != channels:
            came = walk.conv(f"{name}.shortcut", channels, 1, at=came)
        walk.add(came)

    for i in range(2):
        resnet(f"down1.{i}", 640)
        skips.append(walk.shape)
    # Through the third level and back: 1280 channels at half the extents, then up again.
    walk.conv("down1.downsample", 640, 3, 2)
    walk.shape = (1280, *walk.shape[1:])
    walk.upsample()
    walk.conv("up0.upsample", 1280, 3)
    for i in range(3):
        walk.concatenate(skips[2 - i])
        resnet(f"up1.{i}", 640)
    walk.upsample()
    walk.conv("up1.upsample", 640, 3)
    return walk.layers


def deeplab_aspp(size: int = 513) -> list[Layer]:
    """Atrous spatial pyramid pooling on ResNet's last features, at output strides 16 and 8."""
    layers: list[Layer] = []
    for output_stride, rates in ((16, (6, 12, 18)), (8, (12, 24, 36))):
        extent = (size - 1) // output_stride + 1
        walk, name = Walk(2048, extent), f"os{output_stride}"
        features = walk.shape
        branches = [walk.conv(f"{name}.1x1", 256, 1, at=features)]
        branches += [
            walk.conv(f"{name}.rate{rate}", 256, 3, dilation=rate, at=features) for rate in rates
        ]
        pooled = walk.conv(f"{name}.pooled", 256, 1, at=(2048, 1, 1))
        walk.shape = branches[0]
        for branch in branches[1:]:
            walk.concatenate(branch)
        walk.concatenate((pooled[0], extent, extent))
        walk.conv(f"{name}.project", 256, 1)
        layers += walk.layers
    return layers


def dcgan(width: int = 64) -> list[Layer]:
    """A generator of 64x64 pictures, from 100 random numbers; `width` is that of the last layer."""
    walk = Walk(100, 1)
    walk.transposed("conv1", 8 * width, 4, 1)
    for i, channels in enumerate((4 * width, 2 * width, width, 3), start=2):
        walk.transposed(f"conv{i}", channels, 4, 2, 1)
    return walk.layers


NETWORKS: dict[str, tuple[str, str, Callable[[], list[Layer]]]] = {
    # name: (title, source, layers)
    "resnet50": (
        "ResNet-50, 224x224",
        "He et al., Deep Residual Learning (arXiv 1512.03385), table 1; stride as in torchvision",
        resnet50,
    ),
    "vgg16": (
        "VGG-16, 224x224",
        "Simonyan, Zisserman (arXiv 1409.1556), table 1, configuration D",
        vgg16,
    ),
    "mobilenetv2": (
        "MobileNetV2, 224x224",
        "Sandler et al. (arXiv 1801.04381), table 2",
        mobilenet_v2,
    ),
    "efficientnet_b0": (
        "EfficientNet-B0, 224x224",
        "Tan, Le (arXiv 1905.11946), table 1",
        efficientnet_b0,
    ),
    "convnext_t": (
        "ConvNeXt-T, 224x224",
        "Liu et al., A ConvNet for the 2020s (arXiv 2201.03545), table 9",
        convnext_t,
    ),
    "replknet31b": (
        "RepLKNet-31B, 224x224",
        "Ding et al., Scaling Up Your Kernels to 31x31 (arXiv 2203.06717), section 4.1",
        replknet31b,
    ),
    "resnext50": (
        "ResNeXt-50 32x4d, 224x224",
        "Xie et al. (arXiv 1611.05431), table 1",
        resnext50,
    ),
    "unet": (
        "U-Net, 572x572",
        "Ronneberger et al. (arXiv 1505.04597), figure 1",
        unet,
    ),
    "sdxl": (
        "SDXL U-Net, second blocks, 1024x1024",
        "Podell et al. (arXiv 2307.01952), section 2.1; unet/config.json of the base model",
        sdxl_block,
    ),
    "aspp": (
        "DeepLabV3 ASPP, 513x513",
        "Chen et al., Rethinking Atrous Convolution (arXiv 1706.05587), section 3.3",
        deeplab_aspp,
    ),
    "dcgan": (
        "DCGAN generator, 64x64",
        "Radford et al. (arXiv 1511.06434), section 3; the filters and widths of PyTorch's "
        "examples, dcgan/main.py",
        dcgan,
    ),
}
