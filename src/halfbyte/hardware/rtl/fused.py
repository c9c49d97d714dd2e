"""The strong floating-point baseline: an n-way dot product that aligns all its terms to the largest exponent.

This is how tensor cores add: every product, and the accumulator, is moved to the largest exponent among them, cut off
toward zero at a fixed place, summed as an integer, and rounded once. It is smaller than n fused multiply-adds, and not
exact: what lies below the cut is lost, however many terms there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import C, Cat, Module, Mux, Value
from amaranth.lib.wiring import Component, In, Out

from ...errors import SpecError
from .dots import tree
from .rounding import FloatLayout, fields, pack
from .words import align, normalize, register, wire

__all__ = ["FusedDot"]


class FusedDot(Component):  # type: ignore[misc] # Amaranth ships no types
    """Adds n products and the accumulator: ``acc = round(sum(cut(a[i] * b[i])) + cut(0 if first else acc))``.

    With E the largest exponent among the terms that are not zero (a product's is the sum of its factors' exponents),
    `cut` drops what is below 2^(E - fraction_bits), toward zero. Operands are registered, so what is given at one clock
    edge is in `acc` after the next one.

    Ports:
        a: n floats' bits, none infinite.
        b: n floats' bits, none infinite.
        first: this step starts a new sum.
        acc: the sum, a float's bits.

    Args:
        factors: layout of `a` and `b`.
        sum_: layout of the sum.
        lanes: n.

    Raises:
        SpecError: if there is no lane.
    """

    def __init__(self, factors: FloatLayout, sum_: FloatLayout, lanes: int = 4) -> None:
        if lanes < 1:
            raise SpecError(f"A fused dot unit of {lanes} lanes was asked for; it takes one or more.")
        self.factors, self.sum, self.lanes = factors, sum_, lanes
        # Three places below the sum's last one: five cuts lose less than one unit of it together.
        self.fraction_bits = sum_.mantissa_bits + 3
        offset = sum_.bias - 2 * factors.bias
        self._key_of_product, self._key_of_sum = max(0, offset), max(0, -offset)
        super().__init__(
            {
                "a": In(factors.bits).array(lanes),
                "b": In(factors.bits).array(lanes),
                "first": In(1),
                "acc": Out(sum_.bits),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Operand registers, multipliers, maximum, aligners, tree, normalizer, rounder, accumulator."""
        m = Module()
        first = register(m, "first_q", self.first)
        acc = register(m, "acc_q", shape=self.sum.bits)
        terms = []
        for i in range(self.lanes):
            a, b = register(m, f"a{i}_q", self.a[i]), register(m, f"b{i}_q", self.b[i])
            terms.append(self._product(m, a, b, f"term{i}"))
        terms.append(self._addend(m, acc, first))
        largest = _largest(m, [term.key for term in terms])
        signs = Cat(*(term.sign for term in terms))
        total = wire(m, "total", tree(m, [self._aligned(m, term, largest) for term in terms], "sum") + ones(m, signs))
        sign = wire(m, "negative", total[-1])
        inverted = wire(m, "inverted", total[:-1] ^ sign.replicate(len(total) - 1))
        number = normalize(m, inverted, self.sum.mantissa_bits + 2, plus_one=sign)
        # The key of the sum's top bit, given that bit `fraction_bits` has the largest key.
        start = len(inverted) - 1 - self.fraction_bits - self._key_of_sum
        exponent = wire(m, "exponent", largest - number.count + start)
        m.d.sync += acc.eq(pack(m, self.sum, number, sign=sign, exponent=exponent, plus_one=sign))
        m.d.comb += self.acc.eq(acc)
        return m

    def _product(self, m: Module, a: Value, b: Value, name: str) -> _Term:
        """One exact product."""
        sign_a, exponent_a, mantissa_a, nonzero_a = fields(m, self.factors, a, f"{name}_a")
        sign_b, exponent_b, mantissa_b, nonzero_b = fields(m, self.factors, b, f"{name}_b")
        live = wire(m, f"{name}_live", nonzero_a & nonzero_b)
        magnitude = (Cat(mantissa_a, live) & live.replicate(self.factors.mantissa_bits + 1)) * Cat(mantissa_b, C(1, 1))
        key = exponent_a + exponent_b + self._key_of_product
        return _Term(
            name=name,
            sign=sign_a ^ sign_b,
            key=wire(m, f"{name}_key", key & live.replicate(len(key))),
            magnitude=wire(m, f"{name}_magnitude", magnitude),
            width=self.fraction_bits + 2,
        )

    def _addend(self, m: Module, acc: Value, first: Value) -> _Term:
        """The old sum."""
        sign, exponent, mantissa, stored = fields(m, self.sum, acc, "c")
        live = wire(m, "c_live", stored & ~first)
        key = exponent + self._key_of_sum
        return _Term(
            name="c",
            sign=sign,
            key=wire(m, "c_key", key & live.replicate(len(key))),
            magnitude=wire(m, "c_magnitude", Cat(mantissa, C(1, 1)) & live.replicate(self.sum.mantissa_bits + 1)),
            width=self.fraction_bits + 1,
        )

    def _aligned(self, m: Module, term: _Term, largest: Value) -> Value:
        """The term in units of the cut; a negative one is inverted, which is one too few."""
        distance = wire(m, f"{term.name}_distance", largest - term.key, largest.shape())
        frame, _ = align(m, term.magnitude, distance, term.width, term.name)
        return wire(m, f"{term.name}_signed", Cat(frame ^ term.sign.replicate(term.width), term.sign).as_signed())


@dataclass(frozen=True, kw_only=True)
class _Term:
    """What is summed: a sign, an exponent above a common zero (0 if the number is zero), and a magnitude.

    The magnitude is to stand at the top of a frame of `width` bits.
    """

    name: str
    sign: Value
    key: Value
    magnitude: Value
    width: int


def _largest(m: Module, keys: list[Value]) -> Value:
    """The largest of the keys."""
    best = keys[0]
    for i, key in enumerate(keys[1:]):
        best = wire(m, f"largest{i}", Mux(key > best, key, best))
    return best


def ones(m: Module, bits: Value) -> Value:
    """How many bits are set."""
    return tree(m, [bits[i] for i in range(len(bits))], "ones")
