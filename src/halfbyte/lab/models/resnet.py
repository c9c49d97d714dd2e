"""Residual networks for 32x32 color images, ResNet-20 and 32, and for larger ones, ResNet-18, 50 and 101.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016. ResNet-20 and 32 are its networks for CIFAR-10
(section 4.2): three stages of 16, 32 and 64 channels, shortcuts without parameters (option A). ResNet-18, 50 and 101
are its networks for ImageNet (Table 1), by default in the form that is usual for CIFAR
(github.com/kuangliu/pytorch-cifar): a 3x3 convolution of stride 1 in the place of the 7x7 one and the pooling after it.
Where a bottleneck block halves the image, its 3x3 convolution does, as is usual now ("v1.5"), unless the paper's own
form ("v1", its first convolution) is asked for.

Dimensions: N batch, C channels, H and W height and width (32 and 32), K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import HalfbyteError, UnknownNameError

__all__ = ["ResNet", "resnet18", "resnet20", "resnet32", "resnet50", "resnet101"]

Stem = Literal["cifar", "imagenet"]
Halving = Literal["conv1", "conv2"]


class _Pad(nn.Module):
    """Option A: every second pixel where the stride is 2, and zeros for the channels that are missing."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + extra, H / stride, W / stride); half of the new channels lie before the old ones."""
        before = self.extra // 2
        return F.pad(x_NCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around both; ReLU after the first and after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, projected: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut = _shortcut(inputs, outputs, stride, projected=projected)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        h_NCHW = self.relu1(self.norm1(self.conv1(x_NCHW)))
        h_NCHW = self.norm2(self.conv2(h_NCHW))
        result_NCHW: Tensor = self.relu2(h_NCHW + self.shortcut(x_NCHW))
        return result_NCHW


class _Bottleneck(nn.Module):
    """Narrowed to a quarter by a 1x1 convolution, a 3x3 one, widened by another 1x1 one, and a shortcut around all."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, projected: bool, halving: Halving = "conv2") -> None:
        super().__init__()
        inner = outputs // 4
        first, second = (stride, 1) if halving == "conv1" else (1, stride)
        self.conv1 = nn.Conv2d(inputs, inner, 1, first, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, second, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.relu3 = nn.ReLU()
        self.shortcut = _shortcut(inputs, outputs, stride, projected=projected)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        h_NCHW = self.relu1(self.norm1(self.conv1(x_NCHW)))
        h_NCHW = self.relu2(self.norm2(self.conv2(h_NCHW)))
        h_NCHW = self.norm3(self.conv3(h_NCHW))
        result_NCHW: Tensor = self.relu3(h_NCHW + self.shortcut(x_NCHW))
        return result_NCHW


def _shortcut(inputs: int, outputs: int, stride: int, *, projected: bool) -> nn.Module:
    """Nothing where the shape stays; else option B, or option A."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if not projected:
        return _Pad(outputs - inputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Sequential):
    """A stem, stages of residual blocks, the mean over all pixels and a linear head."""

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        *,
        projected: bool,
        bottleneck: bool = False,
        classes: int = 10,
        stem: Stem = "cifar",
        halving: Halving = "conv2",
    ) -> None:
        """Fresh weights from torch's global generator, convolutions as in He et al., ICCV 2015 (fan out).

        Args:
            widths: channels that each stage gives; every stage but the first halves height and width.
            blocks: residual blocks of each stage.
            projected: whether a shortcut that changes shape is a 1x1 convolution with batch norm (option B); else it
                has no parameters (option A).
            bottleneck: whether a block is a 3x3 convolution between two of 1x1, of a quarter of its channels.
            classes: K.
            stem: ``"cifar"``, a 3x3 convolution, or ``"imagenet"``, a 7x7 one of stride 2 and pooling that halves.
            halving: which convolution of a bottleneck has the stride of 2; of other blocks the first always has.

        Raises:
            HalfbyteError: if there is no stage, a stage has no number of blocks, or a size is below 1 (4 for the widths
                of bottlenecks).
            UnknownNameError: if there is no such stem or no such convolution.
        """
        narrowing = 4 if bottleneck else 1
        if not widths or len(widths) != len(blocks) or min(*blocks, classes, min(widths) // narrowing) < 1:
            raise HalfbyteError(
                f"ResNet(widths={tuple(widths)}, blocks={tuple(blocks)}, classes={classes}) was asked for; it takes "
                f"one stage or more with blocks for each, every size is 1 or more, and each width {narrowing} or more."
            )
        if stem not in ("cifar", "imagenet"):
            raise UnknownNameError("stem", stem, ("cifar", "imagenet"))
        if halving not in ("conv1", "conv2"):
            raise UnknownNameError("halving convolution", halving, ("conv1", "conv2"))
        if halving == "conv1" and not bottleneck:
            raise HalfbyteError(
                "halving='conv1' was asked for without bottlenecks, where it says nothing. Leave it out."
            )
        super().__init__()
        inputs = widths[0] // narrowing
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        convolution = nn.Conv2d(3, inputs, kernel, stride, kernel // 2, bias=False)
        self.stem = nn.Sequential(convolution, nn.BatchNorm2d(inputs), nn.ReLU())
        if stem == "imagenet":
            self.stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        block = partial(_Bottleneck, halving=halving) if bottleneck else _Block
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = nn.Sequential()
            for place in range(count):
                stage.append(block(inputs, width, 2 if number and not place else 1, projected=projected))
                inputs = width
            self.add_module(f"stage{number + 1}", stage)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet18(classes: int = 10, *, stem: Stem = "cifar") -> ResNet:
    """Stages of 64, 128, 256 and 512 channels, two blocks each, projected shortcuts.

    Returns:
        A module from images (N, 3, 32, 32), or any from 32x32 up with the stem of ImageNet, to logits (N, K).
        11,173,962 parameters for ten classes; 11,689,512 for ImageNet's thousand and its stem.
    """
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2), projected=True, classes=classes, stem=stem)


def resnet20(classes: int = 10) -> ResNet:
    """The paper's network of n = 3: stages of 16, 32 and 64 channels, three blocks each.

    Returns:
        A module from images (N, 3, 32, 32) to logits (N, K). 269,722 parameters for ten classes, the paper's 0.27 M.
    """
    return ResNet((16, 32, 64), (3, 3, 3), projected=False, classes=classes)


def resnet32(classes: int = 10) -> ResNet:
    """The paper's network of n = 5: stages of 16, 32 and 64 channels, five blocks each.

    Returns:
        A module from images (N, 3, 32, 32) to logits (N, K). 464,154 parameters for ten classes, the paper's 0.46 M.
    """
    return ResNet((16, 32, 64), (5, 5, 5), projected=False, classes=classes)


def resnet50(classes: int = 10, *, stem: Stem = "cifar", halving: Halving = "conv2") -> ResNet:
    """Stages of 256, 512, 1,024 and 2,048 channels; 3, 4, 6 and 3 bottleneck blocks.

    Args:
        classes: K.
        stem: see `ResNet`.
        halving: see `ResNet`.

    Returns:
        As for `resnet18`. 23,520,842 parameters for ten classes; 25,557,032 for ImageNet's thousand and its stem.
    """
    return _deep((3, 4, 6, 3), classes, stem, halving)


def resnet101(classes: int = 10, *, stem: Stem = "cifar") -> ResNet:
    """Stages of 256, 512, 1,024 and 2,048 channels; 3, 4, 23 and 3 bottleneck blocks.

    Returns:
        As for `resnet18`. 42,512,970 parameters for ten classes; 44,549,160 for ImageNet's thousand and its stem.
    """
    return _deep((3, 4, 23, 3), classes, stem)


def _deep(blocks: Sequence[int], classes: int, stem: Stem, halving: Halving = "conv2") -> ResNet:
    """A network of bottleneck blocks."""
    widths = (256, 512, 1024, 2048)
    return ResNet(widths, blocks, projected=True, bottleneck=True, classes=classes, stem=stem, halving=halving)
