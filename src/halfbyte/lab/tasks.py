"""The tasks: what is learned, by which networks, for how long, and how it is judged.

A task names its data, its networks and its settings, and knows nothing of recipes: every recipe gets the same initial
weights, the same order of examples and the same settings. A task brings its own loss and its own score, so that one
which is judged by perplexity or by word errors fits the same trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HalfbyteError, UnknownNameError
from .data import digits as digits_data
from .data.split import Split
from .models import digits as digits_models

__all__ = ["TASKS", "Settings", "Task", "get"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how fast to learn. The learning rate falls from its peak to zero along half a cosine.

    Fine-tuning epochs, where a run asks for them, come on top and have their own learning rate, see `phases`.

    Attributes:
        epochs: passes over the training data.
        batch_size: examples in a step.
        optimizer: ``"sgd"`` or ``"adam"``.
        learning_rate: at the first step.
        momentum: of SGD; Adam has its own and takes none here.
        weight_decay: L2 penalty on every parameter, the learned clips of PACT included.
    """

    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise HalfbyteError(f"{self} cannot learn: epochs, batch_size and learning_rate must be above zero.")
        if self.optimizer not in ("sgd", "adam"):
            raise UnknownNameError("optimizer", self.optimizer, ("sgd", "adam"))
        if self.optimizer == "adam" and self.momentum:
            raise HalfbyteError(f"momentum={self.momentum} would do nothing under Adam. Leave it out or use 'sgd'.")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to learn.

    Attributes:
        name: its name in `TASKS`.
        description: one sentence for people.
        metric: what is measured, for example ``"accuracy"``.
        unit: unit of the metric, for example ``"%"``.
        higher_is_better: which way the metric points.
        load: returns the data.
        models: networks by name; each call returns freshly initialized weights from torch's global generator.
        default_model: the network that is meant when none is named.
        sizes: settings by name; ``smoke`` is for tests, ``cpu`` for a minute at a desk, ``full`` for results.
        loss: (output, target) to a scalar, averaged over the batch.
        score: (output, target) to the sum of the examples' scores.
        summarize: (sum of scores, number of examples) to the metric.
    """

    name: str
    description: str
    metric: str
    unit: str
    higher_is_better: bool
    load: Callable[[], Split]
    models: Mapping[str, Callable[[], nn.Module]]
    default_model: str
    sizes: Mapping[str, Settings]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    summarize: Callable[[float, int], float]

    def model_named(self, name: str | None) -> str:
        """The name of a network of this task: the one asked for, or the default for None.

        Raises:
            UnknownNameError: if the task has no such network.
        """
        if name is not None and name not in self.models:
            raise UnknownNameError(f"model of task {self.name!r}", name, self.models)
        return name or self.default_model

    def settings(self, size: str) -> Settings:
        """The settings of a size.

        Raises:
            UnknownNameError: if the task has no such size.
        """
        if size not in self.sizes:
            raise UnknownNameError(f"size of task {self.name!r}", size, self.sizes)
        return self.sizes[size]


def _correct(logits_NK: Tensor, classes_N: Tensor) -> float:
    """How many examples get their largest logit at the right class."""
    return float((logits_NK.argmax(dim=1) == classes_N).sum())


def _percent(total: float, count: int) -> float:
    """A share as a percentage."""
    return 100 * total / count


def _adam(epochs: int) -> Settings:
    """Settings of the digits. Chosen on FP32 alone, and then the same for every recipe."""
    return Settings(epochs=epochs, batch_size=64, optimizer="adam", learning_rate=3e-3)


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "digits": Task(
            name="digits",
            description="1,797 real handwritten digits of 8x8 pixels, shipped with scikit-learn.",
            metric="accuracy",
            unit="%",
            higher_is_better=True,
            load=digits_data.load,
            models=MappingProxyType({"cnn": digits_models.cnn, "mlp": digits_models.mlp}),
            default_model="cnn",
            sizes=MappingProxyType({"smoke": _adam(2), "cpu": _adam(20), "full": _adam(60)}),
            loss=F.cross_entropy,
            score=_correct,
            summarize=_percent,
        )
    }
)


def get(name: str) -> Task:
    """The task of that name.

    Raises:
        UnknownNameError: if there is none; the text suggests the nearest name.
    """
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS)
    return TASKS[name]
