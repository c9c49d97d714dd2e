"""Small floats in NumPy, exactly: the numbers that the floating-point units must produce.

Everything is computed in binary64, which holds every product of two factors of up to 24 bits exactly. A sum may not
fit; it is then rounded to odd (the neighbor whose last bit is one), which keeps a later rounding to half as many bits
right (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Trans. Computers 57(4), 2008). Rounding
it to nearest instead would round twice.

The floats are those of `halfbyte.hardware.rtl.rounding`: IEEE layouts without subnormals and without NaN.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .planes import Words

__all__ = ["Floats", "Layout", "add_odd", "decode", "encode", "finite_codes"]

Floats = NDArray[np.float64]


class Layout(Protocol):
    """Sign, exponent field and mantissa field, from the top bit down; the bias is half the exponent's range."""

    @property
    def exponent_bits(self) -> int:
        """Width of the exponent field."""

    @property
    def mantissa_bits(self) -> int:
        """Width of the mantissa field."""


def decode(layout: Layout, codes: Words) -> Floats:
    """The numbers that codes stand for; a zero exponent field is zero, the top one counts as finite.

    Args:
        layout: of the codes.
        codes: shape (n,).
    """
    mantissa_bits, exponent_bits = layout.mantissa_bits, layout.exponent_bits
    mantissa = (codes & ((1 << mantissa_bits) - 1)) | (1 << mantissa_bits)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    sign = 1.0 - 2.0 * ((codes >> (mantissa_bits + exponent_bits)) & 1)
    value = np.ldexp(sign * mantissa, exponent.astype(np.int32) - bias - mantissa_bits)
    return np.where(exponent == 0, 0.0, value)


def encode(layout: Layout, x: Floats) -> NDArray[np.int64]:
    """The codes of numbers, rounded to nearest, ties to even, as if the exponent had no limits.

    After that what is too large becomes infinity, and what is too small for a normal number becomes plus zero.

    Args:
        layout: of the codes.
        x: finite; exact, or rounded to odd with at least two bits more than the layout has.
    """
    mantissa_bits, exponent_bits = layout.mantissa_bits, layout.exponent_bits
    fraction, exponent = np.frexp(np.abs(x))
    mantissa = np.rint(np.ldexp(fraction, mantissa_bits + 1)).astype(np.int64)
    # A carry, from 11...1 to 100...0, is one more in the field and nothing in the mantissa.
    field = exponent.astype(np.int64) - 1 + (1 << (exponent_bits - 1)) - 1
    magnitude = (field << mantissa_bits) + mantissa - (1 << mantissa_bits)
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    magnitude = np.minimum(magnitude, infinity)
    sign = (x < 0).astype(np.int64) << (mantissa_bits + exponent_bits)
    return np.where((x == 0) | (magnitude < 1 << mantissa_bits), 0, sign | magnitude)


def add_odd(x: Floats, y: Floats) -> Floats:
    """x + y, rounded to odd where binary64 cannot hold it.

    Args:
        x: shape (n,), finite.
        y: shape (n,), finite; the sum must not overflow.
    """
    total = x + y
    shifted = total - x
    # Knuth's two-sum: what the rounding of the sum dropped, exactly.
    dropped = (x - (total - shifted)) + (y - shifted)
    bits = total.view(np.int64)
    outward = (dropped > 0) == (total > 0)
    step = np.where(outward, 1, -1) * ((dropped != 0) & (bits & 1 == 0))
    result: Floats = (bits + step).view(np.float64)
    return result


def finite_codes(layout: Layout, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    """Random codes of finite numbers: half of them uniform, the others with the fields at which circuits go wrong.

    Those have an exponent at or beside an end or the middle of its range, and a mantissa of zeros, of ones, or of a few
    leading random bits, which is what makes ties.

    Args:
        layout: of the codes.
        rng: where the numbers come from.
        n: how many.
    """
    mantissa_bits, top = layout.mantissa_bits, (1 << layout.exponent_bits) - 1
    ones, middle = (1 << mantissa_bits) - 1, top >> 1
    exponent = rng.integers(0, top, n)
    mantissa = rng.integers(0, ones + 1, n)
    extreme = rng.choice([0, 1, 2, middle - 1, middle, middle + 1, top - 2, top - 1], n)
    few = mantissa & (ones << rng.integers(0, mantissa_bits + 1, n))
    special = np.where(rng.random(n) < 0.5, few, rng.choice([0, 1, 2, ones - 1, ones], n))
    plain = rng.random(n) < 0.5
    magnitude = (np.where(plain, exponent, extreme) << mantissa_bits) | np.where(plain, mantissa, special & ones)
    return magnitude | rng.integers(0, 2, n) << (mantissa_bits + layout.exponent_bits)
