"""The reference backend's encoder equals the oracle, bit for bit; and the statistics that go with it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfbyte import formats, oracle
from halfbyte.formats import FORMATS, Format
from halfbyte.kernels import reference
from halfbyte.kernels.reference.encode import PIECE
from halfbyte.qtensor import pack, unpack

EVERY = list(FORMATS.values())
# Formats that no recipe uses but that a user can build: they take the encoder's general paths.
CUSTOM = [
    formats.logarithmic(8),
    formats.logarithmic(10),
    formats.logarithmic(16, phase=formats.Phase.ODD),
    formats.logarithmic(4, bias=7),
    formats.logarithmic(4, exponent_bits=2, bias=2),
    formats.logarithmic(2, exponent_bits=4, bias=8),
    formats.minifloat(3, 2, bias=3),
    formats.minifloat(2, 3, bias=1),
    formats.integer(8, signed=False),
    formats.integer(3),
    formats.integer(6),
]
GRIDS = [f for f in EVERY if f.kind in ("log", "float")]
ONE = torch.ones(())


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch computes with two threads during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def encoded(x: Tensor, fmt: Format, inv_scale: float = 1.0, **options: object) -> list[int]:
    """The encoder's codes, one to an entry."""
    packed = reference.encode(x, fmt, inv_scale=torch.tensor(inv_scale), **options)  # type: ignore[arg-type]
    return unpack(packed, x.numel(), fmt.bits).tolist()


def check(x: Tensor, fmt: Format, inv_scale: float = 1.0) -> None:
    """Asserts that the encoder gives each element the oracle's code."""
    double = x.dtype == torch.float64
    assert encoded(x, fmt, inv_scale) == oracle.quantize(x.tolist(), fmt, inv_scale=inv_scale, double=double)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fmt", EVERY + CUSTOM, ids=str)
def test_every_value_encodes_to_its_own_code(fmt: Format, dtype: torch.dtype) -> None:
    """A number of the format gets its own code: encode undoes decode, the sign of zero included."""
    finite = [v for v in fmt.values if math.isfinite(v)]
    assert encoded(torch.tensor(finite, dtype=dtype), fmt) == [c for c, v in enumerate(fmt.values) if math.isfinite(v)]


def around(points: list[float], dtype: torch.dtype) -> Tensor:
    """The points as that type holds them, both neighbors of each, and the negatives of all of these."""
    x = torch.tensor(points, dtype=torch.float64).to(dtype)
    inf = torch.tensor(math.inf, dtype=dtype)
    x = torch.cat([x, torch.nextafter(x, inf), torch.nextafter(x, -inf)])
    return torch.cat([x, -x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fmt", EVERY + CUSTOM, ids=str)
def test_every_threshold_and_both_its_neighbors(fmt: Format, dtype: torch.dtype) -> None:
    """At each tie and one float to either side, of both signs if there are two, the encoder is the oracle."""
    steps = [float(magnitude) for magnitude, _ in fmt.thresholds]
    if fmt.kind == "int":
        steps = [i + 0.5 for i in range(fmt.max_integer + 1)]
    x = around([*steps, fmt.max, 0.0], dtype)
    check(x if fmt.signed else x[x > -2], fmt)


@pytest.mark.parametrize("fmt", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_of_the_type(fmt: Format, dtype: torch.dtype) -> None:
    """Infinities, the largest, the smallest normal and the smallest subnormal numbers encode as the oracle says."""
    limits = torch.finfo(dtype)
    ends = [math.inf, limits.max, limits.tiny, limits.smallest_normal / 2, limits.tiny * limits.eps, 0.0]
    check(torch.tensor(ends + [-x for x in ends], dtype=dtype), fmt)


def sixteen_bit_inputs(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit type, infinities included, NaN not."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[~x.isnan()]


def by_bisection(numbers: list[float], fmt: Format) -> dict[float, int]:
    """The oracle's code of each number; where both ends of a stretch agree, so does all between (it is monotone)."""
    ordered = sorted(set(numbers))
    codes = {ordered[0]: oracle.encode(fmt, ordered[0]), ordered[-1]: oracle.encode(fmt, ordered[-1])}
    stretches = [(0, len(ordered) - 1)]
    while stretches:
        low, high = stretches.pop()
        if codes[ordered[low]] == codes[ordered[high]]:
            codes.update(dict.fromkeys(ordered[low:high], codes[ordered[low]]))
        elif high - low > 1:
            middle = (low + high) // 2
            codes[ordered[middle]] = oracle.encode(fmt, ordered[middle])
            stretches += [(low, middle), (middle, high)]
    return codes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_every_16_bit_input(fmt: Format, dtype: torch.dtype) -> None:
    """All 2^16 inputs of a 16-bit type but NaN are widened and get the oracle's code."""
    x = sixteen_bit_inputs(dtype)
    numbers = x.tolist()
    codes = by_bisection(numbers, fmt)
    codes[0.0] = oracle.encode(fmt, 0.0)
    minus_zero = oracle.encode(fmt, -0.0)
    wanted = [minus_zero if v == 0 and math.copysign(1, v) < 0 else codes[v] for v in numbers]
    assert encoded(x, fmt) == wanted


@pytest.mark.parametrize("fmt", [formats.fp4_e3m0_r4, formats.int4, formats.fp4_e2m1], ids=str)
def test_16_bit_inputs_are_scaled_in_float32(fmt: Format) -> None:
    """The product of a bfloat16 number and an inverse scale is rounded to float32, not to bfloat16."""
    x = sixteen_bit_inputs(torch.bfloat16)
    x = x[(x.abs() >= 0.125) & (x.abs() < 8)]
    for inv_scale in (float(torch.tensor(s)) for s in (1.6, 0.7, 1.1)):
        assert encoded(x, fmt, inv_scale) == oracle.quantize(x.tolist(), fmt, inv_scale=inv_scale)


def test_the_bit_rule_is_fig_2c_on_a_million_numbers() -> None:
    """On 2^20 random float32 of all exponents radix 4 is floor(log4(1.6 |x|)) clipped, computed in float64.

    There 1.6 |x| is 4^n only where |x| is 0.625 * 4^n, and then exactly, as 1.6 * 2.5 rounds to 4; frexp has no error.
    """
    x = torch.ldexp(torch.rand(1 << 20) + 1, torch.randint(-14, 12, (1 << 20,))) * torch.randn(1 << 20).sign()
    _, exponent = torch.frexp(1.6 * x.double().abs())
    ebit = torch.div(exponent - 1, 2, rounding_mode="floor").clamp(-4, 3)
    wanted = (ebit + 4).to(torch.uint8) | (x < 0).to(torch.uint8) << 3
    assert torch.equal(reference.encode(x, formats.fp4_e3m0_r4, inv_scale=ONE), pack(wanted, 4))


float32 = st.floats(width=32, allow_nan=False)
tensors = st.lists(float32 | st.floats(-20, 20, width=32), max_size=40)
inverse_scales = st.floats(2.0**-60, 2.0**60, width=32) | st.floats(0.0625, 16, width=32)


@pytest.mark.parametrize("fmt", EVERY, ids=str)
@given(numbers=tensors, inv_scale=inverse_scales)
def test_any_tensor_and_scale(fmt: Format, numbers: list[float], inv_scale: float) -> None:
    """Any float32 tensor under any inverse scale gets the oracle's codes."""
    check(torch.tensor(numbers, dtype=torch.float32), fmt, inv_scale)


@pytest.mark.parametrize("fmt", EVERY, ids=str)
@given(numbers=st.lists(st.floats(allow_nan=False), max_size=20), inv_scale=inverse_scales)
def test_any_float64_tensor_and_scale(fmt: Format, numbers: list[float], inv_scale: float) -> None:
    """Any float64 tensor is computed in float64 and gets the oracle's codes."""
    check(torch.tensor(numbers, dtype=torch.float64), fmt, inv_scale)


@st.composite
def integer_schemes(draw: st.DrawFn) -> tuple[Format, dict[str, object]]:
    """An integer format with a code range and, for half of them, a count from `low` that starts at its bottom."""
    fmt = draw(st.sampled_from([formats.int4, formats.uint4, formats.int8]))
    ends = st.integers(int(fmt.saturate[0]), int(fmt.saturate[1]))
    bottom, top = sorted((draw(ends), draw(ends)))
    counted = draw(st.booleans())
    return fmt, {
        "low": draw(st.floats(-100, 100, width=32) | float32.filter(math.isfinite)),
        "offset": bottom if counted else 0,
        "code_range": (bottom, top),
    }


@given(numbers=tensors, inv_scale=inverse_scales, scheme=integer_schemes(), double=st.booleans())
def test_any_integer_scheme(numbers: list[float], inv_scale: float, scheme: tuple[Format, dict], double: bool) -> None:
    """Any lower end, offset and code range of an integer format give the oracle's codes, in float32 and float64."""
    fmt, options = scheme
    x = torch.tensor(numbers, dtype=torch.float64 if double else torch.float32)
    wanted = oracle.quantize(x.tolist(), fmt, inv_scale=inv_scale, double=double, **options)
    assert encoded(x, fmt, inv_scale, **{**options, "low": torch.tensor(options["low"])}) == wanted


@pytest.mark.parametrize("length", [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 1237, 3 * PIECE + 128])
@pytest.mark.parametrize("fmt", [formats.int4, formats.fp4_e3m0_r4, formats.fp8_e4m3, formats.fp4_e2m1], ids=str)
def test_long_tensors_are_encoded_piece_by_piece(fmt: Format, length: int) -> None:
    """A tensor longer than a piece has the same codes everywhere: across the seams and in the last odd stretch."""
    numbers = torch.cat([torch.randn(500) * 10, around([0.625, 2.5, 1.5, 5.0], torch.float32)])
    codes = torch.tensor(oracle.quantize(numbers.tolist(), fmt), dtype=torch.uint8)
    chosen = torch.randint(len(numbers), (length,))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(
            reference.encode(numbers.to(dtype)[chosen], fmt, inv_scale=ONE), pack(codes[chosen], fmt.bits)
        )


def test_long_affine_tensors() -> None:
    """Lower end, offset and code range hold in every piece."""
    numbers = torch.randn(700)
    options = {"low": -1.5, "offset": -8, "code_range": (-8, 7)}
    codes = torch.tensor(oracle.quantize(numbers.tolist(), formats.int4, inv_scale=5.0, **options), dtype=torch.uint8)
    chosen = torch.randint(700, (2 * PIECE + 77,))
    got = reference.encode(
        numbers[chosen],
        formats.int4,
        inv_scale=torch.tensor(5.0),
        low=torch.tensor(-1.5),
        offset=-8,
        code_range=(-8, 7),
    )
    assert torch.equal(got, pack(codes[chosen], 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fmts", [GRIDS, EVERY, EVERY[::-1]], ids=["grids", "all", "all_reversed"])
def test_encode_each_is_encode_of_each(fmts: list[Format], dtype: torch.dtype) -> None:
    """One walk over a tensor in several formats gives what as many walks would, whatever their order."""
    x = (torch.randn(PIECE + 333) * 8).to(dtype)
    inv_scale = torch.tensor(0.75)
    for fmt, got in zip(fmts, reference.encode_each(x, fmts, inv_scale=inv_scale), strict=True):
        assert torch.equal(got, reference.encode(x, fmt, inv_scale=inv_scale)), fmt


@pytest.mark.parametrize("fmt", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_encoding_leaves_its_input_alone(fmt: Format, dtype: torch.dtype) -> None:
    """The tensor that is encoded does not change, though scratch memory is written in place."""
    x = torch.randn(1000).to(dtype)
    before = x.clone()
    reference.encode(x, fmt, inv_scale=torch.tensor(3.0))
    if fmt.kind == "int":
        reference.encode(x, fmt, inv_scale=torch.tensor(3.0), low=torch.tensor(-1.0), offset=int(fmt.saturate[0]))
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3, 5, 7)])
@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_any_shape(fmt: Format, shape: tuple[int, ...]) -> None:
    """Empty and zero-dimensional tensors encode, and others in row-major order."""
    x = torch.randn(shape)
    assert encoded(x, fmt) == oracle.quantize(x.reshape(-1).tolist(), fmt)


@pytest.mark.parametrize("fmt", [formats.int4, formats.fp4_e3m0_r4, formats.fp4_e2m1, formats.fp8_e5m2], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_codes_do_not_depend_on_threads(fmt: Format) -> None:
    """One thread and two give the same codes."""
    x = torch.randn(2 * PIECE + 99) * 4
    with_two = reference.encode(x, fmt, inv_scale=ONE)
    torch.set_num_threads(1)
    assert torch.equal(reference.encode(x, fmt, inv_scale=ONE), with_two)


@pytest.mark.parametrize("length", [0, 1, 4095, 4097, 100_003, 3 * PIECE + 4099])
@pytest.mark.usefixtures("two_threads")
def test_statistics_do_not_depend_on_threads(length: int) -> None:
    """Moments and stable sums have the same bits for one thread and for two."""
    x = torch.randn(length)
    with_two = (*reference.moments(x), reference.stable_sum(x))
    torch.set_num_threads(1)
    for one, two in zip((*reference.moments(x), reference.stable_sum(x)), with_two, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("length", [1, 5, 4096, 4099, PIECE + 4096 + 3])
def test_moments_are_the_means_of_magnitude_and_square(length: int) -> None:
    """On whole numbers, whose sums are exact in float64, the moments are the exact means."""
    x = torch.randint(-50, 50, (length,)).float()
    whole = x.to(torch.int64)
    mean_abs, mean_square = reference.moments(x)
    assert (mean_abs.dtype, mean_square.dtype) == (torch.float64, torch.float64)
    assert mean_abs.item() == int(whole.abs().sum()) / length
    assert mean_square.item() == int((whole * whole).sum()) / length


def test_moments_of_nothing_are_zero() -> None:
    """An empty tensor has the moments 0 and 0, not NaN."""
    assert [m.item() for m in reference.moments(torch.empty(0))] == [0.0, 0.0]


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 3 * 4096 + 5])
def test_stable_sum_is_the_sum(length: int) -> None:
    """On whole numbers the sum in rows is the exact sum."""
    whole = torch.randint(-(2**20), 2**20, (length,))
    assert reference.stable_sum(whole.float()).item() == int(whole.sum())


def test_value_range() -> None:
    """The range is the smallest and the largest element, NaN if any is, and 0, 0 for nothing."""
    assert [v.item() for v in reference.value_range(torch.tensor([3.0, -2.0, 5.0]))] == [-2.0, 5.0]
    assert all(v.isnan() for v in reference.value_range(torch.tensor([3.0, math.nan, 5.0])))
    assert [v.item() for v in reference.value_range(torch.empty(0))] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("numbers", "bad"),
    [([1.0, -2.0], False), ([1.0, math.nan], True), ([math.inf, 0.0], True), ([0.0, -math.inf], True), ([], False)],
)
def test_nonfinite_elements_show_in_the_range(numbers: list[float], bad: bool) -> None:
    """A NaN or an infinity anywhere is found from the range alone."""
    assert bool(reference.has_nonfinite(*reference.value_range(torch.tensor(numbers)))) is bad


def one_period() -> Tensor:
    """2^20 numbers spread evenly over one period of radix 4 on the logarithmic axis, far from the format's ends."""
    n = 1 << 20
    return 4.0 ** ((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def rounded(x: Tensor, fmt: Format) -> Tensor:
    """x as the format holds it, float64."""
    codes = unpack(reference.encode(x, fmt, inv_scale=ONE), x.numel(), fmt.bits)
    return torch.tensor(fmt.values, dtype=torch.float64)[codes.int()]


def test_radix_4_shrinks_by_a_seventh() -> None:
    """Over a period E[Q/x] = 0.8657: the integral of 4/x over [2.5, 4] and of 1/x over [1, 2.5], on the log axis."""
    exact = ((4 / 2.5 - 4 / 4) + (1 - 1 / 2.5)) / math.log(4)
    assert abs(exact - 0.8657) < 1e-4
    x = one_period()
    assert abs((rounded(x, formats.fp4_e3m0_r4) / x).mean().item() - 0.8657) < 0.001
    assert abs((rounded(x, formats.fp4_e3m0_r4_odd) / x).mean().item() - 0.8657) < 0.001


def test_the_two_phases_err_in_opposite_directions() -> None:
    """Over a period the phases' errors have opposite signs for 67.8 % of numbers, and are never both upward.

    Even rounds up on [2.5, 4) and odd on [1.25, 2); what is left of [1, 4), where both round down, is
    2 log4(1.25) = 32.2 % of the axis.
    """
    x = one_period()
    even, odd = (rounded(x, fmt) - x for fmt in (formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd))
    shares = [
        ((even > 0) ^ (odd > 0)).double().mean().item(),
        ((even < 0) & (odd < 0)).double().mean().item(),
        ((even > 0) & (odd > 0)).double().mean().item(),
    ]
    assert abs(shares[0] - 0.678) < 0.001
    assert abs(shares[1] - 0.322) < 0.001
    assert shares[2] == 0


@pytest.mark.parametrize(("phases", "rms"), [(("even",), 0.3665), (("odd",), 0.3665), (("even", "odd"), 0.2186)])
def test_relative_error_of_a_phase_and_of_their_mean(phases: tuple[str, ...], rms: float) -> None:
    """Over a period the root mean square relative error is 0.3665 for a phase and 0.2186 for the mean of both."""
    known = {"even": formats.fp4_e3m0_r4, "odd": formats.fp4_e3m0_r4_odd}
    x = one_period()
    mean = sum(rounded(x, known[p]) for p in phases) / len(phases)
    assert abs(((mean - x) / x).square().mean().sqrt().item() - rms) < 0.001


@pytest.mark.parametrize("threshold", [4 / 1.6 * 0.95, 4 / 1.6 * 1.05, 4 / 1.848, 2.0, 3.0])
def test_the_threshold_of_least_squared_error(threshold: float) -> None:
    """Over a period no other threshold has a smaller squared error than 4^n / 1.6 (Sun et al. 2020, Fig. 2b)."""
    x = one_period()
    ours = (rounded(x, formats.fp4_e3m0_r4) - x).square().mean()
    assert ours < (torch.where(x >= threshold, 4.0, 1.0) - x).square().mean()
