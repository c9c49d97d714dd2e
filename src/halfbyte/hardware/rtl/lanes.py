"""One product a cycle, in two ways: INT4 x INT4 by a multiplier, INT4 x radix-4 FP4 by a shift.

A code of `halfbyte.formats.fp4_e3m0_r4` is a sign and three bits c: 0 is zero, c = 1...7 is 4^(c - 4). In units of 4^-3
that is 4^(c - 1), so the product with an integer is that integer shifted left by 2 (c - 1) places. The odd phase has
the same codes and the same products in units of half the size (Sun et al., NeurIPS 2020, section 6): a lane does not
know the phase.
"""

from __future__ import annotations

from typing import Literal

from amaranth.hdl import Cat, Module, Mux, Value, signed
from amaranth.lib.wiring import Component, In, Out

from ...errors import SpecError
from .words import wire

__all__ = ["KINDS", "PRODUCT_BITS", "Kind", "Lane", "gated", "multiplicand", "product"]

Kind = Literal["int", "fp4", "mixed"]
"""What the second operand is: INT4, radix-4 FP4, or either, chosen by a mode bit."""

KINDS: tuple[Kind, ...] = ("int", "fp4", "mixed")

PRODUCT_BITS: dict[Kind, int] = {"int": 8, "fp4": 17, "mixed": 17}
"""Signed width that holds every product exactly: -8...15 times -8...7, or times +-4^0...4^6."""


def multiplicand(m: Module, name: str, code: Value, unsigned: Value | None = None) -> Value:
    """The signed number that a 4-bit code stands for: -8...7, or 0...15 where `unsigned` is set.

    Args:
        m: the module.
        name: of the wire.
        code: four bits.
        unsigned: the flag of PACT's activations (`halfbyte.formats.uint4`); None for a unit that has no such mode.
    """
    if unsigned is None:
        return wire(m, name, code.as_signed())
    return wire(m, name, Cat(code, code[3] & ~unsigned).as_signed())


def product(m: Module, kind: Kind, a: Value, b: Value, *, fp4: Value | None = None, name: str = "product") -> Value:
    """The exact product, signed, `PRODUCT_BITS` wide; with an FP4 operand in units of 4^-3.

    Args:
        m: the module.
        kind: what `b` is.
        a: signed integer, see `multiplicand`.
        b: four bits, the code.
        fp4: the mode of a mixed lane: whether `b` is FP4.
        name: prefix of the wires.
    """
    if kind == "int":
        return _multiplied(m, a, b, name)
    nonzero = wire(m, f"{name}_nonzero", b[:3].any())
    if kind == "fp4":
        return _shifted(m, a, b, nonzero, name)
    assert fp4 is not None, "a mixed lane needs its mode"
    # The path that is not asked for gives zero, so that an OR joins the two.
    shifted = _shifted(m, a, b, nonzero & fp4, f"{name}_fp4")
    whole = gated(_multiplied(m, a, b, f"{name}_int"), ~fp4)
    return wire(m, name, shifted | whole, signed(PRODUCT_BITS["mixed"]))


def gated(number: Value, on: Value) -> Value:
    """A signed number, or zero where one bit is zero."""
    return number & on.replicate(len(number)).as_signed()


def _multiplied(m: Module, a: Value, code: Value, name: str) -> Value:
    """a times an INT4 code."""
    return wire(m, name, a * code.as_signed(), signed(PRODUCT_BITS["int"]))


def _shifted(m: Module, a: Value, code: Value, on: Value, name: str) -> Value:
    """a times a radix-4 FP4 code, or zero.

    By 2 c places to the left and two back, which loses nothing where c is not zero, and saves the subtraction.
    """
    moved = wire(m, f"{name}_by0", gated(Mux(code[3], -a, a), on))
    for digit in range(3):
        step = 2 << digit
        moved = wire(m, f"{name}_by{step}", Mux(code[digit], moved << step, moved))
    return wire(m, name, moved >> 2, signed(PRODUCT_BITS["fp4"]))


class Lane(Component):  # type: ignore[misc] # Amaranth ships no types
    """One multiplier without registers.

    Ports:
        a: 4 bits, the INT4 multiplicand's code.
        b: 4 bits, the code of the other operand.
        unsigned: only where asked for: `a` is 0...15 instead of -8...7.
        fp4: only for the kind ``mixed``: `b` is FP4 instead of INT4.
        product: signed, exact; in units of 4^-3 where `b` is FP4.

    Args:
        kind: what `b` is.
        unsigned: whether the multiplicand can be unsigned.

    Raises:
        SpecError: if there is no such kind.
    """

    def __init__(self, kind: Kind, *, unsigned: bool = False) -> None:
        if kind not in KINDS:
            raise SpecError(f"A lane of kind {kind!r} was asked for; 'int', 'fp4' and 'mixed' are possible.")
        self.kind = kind
        ports = {"a": In(4), "b": In(4), "product": Out(signed(PRODUCT_BITS[kind]))}
        if unsigned:
            ports["unsigned"] = In(1)
        if kind == "mixed":
            ports["fp4"] = In(1)
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        """The circuit: nothing but the product."""
        m = Module()
        a = multiplicand(m, "number", self.a, getattr(self, "unsigned", None))
        m.d.comb += self.product.eq(product(m, self.kind, a, self.b, fp4=getattr(self, "fp4", None)))
        return m
