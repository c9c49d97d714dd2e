"""AlexNet for 32x32 color images, and for those of ImageNet.

Krizhevsky, One Weird Trick for Parallelizing Convolutional Neural Networks (arXiv 1404.5997, 2014): five convolutions
of 64, 192, 384, 256 and 256 channels. For ImageNet it is the form of torchvision, with three linear layers; for CIFAR
that of github.com/bearpaw/pytorch-classification, with one.

Dimensions: N batch, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from ...errors import UnknownNameError

__all__ = ["alexnet"]


def alexnet(classes: int = 10, *, stem: Literal["cifar", "imagenet"] = "cifar", dropout: float = 0.5) -> nn.Sequential:
    """Five convolutions without batch norm, pooling after the first, the second and the last, and a linear head.

    Args:
        classes: K.
        stem: for which images: ``"cifar"`` takes (N, 3, 32, 32), ``"imagenet"`` (N, 3, H, W) from 63x63 pixels on,
            224x224 as published.
        dropout: share of the values that are dropped before each of the first two linear layers of ``"imagenet"``.

    Returns:
        A module from images to logits (N, K). 2,472,266 parameters for CIFAR and ten classes, 61,100,840 for ImageNet
        and a thousand.

    Raises:
        UnknownNameError: if there is no such stem.
    """
    if stem not in ("cifar", "imagenet"):
        raise UnknownNameError("stem", stem, ("cifar", "imagenet"))
    window, padding = (2, 5) if stem == "cifar" else (3, 2)
    body = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(window, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(window, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(window, stride=2),
    )
    if stem == "cifar":
        head = nn.Sequential(nn.Flatten(), nn.Linear(256, classes))
    else:
        head = nn.Sequential(
            nn.AdaptiveAvgPool2d(6),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, classes),
        )
    return nn.Sequential(OrderedDict(body=body, head=head))
