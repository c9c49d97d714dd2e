"""DenseNet-121 for 32x32 color images.

Huang et al., Densely Connected Convolutional Networks, CVPR 2017: Table 1, in the form that is usual for CIFAR
(github.com/kuangliu/pytorch-cifar): a 3x3 stem of stride 1 in the place of the 7x7 one and the pooling after it.

Dimensions: N batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

__all__ = ["densenet121"]

_BLOCKS = (6, 12, 24, 16)


def densenet121(classes: int = 10, *, growth: int = 32) -> nn.Sequential:
    """Stem, four stages of 6, 12, 24 and 16 dense layers with halving transitions between them, and a linear head.

    Args:
        classes: K.
        growth: channels that each dense layer adds.

    Returns:
        A module from images (N, 3, 32, 32) to logits (N, K). 6,956,298 parameters for ten classes.
    """
    width = 2 * growth
    network = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, width, 3, padding=1, bias=False)))
    for number, layers in enumerate(_BLOCKS, start=1):
        stage = nn.Sequential()
        for _ in range(layers):
            stage.append(_Dense(width, growth))
            width += growth
        network.add_module(f"stage{number}", stage)
        if number < len(_BLOCKS):
            transition = nn.Sequential(*_convolution(width, width // 2, 1), nn.AvgPool2d(2))
            network.add_module(f"transition{number}", transition)
            width //= 2
    mean = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.add_module("mean", mean)
    network.add_module("head", nn.Linear(width, classes))
    return network


class _Dense(nn.Module):
    """A bottleneck of four times the growth, then a 3x3 convolution; what comes out lies before what came in."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(inputs, 4 * growth, 1), *_convolution(4 * growth, growth, 3))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + growth, H, W)."""
        return torch.cat([self.body(x_NCHW), x_NCHW], dim=1)


def _convolution(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, ...]:
    """Batch norm, ReLU, convolution: in this order, as the paper has it."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.BatchNorm2d(inputs), nn.ReLU(), convolution
