"""A small network for 28x28 gray images of clothes.

Dimensions: N batch, K classes.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["cnn"]


def cnn(width: int = 16, classes: int = 10) -> nn.Sequential:
    """Six 3x3 convolutions with batch norm, two at each of three resolutions, mean over all pixels, linear head.

    Args:
        width: channels of the first two convolutions; each resolution has twice as many as the one before.
        classes: K.

    Returns:
        A module from images (N, 1, 28, 28) to logits (N, K). 72,666 parameters at the default width.
    """
    network, inputs = nn.Sequential(), 1
    for number in range(3):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
        for _ in range(2):
            outputs = width * 2**number
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        network.add_module(f"stage{number + 1}", nn.Sequential(*layers))
    top = OrderedDict(mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(inputs, classes))
    network.add_module("head", nn.Sequential(top))
    return network
