"""From an exact number to a float: round to nearest, ties to even, once.

A float here is IEEE-like, with four simplifications that all favor the floating-point baselines: a zero exponent field
is zero (no subnormals: what is smaller flushes to zero), the top exponent field is infinity and is only ever produced,
NaN does not exist, and the sign of a zero result is plus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amaranth.hdl import C, Cat, Module, Mux, Shape, Value, signed
from amaranth.lib.wiring import Component, In, Out

from ...errors import SpecError
from .words import Normalized, normalize, wire

__all__ = [
    "BF16",
    "DLFLOAT16",
    "FP8",
    "FP16",
    "FP32",
    "FloatLayout",
    "Rounder",
    "fields",
    "integer_to_float",
    "pack",
    "round_up",
]


@dataclass(frozen=True, kw_only=True)
class FloatLayout:
    """How a float is laid out: sign, exponent field, mantissa field, from the top bit down.

    Attributes:
        exponent_bits: width of the exponent field; the bias is half its range, as in IEEE 754.
        mantissa_bits: width of the mantissa field.
    """

    exponent_bits: int
    mantissa_bits: int

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def top(self) -> int:
        """The exponent field of infinity."""
        return (1 << self.exponent_bits) - 1


FP16 = FloatLayout(exponent_bits=5, mantissa_bits=10)
BF16 = FloatLayout(exponent_bits=8, mantissa_bits=7)
FP32 = FloatLayout(exponent_bits=8, mantissa_bits=23)
DLFLOAT16 = FloatLayout(exponent_bits=6, mantissa_bits=9)
"""The 1-6-9 layout of IBM's training chips (Agrawal et al., ARITH 2019), under the rules of this module."""
FP8 = FloatLayout(exponent_bits=5, mantissa_bits=3)
"""1-5-3: nine bits hold both 8-bit formats of hybrid FP8, 1-4-3 and 1-5-2 (Sun et al., NeurIPS 2019)."""


def fields(m: Module, layout: FloatLayout, code: Value, name: str) -> tuple[Value, Value, Value, Value]:
    """Sign, exponent field, mantissa field, and whether the number is not zero."""
    mantissa = code[: layout.mantissa_bits]
    exponent = code[layout.mantissa_bits : -1]
    return code[-1], exponent, mantissa, wire(m, f"{name}_nonzero", exponent.any())


def round_up(number: Normalized, plus_one: Value | int = 0) -> Value:
    """Whether rounding to nearest, ties to even, adds one to all but the lowest bit of ``number.top``.

    With `plus_one` the number is one more than the word, in units of its last place. A guard bit of one then always
    rounds up, and 0111...1 below the kept bits is the tie.
    """
    last, guard, sticky = number.top[1], number.top[0], number.sticky
    return Mux(plus_one, guard | (~sticky & last), guard & (sticky | last))


def pack(
    m: Module, layout: FloatLayout, number: Normalized, *, sign: Value, exponent: Value, plus_one: Value | int = 0
) -> Value:
    """The float's bits.

    Args:
        m: the module.
        layout: of the result.
        number: with ``mantissa_bits + 2`` bits kept: the leading one, the mantissa and the guard bit.
        sign: of the result.
        exponent: what the exponent field would be before rounding; signed.
        plus_one: as it was given to `normalize`.
    """
    mantissa = number.top[1:-1]
    # A carry out of the mantissa leaves it zero and raises the exponent by one, which is right.
    rounded = wire(m, "rounded", Cat(mantissa, exponent).as_signed() + round_up(number, plus_one))
    field = wire(m, "field", rounded[layout.mantissa_bits :].as_signed())
    infinite = wire(m, "infinite", field >= layout.top)
    nonzero = wire(m, "nonzero", number.top[-1] & (field > 0))
    low = Mux(infinite, 0, rounded[: layout.mantissa_bits])
    high = Mux(infinite, layout.top, field[: layout.exponent_bits])
    magnitude = Cat(low, high[: layout.exponent_bits]) & nonzero.replicate(layout.bits - 1)
    return wire(m, "packed", Cat(magnitude, sign & nonzero))


def integer_to_float(
    m: Module, integer: Value, layout: FloatLayout, scales: Sequence[int], scale: Value | int = 0
) -> Value:
    """A signed integer, times a power of two, as a float: normalize, round to nearest even, pack.

    Args:
        m: the module.
        integer: signed.
        layout: of the result.
        scales: the base-two logarithms of the scales to choose from.
        scale: which one.
    """
    width = len(integer)
    sign = wire(m, "negative", integer[-1])
    # -x = ~x + 1; a negative number keeps its distance of one until it is rounded.
    inverted = wire(m, "inverted", integer[:-1] ^ sign.replicate(width - 1))
    number = normalize(m, inverted, layout.mantissa_bits + 2, plus_one=sign)
    shape = Shape(max(layout.exponent_bits, width.bit_length()) + 2, signed=True)
    starts = [layout.bias + width - 2 + log2 for log2 in scales]
    start: Value = C(starts[0], shape)
    for index, other in enumerate(starts[1:], 1):
        start = Mux(Value.cast(scale) == index, C(other, shape), start)
    exponent = wire(m, "exponent", start - number.count, shape)
    return pack(m, layout, number, sign=sign, exponent=exponent, plus_one=sign)


class Rounder(Component):  # type: ignore[misc] # Amaranth ships no types
    """Integer to float, without registers: what stands between an integer accumulator and the rest of a chip.

    Ports:
        integer: signed.
        scale: which of `scales`; only where there is a choice.
        out: the float's bits. What overflows is infinity, what underflows is zero.

    Args:
        width: bits of the integer.
        layout: of the result.
        scales: base-two logarithms of the factors to choose from, see `halfbyte.hardware.rtl.dots.SCALES`.

    Raises:
        SpecError: if the integer is narrower than two bits or there is no scale.
    """

    def __init__(self, width: int = 24, layout: FloatLayout = FP16, scales: Sequence[int] = (0,)) -> None:
        if width < 2 or not scales:
            raise SpecError(f"A rounder of {width} bits with scales {scales!r}; 2 bits and one scale are the least.")
        self.layout, self.scales = layout, tuple(scales)
        ports = {"integer": In(signed(width)), "out": Out(layout.bits)}
        if len(self.scales) > 1:
            ports["scale"] = In((len(self.scales) - 1).bit_length())
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        """The circuit of `integer_to_float`."""
        m = Module()
        m.d.comb += self.out.eq(integer_to_float(m, self.integer, self.layout, self.scales, getattr(self, "scale", 0)))
        return m
