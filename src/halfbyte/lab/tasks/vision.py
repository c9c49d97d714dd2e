"""Images to classes: digits."""

from __future__ import annotations

from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor, nn

from ..data import digits as digits_data
from ..data.source import Batch
from ..models import digits as digits_models
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


def _adam(epochs: int) -> Settings:
    """Settings of the digits. Chosen on FP32 alone, and then the same for every recipe."""
    return Settings(epochs=epochs, batch_size=64, optimizer="adam", learning_rate=3e-3)


TASKS = (
    Task(
        name="digits",
        description="1,797 real handwritten digits of 8x8 pixels, shipped with scikit-learn.",
        metric="accuracy",
        unit="%",
        higher_is_better=True,
        load=lambda _folder: digits_data.load(),
        models=MappingProxyType(
            {"cnn": lambda _data, _settings: digits_models.cnn(), "mlp": lambda _data, _settings: digits_models.mlp()}
        ),
        default_model="cnn",
        sizes=MappingProxyType({"smoke": _adam(2), "cpu": _adam(20), "full": _adam(60)}),
        learn=classify,
        summarize=percent,
    ),
)
