"""Fixed grids: `Radix4`, `Nearest`, `TwoPhase`, and the power of two that brings a tensor inside a format."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from golden import RADIX4
from halfbyte import Nearest, Phase, Radix4, TwoPhase, formats, oracle, quantize
from halfbyte.errors import SpecError, UnknownNameError
from halfbyte.quantizers.grid import largest_log2_scale
from halfbyte.quantizers.number import power_of_two

FLOATS = ["fp4_e3m0_r4", "fp4_e3m0_r4_odd", "fp4_e3m0", "fp4_e2m1", "fp4_e1m2", "fp8_e4m3", "fp8_e5m2"]


@pytest.mark.parametrize("log2_scale", [0, 13, -40])
@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radix4_golden_table(phase, log2_scale, dtype):
    """The golden table holds in both phases, and under any power-of-two scale."""
    scale = 2.0**log2_scale
    q = quantize(torch.tensor([row[0] for row in RADIX4], dtype=dtype) * scale, Radix4(phase=phase), scale=scale)
    value, code = (1, 2) if phase is Phase.EVEN else (3, 4)
    assert q.codes().tolist() == [row[code] for row in RADIX4]
    assert q.dequantize(torch.float64).tolist() == [row[value] * scale for row in RADIX4]


def test_radix4_scale_is_one_unless_given():
    """Radix4 measures nothing: a tensor far outside its range saturates or vanishes."""
    q = quantize(torch.tensor([1e9, 1e-9, 1.0]), Radix4())
    assert q.scale == 1
    assert q.dequantize().tolist() == [64.0, 0.0, 1.0]


def test_odd_phase_is_half_of_even_of_twice():
    """Q_odd(x) = Q_even(2 x) / 2, code for code (Sun et al. 2020, section 6)."""
    x = torch.cat(
        [torch.randn(20_000) * 2.0 ** torch.randint(-9, 8, (20_000,)), torch.tensor([row[0] for row in RADIX4])]
    )
    odd, even = quantize(x, Radix4(phase=Phase.ODD)), quantize(2 * x, Radix4())
    assert torch.equal(odd.codes(), even.codes())
    assert torch.equal(odd.dequantize(), even.dequantize() / 2)


def test_the_two_phases_never_both_round_up():
    """Within the range both of both phases, errors are opposite or both down, never both up."""
    x = torch.rand(20_000) * 29.9 + 0.1
    up = [quantize(x, Radix4(phase=phase)).dequantize() > x for phase in Phase]
    assert not (up[0] & up[1]).any()
    assert up[0].any()
    assert up[1].any()


@pytest.mark.parametrize(
    ("fmt", "x", "expected"),
    [
        # IEEE ties to even: E2M1 and E4M3 ties and their neighbors.
        ("fp4_e2m1", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 5.01, 7, -0.75], [0, 1, 1, 2, 2, 4, 4, 6, 6, -1]),
        (
            "fp8_e4m3",
            [17, 18, 1.0625, 1.1875, 300, 460, 2.0**-10, 2.0**-10 * 1.01, -300],
            [16, 18, 1, 1.25, 288, 448, 0, 2.0**-9, -288],
        ),
        # E5M2 has two mantissa bits: 1.125 and 1.375 are ties, 2^-17 is half the smallest, 57344 the largest.
        (
            "fp8_e5m2",
            [1.125, 1.375, 9, 11, 2.0**-17, 2.0**-17 * 1.01, 6e4, 1e9],
            [1, 1.5, 8, 12, 0, 2.0**-16, 57344, 57344],
        ),
        # Powers of two, midpoint up: 1.5 * 2^n -> 2^(n+1); below 0.75 * 2^-3 nothing is left.
        ("fp4_e3m0", [0.09375, 0.0937, 1.4999, 1.5, 3, 6, 100, -6], [0.125, 0, 1, 2, 4, 8, 8, -8]),
        # A uniform grid of quarters up to 1.75.
        ("fp4_e1m2", [0.125, 0.375, 0.13, 1.6, 9, -1.6], [0, 0.5, 0.25, 1.5, 1.75, -1.5]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_rounds_by_each_format_s_own_rule(fmt, x, expected, dtype):
    """Ties go to the even mantissa, or up for powers of two; beyond the largest value numbers saturate."""
    q = quantize(torch.tensor(x, dtype=dtype), Nearest(fmt=fmt, scale="one"))
    assert q.dequantize(torch.float64).tolist() == expected


@pytest.mark.parametrize("fmt", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_codes_equal_the_oracle(fmt, scale):
    """Under a given scale codes are the oracle's with inv_scale = float32(1 / scale), powers of two or not."""
    x = torch.randn(300) * 2.0 ** torch.randint(-10, 10, (300,))
    step = torch.tensor(scale)
    q = quantize(x, Nearest(fmt=fmt), scale=step)
    assert q.codes().tolist() == oracle.quantize(x.tolist(), formats.get(fmt), inv_scale=step.reciprocal().item())
    assert torch.equal(q.scale, step)


@pytest.mark.parametrize("fmt", FLOATS)
@pytest.mark.parametrize("factor", [1.0, 0.501, 1.0001, 3e-30, 7e25])
def test_amax_scale_is_the_largest_power_of_two_that_fits(fmt, factor):
    """The largest magnitude lies inside the format under the measured scale, and would not under half of it."""
    top = formats.get(fmt).max
    x = torch.tensor([0.1, -1.0, 0.3]) * (top * factor)
    q = quantize(x, Nearest(fmt=fmt))
    scaled = x.abs().max().double() / q.scale.double()
    assert math.frexp(q.scale.item())[0] == 0.5
    assert scaled <= top
    assert 2 * scaled > top


def test_own_scale_one_measures_nothing():
    """scale="one" leaves a tensor where it is; "amax" is the default."""
    x = torch.tensor([100.0])
    assert quantize(x, Nearest(fmt="fp4_e2m1", scale="one")).dequantize().item() == 6.0
    assert quantize(x, Nearest(fmt="fp4_e2m1")).dequantize().item() == 96.0


@pytest.mark.parametrize("limit", [64.0, 6.0, 448.0, 57344.0, 1.75])
def test_largest_log2_scale_is_exact(limit):
    """k is the largest whole number with amax * 2^k <= limit, also one float beside an exact power of two."""
    for exponent in (-149, -127, -60, -1, 0, 5, 100):
        for base in (2.0**exponent, limit * 2.0 ** min(exponent, 60)):
            value = torch.tensor(base)
            for amax in (
                torch.nextafter(value, torch.tensor(0.0)),
                value,
                torch.nextafter(value, torch.tensor(math.inf)),
            ):
                if amax == 0:
                    continue
                k = int(largest_log2_scale(amax, limit))
                exact = Fraction(amax.item())
                assert exact * Fraction(2) ** k <= Fraction(limit) < exact * Fraction(2) ** (k + 1)


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
def test_largest_log2_scale_of_nothing_is_zero(amax):
    """Where the magnitude says nothing the scale is 1."""
    assert largest_log2_scale(torch.tensor(amax), 64.0) == 0


def test_power_of_two_is_exact():
    """2^k for every k of a normal float32 number."""
    k = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(k).tolist() == [2.0**e for e in range(-126, 128)]


@pytest.mark.parametrize("fmt", FLOATS)
@pytest.mark.parametrize("x", [torch.zeros(3), torch.empty(0, 2), torch.tensor(0.75)], ids=["zeros", "empty", "0-d"])
def test_odd_shapes(fmt, x):
    """All-zero, empty and 0-d tensors keep their shape and their zeros."""
    x_hat = quantize(x, Nearest(fmt=fmt)).dequantize()
    assert x_hat.shape == x.shape
    assert torch.equal(x_hat == 0, x == 0)


@pytest.mark.parametrize("fmt", FLOATS)
def test_quantizing_twice_changes_nothing(fmt):
    """Values of the format are their own nearest values."""
    spec = Nearest(fmt=fmt, scale="one")
    once = quantize(torch.randn(500) * 3, spec)
    assert torch.equal(quantize(once.dequantize(), spec).codes(), once.codes())


def test_the_sign_of_zero_is_kept():
    """A negative number that underflows becomes the code of -0, in both phases."""
    for phase in Phase:
        assert quantize(torch.tensor([-1e-9, -0.0, 1e-9]), Radix4(phase=phase)).codes().tolist() == [8, 8, 0]


def test_two_phase_gives_even_to_dgrad_and_odd_to_wgrad():
    """The paper's choice (section 3.3)."""
    assert TwoPhase().for_dgrad == Radix4(phase=Phase.EVEN)
    assert TwoPhase().for_wgrad == Radix4(phase=Phase.ODD)


def test_two_phase_can_be_swapped():
    """dgrad=Phase.ODD gives wgrad the even phase."""
    swapped = TwoPhase(dgrad=Phase.ODD)
    assert swapped.for_dgrad == Radix4(phase=Phase.ODD)
    assert swapped.for_wgrad == Radix4(phase=Phase.EVEN)


def test_nearest_takes_a_format_or_its_name():
    """Both spellings are the same spec, with the same hash."""
    assert Nearest(fmt="fp8_e5m2") == Nearest(fmt=formats.fp8_e5m2)
    assert hash(Nearest(fmt="fp8_e5m2")) == hash(Nearest(fmt=formats.fp8_e5m2))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Nearest(fmt="int4"), SpecError, "integers go through MinMax, Sawb or Pact"),
        (lambda: Nearest(fmt="e8m0"), SpecError, "formats with a sign and an exponent"),
        (lambda: Nearest(fmt="fp8_e4m4"), UnknownNameError, "Did you mean 'fp8_e4m3'"),
        (lambda: Nearest(fmt="fp8_e4m3", scale="max"), SpecError, "'one' or 'amax' is possible"),
        (lambda: Radix4(rounding="up"), SpecError, "'nearest' or 'stochastic' is possible"),
        (lambda: Radix4(phase="odd"), SpecError, "Phase.EVEN or Phase.ODD is possible"),
    ],
)
def test_refuses_what_means_nothing(make, error, text):
    """Each field is checked at birth, and the text says what is possible."""
    with pytest.raises(error, match=text):
        make()


def test_a_radix_of_ones_own_can_be_a_gradient_format():
    """A stated radix-10 format goes through the table search and equals the oracle."""
    fmt = formats.logarithmic(10)
    x = torch.randn(300) * 10.0 ** torch.randint(-4, 4, (300,))
    assert quantize(x, Nearest(fmt=fmt, scale="one")).codes().tolist() == oracle.quantize(x.tolist(), fmt)


STOCHASTIC = Radix4(rounding="stochastic")


def test_stochastic_rounding_takes_a_neighbor_and_is_unbiased():
    """Each draw of 7.0 is 4 or 16, and the mean of n of them is 7 within five standard errors.

    P(16) = (7 - 4) / (16 - 4) = 1/4, so the standard deviation of a draw is 12 * sqrt(3) / 4 = 5.2.
    """
    n = 40_000
    found = quantize(torch.full((n,), 7.0), STOCHASTIC, seed=1).dequantize()
    assert found.unique().tolist() == [4.0, 16.0]
    assert abs(found.double().mean().item() - 7.0) <= 5 * 5.2 / math.sqrt(n)


def test_stochastic_rounding_keeps_levels_saturates_and_lets_small_numbers_live():
    """Levels stay, magnitudes beyond 64 become 64, and a quarter of 4^-3 survives a quarter of the time."""
    levels = torch.tensor(formats.fp4_e3m0_r4.values)
    q = quantize(torch.cat([levels, torch.tensor([1e9, -1e9])]), STOCHASTIC, seed=3)
    assert q.codes().tolist() == [*range(16), 7, 15]
    small = quantize(torch.full((10_000,), 4.0**-4), STOCHASTIC, seed=3).dequantize() > 0
    assert small.double().mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(3 / 16 / 10_000))


def test_stochastic_rounding_is_a_function_of_the_seed():
    """Equal seeds give equal codes, other seeds others."""
    x = torch.randn(1000)
    first, second, third = (quantize(x, STOCHASTIC, seed=seed).codes() for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
