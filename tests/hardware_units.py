"""What the units must compute, said in exact arithmetic: whole numbers, fractions, and one rounding."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from fractions import Fraction

from halfbyte import oracle
from halfbyte.hardware.rtl.rounding import FloatLayout

FP16_VALUES = [struct.unpack("<e", code.to_bytes(2, "little"))[0] for code in range(1 << 16)]
"""The value of each 16 bits of IEEE binary16, subnormals, infinities and NaN included."""


def decode(layout: FloatLayout, code: int) -> Fraction:
    """The value of a float's bits: a zero exponent field is zero."""
    field, mantissa = code >> layout.mantissa_bits & layout.top, code & ((1 << layout.mantissa_bits) - 1)
    if field == 0:
        return Fraction(0)
    value = ((1 << layout.mantissa_bits) + mantissa) * Fraction(2) ** (field - layout.bias - layout.mantissa_bits)
    return -value if code >> (layout.bits - 1) else value


def rounded(layout: FloatLayout, exact: Fraction) -> int:
    """The bits of an exact number rounded once by the oracle's IEEE rule; then small ones become +0."""
    top = layout.top - 1 - layout.bias
    value = oracle.to_binary(exact, precision=layout.mantissa_bits + 1, min_exponent=-layout.bias * 4, max_exponent=top)
    sign = int(value < 0) << (layout.bits - 1)
    if abs(value) == float("inf"):
        return sign | layout.top << layout.mantissa_bits
    if abs(value) < 2.0 ** (1 - layout.bias):
        return 0
    mantissa, exponent = abs(value).hex().removeprefix("0x1.").split("p")
    fraction = int(mantissa.ljust(13, "0")[:13], 16) >> (52 - layout.mantissa_bits)
    return sign | int(exponent) + layout.bias << layout.mantissa_bits | fraction


def multiply_add(factors: FloatLayout, sum_: FloatLayout, a: int, b: int, c: int) -> int:
    """a * b + c, rounded once."""
    return rounded(sum_, decode(factors, a) * decode(factors, b) + decode(sum_, c))


def fused_dot(
    factors: FloatLayout, sum_: FloatLayout, fraction_bits: int, a: Sequence[int], b: Sequence[int], c: int
) -> int:
    """The sum of the products and c, each cut toward zero below the largest exponent, rounded once."""
    terms = []
    for x, y in zip(a, b, strict=True):
        field = (x >> factors.mantissa_bits & factors.top) + (y >> factors.mantissa_bits & factors.top)
        terms.append((field - 2 * factors.bias, decode(factors, x) * decode(factors, y)))
    terms.append(((c >> sum_.mantissa_bits & sum_.top) - sum_.bias, decode(sum_, c)))
    largest = max((exponent for exponent, value in terms if value), default=0)
    unit = Fraction(2) ** (largest - fraction_bits)
    return rounded(sum_, sum((int(value / unit) for _, value in terms), 0) * unit)


def random_float(layout: FloatLayout, draw: random.Random, field: int | None = None) -> int:
    """A float's bits that is not infinite, its mantissa often all ones, all zeros or nearly so."""
    if field is None:
        field = draw.randrange(layout.top)
    width = layout.mantissa_bits
    plain = draw.getrandbits(width)
    mantissa = draw.choice((plain, plain, 0, (1 << width) - 1, 1, 1 << (width - 1), plain & draw.getrandbits(width)))
    return draw.getrandbits(1) << (layout.bits - 1) | min(max(field, 0), layout.top - 1) << width | mantissa


def addend(factors: FloatLayout, sum_: FloatLayout, a: int, b: int, draw: random.Random) -> int:
    """An addend for a product: often its opposite, or near its opposite, or only near its exponent."""
    exact = -decode(factors, a) * decode(factors, b)
    opposite = rounded(sum_, exact)
    field = opposite >> sum_.mantissa_bits & sum_.top
    kind = draw.randrange(4)
    if kind == 0 or field == sum_.top:
        return random_float(sum_, draw)
    if kind == 1:
        return opposite
    if kind == 2:
        return opposite ^ draw.getrandbits(min(4, sum_.mantissa_bits))
    return random_float(sum_, draw, field + draw.randrange(-sum_.mantissa_bits - 4, 2 * sum_.mantissa_bits))
