"""The tasks by name: what is learned, by which networks, for how long, and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ...errors import UnknownNameError
from ...own import is_own
from . import language, own, speech, translation, vision
from .contract import SIZES, Carry, Judgment, Outcome, Settings, Task
from .own import classification

__all__ = ["SIZES", "TASKS", "Carry", "Judgment", "Outcome", "Settings", "Task", "classification", "get"]

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (*vision.TASKS, *language.TASKS, *translation.TASKS, *speech.TASKS)}
)


def get(name: str) -> Task:
    """The task of that name: one of `TASKS`, or ``module:task`` for one of your own, see `classification`.

    Raises:
        UnknownNameError: if there is none; the text suggests the nearest name.
        HalfbyteError: if the module cannot be imported, or holds no such task.
    """
    if is_own(name):
        return own.find(name)
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS, "module:task for one of your own")
    return TASKS[name]
