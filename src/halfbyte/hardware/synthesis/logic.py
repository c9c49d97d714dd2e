"""Logic functions as Liberty writes them: pins, NOT, AND, OR, XOR.

>>> parse_function("!((A & B) | C)")
Not(Or(And(Pin('A'), Pin('B')), Pin('C')))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ...errors import HalfbyteError

__all__ = ["And", "Constant", "Expression", "Not", "Or", "Pin", "Xor", "evaluate", "parse_function", "pins"]


@dataclass(frozen=True, repr=False)
class Pin:
    """The value of a pin."""

    name: str

    def __repr__(self) -> str:
        return f"Pin({self.name!r})"


@dataclass(frozen=True, repr=False)
class Constant:
    """Always false or always true."""

    value: bool

    def __repr__(self) -> str:
        return f"Constant({self.value})"


@dataclass(frozen=True, repr=False)
class Not:
    """The opposite."""

    a: Expression

    def __repr__(self) -> str:
        return f"Not({self.a})"


@dataclass(frozen=True, repr=False)
class And:
    """Both."""

    a: Expression
    b: Expression

    def __repr__(self) -> str:
        return f"And({self.a}, {self.b})"


@dataclass(frozen=True, repr=False)
class Or:
    """At least one."""

    a: Expression
    b: Expression

    def __repr__(self) -> str:
        return f"Or({self.a}, {self.b})"


@dataclass(frozen=True, repr=False)
class Xor:
    """Exactly one."""

    a: Expression
    b: Expression

    def __repr__(self) -> str:
        return f"Xor({self.a}, {self.b})"


Expression = Pin | Constant | Not | And | Or | Xor

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][\w\[\]]*)|([01])|([!'^*&+|()]))")


def parse_function(text: str) -> Expression:
    """The expression that a Liberty `function` (or `next_state`, `clocked_on`) attribute writes.

    From tightest to loosest: ``!`` before and ``'`` after, ``^``, then ``&``, ``*`` or a space, then ``|`` or ``+``.

    Raises:
        HalfbyteError: if the text is no such expression.
    """
    tokens, position = list[str](), 0
    stripped = text.strip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None:
            raise _unreadable(text)
        tokens.append(match[1] or match[2] or match[3])
        position = match.end()
    expression, rest = _sum(tokens, text)
    if rest:
        raise _unreadable(text)
    return expression


def _unreadable(text: str) -> HalfbyteError:
    return HalfbyteError(
        f"The logic function {text!r} of the cell library cannot be read; names, 0, 1, parentheses and the operators "
        "! ' ^ & * | + are possible."
    )


def _chain(
    tokens: list[str],
    text: str,
    part: Callable[[list[str], str], tuple[Expression, list[str]]],
    join: type[And] | type[Or] | type[Xor],
    operators: str,
    juxtaposed: bool = False,
) -> tuple[Expression, list[str]]:
    """``part (operator part)*``, from left to right."""
    left, rest = part(tokens, text)
    while rest:
        if rest[0] in operators:
            right, rest = part(rest[1:], text)
        elif juxtaposed and rest[0] not in ")|+^'":
            right, rest = part(rest, text)
        else:
            break
        left = join(left, right)
    return left, rest


def _sum(tokens: list[str], text: str) -> tuple[Expression, list[str]]:
    return _chain(tokens, text, _product, Or, "|+")


def _product(tokens: list[str], text: str) -> tuple[Expression, list[str]]:
    return _chain(tokens, text, _parity, And, "&*", juxtaposed=True)


def _parity(tokens: list[str], text: str) -> tuple[Expression, list[str]]:
    return _chain(tokens, text, _atom, Xor, "^")


def _atom(tokens: list[str], text: str) -> tuple[Expression, list[str]]:
    if not tokens:
        raise _unreadable(text)
    head, rest = tokens[0], tokens[1:]
    expression: Expression
    if head == "!":
        inner, rest = _atom(rest, text)
        return Not(inner), rest
    if head == "(":
        expression, rest = _sum(rest, text)
        if not rest or rest[0] != ")":
            raise _unreadable(text)
        rest = rest[1:]
    elif head in "01":
        expression = Constant(head == "1")
    elif head[0].isalpha() or head[0] == "_":
        expression = Pin(head)
    else:
        raise _unreadable(text)
    while rest and rest[0] == "'":
        expression, rest = Not(expression), rest[1:]
    return expression, rest


def pins(expression: Expression) -> Iterator[str]:
    """The names of the pins that an expression reads, each as often as it stands there."""
    match expression:
        case Pin(name):
            yield name
        case Not(a):
            yield from pins(a)
        case And(a, b) | Or(a, b) | Xor(a, b):
            yield from pins(a)
            yield from pins(b)


def evaluate(expression: Expression, values: Mapping[str, bool]) -> bool:
    """The value of an expression for given pins: what the compiled evaluation must equal."""
    match expression:
        case Pin(name):
            return values[name]
        case Constant(value):
            return value
        case Not(a):
            return not evaluate(a, values)
        case And(a, b):
            return evaluate(a, values) and evaluate(b, values)
        case Or(a, b):
            return evaluate(a, values) or evaluate(b, values)
        case Xor(a, b):
            return evaluate(a, values) != evaluate(b, values)
