"""The 4-bit unit: lanes, an adder tree, an integer accumulator, and a rounder where asked for.

The integer is exact. A product with an FP4 operand is at most 15 * 4^6 = 61,440, so a chunk of 64 products stays below
2^22 and fits 24 bits; products of integers are at most 120, and 16 bits hold a chunk of 64 four times over. A 32-bit
accumulator is exact for 34,952 products. Within such a chunk the order of summation does not matter: the unit equals
any exact sum, one of fp32 included, and the only rounding is the rounder's.
"""

from __future__ import annotations

from amaranth.hdl import Module, Value, signed
from amaranth.lib.wiring import Component, In, Out

from ...errors import SpecError
from .lanes import KINDS, PRODUCT_BITS, Kind, gated, multiplicand, product
from .rounding import FP16, integer_to_float
from .words import register, wire

__all__ = ["ACCUMULATOR_BITS", "SCALES", "Dot", "tree"]

ACCUMULATOR_BITS: dict[Kind, int] = {"int": 16, "fp4": 24, "mixed": 24}
"""Signed width that is exact for a chunk of 64 products and more."""

SCALES: dict[Kind, tuple[int, ...]] = {"int": (0,), "fp4": (-6, -7), "mixed": (-6, -7, 0)}
"""Base-two logarithms of the rounder's factors: FP4 in the even phase, in the odd phase, INT4."""


def tree(m: Module, terms: list[Value], name: str) -> Value:
    """The exact sum of the terms by a balanced tree of adders."""
    level = 0
    while len(terms) > 1:
        pairs = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
        terms = [wire(m, f"{name}_{level}_{i}", pair) for i, pair in enumerate(pairs)]
        level += 1
    return terms[0]


class Dot(Component):  # type: ignore[misc] # Amaranth ships no types
    """An n-way inner product that accumulates: ``acc = (0 if first else acc) + sum(a[i] * b[i])``.

    Operands are registered, so what is given at one clock edge is in `acc` after the next one, and in `out`, where the
    unit rounds, after the one after that. All ports of one step are given together.

    Ports:
        a: n times 4 bits, INT4 codes.
        b: n times 4 bits, codes of the other operand.
        first: this step starts a new sum.
        unsigned: only where asked for: all of `a` is 0...15 instead of -8...7.
        fp4: only for the kind ``mixed``: all of `b` is FP4 instead of INT4.
        acc: signed, the exact sum; in units of 4^-3 where `b` is FP4. Not where the unit rounds.
        scale: only where the unit rounds: which of `SCALES` the sum has; 0 FP4 even, 1 FP4 odd, 2 INT4.
        out: only where the unit rounds: the sum in FP16.

    Args:
        kind: what `b` is.
        lanes: n.
        unsigned: whether the multiplicands can be unsigned.
        accumulator_bits: width of the accumulator; `ACCUMULATOR_BITS` if None.
        rounds: whether the unit ends in a rounder.

    Raises:
        SpecError: if there is no such kind or no lane, or one step's sum does not fit the accumulator.
    """

    def __init__(
        self,
        kind: Kind,
        lanes: int = 4,
        *,
        unsigned: bool = False,
        accumulator_bits: int | None = None,
        rounds: bool = False,
    ) -> None:
        if kind not in KINDS or lanes < 1:
            raise SpecError(
                f"A dot unit of {lanes} {kind!r} lanes; one lane or more of {', '.join(KINDS)} are possible."
            )
        self.kind, self.lanes, self.rounds = kind, lanes, rounds
        self.width = ACCUMULATOR_BITS[kind] if accumulator_bits is None else accumulator_bits
        least = PRODUCT_BITS[kind] + (lanes - 1).bit_length()
        if self.width < least:
            raise SpecError(
                f"An accumulator of {self.width} bits was asked for; "
                f"{lanes} products of kind {kind!r} need {least} or more."
            )
        ports = {"a": In(4).array(lanes), "b": In(4).array(lanes), "first": In(1)}
        if unsigned:
            ports["unsigned"] = In(1)
        if kind == "mixed":
            ports["fp4"] = In(1)
        if rounds:
            ports["out"] = Out(FP16.bits)
            if len(SCALES[kind]) > 1:
                ports["scale"] = In((len(SCALES[kind]) - 1).bit_length())
        else:
            ports["acc"] = Out(signed(self.width))
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        """Operand registers, lanes, tree, accumulator, rounder."""
        m = Module()
        held = {name: register(m, f"{name}_q", getattr(self, name)) for name in self._flags()}
        products = []
        for i in range(self.lanes):
            code_a, code_b = register(m, f"a{i}_q", self.a[i]), register(m, f"b{i}_q", self.b[i])
            a = multiplicand(m, f"number{i}", code_a, held.get("unsigned"))
            products.append(product(m, self.kind, a, code_b, fp4=held.get("fp4"), name=f"product{i}"))
        acc = register(m, "acc_q", shape=signed(self.width))
        old = gated(acc, ~held["first"])
        m.d.sync += acc.eq(old + tree(m, products, "sum"))
        if self.rounds:
            # The scale goes with the sum, one register behind the operands.
            scale = register(m, "scale_acc", held["scale"]) if "scale" in held else 0
            rounded = integer_to_float(m, acc, FP16, SCALES[self.kind], scale)
            m.d.comb += self.out.eq(register(m, "out_q", rounded))
        else:
            m.d.comb += self.acc.eq(acc)
        return m

    def _flags(self) -> list[str]:
        """The one-bit ports and the scale: everything that is held beside the operands."""
        return [name for name in ("first", "unsigned", "fp4", "scale") if name in self.signature.members]
