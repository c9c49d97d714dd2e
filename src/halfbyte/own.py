"""What a module of somebody's own holds: a task, a recipe, a network, by the name ``module:variable``.

The module is imported, so such a name is only ever one that somebody typed, never one that a file brings.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from .errors import HalfbyteError, UnknownNameError

__all__ = ["fingerprint", "is_own", "named"]

T = TypeVar("T")

_read: dict[str, tuple[object, str]] = {}
"""By module what it was imported by (another after a reload), and the SHA-256 of its file when it was first named."""


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
        HalfbyteError: if there is no such module, it cannot be imported, another of its name was imported before, or
            what it holds is of another kind.
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
        there = [n for n, value in vars(home).items() if isinstance(value, kind) and not n.startswith("_")]
        raise UnknownNameError(f"variable of module {module!r}", variable, there, wanted)
    found = getattr(home, variable)
    if not isinstance(found, kind):
        raise HalfbyteError(f"{name!r} is of type {type(found).__name__}; {wanted} is possible.")
    return found


def _imported(module: str, wanted: str) -> ModuleType:
    """The module, from the working folder if it is there."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    stem = module.replace(".", os.sep)
    files = (f"{stem}.py", f"{stem}{os.sep}__init__.py")
    try:
        home = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # It runs somebody's code: anything may come of it.
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise HalfbyteError(
                f"There is no module {module!r}. Name one that holds {wanted} and that lies in the working folder or "
                "is installed, without .py."
            ) from error
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(files)]
        where = f" at line {lines[-1]}" if lines else ""
        raise HalfbyteError(f"Module {module!r} raised {type(error).__name__}{where}: {error}") from error
    file = Path(getattr(home, "__file__", None) or "")
    meant = next((path for path in map(Path, files) if path.is_file()), None)
    if meant is not None and not (file.is_file() and file.samefile(meant)):
        raise HalfbyteError(
            f"{meant} in the working folder cannot be had as {module!r}: another module of that name comes before it, "
            f"{file if file.name else 'one that is built into Python'}. Give it a name of its own."
        )
    known = _read.get(module)
    if file.is_file() and (known is None or known[0] is not home.__spec__):
        _read[module] = home.__spec__, hashlib.sha256(file.read_bytes()).hexdigest()
    return home


def fingerprint(*names: str) -> dict[str, str]:
    """By the module of each name ``module:variable`` the SHA-256 of its file, so that other code shows.

    It is the file as it was when it was first named, or named again after a reload. Modules that it imports and data
    that it reads have no part in it, and what is in no file (a zip, Python itself) has none.
    """
    modules = sorted({name.partition(":")[0] for name in names if is_own(name)})
    return {f"module {module}": _read[module][1] for module in modules if module in _read}
