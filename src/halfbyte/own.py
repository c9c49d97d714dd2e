"""What a module of somebody's own holds: a task, a recipe, a network, by the name ``module:variable``.

The module is imported, so such a name is only ever one that somebody typed, never one that a file brings.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from .errors import HalfbyteError, UnknownNameError

__all__ = ["fingerprint", "is_own", "named"]

T = TypeVar("T")

_read: dict[str, tuple[object, str]] = {}
"""By module what it was imported by (another after a reload), and the SHA-256 of its file then."""


def is_own(name: object) -> bool:
    """Whether a name is ``module:variable``."""
    return isinstance(name, str) and ":" in name


def named(name: str, kind: type[T], wanted: str) -> T:
    """What a module holds under a name. The module is looked for in the working folder, too.

    Args:
        name: ``module:variable``.
        kind: what it has to be.
        wanted: the same for people: ``"a Recipe"``, and where one comes from.

    Raises:
        HalfbyteError: if there is no such module, it cannot be imported, or what it holds is of another kind.
        UnknownNameError: if it holds nothing of that name.
    """
    module, _, variable = name.partition(":")
    if not variable.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise HalfbyteError(
            f"{name!r} was asked for. A module and a variable in it are possible, without folder and .py: mine:it is "
            "the variable it of mine.py, which lies in the working folder or is installed."
        )
    home = _imported(module, wanted)
    if not hasattr(home, variable):
        there = [n for n, v in vars(home).items() if isinstance(v, kind) and n[0] != "_" and type(v) is not ModuleType]
        raise UnknownNameError(f"variable of module {module!r}", variable, there)
    found = getattr(home, variable)
    if not isinstance(found, kind):
        raise HalfbyteError(f"{name!r} is of type {type(found).__name__}; {wanted} is possible.")
    return found


def _imported(module: str, wanted: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        home = importlib.import_module(module)
    except Exception as error:  # It runs somebody's code: anything may come of it.
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise HalfbyteError(
                f"There is no module {module!r}. Name one that holds {wanted} and that lies in the working folder or "
                "is installed, without .py."
            ) from error
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).stem == module]
        where = f" at line {lines[-1]}" if lines else ""
        raise HalfbyteError(f"Module {module!r} raised {type(error).__name__}{where}: {error}") from error
    file = getattr(home, "__file__", None)  # What is built into Python has none.
    if file is not None and _read.get(module, (None, ""))[0] is not home.__spec__:
        _read[module] = home.__spec__, hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return home


def fingerprint(*names: str) -> dict[str, str]:
    """The SHA-256 of the module of each name ``module:variable``, as it was imported, so that other code shows.

    Neither modules that it imports nor data that it reads have a part in it.
    """
    modules = sorted({name.partition(":")[0] for name in names if is_own(name)})
    return {f"module {module}": _read[module][1] for module in modules if module in _read}
