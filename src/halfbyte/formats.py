"""Which numbers exist in four bits (and in eight): every format as a table from code to value.

A format is a finite set of numbers. All of ours are whole multiples of one ``unit``, so a format is a table of
*integers* times a unit: INT4 is -8...7 times 1, the radix-4 gradient format is 0, 1, 4, 16, ... 4096 times 2^-6, E2M1
is 0, 1, 2, 3, 4, 6, 8, 12 times 1/2. That is why a product of two such tensors can be summed exactly in integers.

Two families round differently:

* integers and small floats round to the nearest value, ties to the even code (IEEE 754);
* logarithmic formats round at the midpoint of two neighboring levels, ties away from zero, and treat the level below
  the smallest as if it existed, so underflow starts at the midpoint between it and the smallest (Sun et al.,
  NeurIPS 2020, Fig. 2c: ``floor(log4(1.6 |x|))``; for radix r the factor is ``2r / (r + 1)``).

Every format saturates: what lies beyond the largest value becomes the largest value.
This module imports neither torch nor anything else of ours except the errors.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Literal

from .errors import SpecError, UnknownNameError

__all__ = [
    "FORMATS",
    "Format",
    "Phase",
    "e8m0",
    "fp4_e1m2",
    "fp4_e2m1",
    "fp4_e3m0",
    "fp4_e3m0_r4",
    "fp4_e3m0_r4_odd",
    "fp8_e4m3",
    "fp8_e5m2",
    "get",
    "int4",
    "int8",
    "integer",
    "logarithmic",
    "minifloat",
    "uint4",
]


class Phase(enum.Enum):
    """Which of the two interleaved sets of levels a logarithmic format uses (Sun et al. 2020, section 3.3)."""

    EVEN = "even"
    ODD = "odd"


@dataclass(frozen=True, kw_only=True)
class Format:
    """A finite set of numbers and its codes. Build one with `integer`, `logarithmic` or `minifloat`.

    Attributes:
        name: its name in `FORMATS`.
        kind: ``"int"`` (two's complement or unsigned), ``"log"`` (sign and exponent only), ``"float"`` (sign,
            exponent, mantissa) or ``"scale"`` (unsigned power of two).
        bits: width of a code; the table has ``2**bits`` rows.
        signed: whether negative numbers exist.
        radix: base of the exponent.
        exponent_bits: width of the exponent field; 0 for integers.
        mantissa_bits: width of the mantissa field; 0 for integers and logarithmic formats.
        bias: what is subtracted from the exponent field.
        phase: `Phase.ODD` levels lie halfway (on the logarithmic axis) between `Phase.EVEN` levels.
        specials: codes that are no numbers: ``"none"``, ``"nan"`` (the top magnitude only, OCP E4M3 and E8M0) or
            ``"ieee"`` (the whole top exponent is infinity and NaN, OCP E5M2).
        description: one sentence for people.
    """

    name: str
    kind: Literal["int", "log", "float", "scale"]
    bits: int
    signed: bool
    radix: int = 2
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    phase: Phase = Phase.EVEN
    specials: Literal["none", "nan", "ieee"] = "none"
    description: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return f"Format({self.name})"

    @cached_property
    def unit(self) -> Fraction:
        """The number of which every value is a whole multiple."""
        if self.kind == "int":
            return Fraction(1)
        if self.kind == "log":
            shift = Fraction(1, math.isqrt(self.radix)) if self.phase is Phase.ODD else Fraction(1)
            return shift * Fraction(self.radix) ** (1 - self.bias)
        if self.kind == "scale":
            return Fraction(2) ** -self.bias
        return Fraction(2) ** (1 - self.bias - self.mantissa_bits)

    @cached_property
    def integers(self) -> tuple[int | None, ...]:
        """For each code its value in units; None where the code is no number (NaN, infinity). Shape (2**bits,)."""
        if self.kind == "int":
            half = 1 << (self.bits - 1)
            return tuple((c ^ half) - half if self.signed else c for c in range(1 << self.bits))
        if self.kind == "scale":
            return tuple(None if c == 255 else 1 << c for c in range(256))
        positive = tuple(self._magnitude(c) for c in range(1 << (self.bits - 1)))
        return positive + tuple(None if m is None else -m for m in positive)

    def _magnitude(self, code: int) -> int | None:
        """The value, in units, of a code without its sign bit."""
        if self.kind == "log":
            return 0 if code == 0 else int(self.radix ** (code - 1))
        exponent, mantissa = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        top = (1 << self.exponent_bits) - 1
        if self.specials == "ieee" and exponent == top:
            return None
        if self.specials == "nan" and exponent == top and mantissa == (1 << self.mantissa_bits) - 1:
            return None
        return mantissa if exponent == 0 else ((1 << self.mantissa_bits) + mantissa) << (exponent - 1)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The table: index is the code, entry its value. Codes that are no numbers hold NaN or an infinity."""
        return tuple(self._value(code) for code in range(1 << self.bits))

    def _value(self, code: int) -> float:
        whole = self.integers[code]
        negative = self.kind in ("log", "float") and code >> (self.bits - 1) == 1
        if whole is None:
            infinite = self.specials == "ieee" and code & ((1 << self.mantissa_bits) - 1) == 0
            special = math.inf if infinite else math.nan
            return -special if negative else special
        value = float(whole * self.unit)
        return -0.0 if negative and whole == 0 else value

    @cached_property
    def max(self) -> float:
        """The largest value; what lies beyond becomes this."""
        return max(v for v in self.values if math.isfinite(v))

    @cached_property
    def saturate(self) -> tuple[float, float]:
        """The smallest and the largest value: the limits to which everything outside is set."""
        return min(v for v in self.values if math.isfinite(v)), self.max

    @cached_property
    def min_positive(self) -> float:
        """The smallest value above zero."""
        return min(v for v in self.values if v > 0)

    @cached_property
    def max_integer(self) -> int:
        """The largest magnitude in units: what bounds a sum of products."""
        return max(abs(i) for i in self.integers if i is not None)

    @cached_property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """The numbers from zero up, as (code, value in units), for formats with a sign bit or without negatives."""
        rows = [(i, c) for c, i in enumerate(self.integers) if i is not None and i >= 0]
        return tuple((c, i) for i, c in sorted(rows) if self.kind == "int" or c < 1 << (self.bits - self.signed))

    @cached_property
    def thresholds(self) -> tuple[tuple[Fraction, bool], ...]:
        """Where the nearest level changes: for each level but the first, (magnitude, whether a tie goes up).

        Returns:
            One pair a step, in ascending order; ``len(levels) - 1`` of them. The magnitudes are exact.
        """
        steps = []
        for (low_code, low), (code, high) in zip(self.levels, self.levels[1:], strict=False):
            if self.kind == "log":
                below = Fraction(high, self.radix) if low_code == 0 else Fraction(low)
                steps.append(((below + high) / 2 * self.unit, True))
            else:
                steps.append((Fraction(low + high, 2) * self.unit, code % 2 == 0))
        return tuple(steps)


def integer(bits: int, *, signed: bool = True, description: str = "") -> Format:
    """An integer format.

    Args:
        bits: width, 1 to 8.
        signed: two's complement if true, else 0...2^bits - 1.
        description: one sentence for people.

    Raises:
        SpecError: if the width is not 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise SpecError(f"An integer format of {bits} bits was asked for; 1 to 8 bits are possible.")
    name = f"{'' if signed else 'u'}int{bits}"
    return Format(name=name, kind="int", bits=bits, signed=signed, description=description)


def logarithmic(
    radix: int, *, exponent_bits: int = 3, bias: int = 4, phase: Phase = Phase.EVEN, description: str = ""
) -> Format:
    """A sign and an exponent, nothing else: 0 and ``radix**(c - bias)`` for the exponent codes c = 1, 2, ...

    Args:
        radix: base of the exponent, 2 or more (Sun et al. chose 4 by trial).
        exponent_bits: width of the exponent field.
        bias: what is subtracted from the field; 4 centers a three-bit field on 1.
        phase: `Phase.ODD` divides every level by the square root of the radix, which must be whole (radix 4: by 2).
        description: one sentence for people.

    Raises:
        SpecError: if the radix is below 2 or has no whole square root where the odd phase is asked for.
    """
    if radix < 2:
        raise SpecError(f"A logarithmic format of radix {radix} was asked for; the radix must be 2 or more.")
    if phase is Phase.ODD and math.isqrt(radix) ** 2 != radix:
        raise SpecError(f"The odd phase of radix {radix} would need its square root to be whole; 4, 9 and 16 have one.")
    if not 1 <= exponent_bits <= 7:
        raise SpecError(f"An exponent field of {exponent_bits} bits was asked for; 1 to 7 bits are possible.")
    suffix = (
        ("" if radix == 2 else f"_r{radix}")
        + ("" if bias == 4 else f"_b{bias}")
        + ("_odd" if phase is Phase.ODD else "")
    )
    return Format(
        name=f"fp{exponent_bits + 1}_e{exponent_bits}m0{suffix}",
        kind="log",
        bits=exponent_bits + 1,
        signed=True,
        radix=radix,
        exponent_bits=exponent_bits,
        bias=bias,
        phase=phase,
        description=description,
    )


def minifloat(
    exponent_bits: int,
    mantissa_bits: int,
    *,
    bias: int,
    specials: Literal["none", "nan", "ieee"] = "none",
    description: str = "",
) -> Format:
    """A small float with subnormals: sign, exponent, mantissa.

    Args:
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the mantissa field.
        bias: what is subtracted from the exponent field.
        specials: which codes are no numbers, see `Format`.
        description: one sentence for people.

    Raises:
        SpecError: if the fields and the sign fill more than eight bits.
    """
    bits = 1 + exponent_bits + mantissa_bits
    if bits > 8 or exponent_bits < 1 or mantissa_bits < 1:
        raise SpecError(f"E{exponent_bits}M{mantissa_bits} was asked for; both fields need a bit, all of it at most 8.")
    usual = (1 << (exponent_bits - 1)) - 1 or 1
    return Format(
        name=f"fp{bits}_e{exponent_bits}m{mantissa_bits}{'' if bias == usual else f'_b{bias}'}",
        kind="float",
        bits=bits,
        signed=True,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        bias=bias,
        specials=specials,
        description=description,
    )


int4 = integer(4, description="Whole numbers -8 to 7: weights and signed activations.")
uint4 = integer(4, signed=False, description="Whole numbers 0 to 15: activations after a ReLU.")
int8 = integer(8, description="Whole numbers -128 to 127: the wider control.")
fp4_e3m0_r4 = logarithmic(4, description="Powers of four, 4^-3 to 4^3, and zero: gradients, even phase (IBM 2020).")
fp4_e3m0_r4_odd = logarithmic(
    4, phase=Phase.ODD, description="The even levels halved, 2^-7 to 2^5, and zero: gradients, odd phase (IBM 2020)."
)
fp4_e3m0 = logarithmic(2, description="Powers of two, 2^-3 to 2^3, and zero: the radix-2 baseline 1-3-0.")
fp4_e2m1 = minifloat(2, 1, bias=1, description="0, 0.5, 1, 1.5, 2, 3, 4, 6: OCP FP4, the radix-2 baseline 1-2-1.")
fp4_e1m2 = minifloat(1, 2, bias=1, description="0 to 1.75 in steps of 0.25: a uniform grid with a sign bit.")
fp8_e4m3 = minifloat(4, 3, bias=7, specials="nan", description="OCP FP8 E4M3: up to 448, NaN, no infinity.")
fp8_e5m2 = minifloat(5, 2, bias=15, specials="ieee", description="OCP FP8 E5M2: up to 57344, infinity, NaN.")
e8m0 = Format(
    name="e8m0",
    kind="scale",
    bits=8,
    signed=False,
    exponent_bits=8,
    bias=127,
    specials="nan",
    description="Powers of two, 2^-127 to 2^127: the block scale of the MX formats.",
)

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        int4,
        uint4,
        int8,
        fp4_e3m0_r4,
        fp4_e3m0_r4_odd,
        fp4_e3m0,
        fp4_e2m1,
        fp4_e1m2,
        fp8_e4m3,
        fp8_e5m2,
        e8m0,
    )
}


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        UnknownNameError: if there is none; the text suggests the nearest name.
    """
    if name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
    return FORMATS[name]
