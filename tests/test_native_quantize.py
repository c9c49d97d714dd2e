"""The native encoders, sums and clips equal the reference to the bit, on every instruction set and thread count."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte import formats, quantize
from halfbyte.errors import NonFiniteWarning, UnknownNameError
from halfbyte.formats import Format
from halfbyte.kernels import Linear, native, reference
from halfbyte.kernels.reference.encode import PIECE
from halfbyte.qtensor import QTensor
from halfbyte.quantizers import (
    MXFP4,
    NVFP4,
    AbsMax,
    ExactGradScale,
    GradQuantizer,
    LayerGradScale,
    LossScale,
    Luq,
    MinMax,
    Nearest,
    Pact,
    Radix4,
    Sawb,
    Spec,
    Use,
)
from halfbyte.rng import Draw
from native_library import isa, needs_library

__all__ = ["isa"]  # a fixture, used by its name

pytestmark = needs_library

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [formats.int4, formats.uint4, formats.int8, formats.integer(3), formats.integer(8, signed=False)]
PHASES = (formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd)
LEVELS = [*PHASES, formats.fp4_e3m0, formats.fp4_e2m1, formats.logarithmic(4, bias=7), formats.logarithmic(2, bias=6)]
RANDOM = [formats.int4, formats.int8, formats.integer(3), *LEVELS]
HANDED_OVER = [formats.fp8_e4m3, formats.fp4_e1m2, formats.logarithmic(16)]
# Around the blocks of 128 codes and 512 bits, the vectors, the rows of 4096 and the pieces of sums.
LENGTHS = [0, 1, 2, 3, 15, 17, 63, 64, 65, 127, 128, 129, 255, 257, 511, 512, 513, 519, 4095, 4096, 4097, 33_001]
ONE = torch.ones(())

each_isa = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def numbers(length: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Tensor:
    """Normal numbers of several magnitudes, with the type's extremes among them, but no NaN."""
    x = torch.randn(length) * torch.exp2(torch.randint(-8, 3, (length,))) * spread
    limits = torch.finfo(dtype)
    ends = [0.0, -0.0, math.inf, -math.inf, limits.max, -limits.tiny, limits.smallest_normal / 4, 7.5, -0.5, 2.5]
    places = torch.randint(max(length, 1), (min(length, len(ends)),))
    x = x.to(dtype)
    x[places] = torch.tensor(ends[: len(places)]).to(dtype)
    return x


def around(points: list[float]) -> Tensor:
    """The points in float32, both neighbors of each, and the negatives of all."""
    x = torch.tensor(points, dtype=torch.float64).float()
    x = torch.cat([x, torch.nextafter(x, torch.tensor(math.inf)), torch.nextafter(x, torch.tensor(-math.inf))])
    return torch.cat([x, -x])


def noise_for(n: int) -> Tensor:
    """Noise as `halfbyte.rng` makes it, its two ends among it."""
    k = torch.randint(0, 1 << 24, (n,))
    k[::7], k[3::7] = 0, (1 << 24) - 1
    return k.float() * 2.0**-24


def finite_and_broken(length: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Finite numbers, and the same with a NaN or an infinity in some place."""
    x = numbers(length, dtype).nan_to_num(posinf=3.0, neginf=-3.0)
    yield x
    for number in (math.nan, math.inf, -math.inf) if length else ():
        broken = x.clone()
        broken[length // 3] = number
        yield broken


def same(one: object, other: object) -> bool:
    """Whether two results are the same: tensors of equal types, shapes and elements, in equal structures."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other


def same_range(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two ranges are the same, NaN being equal to itself."""
    return all(
        (a.dtype == b.dtype and torch.equal(a, b)) or (a.isnan() and b.isnan()) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def threads() -> Iterator[None]:
    """Sets the number of threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fmt", [*INTEGERS, *LEVELS, *HANDED_OVER], ids=str)
def test_codes_of_any_length(isa: str, fmt: Format, dtype: torch.dtype) -> None:
    """Every length, whole blocks and tails, has the reference's codes; also where the reference makes them."""
    for length in LENGTHS:
        x = numbers(length, dtype)
        for scale in (1.0, 1.3, 0.07):
            inv_scale = torch.tensor(scale)
            wanted = reference.encode(x, fmt, inv_scale=inv_scale)
            assert same(native.encode(x, fmt, inv_scale=inv_scale), wanted), (length, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", [*INTEGERS, *LEVELS], ids=str)
def test_every_16_bit_number(isa: str, fmt: Format, dtype: torch.dtype) -> None:
    """All numbers of a 16-bit type have the reference's codes."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[~x.isnan()]
    for scale in (1.0, 0.7):
        inv_scale = torch.tensor(scale)
        assert same(native.encode(x, fmt, inv_scale=inv_scale), reference.encode(x, fmt, inv_scale=inv_scale))


@pytest.mark.parametrize("fmt", [*INTEGERS, *LEVELS], ids=str)
def test_ties_and_their_neighbors(isa: str, fmt: Format) -> None:
    """At each tie and one float to either side, of both signs, the codes are the reference's."""
    steps = [float(m) for m, _ in fmt.thresholds] if fmt.kind != "int" else [i + 0.5 for i in range(fmt.max_integer)]
    x = around([*steps, fmt.max, fmt.max * 2, 0.0, math.inf])
    assert same(native.encode(x, fmt, inv_scale=ONE), reference.encode(x, fmt, inv_scale=ONE))


float32 = st.floats(width=32, allow_nan=False)
tensors = st.lists(float32 | st.floats(-20, 20, width=32), max_size=300)
inverse_scales = st.floats(2.0**-60, 2.0**60, width=32) | st.floats(0.0625, 16, width=32)


@pytest.mark.parametrize("fmt", [formats.int4, *PHASES, formats.fp4_e3m0, formats.fp4_e2m1], ids=str)
@each_isa
@given(some=tensors, scale=inverse_scales)
def test_any_tensor_and_scale(isa: str, fmt: Format, some: list[float], scale: float) -> None:
    """Any float32 tensor under any inverse scale has the reference's codes."""
    x, inv_scale = torch.tensor(some), torch.tensor(scale)
    assert same(native.encode(x, fmt, inv_scale=inv_scale), reference.encode(x, fmt, inv_scale=inv_scale))


@each_isa
@given(
    some=tensors,
    scale=inverse_scales,
    fmt=st.sampled_from(INTEGERS),
    low=st.none() | st.floats(-100, 100, width=32) | float32.filter(math.isfinite),
    counted=st.booleans(),
    data=st.data(),
)
def test_any_integer_grid(
    isa: str, some: list[float], scale: float, fmt: Format, low: float | None, counted: bool, data: st.DataObject
) -> None:
    """Any lower end, offset and code range have the reference's codes."""
    ends = st.integers(int(fmt.saturate[0]), int(fmt.saturate[1]))
    bottom, top = sorted((data.draw(ends), data.draw(ends)))
    options = {
        "inv_scale": torch.tensor(scale),
        "low": None if low is None else torch.tensor(low),
        "offset": bottom if counted else 0,
        "code_range": (bottom, top),
    }
    x = torch.tensor(some)
    if low is not None:
        x = x[(x.double() - low).abs() < math.inf]  # infinity minus infinity has no code
    assert same(native.encode(x, fmt, **options), reference.encode(x, fmt, **options))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "fmts", [PHASES, PHASES[::-1], tuple(LEVELS), (formats.int4, formats.fp4_e3m0_r4), ()], ids=str
)
def test_several_formats_from_one_read(isa: str, fmts: tuple[Format, ...], dtype: torch.dtype) -> None:
    """Codes in several formats at once are those of each by itself, and the range comes with them."""
    for length in LENGTHS:
        x, inv_scale = numbers(length, dtype), torch.tensor(1.7)
        wanted = reference.encode_each(x, fmts, inv_scale=inv_scale)
        assert same(native.encode_each(x, fmts, inv_scale=inv_scale), wanted), length
        for other in finite_and_broken(length, dtype):
            codes, *ends = native.encode_each_with_range(other, fmts, inv_scale=inv_scale)
            assert same(codes, reference.encode_each(other.nan_to_num(nan=0.0), fmts, inv_scale=inv_scale)), length
            assert same_range(ends, reference.value_range(other)), length


def layouts() -> list[Tensor]:
    """Tensors that do not lie in row-major order, and one that does not start where memory is aligned."""
    x = torch.randn(6, 8, 10, 5)
    return [
        x.transpose(0, 3),
        x.to(memory_format=torch.channels_last),
        x[:, ::3],
        x[2, :, 1:, 1],
        x.flatten()[1:],
        x[0, 0, 0, 0],
    ]


@pytest.mark.parametrize("number", range(6))
def test_any_layout(isa: str, number: int) -> None:
    """Codes, bits and statistics are in row-major order of the shape, however the tensor lies in memory."""
    x = layouts()[number]
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    assert same(native.encode(x, formats.int4, inv_scale=ONE), reference.encode(x, formats.int4, inv_scale=ONE))
    assert same(native.encode_each(x, PHASES, inv_scale=ONE), reference.encode_each(x, PHASES, inv_scale=ONE))
    assert same(native.clip_bits(x, low, high), reference.clip_bits(x, low, high))
    assert same(native.moments(x), reference.moments(x))
    noise = noise_for(x.numel())
    for fmt in RANDOM:
        wanted = reference.encode_stochastic(x, fmt, inv_scale=ONE, noise=noise)
        assert same(native.encode_stochastic(x, fmt, inv_scale=ONE, noise=noise), wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fmt", [*RANDOM, formats.fp8_e4m3], ids=str)
def test_random_codes_of_any_length(isa: str, fmt: Format, dtype: torch.dtype) -> None:
    """With given noise, its smallest and largest included, every length has the reference's random codes."""
    for length in LENGTHS:
        x, noise = numbers(length, dtype), noise_for(length)
        for scale in (1.0, 1.3, 0.07):
            inv_scale = torch.tensor(scale)
            wanted = reference.encode_stochastic(x, fmt, inv_scale=inv_scale, noise=noise)
            assert same(native.encode_stochastic(x, fmt, inv_scale=inv_scale, noise=noise), wanted), (length, scale)


@pytest.mark.parametrize("fmt", RANDOM, ids=str)
def test_random_rounding_decides_exactly(isa: str, fmt: Format) -> None:
    """Where the share of the way is a multiple of 2^-24, noise just below it goes up and noise equal to it does not."""
    values = torch.tensor(sorted({v for v in fmt.values if v >= 0}), dtype=torch.float64)
    low, gap = values[:-1].repeat_interleave(64), values.diff().repeat_interleave(64)
    k = torch.randint(1, (1 << 24) - 1, low.shape)
    x = (low + gap * k * 2.0**-24).float()
    inv_scale = ONE
    for shift in (-1, 0, 1):
        noise = ((k + shift).double() * 2.0**-24).float()
        wanted = reference.encode_stochastic(x, fmt, inv_scale=inv_scale, noise=noise)
        assert same(native.encode_stochastic(x, fmt, inv_scale=inv_scale, noise=noise), wanted), shift


@pytest.mark.parametrize("fmt", [formats.int4, *PHASES, formats.fp4_e3m0, formats.fp4_e2m1], ids=str)
@each_isa
@given(some=tensors, scale=inverse_scales, seed=st.integers(0, (1 << 64) - 1), part=st.integers(0, (1 << 24) - 1))
def test_drawn_codes_are_those_of_the_draws_noise(
    isa: str, fmt: Format, some: list[float], scale: float, seed: int, part: int
) -> None:
    """Noise that is computed on the way is the draw's: the codes equal those of noise made beforehand."""
    draw = Draw(seed=seed, layer=3, step=torch.tensor(seed % 1001), operand=seed % 256, rank=seed % 5)
    x, inv_scale = torch.tensor(some), torch.tensor(scale)
    noise = draw.uniform(x.numel(), part)
    wanted = reference.encode_stochastic(x, fmt, inv_scale=inv_scale, noise=noise)
    assert same(native.encode_drawn(x, fmt, inv_scale=inv_scale, draw=draw, part=part), wanted)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 127, 128, 129, 100_003])
def test_uniform_numbers_are_rngs(isa: str, length: int) -> None:
    """Philox in vectors gives the numbers of `halfbyte.rng`, at the largest words of key and counter too."""
    for seed, word in ((0, 0), (987654321987654321, 77), ((1 << 64) - 1, (1 << 32) - 1)):
        draw = Draw(seed=seed, layer=word, step=torch.tensor(word), operand=word % 256, rank=word % 9)
        for part in (0, 5, (1 << 24) - 1):
            assert same(native.uniform(length, draw, part), draw.uniform(length, part))


CLIPS = [(0.0, 2.0), (-2.0, 2.0), (0.0, 1e-3), (-1.25, 1.25)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("low", "high"), CLIPS)
def test_clip_bits(isa: str, low: float, high: float, dtype: torch.dtype) -> None:
    """Bits inside a clip and at its ends are the reference's, NaN lying outside; without a tie there is one plane."""
    ends = torch.tensor(low), torch.tensor(high)
    for length in LENGTHS:
        x = numbers(length, dtype)
        x[x.abs() == high] = 0.5
        x[length // 3 : length // 3 + 1] = math.nan
        assert same(native.clip_bits(x, *ends), reference.clip_bits(x, *ends)), length
        for place, end in ((length // 2, high), (length - 1, -high)):
            x[place : place + 1] = end
            assert same(native.clip_bits(x, *ends), reference.clip_bits(x, *ends)), length


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("low", "high"), CLIPS)
@pytest.mark.parametrize("wide", [False, True])
def test_clip_backward(isa: str, low: float, high: float, wide: bool, dtype: torch.dtype) -> None:
    """The gradients of x and of the clip have the reference's bits, with ties and without, over several pieces."""
    fmt = {(False, False): formats.uint4, (False, True): formats.int4}.get(
        (wide, low < 0), formats.int8 if low < 0 else formats.integer(8, signed=False)
    )
    top = fmt.max_integer - 1 if low < 0 else fmt.max_integer
    for length in [*LENGTHS, PIECE + 70_001]:
        x = torch.randn(length) * high
        for tie in (False, True):
            if tie:
                x[:: max(1, length // 5)] = high
            q = QTensor(
                reference.encode(x, fmt, inv_scale=torch.tensor(top / high), code_range=(-top if low < 0 else 0, top)),
                ONE, fmt, x.shape,
            )  # fmt: skip
            bits = reference.clip_bits(x, torch.tensor(low), torch.tensor(high))
            grad = numbers(length, dtype).nan_to_num(posinf=1.0, neginf=-1.0)
            kept = grad.clone()
            assert same(native.clip_backward(grad, q, *bits), reference.clip_backward(kept, q, *bits)), length


def test_clip_backward_works_in_place(isa: str) -> None:
    """The gradient that is handed in is the one that comes back."""
    x, grad = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([1.0, 2.0, 4.0])
    q = QTensor(reference.encode(x, formats.uint4, inv_scale=torch.tensor(7.5)), ONE, formats.uint4, x.shape)
    bits = native.clip_bits(x, torch.tensor(0.0), torch.tensor(2.0))
    grad_x, grad_clip = native.clip_backward(grad, q, *bits)
    assert grad_x is grad
    assert (grad.tolist(), grad_clip.item()) == ([0.0, 2.0, 0.0], 4.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("low", "high"), CLIPS)
@pytest.mark.parametrize("fmt", [formats.int4, formats.uint4, formats.int8], ids=str)
def test_codes_range_and_bits_from_one_read(isa: str, fmt: Format, low: float, high: float, dtype: torch.dtype) -> None:
    """The fused activation kernel gives what encoding, range and bits give one by one."""
    clip, code_range = torch.tensor(high), (-7 if low < 0 and fmt.signed else 0, 7)
    options = {"inv_scale": (1 / clip.double() * 7).float(), "code_range": code_range}
    least = torch.tensor(high * code_range[0] / 7)
    for length in LENGTHS:
        for x in finite_and_broken(length, dtype):
            for tie in (False, True):
                x[length - 1 :] = high if tie else high / 2
                codes, ends, bits = native.encode_clipped(x, fmt, clip=clip, code_range=code_range)
                clean = x.nan_to_num(nan=0.0)
                assert same(codes, reference.encode(clean, fmt, **options)), length
                assert same_range(ends, reference.value_range(x)), length
                assert same(bits, reference.clip_bits(clean, least, clip)), length
                unmasked = native.encode_clipped(x, fmt, clip=clip, code_range=code_range, mask=False)
                assert same(unmasked[0], codes)
                assert unmasked[2] == (None, None)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_range(isa: str, dtype: torch.dtype) -> None:
    """Smallest and largest element are the reference's, in its type; any NaN makes both NaN."""
    for length in LENGTHS:
        x = numbers(length, dtype) if dtype != torch.float64 else torch.randn(length).double()
        assert same(native.value_range(x), reference.value_range(x)), length
        for place in {0, length // 2, length - 1} if length else ():
            broken = x.clone()
            broken[place] = math.nan
            assert all(end.isnan() for end in native.value_range(broken)), (length, place)


def test_a_zero_at_the_end_of_a_range_is_positive(isa: str) -> None:
    """Which of two zeros is the smaller does not depend on their order."""
    for zeros in ([0.0, -0.0], [-0.0, 0.0], [-0.0]):
        assert [math.copysign(1, end) for end in native.value_range(torch.tensor(zeros))] == [1, 1]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_moments_and_sums(isa: str, dtype: torch.dtype) -> None:
    """Means and sums have the reference's bits: both add in one order."""
    for length in [*LENGTHS, 2 * PIECE + 4096 * 3 + 5]:
        x = (torch.randn(length, dtype=torch.float64) * 100).to(dtype)
        assert same(native.moments(x), reference.moments(x)), length
        assert same(native.stable_sum(x), reference.stable_sum(x)), length


def test_a_sum_of_more_than_4096_rows(isa: str) -> None:
    """The rows' sums are themselves summed in rows, twice where there are many."""
    x = torch.rand(4096 * 4097 + 3)
    assert same(native.stable_sum(x), reference.stable_sum(x))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [2, 3, 7])
def test_results_do_not_depend_on_threads(isa: str, count: int) -> None:
    """One thread and several give the same codes, bits, ranges, sums and gradients."""
    x = torch.randn(2 * PIECE + 33_333)
    x[12345] = 2.0
    noise, draw = noise_for(x.numel()), Draw(seed=5, layer=1, step=torch.tensor(2), operand=0)
    low, high = torch.tensor(0.0), torch.tensor(2.0)
    q = QTensor(reference.encode(x, formats.uint4, inv_scale=torch.tensor(7.5)), ONE, formats.uint4, x.shape)

    def everything() -> tuple[object, ...]:
        bits = native.clip_bits(x, low, high)
        return (
            native.value_range(x),
            native.moments(x),
            native.stable_sum(x),
            native.encode(x, formats.int4, inv_scale=ONE),
            native.encode_each_with_range(x, PHASES, inv_scale=ONE),
            native.encode_stochastic(x, formats.fp4_e3m0, inv_scale=ONE, noise=noise),
            native.encode_drawn(x, formats.fp4_e3m0, inv_scale=ONE, draw=draw),
            native.uniform(x.numel(), draw),
            bits,
            native.encode_clipped(x, formats.uint4, clip=high, code_range=(0, 15)),
            native.clip_backward(torch.arange(x.numel()).sin(), q, *bits),
        )

    torch.set_num_threads(1)
    alone = everything()
    torch.set_num_threads(count)
    assert same(everything(), alone)


SPECS: list[Spec] = [
    MinMax(bits=4), MinMax(bits=8), Sawb(), Sawb(levels=16), Sawb(ibm_shifted=True), AbsMax(), AbsMax(bits=4),
    Pact(clip=1.5), Pact(clip=1.5, signed=True), Pact(bits=8, signed=None), Radix4(), Radix4(phase=formats.Phase.ODD),
    Nearest(fmt="fp4_e2m1"), Nearest(fmt="fp4_e3m0"), Nearest(fmt="fp8_e4m3"), NVFP4(), MXFP4(), Luq(),
    AbsMax(bits=4, rounding="stochastic"), Radix4(rounding="stochastic"), NVFP4(rounding="stochastic"),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("broken", [False, True], ids=["numbers", "nan"])
def test_quantizers_are_the_same_on_both_backends(spec: Spec, broken: bool) -> None:
    """A spec's codes, scales and zero points do not depend on the backend, nor does what a NaN turns them into."""
    x = torch.randn(70, 96)
    if broken:
        x[3, 5] = math.nan
    found = []
    for backend in ("reference", "native"):
        quantizer = spec.build(backend=backend)
        quantizer.seed = 7 if spec.stochastic else None
        if broken:
            with pytest.warns(NonFiniteWarning):
                found.append(quantizer.quantize(x, observe=True, differentiable=True))
        else:
            found.append(quantizer.quantize(x, observe=True, differentiable=True))
    (one, one_saved), (other, other_saved) = found
    if broken:
        assert one.scale.isnan()
        assert other.scale.isnan()
        one, other = replace(one, scale=ONE, zero_point=None), replace(other, scale=ONE, zero_point=None)
        if isinstance(spec, (MinMax, Sawb)):  # whose codes are counted from a number that is not there
            return
    for part in ("qdata", "scale", "zero_point", "block_scale"):
        assert same(getattr(one, part), getattr(other, part)), part
    assert same(tuple(one_saved), tuple(other_saved))


GRADIENT_SPECS = [
    (Radix4(), Radix4(phase=formats.Phase.ODD)),
    (Radix4(), Radix4()),
    (Radix4(rounding="stochastic"), Radix4()),
    (Nearest(fmt="fp8_e5m2"), Radix4(rounding="stochastic")),
]


@pytest.mark.filterwarnings("ignore::halfbyte.errors.NonFiniteWarning")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [LayerGradScale(), ExactGradScale(), LossScale(growth_interval=1)], ids=str)
@pytest.mark.parametrize("specs", GRADIENT_SPECS, ids=str)
def test_gradients_are_the_same_on_both_backends(specs: tuple[Spec, Spec], scale: Any, dtype: torch.dtype) -> None:
    """Both GEMMs' codes and scales, and the layer's scale after each vote, are the reference's, broken batches too."""
    draw = Draw(seed=1, layer=2, step=torch.tensor(3), operand=0)
    geometry = Linear(rows=30, in_features=5, out_features=70)
    uses = {gemm: Use(gemm=gemm, operand=0, geometry=geometry, draw=draw) for gemm in ("dgrad", "wgrad")}
    states, quantizers = [], []
    once = dict.fromkeys(uses, 1)
    for backend in ("reference", "native"):
        states.append(scale.build())
        both = dict(zip(uses, specs, strict=True))
        quantizers.append(GradQuantizer(both, states[-1], samples=once, gains=once, backend=backend))
    for batch in ([0.0], [1e-3], [3e-3, -2e-3], [1e-3, math.nan], [1e-3], [math.inf], [-5.0], [1e-3, -math.inf]):
        x = torch.randn(30, 70).mul_(1e-3).to(dtype) if batch != [0.0] else torch.zeros(30, 70, dtype=dtype)
        x.view(-1)[: len(batch)] = torch.tensor(batch)
        one, other = (q.quantize(dict.fromkeys(uses, x), uses, observe=True) for q in quantizers)
        for gemm in uses:
            assert same(one[gemm][0].qdata, other[gemm][0].qdata), batch
            assert same_range([one[gemm][0].scale], [other[gemm][0].scale]), batch
        for state in states:
            state.advance()
        wanted, got = (state.state_dict() for state in states)
        assert all(torch.equal(wanted[name], got[name]) for name in wanted), batch
        assert torch.equal(quantizers[0].nonfinite, quantizers[1].nonfinite)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the library's functions, as they are called from here on."""
    called: list[str] = []

    def listed(name: str, real: Any) -> Any:
        return lambda *args: (called.append(name), real(*args))[1]

    functions = {
        "clip": ("_clip_bits", "_encode_clipped"),
        "encode": ("_encode_grid", "_encode_levels"),
        "stochastic": ("_uniform", "_encode_random"),
        "sums": ("_value_range", "_moments"),
    }
    for place, names in functions.items():
        module = import_module(f"halfbyte.kernels.native.{place}")
        for name in names:
            monkeypatch.setattr(module, name, listed(name, getattr(module, name)))
    return called


def test_what_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clipped activation and, once its scale is settled, a gradient are read once; LUQ makes no noise in memory."""
    activation, luq = Pact(clip=1.5).build(backend="native"), Luq().build(backend="native")
    luq.seed = 3
    phases = {"dgrad": Radix4(), "wgrad": Radix4(phase=formats.Phase.ODD)}
    samples = {"dgrad": 1, "wgrad": 1}
    gradient = GradQuantizer(phases, LayerGradScale().build(), samples=samples, gains=samples, backend="native")
    x = torch.randn(300)
    called = reads(monkeypatch)
    activation.quantize(x, observe=True, differentiable=True)
    assert called == ["_encode_clipped"]
    for expected in (["_value_range", "_encode_levels"], ["_encode_levels"]):
        called.clear()
        gradient.quantize(dict.fromkeys(phases, x), {}, observe=True)
        assert called == expected
    called.clear()
    luq.quantize(x)
    assert called == ["_value_range", "_encode_random"]


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_float64_goes_to_the_reference(dtype: torch.dtype) -> None:
    """float64 is computed in float64: a number that float32 would round over a tie keeps its code."""
    x = torch.tensor([2.5 + 2.0**-40, 0.625 - 2.0**-40], dtype=dtype)
    assert same(native.encode(x, formats.int4, inv_scale=ONE), reference.encode(x, formats.int4, inv_scale=ONE))
    assert native.encode(x[1:], PHASES[0], inv_scale=ONE).item() == 3


X = torch.randn(300)
BITS = torch.zeros(38, dtype=torch.uint8)
CALLS = {
    "value_range": (X,),
    "moments": (X,),
    "stable_sum": (X,),
    "encode_grid": (X, ONE, None, 0, -8, 7, 4),
    "encode_levels": (X, ONE, [0, 3 << 22, 24, 60, 0x42800000]),
    "clip_bits": (X, -ONE, ONE),
    "encode_clipped": (X, ONE, -7, 7, 4, True),
    "clip_backward": (X.clone(), torch.zeros(150, dtype=torch.uint8), 4, True, BITS, None),
    "uniform": (torch.tensor(3), 300, [1, 2, 3, 4]),
    "encode_random": (X, ONE, 4, 0, [-8, 7, 4], None, torch.tensor(3), [1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_are_sound(name: str) -> None:
    """Each operator tells torch the truth: its schema, what it changes, and its results' shapes."""
    torch.library.opcheck(getattr(torch.ops.halfbyte, name).default, CALLS[name])


def test_the_compiler_sees_one_step() -> None:
    """torch.compile traces through an encoder without a break, and the codes are the same."""

    def step(x: Tensor) -> tuple[Tensor, ...]:
        draw = Draw(seed=1, layer=2, step=torch.tensor(3), operand=0)
        return (
            native.encode(x * 2, formats.int4, inv_scale=ONE),
            *native.encode_each(x, PHASES, inv_scale=ONE),
            native.encode_drawn(x, formats.fp4_e3m0, inv_scale=ONE, draw=draw),
            *native.moments(x),
        )

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert same(compiled(X), step(X))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter with other variables in its environment."""
    source = str(Path(native.__file__).parents[3])
    env = {**os.environ, "PYTHONPATH": source, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


def test_the_environment_forces_an_instruction_set() -> None:
    """HALFBYTE_ISA decides, and `info` says what was decided."""
    done = run("from halfbyte.kernels import native; print(native.info().isa)", HALFBYTE_ISA="portable")
    assert done.stdout.strip() == "portable", done.stderr


def test_an_unknown_instruction_set_is_an_error() -> None:
    """A set that the machine does not have is refused by name, in the environment and in a call."""
    done = run("from halfbyte.kernels import native; native.info()", HALFBYTE_ISA="neon2")
    assert "There is no instruction set on this machine named 'neon2'." in done.stderr
    with pytest.raises(UnknownNameError, match="neon2"):
        native.force_isa("neon2")


def test_without_a_library_there_is_one_clear_line(tmp_path: Path) -> None:
    """Where the library is missing or broken `info` says why and how to get it, and a use is an error that does too."""
    (tmp_path / "broken.so").write_bytes(b"no library")
    for name in ("absent.so", "broken.so"):
        code = (
            "import torch\nfrom halfbyte import formats\nfrom halfbyte.kernels import native\n"
            "print(native.available(), native.info().problem)\n"
            "native.encode(torch.ones(3), formats.int4, inv_scale=torch.ones(()))\n"
        )
        done = run(code, HALFBYTE_LIBRARY=str(tmp_path / name))
        assert done.stdout.startswith("False")
        assert done.stdout.count("\n") == 1
        assert "pip install ziglang" in done.stdout
        assert "UnsupportedError: The native backend is absent" in done.stderr


def test_threads_of_torch_are_used() -> None:
    """torch's own loop was found, so the kernels run on its threads."""
    assert native.info().threads == torch.get_num_threads()
    assert quantize(torch.tensor([1.0]), AbsMax()).codes().tolist() == [127]
