"""The truth: scalar, exact, slow. Every kernel must equal it bit for bit.

Numbers are `fractions.Fraction`; nothing here is rounded unless the definition says so, and then by `to_binary`, which
rounds as IEEE 754 does. The rules are written as the papers state them (a search over the table, a walk along the
exponents), not as kernels compute them (thresholds, bit tricks), so that agreement means something.

    >>> from halfbyte import formats, oracle
    >>> [float(oracle.round(formats.fp4_e3m0_r4, x)) for x in (0.6, 0.625, 100.0)]
    [0.25, 1.0, 64.0]
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from fractions import Fraction

from .formats import Format, Phase, fp4_e2m1

__all__ = [
    "decode",
    "encode",
    "encode_stochastic",
    "hadamard",
    "matmul",
    "mx_exponent",
    "quantize",
    "round",
    "to_binary",
]

Number = Fraction | int | float


def decode(fmt: Format, code: int) -> Fraction:
    """The value of a code. The sign of a negative zero is lost: a `Fraction` has none.

    Raises:
        ValueError: if the code is outside the table or is no number (NaN, infinity).
    """
    if not 0 <= code < 1 << fmt.bits:
        raise ValueError(f"{fmt.name} has the codes 0 to {(1 << fmt.bits) - 1}; got {code}.")
    whole = fmt.integers[code]
    if whole is None:
        raise ValueError(f"Code {code} of {fmt.name} is {fmt.values[code]}, no number.")
    return whole * fmt.unit


def encode(fmt: Format, x: Number) -> int:
    """The code of the nearest value by the format's own rule (see `halfbyte.formats`).

    Beyond the largest value, infinities included, the result saturates. The sign bit of a sign-magnitude format is the
    sign of x, also where the magnitude rounds to zero. NaN gives the code of NaN where one exists, else that of zero:
    whoever quantizes a tensor must detect NaN before.

    Args:
        fmt: the format.
        x: an exact number; a float is taken at its exact value.
    """
    if isinstance(x, float) and math.isnan(x):
        return next((c for c, v in enumerate(fmt.values) if math.isnan(v)), 0)
    negative = math.copysign(1.0, x) < 0 if isinstance(x, float) else x < 0
    if isinstance(x, float) and math.isinf(x):
        return fmt.values.index(fmt.saturate[0] if negative else fmt.saturate[1])
    exact = Fraction(x)
    if fmt.kind == "int":
        low, high = (int(v) for v in fmt.saturate)
        # Python rounds a Fraction half to even.
        return min(max(builtins.round(exact), low), high) & ((1 << fmt.bits) - 1)
    if fmt.kind == "scale":
        return _nearest_even(fmt, max(exact, Fraction(0)))
    magnitude = _nearest_log(fmt, abs(exact)) if fmt.kind == "log" else _nearest_even(fmt, abs(exact))
    return magnitude | (1 << (fmt.bits - 1) if negative else 0)


def _nearest_log(fmt: Format, x: Fraction) -> int:
    """Fig. 2c of Sun et al. 2020 for any radix: multiply by 2r / (r + 1), then truncate the logarithm."""
    if fmt.phase is Phase.ODD:
        x = x * math.isqrt(fmt.radix)
    lifted = x * Fraction(2 * fmt.radix, fmt.radix + 1)
    top = (1 << fmt.exponent_bits) - 1
    code = 0
    while code < top and lifted >= Fraction(fmt.radix) ** (code + 1 - fmt.bias):
        code += 1
    return code


def _nearest_even(fmt: Format, x: Fraction) -> int:
    """The nearest of the table's non-negative values; of two equally near ones the even code."""
    codes = [c for c in range(1 << (fmt.bits - fmt.signed)) if fmt.integers[c] is not None]
    return min(codes, key=lambda c: (abs(decode(fmt, c) - x), c % 2))


def encode_stochastic(fmt: Format, x: Number, noise: Number) -> int:
    """The code of one of the two values around x: the farther from zero if the noise is below x's share of the way.

    Over noise that is uniform in [0, 1) the mean of the results is x, for |x| up to the largest value.

    Args:
        fmt: a format with a sign bit.
        x: a finite number.
        noise: in [0, 1).
    """
    exact = abs(Fraction(x))
    negative = math.copysign(1.0, x) < 0 if isinstance(x, float) else x < 0
    levels = [(decode(fmt, c), c) for c in range(1 << (fmt.bits - 1)) if fmt.integers[c] is not None]
    below, code = max(pair for pair in levels if pair[0] <= exact)
    above = [pair for pair in levels if pair[0] > exact]
    if above and Fraction(noise) * (min(above)[0] - below) < exact - below:
        code = min(above)[1]
    return code | (1 << (fmt.bits - 1) if negative else 0)


def mx_exponent(amax: Number, rule: str, fmt: Format = fp4_e2m1) -> int:
    """k of the scale 2^k of a block of the MX formats, -127 to 127.

    ``floor`` 2^(floor(log2 amax) - e), with e the exponent of the format's largest value (OCP MX 1.0, section 6.3);
    ``ceil`` the same with the logarithm rounded up; ``even`` rounds amax to the format's own bits of mantissa first,
    halves up, then takes the floor; ``rceil`` the smallest 2^k with ``amax <= 2^k * fmt.max``.

    Args:
        amax: the block's largest magnitude.
        rule: one of the four.
        fmt: the format of the block's elements.

    Raises:
        ValueError: if there is no such rule.
    """
    if rule not in ("floor", "ceil", "even", "rceil"):
        raise ValueError(f"{rule!r} is no scale rule; 'floor', 'ceil', 'even' and 'rceil' are.")
    exact = Fraction(amax)
    if exact == 0:
        return -127
    if rule == "rceil":
        k = -_floor_log2(Fraction(fmt.max) / exact)
    else:
        k = _floor_log2(exact)
        if rule == "even":
            unit = Fraction(2) ** (k - fmt.mantissa_bits)
            k = _floor_log2((exact / unit + Fraction(1, 2)).__floor__() * unit)
        elif rule == "ceil":
            k = -_floor_log2(1 / exact)
        k -= _floor_log2(Fraction(fmt.max))
    return min(max(k, -127), 127)


def _floor_log2(x: Fraction) -> int:
    """The k with 2^k <= x < 2^(k + 1), for x above zero."""
    k = x.numerator.bit_length() - x.denominator.bit_length()
    return k if Fraction(2) ** k <= x else k - 1


def hadamard(xs: Sequence[Number]) -> list[Fraction]:
    """xs times the Hadamard matrix of Sylvester's order, before the factor 1 / sqrt(n).

    Entry (i, j) of the matrix is -1 to the number of ones that i and j share in binary.

    Args:
        xs: n exact numbers, n a power of two.
    """
    return [
        sum(((-1) ** (i & j).bit_count() * Fraction(x) for j, x in enumerate(xs)), Fraction(0)) for i in range(len(xs))
    ]


def round(fmt: Format, x: Number) -> Fraction:
    """The nearest value of the format to x: ``decode(encode(x))``."""
    return decode(fmt, encode(fmt, x))


def to_binary(x: Number, *, precision: int = 24, min_exponent: int = -126, max_exponent: int = 127) -> float:
    """x rounded to nearest, ties to even, as IEEE binary32 (the default) or another binary format holds it.

    Args:
        x: an exact number.
        precision: bits of the significand, the leading one included: 24 for binary32, 53 for binary64.
        min_exponent: of the smallest normal number: -126 for binary32, -1022 for binary64.
        max_exponent: of the largest number: 127 for binary32, 1023 for binary64.

    Returns:
        The rounded number, which a Python float holds exactly; infinite where x overflows.
    """
    exact = Fraction(x)
    if exact == 0:
        return 0.0
    exponent = abs(exact).numerator.bit_length() - abs(exact).denominator.bit_length()
    if abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, min_exponent) - precision + 1)
    rounded = builtins.round(exact / quantum) * quantum
    if abs(rounded) >= Fraction(2) ** (max_exponent + 1):
        return math.inf if rounded > 0 else -math.inf
    return float(rounded)


def quantize(
    xs: Sequence[float],
    fmt: Format,
    *,
    inv_scale: float = 1.0,
    low: float = 0.0,
    offset: int = 0,
    code_range: tuple[int, int] | None = None,
    double: bool = False,
) -> list[int]:
    """The codes of a tensor, with the two roundings that a kernel makes: of ``x - low`` and of its multiple.

    A kernel subtracts and multiplies in binary32 (binary64 for a binary64 input), so those two results are rounded
    there and nowhere else.

    Args:
        xs: numbers, each exact in binary32 (or binary64 with `double`); not NaN.
        fmt: the format of the codes.
        inv_scale: the reciprocal of the scale, exact in binary32.
        low: what is subtracted first; 0 for a symmetric scheme.
        offset: what is added to the nearest integer: the lowest code, for a scheme that counts from `low`.
        code_range: the lowest and highest integer that may be used; the format's own if None. With `offset` it is for
            integer formats only.
        double: compute in binary64.
    """
    limits = {"precision": 53, "min_exponent": -1022, "max_exponent": 1023} if double else {}

    def rounded(exact: Fraction) -> float:
        return to_binary(exact, **limits)

    codes = []
    for x in xs:
        shifted = x if low == 0.0 or math.isinf(x) else rounded(Fraction(x) - Fraction(low))
        scaled = shifted if math.isinf(shifted) else rounded(Fraction(shifted) * Fraction(inv_scale))
        if code_range is None and offset == 0:
            # A product that underflows to zero keeps the sign of x.
            codes.append(encode(fmt, scaled if scaled != 0.0 else math.copysign(0.0, x)))
            continue
        bottom, top = code_range or tuple(int(v) for v in fmt.saturate)
        whole = (bottom if scaled < 0 else top) if math.isinf(scaled) else builtins.round(Fraction(scaled)) + offset
        codes.append(min(max(whole, bottom), top) & ((1 << fmt.bits) - 1))
    return codes


def matmul(
    a: Sequence[Sequence[int]], b: Sequence[Sequence[int]], fmt_a: Format, fmt_b: Format
) -> list[list[Fraction]]:
    """The exact product of two matrices of codes.

    Args:
        a: codes of shape (M, K) in `fmt_a`.
        b: codes of shape (K, N) in `fmt_b`.
        fmt_a: the format of `a`.
        fmt_b: the format of `b`.

    Returns:
        Exact values of shape (M, N), before any scale.
    """
    columns = list(zip(*b, strict=True))
    return [
        [
            sum((decode(fmt_a, p) * decode(fmt_b, q) for p, q in zip(row, column, strict=True)), Fraction(0))
            for column in columns
        ]
        for row in a
    ]
