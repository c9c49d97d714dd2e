"""The oracle is right by itself: golden tables, hand-worked ties, and Python's own IEEE rounding."""

from __future__ import annotations

import itertools
import math
import random
import struct
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden import RADIX4
from halfbyte import formats, oracle
from halfbyte.formats import FORMATS, Format

EVERY = [*FORMATS.values(), formats.logarithmic(8), formats.logarithmic(10), formats.minifloat(3, 2, bias=3)]
SIGN_MAGNITUDE = [f for f in EVERY if f.kind in ("log", "float")]
R4, R4_ODD = formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd
BINARY64 = {"precision": 53, "min_exponent": -1022, "max_exponent": 1023}
BINARY16 = {"precision": 11, "min_exponent": -14, "max_exponent": 15}


@pytest.mark.parametrize(("x", "even", "even_code", "odd", "odd_code"), RADIX4)
def test_golden_table_of_radix_4(x: float, even: float, even_code: int, odd: float, odd_code: int) -> None:
    """Both phases of radix 4 give the worked table's values and codes."""
    assert (oracle.round(R4, x), oracle.encode(R4, x)) == (even, even_code)
    assert (oracle.round(R4_ODD, x), oracle.encode(R4_ODD, x)) == (odd, odd_code)


# Hand-worked: the spacing of E4M3 is 2 in [16, 32), 1/8 in [1, 2), 32 in [256, 448]; 17 lies between codes 0x58 (16)
# and 0x59 (18) and goes to the even one.
@pytest.mark.parametrize(
    ("name", "x", "value"),
    [
        ("fp4_e2m1", 0.25, 0),
        ("fp4_e2m1", 0.75, 1),
        ("fp4_e2m1", 1.25, 1),
        ("fp4_e2m1", 1.75, 2),
        ("fp4_e2m1", 2.5, 2),
        ("fp4_e2m1", 3.5, 4),
        ("fp4_e2m1", 5, 4),
        ("fp4_e2m1", 6.1, 6),
        ("fp8_e4m3", 17, 16),
        ("fp8_e4m3", 18, 18),
        ("fp8_e4m3", 1.0625, 1),
        ("fp8_e4m3", 1.1875, 1.25),
        ("fp8_e4m3", 300, 288),
        ("fp8_e4m3", 460, 448),
        ("fp8_e4m3", 1e9, 448),
        ("fp8_e4m3", 2**-10, 0),
        ("fp8_e4m3", 2**-10 * 1.01, 2**-9),
        ("fp8_e5m2", 1e9, 57344),
        ("fp8_e5m2", 61440, 57344),
        ("fp8_e5m2", 1.125, 1),
        ("fp8_e5m2", 1.375, 1.5),
        ("int4", 0.5, 0),
        ("int4", 1.5, 2),
        ("int4", -0.5, 0),
        ("int4", -2.5, -2),
        ("int4", 7.6, 7),
        ("int4", -9, -8),
        ("uint4", -3, 0),
        ("uint4", 14.5, 14),
        ("uint4", 15.5, 15),
        ("fp4_e3m0", 1.5, 2),
        ("fp4_e3m0", 0.09375, 0.125),
        ("fp4_e3m0", 0.0937, 0),
        ("e8m0", 1.5, 2),
        ("e8m0", 3, 2),
        ("e8m0", 0, 2.0**-127),
        ("e8m0", -5, 2.0**-127),
    ],
)
def test_golden_roundings_of_the_other_formats(name: str, x: float, value: float) -> None:
    """Ties, saturation and underflow of the other formats are as worked by hand."""
    assert oracle.round(formats.get(name), x) == value


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_a_value_is_its_own_nearest(fmt: Format) -> None:
    """encode(decode(c)) is c for every code that is a number; only -0 loses its sign, as a fraction has none."""
    for code, whole in enumerate(fmt.integers):
        if whole is None:
            continue
        lost_sign = fmt.kind in ("log", "float") and code == 1 << (fmt.bits - 1)
        assert oracle.encode(fmt, oracle.decode(fmt, code)) == (0 if lost_sign else code)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_a_float_value_is_its_own_nearest(fmt: Format) -> None:
    """encode(values[c]) is c, the code of -0.0 included."""
    for code, value in enumerate(fmt.values):
        if math.isfinite(value):
            assert oracle.encode(fmt, value) == code


def neighbors(fmt: Format) -> list[tuple[int, Fraction, int, Fraction]]:
    """Each two neighboring non-negative numbers of a table, read from its values: (code, value, code, value)."""
    found: dict[Fraction, int] = {}
    for code, whole in enumerate(fmt.integers):
        if whole is not None and whole >= 0:
            found.setdefault(whole * fmt.unit, code)
    rows = sorted(found.items())
    return [(c, v, d, w) for (v, c), (w, d) in itertools.pairwise(rows)]


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_every_tie_and_its_surroundings(fmt: Format) -> None:
    """At the middle of two neighbors the format's rule decides; a hair to either side the nearer one wins.

    For a logarithmic format the neighbor below the smallest is the level that would be there, not zero.
    """
    hair = Fraction(1, 10**60)
    for low_code, low, high_code, high in neighbors(fmt):
        below = high / fmt.radix if fmt.kind == "log" and low == 0 else low
        middle = (below + high) / 2
        at_tie = high_code if fmt.kind == "log" or high_code % 2 == 0 else low_code
        assert oracle.encode(fmt, middle) == at_tie
        assert oracle.encode(fmt, middle - hair) == low_code
        assert oracle.encode(fmt, middle + hair) == high_code


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_the_thresholds_of_the_format_are_those_of_the_oracle(fmt: Format) -> None:
    """`Format.thresholds`, which kernels use, says the same as the oracle, which never reads it."""
    for (step, goes_up), (low, _), (high, _) in zip(fmt.thresholds, fmt.levels, fmt.levels[1:], strict=False):
        assert oracle.encode(fmt, step) == (high if goes_up else low)
        assert oracle.encode(fmt, step * (1 - Fraction(1, 10**60))) == low
        assert oracle.encode(fmt, step * (1 + Fraction(1, 10**60))) == high


any_float = st.floats(allow_nan=False, allow_infinity=False)


@given(any_float)
def test_the_odd_phase_is_the_even_phase_of_twice_the_number(x: float) -> None:
    """Q_odd(x) = Q_even(2x) / 2 with the same code (Sun et al. 2020, sections 3.3 and 6)."""
    twice = 2 * Fraction(x)
    assert oracle.round(R4_ODD, x) == oracle.round(R4, twice) / 2
    assert oracle.encode(R4_ODD, x) & 7 == oracle.encode(R4, twice) & 7


@pytest.mark.parametrize("fmt", [R4, R4_ODD], ids=str)
@given(x=st.floats(min_value=0.0098, max_value=9.9))
def test_four_times_the_number_is_one_level_up(fmt: Format, x: float) -> None:
    """Q(4x) = 4 Q(x) while neither underflows nor saturates."""
    assert oracle.round(fmt, 4 * Fraction(x)) == 4 * oracle.round(fmt, x)


@pytest.mark.parametrize("fmt", SIGN_MAGNITUDE, ids=str)
@given(x=st.floats(allow_nan=False))
def test_rounding_is_odd(fmt: Format, x: float) -> None:
    """Q(-x) = -Q(x), and the codes differ in the sign bit only, also where the magnitude rounds to zero."""
    assert oracle.round(fmt, -x) == -oracle.round(fmt, x)
    assert oracle.encode(fmt, -x) ^ oracle.encode(fmt, x) == 1 << (fmt.bits - 1)


@pytest.mark.parametrize("fmt", EVERY, ids=str)
@given(x=any_float, y=any_float)
def test_rounding_is_monotone(fmt: Format, x: float, y: float) -> None:
    """A larger number never rounds to a smaller one."""
    low, high = sorted((x, y))
    assert oracle.round(fmt, low) <= oracle.round(fmt, high)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_infinities_saturate(fmt: Format) -> None:
    """An infinity becomes the largest number of its sign, or the smallest number where there are no negatives."""
    assert oracle.round(fmt, math.inf) == Fraction(fmt.saturate[1])
    assert oracle.round(fmt, -math.inf) == Fraction(fmt.saturate[0])


@pytest.mark.parametrize(("name", "code"), [("fp8_e4m3", 0x7F), ("fp8_e5m2", 0x7D), ("e8m0", 0xFF), ("int4", 0)])
def test_nan_has_its_code_or_that_of_zero(name: str, code: int) -> None:
    """NaN gives the code of NaN where there is one, else 0."""
    assert oracle.encode(formats.get(name), math.nan) == code


@pytest.mark.parametrize("code", [-1, 16])
def test_decode_refuses_codes_outside_the_table(code: int) -> None:
    """A code that the format does not have is an error that names the codes it has."""
    with pytest.raises(ValueError, match=rf"int4 has the codes 0 to 15; got {code}"):
        oracle.decode(formats.int4, code)


@pytest.mark.parametrize(("name", "code", "what"), [("fp8_e4m3", 0x7F, "nan"), ("fp8_e5m2", 0xFC, "-inf")])
def test_decode_refuses_codes_that_are_no_numbers(name: str, code: int, what: str) -> None:
    """The code of NaN or infinity has no exact value."""
    with pytest.raises(ValueError, match=rf"Code {code} of {name} is {what}, no number"):
        oracle.decode(formats.get(name), code)


def python_rounds(x: float, kind: str) -> float:
    """x as IEEE binary32 ("f") or binary16 ("e"), by Python's struct, which overflows with an error."""
    try:
        (rounded,) = struct.unpack(kind, struct.pack(kind, x))
    except OverflowError:
        return math.copysign(math.inf, x)
    return rounded


def hard_doubles(kind: str) -> list[float]:
    """Numbers of delicate rounding: over the whole range, subnormal, ties and their neighbors, overflow."""
    rng = random.Random(0)
    precision, smallest, largest = (24, -126, 127) if kind == "f" else (11, -14, 15)
    found = [rng.uniform(1, 2) * 2.0 ** rng.randint(smallest - precision - 2, largest + 1) for _ in range(2000)]
    for _ in range(500):
        exponent = rng.choice([rng.randint(smallest, largest), smallest, largest])
        whole = rng.choice([rng.getrandbits(precision - 1) | 1 << (precision - 1), (1 << precision) - 1])
        tie = (whole + 0.5) * 2.0 ** (exponent - precision + 1)
        subnormal = (rng.getrandbits(precision - 2) + 0.5) * 2.0 ** (smallest - precision + 1)
        found += [y for t in (tie, subnormal) for y in (t, math.nextafter(t, math.inf), math.nextafter(t, 0))]
    return found + [-x for x in found]


@pytest.mark.parametrize(("kind", "limits"), [("f", {}), ("e", BINARY16)])
def test_to_binary_equals_struct(kind: str, limits: dict[str, int]) -> None:
    """Rounding a double to binary32 and binary16 is what Python's struct does, overflow and subnormals included."""
    for x in hard_doubles(kind):
        assert oracle.to_binary(x, **limits) == python_rounds(x, kind)


@given(st.integers(-(2**80), 2**80), st.integers(1, 2**80), st.integers(-1100, 1000))
def test_to_binary_equals_float_for_binary64(numerator: int, denominator: int, exponent: int) -> None:
    """Rounding a fraction to binary64 is what float() does, which Python rounds correctly."""
    exact = Fraction(numerator, denominator) * Fraction(2) ** exponent
    try:
        wanted = float(exact)
    except OverflowError:
        wanted = math.copysign(math.inf, numerator)
    assert oracle.to_binary(exact, **BINARY64) == wanted


def test_to_binary_rounds_once() -> None:
    """A hair above a tie goes up, even where a double could not see the hair."""
    tie = 1 + Fraction(1, 2**24)
    assert oracle.to_binary(tie) == 1.0
    assert oracle.to_binary(tie + Fraction(1, 2**200)) == 1 + 2.0**-23
    assert oracle.to_binary(-tie - Fraction(1, 2**200)) == -1 - 2.0**-23


def test_to_binary_overflows_at_half_a_step_beyond_the_largest() -> None:
    """The tie above the largest float32 is the smallest number that becomes infinite (IEEE 754, 4.3.1)."""
    largest = (2 - Fraction(1, 2**23)) * 2**127
    tie = (2 - Fraction(1, 2**24)) * 2**127
    assert oracle.to_binary(tie - Fraction(1, 2**50)) == float(largest)
    assert oracle.to_binary(tie) == math.inf
    assert oracle.to_binary(-tie) == -math.inf


def test_quantize_rounds_the_difference_to_binary32() -> None:
    """2^24 + 6 minus -1 is a tie of float32, which becomes 2^24 + 8; only with that does the product reach 3.5.

    With s = 3.5 * 2^-24 (1 - 2^-21): (2^24 + 8) s = 3.5 (1 - 2^-42), in float32 3.5, a tie to 4; but (2^24 + 7) s =
    3.5 (1 - 2^-24), in float32 one unit below 3.5, so 3.
    """
    x, inv_scale = 2.0**24 + 6, 3.5 * 2.0**-24 * (1 - 2.0**-21)
    assert oracle.quantize([x], formats.uint4, inv_scale=inv_scale, low=-1.0) == [4]
    assert oracle.quantize([x], formats.uint4, inv_scale=inv_scale, low=-1.0, double=True) == [3]


def test_quantize_rounds_the_product_to_binary32() -> None:
    """(1 + 2^-13) * 3.5 (1 - 2^-13) = 3.5 - 3.5 * 2^-26, in float32 3.5, a tie to 4; in float64 below it, so 3."""
    x, inv_scale = 1 + 2.0**-13, 3.5 * (1 - 2.0**-13)
    assert oracle.quantize([x], formats.int4, inv_scale=inv_scale) == [4]
    assert oracle.quantize([x], formats.int4, inv_scale=inv_scale, double=True) == [3]


# (x + 1) * 7.5 - 8, rounded half to even: 0 at -1; 0.75 -> 1 at -0.9; 7.5 -> 8 at 0; 14.25 -> 14 at 0.9; 15 at 1.
@pytest.mark.parametrize(
    ("x", "whole"), [(-1.0, -8), (-0.9, -7), (0.0, 0), (0.9, 6), (1.0, 7), (2.0, 7), (math.inf, 7), (-math.inf, -8)]
)
def test_quantize_counts_from_low(x: float, whole: int) -> None:
    """With low -1, inverse step 7.5 and offset -8 the range [-1, 1] becomes -8 to 7, and the ends saturate."""
    codes = oracle.quantize([x], formats.int4, inv_scale=7.5, low=-1.0, offset=-8, code_range=(-8, 7))
    assert [oracle.decode(formats.int4, c) for c in codes] == [whole]


def test_quantize_keeps_the_sign_of_an_underflow() -> None:
    """A negative number whose product underflows to zero has the code of -0."""
    assert oracle.quantize([-1e-30, 1e-30, -0.0], R4, inv_scale=1e-30) == [8, 0, 8]


def test_quantize_stays_within_a_narrower_range() -> None:
    """A code range cuts both ends."""
    assert oracle.quantize([-9.0, -7.6, 9.0], formats.int4, code_range=(-7, 7)) == [9, 9, 7]


def test_matmul_by_hand() -> None:
    """[[1, -4], [1/4, 64]] @ [[3], [-8]] = [[35], [-511.25]]; in the odd phase half of it."""
    a = [[4, 13], [3, 7]]
    b = [[3], [8]]
    assert oracle.matmul(a, b, R4, formats.int4) == [[35], [Fraction(-2045, 4)]]
    assert oracle.matmul(a, b, R4_ODD, formats.int4) == [[Fraction(35, 2)], [Fraction(-2045, 8)]]


def test_matmul_refuses_lengths_that_differ() -> None:
    """Matrices that do not fit are an error, not a shorter sum."""
    with pytest.raises(ValueError, match="zip"):
        oracle.matmul([[1, 2, 3]], [[1], [2]], formats.int4, formats.int4)
