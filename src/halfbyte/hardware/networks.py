"""Networks whose training step `halfbyte hw` can model by name: the paper's, and the one of each task.

A trace needs shapes and no data, so none is read here: sizes that a task takes from its data (words in a vocabulary,
frames in a sentence) are written down, with the usual ones of that data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..errors import HalfbyteError, UnknownNameError
from ..lab.models import (
    alexnet,
    densenet,
    digits,
    fashion,
    googlenet,
    language,
    mobilenet,
    resnet,
    sentence,
    speech,
    translation,
    vgg,
)
from ..own import is_own, named

__all__ = ["NETWORKS", "Example", "find"]

Inputs = Callable[[int], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A network and inputs for it.

    Attributes:
        what: network and data in words.
        network: makes it.
        inputs: for so many samples its arguments, without data.
        batch: samples of a step, where nobody asks for others.
    """

    what: str
    network: Callable[[], nn.Module]
    inputs: Inputs
    batch: int


def _floats(*shape: int) -> Inputs:
    return lambda count: (torch.empty(count, *shape, device="meta"),)


def _symbols(*lengths: int) -> Inputs:
    """Whole numbers: a row of each length for each sample."""
    return lambda count: tuple(torch.zeros(count, length, dtype=torch.int64, device="meta") for length in lengths)


def _sentences(length: int) -> Inputs:
    """Whole numbers, and how many are real."""
    return lambda count: (*_symbols(length)(count), torch.full((count,), length, dtype=torch.int64, device="meta"))


_IMAGENET, _CIFAR = _floats(3, 224, 224), _floats(3, 32, 32)


def _large(network: Callable[..., nn.Module], what: str, **more: str) -> Example:
    made = partial(network, classes=1000, stem="imagenet", **more)
    return Example(what=f"{what}, ImageNet 224x224", network=made, inputs=_IMAGENET, batch=64)


def _small(network: Callable[..., nn.Module], what: str) -> Example:
    return Example(what=f"{what}, CIFAR-10", network=network, inputs=_CIFAR, batch=128)


NETWORKS: Mapping[str, Example] = MappingProxyType(
    {
        "resnet18": _large(resnet.resnet18, "ResNet-18"),
        "resnet50": _large(resnet.resnet50, "ResNet-50 (v1.5: the 3x3 convolutions stride)"),
        "resnet50-v1": _large(resnet.resnet50, "ResNet-50 (v1: the first 1x1 convolutions stride)", halving="conv1"),
        "resnet101": _large(resnet.resnet101, "ResNet-101"),
        "alexnet": _large(alexnet.alexnet, "AlexNet"),
        "resnet20": _small(resnet.resnet20, "ResNet-20"),
        "resnet18-cifar": _small(resnet.resnet18, "ResNet-18"),
        "vgg16": _small(vgg.vgg16, "VGG16"),
        "googlenet": _small(googlenet.googlenet, "GoogLeNet"),
        "densenet121": _small(densenet.densenet121, "DenseNet-121"),
        "mobilenetv2": _small(mobilenet.mobilenetv2, "MobileNetV2"),
        "lstm-650": Example(
            what="LSTM of 2 x 650, 35 of PTB's 10,000 words",
            network=partial(language.LSTMModel, 10_000, width=650),
            inputs=_symbols(35),
            batch=20,
        ),
        "transformer-base": Example(
            what="Transformer-base, 32 of 37,000 pieces in each language",
            network=partial(translation.Transformer, 37_000, pad=0, width=512, layers=6, heads=8, inner=2048),
            inputs=_symbols(32, 32),
            batch=128,
        ),
        "digits": Example(what="the digits' CNN", network=digits.cnn, inputs=_floats(1, 8, 8), batch=64),
        "fashion": Example(what="the clothes' CNN", network=fashion.cnn, inputs=_floats(1, 28, 28), batch=128),
        "cifar10": _small(resnet.resnet20, "ResNet-20"),
        "ptb": Example(
            what="LSTM of 2 x 200, 35 of PTB's 10,000 words",
            network=partial(language.LSTMModel, 10_000, width=200),
            inputs=_symbols(35),
            batch=20,
        ),
        "shakespeare": Example(
            what="GPT of 4 x 128, 64 of 65 characters",
            network=partial(language.GPT, 65, width=128, layers=4, heads=4, context=64),
            inputs=_symbols(64),
            batch=12,
        ),
        "sst2": Example(
            what="Kim's CNN, sentences of 20 of 14,000 words",
            network=partial(sentence.SentenceCNN, 14_000, pad=0, width=128, channels=100, dropout=0.5),
            inputs=_sentences(20),
            batch=50,
        ),
        "multi30k": Example(
            what="Transformer of 4 x 128, 16 of 5,000 pieces in each language",
            network=partial(translation.Transformer, 5_000, pad=0, width=128, layers=4, heads=4, inner=256),
            inputs=_symbols(16, 16),
            batch=64,
        ),
        "an4": Example(
            what="bidirectional LSTM of 4 x 128, 45 stacks of 6 x 40 mel bands",
            network=partial(speech.Recognizer, 240, 29, width=128, layers=4, dropout=0.2),
            inputs=_floats(45, 240),
            batch=8,
        ),
        "fsdd": Example(
            what="bidirectional LSTM of 2 x 64, 22 stacks of 2 x 40 mel bands",
            network=partial(speech.Listener, 80, 10, width=64, layers=2, dropout=0.2),
            inputs=_floats(22, 80),
            batch=50,
        ),
    }
)
"""By name; the tasks' stand last."""


def find(name: str, shape: str | None = None) -> Example:
    """A network by its name here, or any function of yours that makes one.

    Args:
        name: a key of `NETWORKS`, or ``module:function``; the module is looked for in the working folder, too.
        shape: of one input of ``module:function`` with commas, without the batch: ``3,224,224``.

    Raises:
        UnknownNameError: if there is no such network.
        HalfbyteError: if the module or function cannot be had, a shape is missing, or no whole numbers.
    """
    if not is_own(name):
        if name not in NETWORKS:
            raise UnknownNameError("network", name, NETWORKS, "module:function for one of your own")
        if shape is not None:
            raise HalfbyteError(f"--input {shape} was given with {name}, whose inputs are known. Leave it out.")
        return NETWORKS[name]
    if shape is None:
        raise HalfbyteError(f"{name} was given without --input, the shape of one of its inputs, for example 3,224,224.")
    try:
        sizes = [int(part) for part in shape.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise HalfbyteError(
            f"--input {shape} was given; whole numbers with commas are possible, for example 3,224,224."
        )
    return Example(what=name, network=_function(name), inputs=_floats(*sizes), batch=64)


def _function(name: str) -> Callable[[], nn.Module]:
    made: Callable[[], object] = named(name, Callable, "a function that returns a network")  # type: ignore[arg-type]
    return partial(_made, name, made)


def _made(name: str, function: Callable[[], object]) -> nn.Module:
    """What a function of somebody else's returns."""
    try:
        network = function()
    except (TypeError, ValueError, RuntimeError) as error:
        raise HalfbyteError(f"{name}() made no network ({error}). It is called without arguments.") from error
    if not isinstance(network, nn.Module):
        raise HalfbyteError(f"{name}() returned a {type(network).__name__}; a torch.nn.Module is possible.")
    return network
