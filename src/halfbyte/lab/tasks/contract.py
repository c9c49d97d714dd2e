"""What a task is: its data, its networks, its settings, and how it is judged.

A task knows nothing of recipes: every recipe gets the same initial weights, the same order of examples and the same
settings. It brings its own loss and its own score, so that tasks judged by accuracy, perplexity, BLEU or word errors
fit one trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import Tensor, nn

from ...errors import HalfbyteError, UnknownNameError
from ..data.source import Batch, Data

__all__ = ["SIZES", "Carry", "Judgment", "Outcome", "Settings", "Task"]

SIZES = ("smoke", "cpu", "full")
"""For tests (seconds), for a desk (seconds to an hour or more), and for a GPU: the published setting where
there is one, which the settings of each task say."""

Carry = tuple[Tensor, ...]
"""What a network hands from one batch to the next, without gradient: a recurrent state. Empty when a pass begins."""

_OPTIMIZERS = ("sgd", "adam", "adamw")
_SCHEDULES = ("cosine", "drops", "decay", "inverse_sqrt")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how fast to learn.

    The learning rate climbs along a straight line while it is warming up; what follows is its schedule. Fine-tuning
    epochs, where a run asks for them, come on top and have their own learning rate, see `halfbyte.lab.phases`.

    Attributes:
        epochs: passes over the training data.
        batch_size: examples in a step.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        learning_rate: the highest.
        learned_rate: the highest of what quantizers learn (clips, steps); None for `learning_rate`.
        model: the network that is meant when none is named; empty for the task's own default.
        momentum: of SGD; the others have their own and take none here.
        weight_decay: L2 penalty on every parameter, the learned clips of PACT included.
        betas: of Adam; None for torch's own.
        schedule: ``"cosine"`` to zero along half a cosine; ``"drops"`` a tenth after each of `drops`; ``"decay"`` times
            `decay` an epoch after `hold` epochs; ``"inverse_sqrt"`` with the square root of the batches done.
        warmup: batches of warming up.
        drops: shares of the run.
        hold: epochs.
        decay: factor.
        clip_norm: the largest norm of all gradients together; None for any.
        smoothing: share of a target's weight that is spread over all classes (label smoothing), in training only.
        dropout: handed to the network, where it has any.
        beam: how many beginnings are kept where a sequence is searched for; 1 is greedy.
        test_batch_size: examples in a batch of judging.
        examples: how many to learn from (symbols, for a text); None for all.
        test_examples: the same for judging.
    """

    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adam", "adamw"]
    learning_rate: float
    learned_rate: float | None = None
    model: str = ""
    momentum: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    schedule: Literal["cosine", "drops", "decay", "inverse_sqrt"] = "cosine"
    warmup: int = 0
    drops: tuple[float, ...] = ()
    hold: int = 0
    decay: float = 1.0
    clip_norm: float | None = None
    smoothing: float = 0.0
    dropout: float = 0.0
    beam: int = 1
    test_batch_size: int = 512
    examples: int | None = None
    test_examples: int | None = None

    def __post_init__(self) -> None:
        counts = (self.epochs, self.batch_size, self.test_batch_size, self.beam, self.examples, self.test_examples)
        rates = (self.learning_rate, self.learned_rate)
        if any(count is not None and count < 1 for count in counts) or any(r is not None and r <= 0 for r in rates):
            raise HalfbyteError(f"{self} cannot learn: epochs, batch_size and learning rates must be above zero.")
        for what, given, possible in (
            ("optimizer", self.optimizer, _OPTIMIZERS),
            ("schedule", self.schedule, _SCHEDULES),
        ):
            if given not in possible:
                raise UnknownNameError(what, given, possible)
        idle = {
            f"momentum={self.momentum}, under Adam": self.optimizer != "sgd" and self.momentum != 0,
            f"betas={self.betas}, under SGD": self.optimizer == "sgd" and self.betas is not None,
            f"drops={self.drops}, without schedule='drops'": self.schedule != "drops" and bool(self.drops),
            f"decay={self.decay} or hold={self.hold}, without schedule='decay'": (
                self.schedule != "decay" and (self.decay != 1.0 or self.hold != 0)
            ),
            "schedule='inverse_sqrt', without a warmup,": self.schedule == "inverse_sqrt" and self.warmup == 0,
        }
        for knob, is_idle in idle.items():
            if is_idle:
                raise HalfbyteError(f"{knob} would do nothing. Leave it out or give what it goes with.")


class Outcome(NamedTuple):
    """What a batch gave.

    Attributes:
        loss: mean over the batch's ``count``, a scalar.
        score: the sum of the scores of those that ``count`` counts.
        carry: for the next batch.
    """

    loss: Tensor
    score: float
    carry: Carry = ()


class Judgment(NamedTuple):
    """What a trained network came to on the test data.

    Attributes:
        value: the task's metric.
        further: other measures by name, each in the metric's unit. Records and the page of results have them, too.
    """

    value: float
    further: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to learn.

    Attributes:
        name: its name in `halfbyte.lab.tasks.TASKS`.
        description: one sentence for people.
        metric: what is measured, for example ``"accuracy"``.
        unit: unit of the metric, for example ``"%"``; empty where it has none.
        higher_is_better: which way the metric points.
        load: the data from a folder of data sets, each in a folder of its own; None is only enough for data that needs
            no file.
        models: networks by name; each call returns freshly initialized weights from torch's global generator. Called
            with the data, for its sizes, and the settings.
        default_model: the network that is meant when neither a name nor the size's settings name one.
        sizes: settings for each of `SIZES`.
        learn: (network, batch, carry, settings) to the outcome. Used for judging too; then the network is in evaluation
            mode and there is no gradient.
        summarize: (sum of scores, sum of counts) to the metric; or, for a task with `judge`, to `progress_metric`.
        judge: (network, data cut to the settings, settings) to the metric, after the last epoch, where that takes more
            than a sum; or to a `Judgment`, which has further measures too. None where `summarize` gives the metric.
        progress_metric: what `summarize` gives; empty for the metric itself.
        packages: what else its data or its metric is computed by, as ``pip`` names it. A record holds their versions,
            and a comparison makes a run again whose versions have changed.
    """

    name: str
    description: str
    metric: str
    unit: str
    higher_is_better: bool
    load: Callable[[Path | None], Data]
    models: Mapping[str, Callable[[Data, Settings], nn.Module]]
    default_model: str
    sizes: Mapping[str, Settings]
    learn: Callable[[nn.Module, Batch, Carry, Settings], Outcome]
    summarize: Callable[[float, int], float]
    judge: Callable[[nn.Module, Data, Settings], float | Judgment] | None = None
    progress_metric: str = ""
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.packages, str):
            raise HalfbyteError(
                f"Task {self.name!r}: packages={self.packages!r} is a text; a tuple of texts is possible."
            )

    def model_named(self, name: str | None, size: str = "cpu") -> str:
        """The name of a network of this task: the one asked for, or the default of that size for None.

        Raises:
            UnknownNameError: if the task has no such network.
        """
        if name is not None and name not in self.models:
            raise UnknownNameError(f"model of task {self.name!r}", name, self.models)
        return name or self.settings(size).model or self.default_model

    def settings(self, size: str) -> Settings:
        """The settings of a size.

        Raises:
            UnknownNameError: if the task has no such size.
        """
        if size not in self.sizes:
            raise UnknownNameError(f"size of task {self.name!r}", size, self.sizes)
        return self.sizes[size]

    def judged(self, network: nn.Module, data: Data, settings: Settings) -> Judgment | None:
        """What `judge` says of a network; None for a task without.

        Args:
            network: in evaluation mode.
            data: cut to the settings.
            settings: of the run.

        Raises:
            HalfbyteError: if it says something else than numbers.
        """
        if self.judge is None:
            return None
        found = self.judge(network, data, settings)
        judgment = found if isinstance(found, Judgment) else Judgment(found)
        if not all(isinstance(number, int | float) for number in (judgment.value, *judgment.further.values())):
            raise HalfbyteError(
                f"judge of task {self.name!r} gave {found!r}; it gives a float, or a halfbyte.lab.tasks.Judgment of a "
                "float and a mapping from names to floats."
            )
        return judgment

    def load_for(self, folder: Path | None, settings: Settings) -> Data:
        """The data, cut to what a run of those settings learns from and is judged by."""
        data = self.load(folder)
        if settings.examples is not None:
            data = replace(data, train=data.train.first(settings.examples))
        return data if settings.test_examples is None else replace(data, test=data.test.first(settings.test_examples))
