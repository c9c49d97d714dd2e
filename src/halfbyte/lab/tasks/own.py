"""A task of your own: your network and your data, and all that the lab does with the tasks that it brings.

    # mine.py
    task = classification(network, train=(x, y), test=(x_test, y_test))

    halfbyte compare mine:task --recipes fp32,ibm2020 --seeds 3

A name with a colon is a module and a variable in it. The module is imported, so it is only ever a name that somebody
typed, never one that a file brings.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import HalfbyteError
from ..data.source import Data, Examples
from .contract import Settings, Task
from .vision import classify, percent

__all__ = ["classification", "find", "fingerprint", "is_own", "named"]

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


def is_own(name: str) -> bool:
    """Whether a task's name is ``module:variable``."""
    return ":" in name


def named(name: str, wanted: str) -> Any:
    """What a module holds under a name. The module is looked for in the working folder, too.

    Args:
        name: ``module:variable``.
        wanted: what it should be, for the error: ``"a function in it that takes nothing"``.

    Raises:
        HalfbyteError: if there is no such module, or nothing of that name in it.
    """
    module, _, variable = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), variable)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise HalfbyteError(
            f"{name!r} was asked for and cannot be had ({error}). Name a module that Python finds from here and "
            f"{wanted}."
        ) from error


def find(name: str) -> Task:
    """The task that a module holds.

    Args:
        name: ``module:variable``.

    Raises:
        HalfbyteError: if it cannot be had, or is no `Task`.
    """
    task = named(name, "a Task in it, for example one that halfbyte.lab.tasks.classification made")
    if not isinstance(task, Task):
        raise HalfbyteError(
            f"{name!r} is a {type(task).__name__}; a Task is possible, for example one that "
            "halfbyte.lab.tasks.classification made."
        )
    return task


def fingerprint(name: str) -> dict[str, str]:
    """By the task's name the SHA-256 of its module, so that a run of other code shows; nothing for the lab's own.

    Data that the module reads from elsewhere have no part in it.
    """
    if not is_own(name):
        return {}
    find(name)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return {} if file is None else {name: hashlib.sha256(Path(file).read_bytes()).hexdigest()}
