"""What a module of somebody's own holds: a task, a recipe, a network, by the name ``module:variable``.

The module is imported, so such a name is only ever one that somebody typed, never one that a file brings.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path
from typing import TypeVar

from .errors import HalfbyteError

__all__ = ["fingerprint", "is_own", "named"]

T = TypeVar("T")


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
        HalfbyteError: if there is no such module, nothing of that name in it, or something of another kind.
    """
    module, _, variable = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), variable)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise HalfbyteError(
            f"{name!r} was asked for and cannot be had ({error}). Name a module that Python finds from here and "
            f"{wanted} in it."
        ) from error
    if not isinstance(found, kind):
        raise HalfbyteError(f"{name!r} is a {type(found).__name__}; {wanted} is possible.")
    return found


def fingerprint(*names: str) -> dict[str, str]:
    """By each name of the form ``module:variable`` its module's SHA-256, so that a run of other code shows.

    Data that a module reads from elsewhere have no part in it. The modules have been imported before.
    """
    found = {}
    for name in filter(is_own, names):
        file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
        if file is not None:
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found
