"""The tasks by name: what is learned, by which networks, for how long, and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ...errors import UnknownNameError
from . import language, speech, translation, vision
from .contract import SIZES, Carry, Outcome, Settings, Task

__all__ = ["SIZES", "TASKS", "Carry", "Outcome", "Settings", "Task", "get"]

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (*vision.TASKS, *language.TASKS, *translation.TASKS, *speech.TASKS)}
)


def get(name: str) -> Task:
    """The task of that name.

    Raises:
        UnknownNameError: if there is none; the text suggests the nearest name.
    """
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS)
    return TASKS[name]
