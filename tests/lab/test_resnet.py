"""The residual networks: their sizes are the published ones, and their parts are where the paper has them."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.lab.models.resnet import ResNet, resnet18, resnet20, resnet32


@pytest.mark.parametrize(("build", "parameters"), [(resnet18, 11_173_962), (resnet20, 269_722), (resnet32, 464_154)])
def test_parameter_counts(build, parameters):
    """Each network has as many parameters as its paper says.

    He et al. 2016, Table 6, print 0.27 M and 0.46 M. By hand, ResNet-20: convolutions have 9 * (3 * 16 + 6 * 16 * 16
    + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64) = 267,696, the norms two for each channel, 2 * (7 * 16 + 6 * 32 +
    6 * 64) = 1,376, the head 64 * 10 + 10 = 650. (Option B would add 2,752.) ResNet-32 has two blocks more a stage:
    9 * 4 * (16 * 16 + 32 * 32 + 64 * 64) + 2 * 4 * (16 + 32 + 64) = 194,432 more. ResNet-18 for CIFAR is commonly given
    as 11,173,962.
    """
    assert sum(p.numel() for p in build().parameters()) == parameters


def test_shapes_of_the_stages():
    """Each stage but the first halves the image, and the logits have one number a class."""
    network, x = resnet20(classes=7), torch.rand(2, 3, 32, 32)
    shapes = []
    for name, part in network.named_children():
        x = part(x)
        if name.startswith("stage"):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert x.shape == (2, 7)


def test_option_a_copies_every_second_pixel():
    """A shortcut without parameters takes every second pixel and puts as many zero channels before as after."""
    block = resnet20().stage2[0]
    x = torch.rand(1, 16, 4, 4)
    y = block.shortcut(x)
    assert y.shape == (1, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("sizes", [((), (), 10), ((16, 0), (2, 2), 10), ((16,), (0,), 10), ((16,), (2,), 0)])
def test_impossible_sizes_are_errors(sizes):
    """A network without a stage, or with a size below 1, is refused."""
    widths, blocks, classes = sizes
    with pytest.raises(HalfbyteError, match="every size is 1 or more"):
        ResNet(widths, blocks, projected=True, classes=classes)
