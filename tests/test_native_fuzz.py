"""Shapes, strides, threads and special numbers that nobody thought of: native equals reference on each instruction set.

`./dev test` tries some hundreds; ``./dev fuzz 5000`` tries that many examples of each test, new ones every time.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as given_by_hypothesis
from hypothesis import strategies as st
from torch import Tensor

from halfbyte import formats
from halfbyte.formats import Format
from halfbyte.kernels import Batched, Conv, ConvTranspose, Geometry, Linear, Reduction, native, reference
from halfbyte.qtensor import Blocks, QTensor, pack
from halfbyte.quantizers import MXFP4, NVFP4, Spec, Use
from halfbyte.rng import Draw
from native_library import needs_library
from shapes import GEMMS, operand_shapes

pytestmark = needs_library
native_gemm = importlib.import_module("halfbyte.kernels.native.gemm")  # the package's `gemm` is the function

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PHASES = (formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd)
LEVELS = [*PHASES, formats.fp4_e3m0, formats.fp4_e2m1]
FLOATS_OF_8_BITS = [formats.fp8_e4m3, formats.fp8_e5m2]
NEAREST = [*LEVELS, *FLOATS_OF_8_BITS, formats.fp4_e1m2]
BLOCK_SPECS: list[Spec] = [
    NVFP4(), NVFP4(square=True), NVFP4(rounding="stochastic", headroom=True), MXFP4(), MXFP4(scale_rule="rceil"),
    MXFP4(scale_rule="even"), MXFP4(scale_rule="ceil"), MXFP4(rounding="stochastic", headroom=True),
]  # fmt: skip
SIGNED = [formats.int4, formats.int8, formats.integer(3)]
INTEGERS = [*SIGNED, formats.uint4, formats.integer(8, signed=False)]
NARROW = [formats.int4, formats.uint4, formats.integer(2)]

seen: Counter[str] = Counter()
"""How many different tensors and products were compared, each on every instruction set."""


@pytest.fixture(scope="module", autouse=True)
def count(request: pytest.FixtureRequest) -> Iterator[None]:
    """Says at the end how many shapes were compared, and sets the threads back."""
    before, different = torch.get_num_threads(), set[object]()
    remember.append(different)
    yield
    remember.clear()
    torch.set_num_threads(before)
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfuzz: {dict(seen)} comparisons, {len(different)} different shapes, {native.isas()}")


remember: list[set[object]] = []


def given(**strategies: st.SearchStrategy[object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis's, which draws the number of threads, too; the examples are as many as the profile says."""
    quiet = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return quiet(given_by_hypothesis(threads=st.sampled_from([1, 2, 3, 4]), **strategies)(test))

    return decorate


def agree(kind: str, shape: object, compute: Callable[[object], object], threads: int) -> None:
    """`compute(backend)` is the same for the reference and for the native backend on each instruction set."""
    wanted = compute(reference)
    seen[kind] += 1
    remember[0].add((kind, shape))
    torch.set_num_threads(threads)
    for isa in native.isas():
        native.force_isa(isa)
        got = compute(native)
        assert same(got, wanted), (isa, threads, got, wanted)
    native.force_isa(None)
    torch.set_num_threads(1)


def same(one: object, other: object) -> bool:
    """Whether two results are equal to the bit, in structure and type; one NaN is as good as another."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        if not one.is_floating_point():
            return torch.equal(one, other)
        signs = torch.equal(one.nan_to_num().signbit(), other.nan_to_num().signbit())
        return signs and torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other


def ends_of(found: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A range whose zeros are positive: which of two zeros is the smaller is not defined."""
    return tuple(end + 0.0 for end in found)


# ---- numbers ---------------------------------------------------------------------------------------------------------

long = st.sampled_from([0, 40_000, 140_001, 600_011])
"""Lengths that are cut between threads."""


@st.composite
def numbers(draw: st.DrawFn, *, nan: bool = False, dtypes: list[torch.dtype] = FLOATS) -> Tensor:
    """A tensor of any shape, memory layout and magnitude, with special numbers among its elements."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 13), max_size=4) | st.lists(st.integers(1, 700), min_size=1, max_size=1))
    if draw(st.integers(0, 9)) == 0:
        shape = [draw(long)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0 ** draw(st.integers(-20, 12))
    limits = torch.finfo(dtype)
    specials = [0.0, -0.0, math.inf, -math.inf, limits.max, limits.min, limits.tiny, -limits.smallest_normal / 8]
    specials += [0.5, 2.5, -1.5, 3.0, 1e-40, 7.0] + ([math.nan] if nan else [])
    flat = x.view(-1)
    for special in draw(st.lists(st.sampled_from(specials), max_size=min(5, len(flat)))):
        flat[draw(st.integers(0, len(flat) - 1))] = special
    x = x.to(dtype)
    match draw(st.sampled_from(["plain", "permuted", "channels last", "strided", "offset", "expanded"])):
        case "permuted":
            x = x.permute(draw(st.permutations(range(x.dim()))))
        case "channels last" if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        case "strided" if x.dim():
            x = x[..., draw(st.integers(0, 2)) :: draw(st.integers(2, 3))]
        case "offset":
            x = x.reshape(-1)[1:]
        case "expanded" if x.numel() < 1000:
            x = x.unsqueeze(-1).expand(*x.shape, 3)
    return x


scales = st.floats(2.0**-20, 2.0**20, width=32).map(torch.tensor)


@given(x=numbers(), scale=scales, fmt=st.sampled_from([*INTEGERS, *NEAREST]), data=st.data())
def test_encode(x: Tensor, scale: Tensor, fmt: Format, data: st.DataObject, threads: int) -> None:
    """Codes rounded to nearest, whatever the lower end, offset and code range."""
    options: dict[str, object] = {}
    if fmt.kind == "int" and data.draw(st.booleans()):
        ends = st.integers(int(fmt.saturate[0]), int(fmt.saturate[1]))
        bottom, top = sorted((data.draw(ends), data.draw(ends)))
        options = {"code_range": (bottom, top), "offset": data.draw(st.sampled_from([0, bottom]))}
        low = data.draw(st.floats(-100, 100, width=32))
        options["low"] = torch.tensor(low)
    agree("encode", x.shape, lambda backend: backend.encode(x, fmt, inv_scale=scale, **options), threads)


@given(x=numbers(nan=True), scale=scales, fmts=st.lists(st.sampled_from(NEAREST), max_size=4))
def test_encode_each(x: Tensor, scale: Tensor, fmts: list[Format], threads: int) -> None:
    """Codes in several formats at once, and the range from the same read, also where a number is NaN or infinite."""

    def compute(backend: object) -> object:
        codes, *ends = backend.encode_each_with_range(x, fmts, inv_scale=scale)
        return codes, ends_of(ends)

    agree("encode_each", x.shape, compute, threads)


@given(x=numbers(), scale=scales, fmt=st.sampled_from([*SIGNED, *LEVELS]), seed=st.integers(0, (1 << 64) - 1))
def test_stochastic(x: Tensor, scale: Tensor, fmt: Format, seed: int, threads: int) -> None:
    """Random codes, from noise that is handed in and from noise that is drawn on the way."""
    draw = Draw(seed=seed, layer=seed % 77, step=torch.tensor(seed % 1001), operand=seed % 256, rank=seed % 5)
    noise = draw.uniform(x.numel(), seed % 9)

    def compute(backend: object) -> object:
        given_noise = backend.encode_stochastic(x, fmt, inv_scale=scale, noise=noise)
        if backend is native:
            drawn = native.encode_drawn(x, fmt, inv_scale=scale, draw=draw, part=seed % 9)
            return given_noise, drawn, native.uniform(x.numel(), draw, seed % 9)
        return given_noise, given_noise, noise

    agree("stochastic", x.shape, compute, threads)


@given(
    x=numbers(nan=True), high=st.sampled_from([0.5, 2.5, 3.0]), both=st.booleans(), wide=st.booleans(), data=st.data()
)
def test_clip(x: Tensor, high: float, both: bool, wide: bool, data: st.DataObject, threads: int) -> None:
    """Bits of a clip, and the gradients of x and of the clip."""
    low, high_t = torch.tensor(-high if both else 0.0), torch.tensor(high)
    fmt = formats.integer(8 if wide else 4, signed=both)
    clean = x.contiguous().nan_to_num()
    top = 7 if both else 15
    codes = reference.encode(clean, fmt, inv_scale=torch.tensor(top / high), code_range=(-top if both else 0, top))
    q = QTensor(codes, torch.ones(()), fmt, x.shape)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).to(x.dtype)

    def compute(backend: object) -> object:
        inside, ties = backend.clip_bits(x, low, high_t)
        return inside, ties, backend.clip_backward(grad.clone(), q, inside, ties)

    agree("clip", x.shape, compute, threads)


@given(x=numbers(nan=True), clip=scales, both=st.booleans(), mask=st.booleans(), fmt=st.sampled_from(INTEGERS))
def test_codes_range_and_bits_from_one_read(
    x: Tensor, clip: Tensor, both: bool, mask: bool, fmt: Format, threads: int
) -> None:
    """The fused activation kernel, also where a number is NaN or infinite."""
    both = both and fmt.signed

    def compute(backend: object) -> object:
        codes, found, bits = backend.encode_clipped(x, fmt, clip=clip, code_range=(-3 if both else 0, 3), mask=mask)
        return codes, ends_of(found), bits

    if fmt.bits > 2:
        agree("encode_clipped", x.shape, compute, threads)


@given(x=numbers(nan=True, dtypes=[*FLOATS, torch.float64]))
def test_statistics(x: Tensor, threads: int) -> None:
    """Range, means and sums, also where a number is NaN or infinite."""
    flat = x.reshape(-1)
    agree("statistics", x.shape, lambda b: (ends_of(b.value_range(x)), b.moments(x), b.stable_sum(flat)), threads)


View = tuple[tuple[int, ...], int, int]


@st.composite
def views(draw: st.DrawFn) -> View:
    """A shape and two different dimensions of it."""
    shape = tuple(draw(st.lists(st.integers(1, 40) | st.sampled_from([64, 127, 300]), min_size=2, max_size=4)))
    while math.prod(shape) > 200_000:
        shape = shape[:-1] if len(shape) > 2 else (shape[0], 40)
    axis, across = draw(st.permutations(range(len(shape))))[:2]
    return shape, axis, across


@given(view=views(), seed=st.integers(0, 1 << 32), size=st.sampled_from([2, 4, 16, 32, 64, 256]), back=st.booleans())
def test_rotations(view: View, seed: int, size: int, back: bool, threads: int) -> None:
    """Hadamard rotations along any axis, with signs for odd seeds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(view[0], generator=generator)
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0) if seed % 2 else None
    agree("rotation", view, lambda b: b.rotate(x, Reduction(*view), size, signs, back=back), threads)


@given(
    view=views(), spec=st.sampled_from(BLOCK_SPECS), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 1 << 32),
    special=st.sampled_from([None, 0.0, 1e-40, math.nan, math.inf]),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::halfbyte.errors.NonFiniteWarning")
def test_blocks(view: View, spec: Spec, dtype: torch.dtype, seed: int, special: float | None, threads: int) -> None:
    """Codes and scales of block formats along any axis, also where a number is NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(view[0], generator=generator) * 2.0 ** torch.randint(-30, 9, view[0], generator=generator)
    if special is not None:
        x.view(-1)[seed % x.numel() :: 41] = special
    x = x.to(dtype)
    draw = Draw(seed=seed, layer=1, step=torch.tensor(seed % 99), operand=2)
    used = Use(gemm="fprop", operand=0, geometry=OneView(Reduction(*view)), draw=draw)  # type: ignore[arg-type]

    def compute(backend: object) -> object:
        q = spec.build(backend="native" if backend is native else "reference").quantize(x, use=used).q
        return q.qdata, q.scale, q.block_scale

    agree("blocks", (view, spec), compute, threads)


class OneView:
    """A layer that shows an operand in one view."""

    def __init__(self, view: Reduction) -> None:
        self.view = view

    def reduction_view(self, _gemm: str, _operand: int) -> Reduction:
        """That view."""
        return self.view


# ---- products --------------------------------------------------------------------------------------------------------

sides = st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 128, 129, 200, 260])


@st.composite
def convolutions(draw: st.DrawFn) -> Conv:
    """A convolution in one, two or three dimensions: stride, padding, dilation, groups, each direction by itself."""
    dims = draw(st.integers(1, 3))
    each = lambda lowest, highest: tuple(draw(st.integers(lowest, highest)) for _ in range(dims))  # noqa: E731
    kernel, stride, padding, dilation = each(1, 4), each(1, 3), each(0, 3), each(1, 3)
    groups, fan_in, fan_out = (draw(st.integers(1, n)) for n in (3, 20, 20))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = tuple(n + draw(st.integers(0, (9, 6, 3)[dims - 1])) for n in least)
    return Conv(
        input_shape=(draw(st.integers(1, 5)), groups * fan_in, *size),
        weight_shape=(groups * fan_out, fan_in, *kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


geometries = st.one_of(
    st.builds(Linear, rows=sides, in_features=sides, out_features=sides),
    st.builds(Batched, batch=st.integers(1, 5), rows=sides, columns=sides, inner=sides),
    convolutions(),
    st.builds(ConvTranspose, conv=convolutions()),
)


def operand(fmt: Format, shape: tuple[int, ...], generator: torch.Generator, outside: float) -> QTensor:
    """Codes of which that share is any, and the others lie in few levels, as a gradient's do."""
    numel = math.prod(shape)
    few = torch.randint(1, min(5, 1 << fmt.bits), (numel,), generator=generator)
    anything = torch.randint(1 << fmt.bits, (numel,), generator=generator)
    codes = torch.where(torch.rand(numel, generator=generator) < outside, anything, few)
    return QTensor(pack(codes.to(torch.uint8), fmt.bits), torch.tensor(0.37), fmt, torch.Size(shape))


@given(
    geometry=geometries,
    which=st.sampled_from(GEMMS),
    fmts=st.tuples(st.sampled_from([*INTEGERS, *LEVELS]), st.sampled_from(NARROW))
    | st.tuples(st.sampled_from([*INTEGERS, formats.fp4_e3m0_r4]), st.sampled_from([formats.int8, *PHASES])),
    outside=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    method=st.integers(0, 3),
    seed=st.integers(0, 1 << 32),
)
def test_gemm(
    geometry: Geometry, which: str, fmts: tuple[Format, Format], outside: float, method: int, seed: int, threads: int
) -> None:
    """Sums and results of the three GEMMs, by each method; a zero has either sign where one product is all there is."""
    generator = torch.Generator().manual_seed(seed)
    shapes = operand_shapes(geometry, which)
    a, b = (operand(fmt, shape, generator, outside) for fmt, shape in zip(fmts, shapes, strict=True))

    def compute(backend: object) -> object:
        plain = backend is native and not isinstance(geometry, ConvTranspose)
        if plain and native_gemm.reference_case(which, a, b, geometry) is None:
            sums = native_gemm._product(which, a, b, geometry, method=method).double()
            return sums, native.gemm(which, a, b, geometry)
        return backend.accumulators(which, a, b, geometry) + 0.0, backend.gemm(which, a, b, geometry) + 0.0

    kind = f"gemm of {type(geometry).__name__}"
    agree(kind, (which, geometry), compute, threads)


def blocked(kind: str, geometry: Geometry, which: str, place: int, generator: torch.Generator) -> QTensor:
    """Random codes whose products with each other float64 sums exactly."""
    shape = operand_shapes(geometry, which)[place]
    fmt = {"e4m3": formats.fp8_e4m3, "e5m2": formats.fp8_e5m2, "int4": formats.int4}.get(kind, formats.fp4_e2m1)
    if fmt.bits == 8:
        least, most = (0, 0x7E) if kind == "e4m3" else (0x30, 0x7B)
        magnitude = torch.randint(least, most + 1, (math.prod(shape),), generator=generator)
        codes = magnitude + 128 * torch.randint(2, magnitude.shape, generator=generator)
        return QTensor(codes.to(torch.uint8), torch.tensor(0.37), fmt, torch.Size(shape))
    q = operand(fmt, shape, generator, 1.0)
    if kind == "int4":
        return q
    view, powers = geometry.reduction_view(which, place), kind == "mx"
    sizes = [1] * len(view.shape)
    sizes[view.axis] = 32 if powers else 16
    if kind == "square":
        sizes[view.across] = 16
    blocks = Blocks(view.shape, tuple(sizes), formats.e8m0 if powers else formats.fp8_e4m3)
    # E4M3 scales of 13 binades, powers of two of 16.
    scales = torch.randint(*((100, 116) if powers else (24, 0x7F)), blocks.grid, generator=generator)
    return QTensor(q.qdata, q.scale, fmt, torch.Size(shape), block_scale=scales.to(torch.uint8), blocks=blocks)


KINDS = st.sampled_from(["nv", "mx", "square", "e4m3", "e5m2", "int4"])


@given(geometry=geometries, which=st.sampled_from(GEMMS), kinds=st.tuples(KINDS, KINDS), seed=st.integers(0, 1 << 32))
def test_gemm_of_numbers(geometry: Geometry, which: str, kinds: tuple[str, str], seed: int, threads: int) -> None:
    """Products with scales for blocks, or of 8-bit floats."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (blocked(kind, geometry, which, place, generator) for place, kind in enumerate(kinds))
    kind = f"gemm of {type(geometry).__name__}"
    agree(kind, (which, geometry, kinds), lambda backend: backend.gemm(which, a, b, geometry) + 0.0, threads)


def main(examples: int, *arguments: str) -> int:
    """Runs this file with that many examples of each test."""
    settings.register_profile("fuzz", settings(deadline=None, print_blob=True, max_examples=examples))
    options = ["--hypothesis-profile=fuzz", "-p", "no:cacheprovider"]
    # Hypothesis is imported here already, which pytest would rather have done itself.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([__file__, *options, *arguments]))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
