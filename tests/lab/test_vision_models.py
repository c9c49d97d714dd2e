"""The networks for pictures: their sizes as published, and what they do to a picture's shape."""

import pytest
import torch
from torch import nn

from halfbyte.convert import convert
from halfbyte.errors import UnknownNameError
from halfbyte.lab.models.alexnet import alexnet
from halfbyte.lab.models.densenet import densenet121
from halfbyte.lab.models.fashion import cnn
from halfbyte.lab.models.googlenet import googlenet
from halfbyte.lab.models.mobilenet import mobilenetv2
from halfbyte.lab.models.vgg import vgg16


def parameters(network):
    return sum(weight.numel() for weight in network.parameters())


# As github.com/kuangliu/pytorch-cifar builds them, but AlexNet: 61,100,840 is torchvision's number for ImageNet, and
# 2,472,266 that of github.com/bearpaw/pytorch-classification. The CNN, by hand, of width 16: convolutions
# 9 (1 16 + 16 16 + 16 32 + 32 32 + 32 64 + 64 64) = 71,568, norms 4 (16 + 32 + 64) = 448, head 64 10 + 10 = 650.
@pytest.mark.parametrize(
    ("build", "count"),
    [
        (vgg16, 14_728_266),
        (googlenet, 6_166_250),
        (densenet121, 6_956_298),
        (mobilenetv2, 2_296_922),
        (alexnet, 2_472_266),
        (lambda: alexnet(1000, stem="imagenet"), 61_100_840),
        (cnn, 71_568 + 448 + 650),
    ],
)
def test_parameter_counts(build, count):
    """Every network has as many parameters as its published form."""
    with torch.device("meta"):
        assert parameters(build()) == count


NETWORKS = [vgg16, googlenet, densenet121, mobilenetv2, alexnet]


@pytest.mark.parametrize("build", NETWORKS)
def test_pictures_become_logits(build):
    """A batch of 32x32 color pictures becomes a row of logits each; the head is the last layer, for any K."""
    network = build(classes=7).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert (type(layers[0]), layers[0].in_channels) == (nn.Conv2d, 3)
    assert (type(layers[-1]), layers[-1].out_features) == (nn.Linear, 7)


# Channels and height after each stage: VGG halves after each of its five, GoogLeNet pools before its second and third,
# DenseNet averages in its three transitions (which come after stages 1 to 3), MobileNetV2 strides in its third, fourth
# and sixth.
@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (vgg16, [(64, 16), (128, 8), (256, 4), (512, 2), (512, 1)]),
        (googlenet, [(480, 32), (832, 16), (1024, 8)]),
        (densenet121, [(256, 32), (512, 16), (1024, 8), (1024, 4)]),
        (mobilenetv2, [(16, 32), (24, 32), (32, 16), (64, 8), (96, 8), (160, 4), (320, 4)]),
    ],
)
def test_stages_have_their_shapes(build, shapes):
    """Every stage has the channels and the resolution of its published form."""
    found = []
    with torch.device("meta"):
        network = build().eval()
        for name, module in network.named_children():
            if name.startswith("stage"):
                module.register_forward_hook(lambda *call: found.append(tuple(call[2].shape[1:3])))
        network(torch.empty(1, 3, 32, 32))
    assert found == shapes


def test_imagenet_form_of_alexnet():
    """AlexNet's other form takes pictures of 224x224 and has three linear layers; a third form does not exist."""
    with torch.device("meta"):
        network = alexnet(1000, stem="imagenet")
        assert network(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        assert network.body(torch.empty(2, 3, 224, 224)).shape == (2, 256, 6, 6)
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == 3
    with pytest.raises(UnknownNameError, match="Did you mean 'cifar'"):
        alexnet(stem="cifr")


def test_dropout_of_alexnet_acts():
    """The share of values that ImageNet's AlexNet drops is the one given."""
    with torch.device("meta"):
        shares = [m.p for m in alexnet(stem="imagenet", dropout=0.3).modules() if isinstance(m, nn.Dropout)]
    assert shares == [0.3, 0.3]


def test_expansion_of_inverted_blocks():
    """MobileNetV2 has a shortcut in every block of stride 1: 14 of 17, 4 of them with a convolution."""
    blocks = [module for module in mobilenetv2().modules() if hasattr(module, "shortcut")]
    kinds = [type(block.shortcut) for block in blocks]
    assert (len(kinds), kinds.count(type(None)), kinds.count(nn.Sequential)) == (17, 3, 4)


@pytest.mark.parametrize("build", [*NETWORKS, cnn])
def test_networks_learn_in_four_bits(build):
    """Under ibm2020 a step reaches every parameter; only first, last and depthwise layers are left as they were."""
    torch.manual_seed(0)
    network = convert(build(), "ibm2020")
    size = (2, 1, 28, 28) if build is cnn else (2, 3, 32, 32)
    network(torch.rand(size)).logsumexp(dim=1).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())
    plain = [m for m in network.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    depthwise = [m for m in plain if getattr(m, "groups", 1) > 1]
    assert len(plain) - len(depthwise) == 2
    assert len(depthwise) == (17 if build is mobilenetv2 else 0)
