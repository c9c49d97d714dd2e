"""The residual networks of bottleneck blocks, and the stem of ImageNet."""

import pytest
import torch
from torch import nn

from halfbyte.errors import HalfbyteError, UnknownNameError
from halfbyte.lab.models.resnet import ResNet, resnet18, resnet50, resnet101


# For CIFAR as github.com/kuangliu/pytorch-cifar builds them, for ImageNet as torchvision does.
@pytest.mark.parametrize(
    ("build", "cifar", "imagenet"),
    [
        (resnet18, 11_173_962, 11_689_512),
        (resnet50, 23_520_842, 25_557_032),
        (resnet101, 42_512_970, 44_549_160),
    ],
)
def test_parameter_counts(build, cifar, imagenet):
    """Each network has as many parameters as its published form, with either stem."""
    with torch.device("meta"):
        found = [sum(w.numel() for w in network.parameters()) for network in (build(), build(1000, stem="imagenet"))]
    assert found == [cifar, imagenet]


@pytest.mark.parametrize(
    ("stem", "size", "heights"), [("cifar", 32, [32, 32, 16, 8, 4]), ("imagenet", 224, [56, 56, 28, 14, 7])]
)
def test_shapes_of_the_stages(stem, size, heights):
    """Bottlenecks give 256 to 2,048 channels; a 3x3 stem keeps the image, that of ImageNet quarters it."""
    shapes = []
    with torch.device("meta"):
        network = resnet50(7, stem=stem).eval()
        for part in list(network.children())[:5]:
            part.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[1:3])))
        assert network(torch.empty(2, 3, size, size)).shape == (2, 7)
    assert shapes == list(zip([64, 256, 512, 1024, 2048], heights, strict=True))


def test_a_bottleneck_by_hand():
    """A block is 1x1, 3x3 and 1x1, a norm after each, ReLU after the first two and after the sum with the shortcut."""
    torch.manual_seed(0)
    block = ResNet((8, 16), (1, 1), projected=True, bottleneck=True).stage2[0].eval()
    x, conv = torch.rand(2, 8, 6, 6), nn.functional.conv2d
    scale = 1 / (1 + 1e-5) ** 0.5  # What a fresh norm does in evaluation mode.
    h = (conv(x, block.conv1.weight) * scale).relu()
    h = (conv(h, block.conv2.weight, stride=2, padding=1) * scale).relu()
    h = conv(h, block.conv3.weight) * scale
    expected = (h + conv(x, block.shortcut[0].weight, stride=2) * scale).relu()
    torch.testing.assert_close(block(x), expected)
    assert (block.conv1.out_channels, block.conv2.out_channels, block.conv3.out_channels) == (4, 4, 16)


@pytest.mark.parametrize(
    "sizes", [((16, 32), (2,), False, 10), ((16,), (0,), False, 10), ((3,), (1,), True, 10), ((), (), True, 10)]
)
def test_impossible_sizes_are_errors(sizes):
    """A stage without a number of blocks, or a bottleneck too narrow to be a quarter of, is refused."""
    widths, blocks, bottleneck, classes = sizes
    with pytest.raises(HalfbyteError, match="one stage or more with blocks for each"):
        ResNet(widths, blocks, projected=True, bottleneck=bottleneck, classes=classes)


def test_unknown_stems_suggest():
    """A misspelt stem is an error that names the right one."""
    with pytest.raises(UnknownNameError, match="Did you mean 'imagenet'"):
        resnet18(stem="imagnet")
