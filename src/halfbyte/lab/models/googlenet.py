"""GoogLeNet for 32x32 color images.

Szegedy et al., Going Deeper with Convolutions, CVPR 2015, in the form that is usual for CIFAR
(github.com/kuangliu/pytorch-cifar): a 3x3 stem of 192 channels, batch norm after each convolution, two 3x3 convolutions
in the place of a 5x5 one, no auxiliary heads and no dropout.

Dimensions: N batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["googlenet"]

# Table 1 of the paper: channels of the 1x1 branch, of the 3x3 branch (reduced, out), of the 5x5 branch (reduced, out),
# and after the pooling.
_STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


def googlenet(classes: int = 10) -> nn.Sequential:
    """Stem, nine Inception blocks in three stages with pooling between them, mean over all pixels, linear head.

    Args:
        classes: K.

    Returns:
        A module from images (N, 3, 32, 32) to logits (N, K). 6,166,250 parameters for ten classes.
    """
    network = nn.Sequential(OrderedDict(stem=nn.Sequential(*_convolution(3, 192, 3))))
    inputs = 192
    for number, stage in enumerate(_STAGES, start=1):
        blocks: list[nn.Module] = [] if number == 1 else [nn.MaxPool2d(3, stride=2, padding=1)]
        for widths in stage:
            blocks.append(_Inception(inputs, widths))
            inputs = widths[0] + widths[2] + widths[4] + widths[5]
        network.add_module(f"stage{number}", nn.Sequential(*blocks))
    for name, module in (("mean", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())):
        network.add_module(name, module)
    network.add_module("head", nn.Linear(inputs, classes))
    return network


class _Inception(nn.Module):
    """Four branches side by side, their channels joined."""

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        one, reduced3, three, reduced5, five, pooled = widths
        self.branch1 = nn.Sequential(*_convolution(inputs, one, 1))
        self.branch3 = nn.Sequential(*_convolution(inputs, reduced3, 1), *_convolution(reduced3, three, 3))
        self.branch5 = nn.Sequential(
            *_convolution(inputs, reduced5, 1), *_convolution(reduced5, five, 3), *_convolution(five, five, 3)
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *_convolution(inputs, pooled, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H, W)."""
        return torch.cat([branch(x_NCHW) for branch in self.children()], dim=1)


def _convolution(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, ...]:
    """Convolution, with a bias as the usual form has it, batch norm, ReLU."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()
