"""MobileNetV2 for 32x32 color images.

Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018: Table 2, in the form that is usual
for CIFAR (github.com/kuangliu/pytorch-cifar): stride 1 in the stem and in the second stage, ReLU in the place of ReLU6,
an expansion of 1 keeps its convolution, and a block of stride 1 that changes its channels has a shortcut, too, a 1x1
convolution.

Dimensions: N batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

__all__ = ["mobilenetv2"]

# Of each stage: expansion, channels, blocks, stride of its first block.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenetv2(classes: int = 10) -> nn.Sequential:
    """Stem, 17 inverted residual blocks, a 1x1 convolution to 1,280 channels, mean over all pixels, linear head.

    Args:
        classes: K.

    Returns:
        A module from images (N, 3, 32, 32) to logits (N, K). 2,296,922 parameters for ten classes.
    """
    network = nn.Sequential(OrderedDict(stem=nn.Sequential(*_convolution(3, 32, 3), nn.ReLU())))
    inputs = 32
    for number, (expansion, width, blocks, stride) in enumerate(_STAGES, start=1):
        stage = nn.Sequential()
        for place in range(blocks):
            stage.append(_Inverted(inputs, width, expansion, 1 if place else stride))
            inputs = width
        network.add_module(f"stage{number}", stage)
    top = nn.Sequential(*_convolution(inputs, 1280, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.add_module("top", top)
    network.add_module("head", nn.Linear(1280, classes))
    return network


class _Inverted(nn.Module):
    """Widened by a 1x1 convolution, a depthwise 3x3 one, narrowed by another 1x1 one without ReLU after it."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inputs
        self.body = nn.Sequential(
            *_convolution(inputs, inner, 1),
            nn.ReLU(),
            *_convolution(inner, inner, 3, stride, groups=inner),
            nn.ReLU(),
            *_convolution(inner, outputs, 1),
        )
        self.shortcut: nn.Module | None = None
        if stride == 1:
            changes = inputs != outputs
            self.shortcut = nn.Sequential(*_convolution(inputs, outputs, 1)) if changes else nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        result_NCHW: Tensor = self.body(x_NCHW)
        return result_NCHW if self.shortcut is None else result_NCHW + self.shortcut(x_NCHW)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    """Convolution without bias (the norm after it has one) and batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(outputs)
