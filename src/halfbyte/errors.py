"""What can go wrong, said once: every error names what was asked, what was got, what is possible and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HalfbyteError(Exception):
    """Base of every error that this library raises on purpose."""


class UnknownNameError(HalfbyteError, ValueError):
    """A name that is in no table. Its text suggests the nearest right one and lists the rest.

    Args:
        kind: what the name should have been, for example ``"recipe"``.
        asked: the name that was given.
        possible: every name that would have been accepted.
        other: what else would have been, in words: ``"module:task for one of your own"``.
    """

    def __init__(self, kind: str, asked: str, possible: Iterable[str], other: str = "") -> None:
        self.kind = kind
        self.asked = asked
        self.possible = sorted(possible)
        self.other = other
        nearest = difflib.get_close_matches(asked, self.possible, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        known = f"{', '.join(self.possible) or 'none'}{'; ' if other else ''}{other}"
        super().__init__(f"There is no {kind} named {asked!r}.{hint} Possible: {known}.")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, list[str], str]]:
        return type(self), (self.kind, self.asked, self.possible, self.other)


class SpecError(HalfbyteError, ValueError):
    """A quantizer spec or recipe with a field that cannot mean anything."""


class ConversionError(HalfbyteError, ValueError):
    """A model that cannot be converted or restored as asked. The model is left as it was."""


class UnsupportedError(HalfbyteError, RuntimeError):
    """Something that a converted layer cannot do, such as being differentiated twice."""


class NonFiniteWarning(UserWarning):
    """A NaN or an infinity reached a quantizer. The result of that GEMM is NaN, as it would be in floating point."""
