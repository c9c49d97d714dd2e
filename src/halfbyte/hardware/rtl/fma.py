"""The floating-point baseline: a fused multiply-add that rounds once.

One path, as small as we can write it: the addend is aligned to the product, what falls off on the right is one sticky
bit, one adder serves addition and subtraction, a stagewise normalizer counts while it shifts, and the rounder is that
of the 4-bit units. The simplified rules of these floats stand in `halfbyte.hardware.rtl.rounding`.
"""

from __future__ import annotations

from dataclasses import replace

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib.wiring import Component, In, Out

from .rounding import FloatLayout, fields, pack
from .words import align, normalize, register, signed_for, wire

__all__ = ["FMA", "multiply_add"]


class FMA(Component):  # type: ignore[misc] # Amaranth ships no types
    """Multiplies and accumulates: ``acc = round((0 if first else acc) + a * b)``, one product a cycle.

    Operands are registered, so what is given at one clock edge is in `acc` after the next one.

    Ports:
        a: a float's bits, not infinite.
        b: a float's bits, not infinite.
        first: this step starts a new sum.
        acc: the sum, a float's bits.

    Args:
        factors: layout of `a` and `b`.
        sum_: layout of the sum.
    """

    def __init__(self, factors: FloatLayout, sum_: FloatLayout) -> None:
        self.factors, self.sum = factors, sum_
        super().__init__({"a": In(factors.bits), "b": In(factors.bits), "first": In(1), "acc": Out(sum_.bits)})

    def elaborate(self, platform: object) -> Module:
        """Operand registers, multiplier, aligner, adder, normalizer, rounder, accumulator."""
        m = Module()
        a, b = register(m, "a_q", self.a), register(m, "b_q", self.b)
        first = register(m, "first_q", self.first)
        acc = register(m, "acc_q", shape=self.sum.bits)
        m.d.sync += acc.eq(multiply_add(m, a, b, acc, first, self.factors, self.sum))
        m.d.comb += self.acc.eq(acc)
        return m


def multiply_add(
    m: Module, a: Value, b: Value, c: Value, without_c: Value, factors: FloatLayout, sum_: FloatLayout
) -> Value:
    """a * b + c, rounded once.

    The frame, from the top: the addend's significand, two places that keep it clear of the product, the product, and
    as many places as cancellation may bring up. So wide, a bit that falls off the right end can only be sticky: with
    M bits of mantissa in a factor and Mc in the sum, the addend loses bits only when it is below 2^Mc units of the
    frame's last place and the product is at least 2^(2M + tail) >= 2^(Mc + 2) of them.
    """
    sign_a, exponent_a, mantissa_a, nonzero_a = fields(m, factors, a, "a")
    sign_b, exponent_b, mantissa_b, nonzero_b = fields(m, factors, b, "b")
    sign_c, exponent_c, mantissa_c, stored_c = fields(m, sum_, c, "c")
    nonzero_c = wire(m, "c_counts", stored_c & ~without_c)
    live = wire(m, "live", nonzero_a & nonzero_b)
    tail = max(0, sum_.mantissa_bits + 2 - 2 * factors.mantissa_bits)
    width = (sum_.mantissa_bits + 1) + 2 + (2 * factors.mantissa_bits + 2) + tail

    significand_a = Cat(mantissa_a, C(1, 1)) & live.replicate(factors.mantissa_bits + 1)
    product = wire(m, "product", significand_a * Cat(mantissa_b, C(1, 1)))
    # The exponent field that the frame's top bit has when the product rules, and the addend's distance from there.
    base = sum_.bias - 2 * factors.bias + sum_.mantissa_bits + 4
    reach = signed_for(base - sum_.top, base + 2 * factors.top)
    ruler = wire(m, "ruler", exponent_a + exponent_b + base, reach)
    exponent_now = exponent_c & (~without_c).replicate(sum_.exponent_bits)
    distance = wire(m, "distance", ruler - exponent_now, reach)
    addend_rules = wire(m, "addend_rules", ~live | (distance < 0))
    shift = wire(m, "shift", distance[:-1] & (~addend_rules).replicate(reach.width - 1))
    top = wire(m, "top", Mux(addend_rules, exponent_now, ruler))

    significand_c = Cat(mantissa_c, C(1, 1)) & nonzero_c.replicate(sum_.mantissa_bits + 1)
    aligned, sticky = align(m, significand_c, shift, width, "addend")
    sign_ab = sign_a ^ sign_b
    subtract = wire(m, "subtract", sign_ab ^ sign_c)
    # P + ~C = P - C - 1: with a carry out, one is missing (unless C had a tail, which makes up for it: the number then
    # lies strictly between the word and the word plus one); without a carry, its inverse is C - P.
    total = Signal(width + 1, name="total")
    m.d.comb += total.eq(Cat(C(0, tail), product) + (aligned ^ subtract.replicate(width)))
    flip = wire(m, "flip", subtract & ~total[-1])
    plus_one = wire(m, "plus_one", subtract & total[-1] & ~sticky)
    word = wire(m, "word", total[:-1] ^ flip.replicate(width))
    number = normalize(m, word, sum_.mantissa_bits + 2, plus_one=plus_one)
    low = signed_for(min(base, 0) - (1 << len(number.count)), max(base + 2 * factors.top, sum_.top))
    exponent = wire(m, "exponent", top - number.count, low)
    number = replace(number, sticky=number.sticky | sticky)
    return pack(m, sum_, number, sign=sign_ab ^ flip, exponent=exponent, plus_one=plus_one)
