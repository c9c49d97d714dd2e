"""Two small networks for 8x8 gray images of digits: one of convolutions, one of matrices.

Recipes keep a network's first and last layer in high precision. Both networks are therefore deep enough that layers
remain between those two: three convolutions in the CNN, one matrix in the MLP.

Dimensions: N batch, C channels, H and W height and width (8 and 8), K classes (10).
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["cnn", "mlp"]


def cnn(width: int = 32) -> nn.Sequential:
    """Four 3x3 convolutions, each with batch norm and ReLU, and a linear head.

    Args:
        width: channels of the two middle blocks; the first has half as many, the last twice as many.

    Returns:
        A module from images (N, 1, 8, 8) to logits (N, 10). About 33,000 parameters at the default width.
    """
    return nn.Sequential(
        OrderedDict(
            stem=_block(1, width // 2),
            body1=_block(width // 2, width),
            pool=nn.MaxPool2d(2),
            body2=_block(width, width),
            body3=_block(width, 2 * width),
            mean=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(2 * width, 10),
        )
    )


def mlp(width: int = 256) -> nn.Sequential:
    """Three linear layers with ReLU between them.

    Args:
        width: units of the two hidden layers.

    Returns:
        A module from images (N, 1, 8, 8) to logits (N, 10). About 85,000 parameters at the default width.
    """
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            stem=nn.Linear(64, width),
            relu1=nn.ReLU(),
            body=nn.Linear(width, width),
            relu2=nn.ReLU(),
            head=nn.Linear(width, 10),
        )
    )


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Convolution without bias (the norm after it has one), batch norm, ReLU: (N, C, H, W) -> (N, C', H, W)."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
            norm=nn.BatchNorm2d(channels_out),
            relu=nn.ReLU(),
        )
    )
