"""VGG16 for 32x32 color images.

Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015: configuration D,
in the form that is usual for CIFAR (github.com/kuangliu/pytorch-cifar): batch norm after each convolution, and one
linear layer in the place of three.

Dimensions: N batch, K classes.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["vgg16"]

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(classes: int = 10) -> nn.Sequential:
    """Thirteen 3x3 convolutions in five stages, each stage with 2x2 pooling at its end, and a linear head.

    Args:
        classes: K.

    Returns:
        A module from images (N, 3, 32, 32) to logits (N, K). 14,728,266 parameters for ten classes; the convolutions
        keep their biases, as the usual form does.
    """
    network, inputs = nn.Sequential(), 3
    for number, stage in enumerate(_STAGES, start=1):
        layers: list[nn.Module] = []
        for width in stage:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        network.add_module(f"stage{number}", nn.Sequential(*layers, nn.MaxPool2d(2)))
    network.add_module("head", nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(inputs, classes))))
    return network
