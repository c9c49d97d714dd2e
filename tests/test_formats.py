"""The tables of the formats: what each code stands for, and what a format refuses."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys
from fractions import Fraction

import pytest

from halfbyte import formats
from halfbyte.errors import SpecError, UnknownNameError
from halfbyte.formats import FORMATS, Format, Phase

EVERY = list(FORMATS.values())
SIGNED_ZERO = [f for f in EVERY if f.kind in ("log", "float")]

# The non-negative half of each 4-bit table with a sign bit. Sources: int4 and uint4 are two's complement and plain
# binary; radix 4 is Sun et al. 2020, section 3.1 (4^-3 to 4^3), its odd phase section 6 (half of it); 1-3-0 and 1-2-1
# are Fig. 1a there, 1-2-1 also OCP MX v1.0 table 5.
HALF_TABLES = {
    "fp4_e3m0_r4": [0, 2**-6, 2**-4, 2**-2, 1, 4, 16, 64],
    "fp4_e3m0_r4_odd": [0, 2**-7, 2**-5, 2**-3, 0.5, 2, 8, 32],
    "fp4_e3m0": [0, 0.125, 0.25, 0.5, 1, 2, 4, 8],
    "fp4_e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "fp4_e1m2": [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75],
}
TABLES = {
    "int4": [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1],
    "uint4": list(range(16)),
    **{name: half + [-v for v in half] for name, half in HALF_TABLES.items()},
}


@pytest.mark.parametrize("name", TABLES)
def test_the_sixteen_codes_of_every_4_bit_format(name: str) -> None:
    """Each code of a 4-bit format stands for the number that its source's table gives."""
    assert list(formats.get(name).values) == TABLES[name]


def test_the_golden_tables_cover_every_4_bit_format() -> None:
    """No 4-bit format is left without a table above."""
    assert set(TABLES) == {f.name for f in EVERY if f.bits == 4}


def test_int8_is_twos_complement() -> None:
    """Codes 0 to 127 are themselves and 128 to 255 are 256 less."""
    assert list(formats.int8.values) == [*range(128), *range(-128, 0)]


# OCP 8-bit floating point specification v1.0, table 2, and OCP MX v1.0, section 5.4.1 (E8M0).
@pytest.mark.parametrize(
    ("name", "code", "value"),
    [
        ("fp8_e4m3", 0x7E, 448.0),
        ("fp8_e4m3", 0xFE, -448.0),
        ("fp8_e4m3", 0x08, 2.0**-6),
        ("fp8_e4m3", 0x07, 7 * 2.0**-9),
        ("fp8_e4m3", 0x01, 2.0**-9),
        ("fp8_e4m3", 0x38, 1.0),
        ("fp8_e5m2", 0x7B, 57344.0),
        ("fp8_e5m2", 0xFB, -57344.0),
        ("fp8_e5m2", 0x04, 2.0**-14),
        ("fp8_e5m2", 0x03, 3 * 2.0**-16),
        ("fp8_e5m2", 0x01, 2.0**-16),
        ("fp8_e5m2", 0x3C, 1.0),
        ("fp8_e5m2", 0x7C, math.inf),
        ("fp8_e5m2", 0xFC, -math.inf),
        ("e8m0", 0x00, 2.0**-127),
        ("e8m0", 0x7F, 1.0),
        ("e8m0", 0xFE, 2.0**127),
    ],
)
def test_landmarks_of_the_8_bit_floats(name: str, code: int, value: float) -> None:
    """The landmarks of E4M3, E5M2 and E8M0 are where the OCP tables put them."""
    assert formats.get(name).values[code] == value


@pytest.mark.parametrize(
    ("name", "codes"),
    [("fp8_e4m3", [0x7F, 0xFF]), ("fp8_e5m2", [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]), ("e8m0", [0xFF])],
)
def test_the_codes_of_nan(name: str, codes: list[int]) -> None:
    """Exactly the codes that the OCP tables name are NaN."""
    assert [c for c, v in enumerate(formats.get(name).values) if math.isnan(v)] == codes


@pytest.mark.parametrize(
    ("name", "largest", "smallest"),
    [
        ("int4", 7, 1),
        ("uint4", 15, 1),
        ("int8", 127, 1),
        ("fp4_e3m0_r4", 64, 2**-6),
        ("fp4_e3m0_r4_odd", 32, 2**-7),
        ("fp4_e3m0", 8, 2**-3),
        ("fp4_e2m1", 6, 0.5),
        ("fp4_e1m2", 1.75, 0.25),
        ("fp8_e4m3", 448, 2**-9),
        ("fp8_e5m2", 57344, 2**-16),
        ("e8m0", 2.0**127, 2.0**-127),
    ],
)
def test_ends_of_every_format(name: str, largest: float, smallest: float) -> None:
    """`max` and `min_positive` are the largest and the smallest positive number, infinity not counted."""
    fmt = formats.get(name)
    assert (fmt.max, fmt.min_positive) == (largest, smallest)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("int4", (-8, 7)),
        ("uint4", (0, 15)),
        ("int8", (-128, 127)),
        ("fp8_e5m2", (-57344, 57344)),
        ("fp4_e2m1", (-6, 6)),
    ],
)
def test_saturation_limits(name: str, ends: tuple[float, float]) -> None:
    """`saturate` holds the most negative and the largest number, infinities not counted."""
    assert formats.get(name).saturate == ends


def test_e8m0_starts_above_zero() -> None:
    """A block scale has no zero and no sign: its limits are its smallest and largest power of two."""
    assert formats.e8m0.saturate == (2.0**-127, 2.0**127)


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_integers_times_unit_are_the_values(fmt: Format) -> None:
    """Every number of a format is exactly a whole multiple of its unit."""
    for whole, value in zip(fmt.integers, fmt.values, strict=True):
        if whole is None:
            assert not math.isfinite(value)
        else:
            assert Fraction(value) == whole * fmt.unit


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_the_unit_is_no_smaller_than_it_must_be(fmt: Format) -> None:
    """The integers have no common factor, so their bounds on sums are tight."""
    assert math.gcd(*(i for i in fmt.integers if i is not None)) == 1


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_max_integer_bounds_every_integer(fmt: Format) -> None:
    """`max_integer` is the largest magnitude among the integers, the most negative one included."""
    assert fmt.max_integer == max(abs(Fraction(v)) for v in fmt.values if math.isfinite(v)) / fmt.unit


@pytest.mark.parametrize("fmt", SIGNED_ZERO, ids=str)
def test_the_sign_bit_alone_is_negative_zero(fmt: Format) -> None:
    """In a sign-magnitude format the top bit alone is -0.0, and code 0 is +0.0 (Sun et al. 2020: +-0 is preserved)."""
    zero, minus_zero = fmt.values[0], fmt.values[1 << (fmt.bits - 1)]
    assert (zero, minus_zero) == (0.0, 0.0)
    assert (math.copysign(1, zero), math.copysign(1, minus_zero)) == (1, -1)


def test_the_odd_phase_is_half_the_even_phase() -> None:
    """Code for code the odd levels are half the even ones (Sun et al. 2020, section 6)."""
    assert [2 * v for v in formats.fp4_e3m0_r4_odd.values] == list(formats.fp4_e3m0_r4.values)


def test_both_phases_have_the_same_integers() -> None:
    """The phases differ in the unit only, so one multiplier serves both."""
    odd, even = formats.fp4_e3m0_r4_odd, formats.fp4_e3m0_r4
    assert odd.integers == even.integers == (0, 1, 4, 16, 64, 256, 1024, 4096, 0, -1, -4, -16, -64, -256, -1024, -4096)
    assert (even.unit, odd.unit) == (Fraction(1, 64), Fraction(1, 128))


@pytest.mark.parametrize("radix", [2, 3, 4, 8, 10, 16])
def test_any_radix_can_be_expressed(radix: int) -> None:
    """Radix r has the levels r^-3 to r^3 around 1 with a three-bit exponent of bias 4."""
    fmt = formats.logarithmic(radix)
    assert [i * fmt.unit for i in fmt.integers[:8]] == [0, *(Fraction(radix) ** n for n in range(-3, 4))]


def test_the_odd_phase_of_radix_16_is_a_quarter() -> None:
    """The odd levels lie at the geometric middle: radix 16 divides by its square root, 4."""
    even, odd = formats.logarithmic(16), formats.logarithmic(16, phase=Phase.ODD)
    assert [4 * v for v in odd.values] == list(even.values)


def test_exponent_bits_and_bias_move_the_levels() -> None:
    """Two exponent bits and a bias of 1 give radix 4 the levels 1, 4, 16."""
    assert formats.logarithmic(4, exponent_bits=2, bias=1).values == (0, 1, 4, 16, 0, -1, -4, -16)


@pytest.mark.parametrize(
    ("fmt", "name"),
    [
        (formats.logarithmic(2), "fp4_e3m0"),
        (formats.logarithmic(4), "fp4_e3m0_r4"),
        (formats.logarithmic(4, phase=Phase.ODD), "fp4_e3m0_r4_odd"),
        (formats.logarithmic(10, exponent_bits=4, bias=8), "fp5_e4m0_r10_b8"),
        (formats.minifloat(3, 2, bias=3), "fp6_e3m2"),
        (formats.integer(5), "int5"),
        (formats.integer(3, signed=False), "uint3"),
    ],
)
def test_names_follow_from_the_fields(fmt: Format, name: str) -> None:
    """A constructor names its format after width, fields, radix and phase."""
    assert fmt.name == name


# Thresholds by hand: radix 4 has 0.625 * 4^n (Sun et al. 2020: 4^n / 1.6), radix 2 has 0.75 * 2^n.
@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("fp4_e3m0_r4", 0.009765625, 40),
        ("fp4_e3m0_r4_odd", 0.0048828125, 20),
        ("fp4_e3m0", 0.09375, 6),
        ("fp4_e2m1", 0.25, 5),
        ("fp8_e4m3", 2**-10, 432),
        ("fp8_e5m2", 2**-17, 53248),
        ("uint4", 0.5, 14.5),
    ],
)
def test_first_and_last_threshold(name: str, first: float, last: float) -> None:
    """Underflow ends and the largest value begins where the source says."""
    steps = [magnitude for magnitude, _ in formats.get(name).thresholds]
    assert (steps[0], steps[-1]) == (first, last)


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_thresholds_separate_neighboring_levels(fmt: Format) -> None:
    """There is one threshold between two neighboring levels, and none elsewhere."""
    levels = [whole * fmt.unit for _, whole in fmt.levels]
    steps = [magnitude for magnitude, _ in fmt.thresholds]
    assert len(steps) == len(levels) - 1
    assert all(low < step < high for low, step, high in zip(levels, steps, levels[1:], strict=False))


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_a_tie_goes_up_in_logarithms_and_to_even_elsewhere(fmt: Format) -> None:
    """A tie between floats or integers goes to the even code; between logarithmic levels it goes up (Fig. 2c)."""
    for (_, goes_up), (code, _) in zip(fmt.thresholds, fmt.levels[1:], strict=True):
        assert goes_up is (fmt.kind == "log" or code % 2 == 0)


@pytest.mark.parametrize("fmt", [f for f in EVERY if f.kind != "int"], ids=str)
def test_levels_start_at_the_lowest_code_and_ascend(fmt: Format) -> None:
    """Without its sign bit a code orders as its value does."""
    assert [c for c, _ in fmt.levels] == list(range(len(fmt.levels)))
    assert [i for _, i in fmt.levels] == sorted({i for i in fmt.integers if i is not None and i >= 0})


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_a_format_cannot_be_changed(fmt: Format) -> None:
    """A format is frozen: neither a field nor a computed table can be set."""
    for name in ("bits", "phase", "unit"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(fmt, name, 3)


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_a_format_survives_pickling(fmt: Format) -> None:
    """A pickled format comes back equal, with the same hash and the same table, whether or not the table was made."""
    fresh = dataclasses.replace(fmt)
    for original in (fresh, fmt):
        back = pickle.loads(pickle.dumps(original))
        assert back == fmt
        assert hash(back) == hash(fmt)
        assert back.integers == fmt.integers


def test_formats_are_usable_as_keys() -> None:
    """No two formats are equal, so each finds its own entry in a dictionary."""
    assert len({f: f.name for f in EVERY}) == len(EVERY)
    assert {f: f.name for f in EVERY}[dataclasses.replace(formats.int8)] == "int8"


def test_the_registry_is_keyed_by_name() -> None:
    """`FORMATS` and `get` find a format under its own name."""
    assert all(name == fmt.name and formats.get(name) is fmt for name, fmt in FORMATS.items())


def test_repr_is_short() -> None:
    """A format prints its name and nothing else."""
    assert repr(formats.fp4_e3m0_r4_odd) == "Format(fp4_e3m0_r4_odd)"


def test_an_unknown_name_suggests_the_nearest() -> None:
    """The error for a wrong name repeats it, suggests the nearest and lists all."""
    with pytest.raises(UnknownNameError, match=r"no format named 'fp4_e2m2'. Did you mean 'fp4_e2m1'") as caught:
        formats.get("fp4_e2m2")
    assert all(name in str(caught.value) for name in FORMATS)


@pytest.mark.parametrize("bits", [0, -1, 9])
def test_integers_have_1_to_8_bits(bits: int) -> None:
    """An integer format of another width is refused by its width."""
    with pytest.raises(SpecError, match=rf"integer format of {bits} bits was asked for; 1 to 8"):
        formats.integer(bits)


@pytest.mark.parametrize("radix", [1, 0, -4])
def test_a_radix_is_2_or_more(radix: int) -> None:
    """A radix below 2 is refused by its number."""
    with pytest.raises(SpecError, match=rf"radix {radix} was asked for; the radix must be 2 or more"):
        formats.logarithmic(radix)


@pytest.mark.parametrize("radix", [2, 3, 8, 10])
def test_the_odd_phase_needs_a_whole_square_root(radix: int) -> None:
    """The odd phase of a radix without a whole square root is refused."""
    with pytest.raises(SpecError, match=rf"odd phase of radix {radix} .* whole; 4, 9 and 16"):
        formats.logarithmic(radix, phase=Phase.ODD)


@pytest.mark.parametrize("exponent_bits", [0, 8])
def test_an_exponent_field_has_1_to_7_bits(exponent_bits: int) -> None:
    """A logarithmic format of another width is refused by its width."""
    with pytest.raises(SpecError, match=rf"exponent field of {exponent_bits} bits was asked for; 1 to 7"):
        formats.logarithmic(4, exponent_bits=exponent_bits)


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), [(0, 3), (3, 0), (5, 3)])
def test_a_small_float_has_both_fields_and_at_most_8_bits(exponent_bits: int, mantissa_bits: int) -> None:
    """A small float without a field, or beyond a byte, is refused by its fields."""
    with pytest.raises(SpecError, match=rf"E{exponent_bits}M{mantissa_bits} was asked for; .* at most 8"):
        formats.minifloat(exponent_bits, mantissa_bits, bias=1)


WITHOUT_TORCH = """
import importlib, pathlib, sys, types
sys.modules["torch"] = None  # an import of torch now fails
package = types.ModuleType("halfbyte")
package.__path__ = [str(pathlib.Path(sys.argv[1]))]
sys.modules["halfbyte"] = package
formats = importlib.import_module("halfbyte.formats")
oracle = importlib.import_module("halfbyte.oracle")
assert float(oracle.round(formats.fp4_e3m0_r4, 0.625)) == 1.0
"""


def test_formats_and_oracle_need_no_torch() -> None:
    """The tables and the exact arithmetic run where torch is not installed."""
    package = str(formats.__file__).rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, package], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
