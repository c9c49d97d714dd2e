"""A task of your own: your network and your data, and all that the lab does with the tasks that it brings.

    # mine.py
    task = classification(network, train=(x, y), test=(x_test, y_test))

    halfbyte compare mine:task --recipes fp32,ibm2020 --seeds 3

A name with a colon is a module and a variable in it, see `halfbyte.own`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ...errors import HalfbyteError
from ...own import named
from ..data.source import Data, Examples
from .contract import Settings, Task
from .vision import classify, percent

__all__ = ["classification", "find"]

_SETTINGS = Settings(epochs=20, batch_size=64, optimizer="adam", learning_rate=3e-3)
"""Those of the digits."""


def classification(
    network: Callable[[], nn.Module],
    *,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    settings: Settings = _SETTINGS,
    description: str = "A task of somebody's own.",
) -> Task:
    """A task that is judged by how many examples get the right class. What has another loss is a `Task` written out.

    Args:
        network: called without arguments, returns a network with fresh weights from torch's global generator. It takes
            a batch of inputs and returns logits (N, K).
        train: what it learns from: inputs (N, ...) and classes (N,), int64.
        test: what it is judged by.
        settings: how long and how fast to learn, for the sizes ``cpu`` and ``full``; ``smoke`` is one pass.
        description: one sentence for people.

    Raises:
        HalfbyteError: if there is not one class for each input, or the classes are not int64.
    """
    for part, (_, classes) in (("train", train), ("test", test)):
        if classes.dtype != torch.int64 or classes.ndim != 1:
            raise HalfbyteError(
                f"{part}=(inputs, classes) was given with classes of {classes.dtype} and shape {tuple(classes.shape)}; "
                "classes are whole numbers from 0, of torch.int64 and shape (N,): classes.long()."
            )
    sides = [Examples(inputs=inputs, targets=classes) for inputs, classes in (train, test)]
    data = Data(train=sides[0], test=sides[1])
    return Task(
        name="own",
        description=description,
        metric="accuracy",
        unit="%",
        higher_is_better=True,
        load=lambda _folder: data,
        models=MappingProxyType({"own": lambda _data, _settings: network()}),
        default_model="own",
        sizes=MappingProxyType({"smoke": replace(settings, epochs=1), "cpu": settings, "full": settings}),
        learn=classify,
        summarize=percent,
    )


def find(name: str) -> Task:
    """The task that a module holds.

    Args:
        name: ``module:variable``.

    Raises:
        HalfbyteError: if it cannot be had, or is no `Task`.
    """
    return named(name, Task, "a Task (halfbyte.lab.tasks.classification makes one)")
