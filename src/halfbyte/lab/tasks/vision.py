"""Images to classes: digits, clothes, and ten kinds of things in color."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor, nn

from ..data import cifar10, fashion
from ..data import digits as digits_data
from ..data.source import Batch, Data
from ..models import alexnet, densenet, googlenet, mobilenet, resnet, vgg
from ..models import digits as digits_models
from ..models import fashion as fashion_models
from .contract import Carry, Outcome, Settings, Task

__all__ = ["TASKS", "classify", "percent"]


def classify(network: nn.Module, batch: Batch, _carry: Carry, settings: Settings) -> Outcome:
    """Cross-entropy, and how many examples get their largest logit at the right class."""
    logits_NK = network(*batch.inputs)
    (classes_N,) = batch.targets
    smoothing = settings.smoothing if network.training else 0.0
    return Outcome(F.cross_entropy(logits_NK, classes_N, label_smoothing=smoothing), correct(logits_NK, classes_N))


def correct(logits_NK: Tensor, classes_N: Tensor) -> float:
    """How many examples get their largest logit at the right class."""
    return float((logits_NK.detach().argmax(dim=1) == classes_N).sum())


def percent(total: float, count: int) -> float:
    """A share as a percentage."""
    return 100 * total / count


def _models(**networks: Callable[[], nn.Module]) -> MappingProxyType[str, Callable[[Data, Settings], nn.Module]]:
    """Networks that need neither the data nor the settings, since every image has the same size."""

    def built(network: Callable[[], nn.Module]) -> Callable[[Data, Settings], nn.Module]:
        return lambda _data, _settings: network()

    return MappingProxyType({name: built(network) for name, network in networks.items()})


def _adam(epochs: int) -> Settings:
    """Settings of the digits: ours. Chosen on FP32 alone, and then the same for every recipe."""
    return Settings(epochs=epochs, batch_size=64, optimizer="adam", learning_rate=3e-3)


# He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2: 64,000 batches of 128 images are 164
# epochs. The curves of Sun et al., NeurIPS 2020, have about 160 epochs and the same drops (Fig. 1).
_CIFAR10 = Settings(
    epochs=160,
    batch_size=128,
    optimizer="sgd",
    learning_rate=0.1,
    model="resnet18",
    momentum=0.9,
    weight_decay=1e-4,
    schedule="drops",
    drops=(0.5, 0.75),
)
_CIFAR10_CPU = replace(_CIFAR10, epochs=5, model="resnet20", schedule="cosine", drops=())
# Ours: of the networks that Fashion-MNIST's authors list none comes with a whole schedule.
_FASHION_CPU = replace(_CIFAR10_CPU, epochs=7, model="cnn")

TASKS = (
    Task(
        name="digits",
        description="1,797 real handwritten digits of 8x8 pixels, shipped with scikit-learn.",
        metric="accuracy",
        unit="%",
        higher_is_better=True,
        load=lambda _folder: digits_data.load(),
        models=_models(cnn=digits_models.cnn, mlp=digits_models.mlp),
        default_model="cnn",
        sizes=MappingProxyType({"smoke": _adam(2), "cpu": _adam(20), "full": _adam(60)}),
        learn=classify,
        summarize=percent,
    ),
    Task(
        name="fashion",
        description="Fashion-MNIST: 70,000 gray pictures of clothes, 28x28 pixels.",
        metric="accuracy",
        unit="%",
        higher_is_better=True,
        load=fashion.load,
        models=_models(cnn=fashion_models.cnn),
        default_model="cnn",
        sizes=MappingProxyType(
            {
                "smoke": replace(_FASHION_CPU, epochs=1, batch_size=32, examples=96, test_examples=32),
                "cpu": _FASHION_CPU,
                "full": replace(_FASHION_CPU, epochs=60),
            }
        ),
        learn=classify,
        summarize=percent,
    ),
    Task(
        name="cifar10",
        description="CIFAR-10: 60,000 color pictures of ten kinds of things, 32x32 pixels.",
        metric="accuracy",
        unit="%",
        higher_is_better=True,
        load=cifar10.load,
        models=_models(
            resnet20=resnet.resnet20,
            resnet32=resnet.resnet32,
            resnet18=resnet.resnet18,
            resnet50=resnet.resnet50,
            resnet101=resnet.resnet101,
            vgg16=vgg.vgg16,
            googlenet=googlenet.googlenet,
            densenet121=densenet.densenet121,
            mobilenetv2=mobilenet.mobilenetv2,
            alexnet=alexnet.alexnet,
        ),
        default_model="resnet20",
        sizes=MappingProxyType(
            {
                "smoke": replace(_CIFAR10_CPU, epochs=1, batch_size=16, examples=48, test_examples=16),
                "cpu": _CIFAR10_CPU,
                "full": _CIFAR10,
            }
        ),
        learn=classify,
        summarize=percent,
    ),
)
