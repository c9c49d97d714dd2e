"""Block formats and 8-bit floats on the native backend: the reference's bits on every instruction set."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halfbyte import formats
from halfbyte.formats import Format
from halfbyte.kernels import Batched, Geometry, Linear, Reduction, native, reference
from halfbyte.qtensor import Blocks, QTensor
from halfbyte.quantizers import MXFP4, NVFP4, BitSplit, Sawb, Spec, Use, quantize
from halfbyte.rng import Draw
from native_library import isa, needs_library
from shapes import GEMMS, GEOMETRIES, conv, operand_shapes

__all__ = ["isa"]  # a fixture, used by its name

pytestmark = needs_library
native_gemm = importlib.import_module("halfbyte.kernels.native.gemm")  # the package's `gemm` is the function

E4M3, E5M2 = formats.fp8_e4m3, formats.fp8_e5m2
RULES = ("floor", "ceil", "even", "rceil")
SPECS: list[Spec] = [
    NVFP4(), NVFP4(square=True), NVFP4(rounding="stochastic", headroom=True), NVFP4(rounding="stochastic", square=True),
    NVFP4(four_over_six=True), NVFP4(rounding="ms_eden"), *(MXFP4(scale_rule=rule) for rule in RULES),
    MXFP4(scale_rule="quest"), MXFP4(rounding="stochastic", headroom=True),
]  # fmt: skip
MORE: dict[str, Geometry] = {
    "panels": conv((17, 70, 3, 4), (67, 70, 3, 3), padding=1),
    "strided": conv((33, 18, 9, 8), (40, 18, 3, 3), stride=2, padding=1),
    "wide_fan": conv((2, 800, 3, 3), (20, 800, 2, 2), padding=1),
    "tall": conv((2, 3, 40, 90), (5, 3, 3, 3), padding=1),
    "long": Linear(rows=5, in_features=1100, out_features=70),
    "many_rows": Linear(rows=140, in_features=40, out_features=260),
    "batches": Batched(batch=9, rows=5, columns=66, inner=33),
}
ALL = {**GEOMETRIES, **MORE}
FEW = ["linear_odd", "conv2d_dilated", "conv2d_grouped", "conv_transpose", "batched", "strided"]


@pytest.fixture(autouse=True)
def threads_afterwards() -> Iterator[None]:
    """The number of threads is what it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def use(geometry: Geometry, gemm: str, operand: int) -> Use:
    """What an operand is quantized for."""
    draw = Draw(seed=1, layer=3, step=torch.tensor(2), operand=operand)
    return Use(gemm=gemm, operand=operand, geometry=geometry, draw=draw)


def spread(*shape: int) -> Tensor:
    """Numbers of many magnitudes."""
    return torch.randn(shape) * torch.exp(torch.randn(shape)) * 3


def codes(spec: Spec, geometry: Geometry, gemm: str, backend: str = "native") -> list[QTensor]:
    """Both operands of a GEMM in a spec's codes."""
    built = spec.build(backend=backend)
    shapes = operand_shapes(geometry, gemm)
    return [built.quantize(spread(*shape), use=use(geometry, gemm, i)).q for i, shape in enumerate(shapes)]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two results have equal bits; one NaN is as good as another."""
    alike = torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())
    return one.dtype == other.dtype and alike and torch.equal(one.nan_to_num().signbit(), other.nan_to_num().signbit())


def by_kernel(gemm: str, a: QTensor, b: QTensor, geometry: Geometry) -> bool:
    """Whether a kernel computes a product, and that with the reference's bits."""
    wanted = reference.gemm(gemm, a, b, geometry)
    found = native.gemm(gemm, a, b, geometry)
    return native.computed_by(gemm, a, b, geometry, "exact") == "native" and same(found.view(wanted.shape), wanted)


# ---- codes and scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["linear_odd", "conv2d_dilated", "conv2d_grouped", "batched"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_operands_are_the_reference_s(isa: str, spec: Spec, name: str, dtype: torch.dtype) -> None:
    """Codes, scales and masks of every operand of every GEMM are the reference's, whatever the type of the numbers."""
    for gemm, place in itertools.product(GEMMS, (0, 1)):
        x = spread(*operand_shapes(ALL[name], gemm)[place]).to(dtype)
        one, other = (
            spec.build(backend=b).quantize(x, differentiable=True, use=use(ALL[name], gemm, place))
            for b in ("reference", "native")
        )
        for part in ("qdata", "scale", "block_scale"):
            assert same(getattr(one.q, part), getattr(other.q, part)), (gemm, place, part)
        assert len(one.saved) == len(other.saved)
        assert all(map(torch.equal, one.saved, other.saved))


def magnitudes() -> Tensor:
    """Largest magnitudes of blocks: zero, subnormal numbers, every binade, E4M3's ties and their neighbors."""
    ties = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E4M3.values[:127])])
    binades = torch.exp2(torch.arange(-149.0, 128.0))
    points = torch.cat([ties * 6, ties * 6 * 16 / 17, binades, binades * 1.5, binades * 1.75, binades.clamp_min(1e-38)])
    neighbors = [torch.nextafter(points, torch.tensor(end)) for end in (0.0, math.inf)]
    found = torch.cat([torch.zeros(3), points, *neighbors])
    return found[found.isfinite()]


@pytest.mark.parametrize("limit", [6.0, 6 * 16 / 17])
@pytest.mark.parametrize("largest", [448.0, 256.0])
def test_nvfp4_scales_are_the_reference_s(isa: str, limit: float, largest: float) -> None:
    """The tensor's scale, the blocks' codes and the factors, for tensors of every magnitude."""
    for top in (2688.0, 1e-45, 1e-38, 3e-5, 1.0, 1.7e38, 3.4e38, 0.0):
        amax = magnitudes().clamp_max(top)
        wanted = reference.nv_scales(amax, limit=limit, largest=largest)
        assert all(map(same, native.nv_scales(amax, limit=limit, largest=largest), wanted)), top


@pytest.mark.parametrize("factor", [1.0, 0.75])
@pytest.mark.parametrize("rule", RULES)
def test_mxfp4_scales_are_the_reference_s(isa: str, rule: str, factor: float) -> None:
    """The blocks' powers of two and the factors, for blocks of every magnitude."""
    wanted = reference.mx_scales(magnitudes(), rule=rule, factor=factor)
    assert all(map(same, native.mx_scales(magnitudes(), rule=rule, factor=factor), wanted))


@pytest.mark.parametrize("view", [(300,), (7, 130), (3, 50, 5), (40, 1200), (2, 16, 70), (0, 16), (16, 0)])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_the_largest_magnitudes_show_what_is_broken(isa: str, view: tuple[int, ...], number: float) -> None:
    """A block's largest magnitude is NaN or infinite where a number of it is, along every axis."""
    for axis in range(len(view)):
        sizes = tuple(16 if dim == axis else 1 for dim in range(len(view)))
        x = spread(*view)
        for _ in range(2):
            wanted = reference.block_amax(x, Blocks(view, sizes, None))
            found = native.block_amax(x, Blocks(view, sizes, None))
            assert all(map(same, found, wanted))
            x.view(-1)[: x.numel() // 2 : 37] = number


@pytest.mark.parametrize("size", [2, 16, 32, 64, 256, 512])
def test_rotations_are_the_reference_s(isa: str, size: int) -> None:
    """There and back, along every axis, with the groups that are left over, with and without signs."""
    for shape in ((5, 37), (3, size + 21, 5), (2, 33, 1100)):
        x = spread(*shape)
        signs = torch.where(torch.rand(size) < 0.5, -1.0, 1.0)
        for axis, some, back in itertools.product(range(len(shape)), (None, signs), (False, True)):
            view = Reduction(shape, axis, 0)
            wanted = reference.rotate(x, view, size, some, back=back)
            assert same(native.rotate(x, view, size, some, back=back), wanted), (shape, axis, back)


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("name", ALL)
def test_block_products_are_the_reference_s(isa: str, name: str, gemm: str) -> None:
    """A kernel computes the product of two block formats in every layer, with the reference's bits."""
    for spec in (NVFP4(), NVFP4(square=True), MXFP4(), MXFP4(rounding="stochastic", headroom=True)):
        assert by_kernel(gemm, *codes(spec, ALL[name], gemm), ALL[name]), spec


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("name", FEW)
def test_blocks_meet_other_codes(isa: str, name: str, gemm: str) -> None:
    """NVFP4 times MXFP4, an integer, an 8-bit float, and codes whose blocks lie for another GEMM: all by a kernel."""
    geometry = ALL[name]
    nv, mx = codes(NVFP4(), geometry, gemm), codes(MXFP4(), geometry, gemm)
    wider = [float8(E4M3, shape, 0) for shape in operand_shapes(geometry, gemm)]
    whole = [quantize(spread(*shape), Sawb()) for shape in operand_shapes(geometry, gemm)]
    elsewhere = [quantize(spread(*shape), NVFP4()) for shape in operand_shapes(geometry, gemm)]
    for others in (mx, wider, whole, elsewhere):
        assert by_kernel(gemm, nv[0], others[1], geometry)
        assert by_kernel(gemm, others[0], nv[1], geometry)


def float8(fmt: Format, shape: tuple[int, ...], least: int, most: int | None = None) -> QTensor:
    """Random codes of an 8-bit float: numbers with either sign, magnitudes from `least` to `most`."""
    top = max(code for code in range(128) if fmt.integers[code] is not None) if most is None else most
    magnitude = torch.randint(least, top + 1, shape)
    chosen = torch.where(torch.rand(shape) < 0.1, 0, magnitude) + 128 * torch.randint(2, shape)
    return QTensor(chosen.to(torch.uint8).reshape(-1), torch.tensor(0.37), fmt, torch.Size(shape))


def integers(fmt: Format, shape: tuple[int, ...]) -> QTensor:
    """Random codes of an integer format."""
    return quantize(spread(*shape), Sawb(bits=fmt.bits, levels=(1 << fmt.bits) - 1))


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("name", [*FEW, "panels", "tall"])
def test_8_bit_floats_times_integers(isa: str, name: str, gemm: str, fmt: Format) -> None:
    """Any codes of an 8-bit float times INT4, in either place, have the reference's exact sums."""
    a, b = operand_shapes(ALL[name], gemm)
    for most in (3, 90, None):
        assert by_kernel(gemm, float8(fmt, a, 0, most), integers(formats.int4, b), ALL[name])
    assert by_kernel(gemm, integers(formats.int4, a), float8(fmt, b, 0), ALL[name])


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("name", FEW)
def test_8_bit_floats_times_8_bit_floats(isa: str, name: str, gemm: str) -> None:
    """Two 8-bit floats of 24 and 18 binades, whose sums float64 holds exactly, have the reference's results."""
    a, b = operand_shapes(ALL[name], gemm)
    for fmts in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)):
        first, second = (
            float8(fmt, shape, 8 << 2 if fmt == E5M2 else 0) for fmt, shape in zip(fmts, (a, b), strict=True)
        )
        assert by_kernel(gemm, first, second, ALL[name])


@pytest.mark.parametrize("code", [0x7B, 0xFB, 0x03])
def test_sums_beyond_53_bits(isa: str, code: int) -> None:
    """wgrad of E5M2 and 15, summed beyond 2^53, is exact, in a linear layer and in a convolution."""
    rows = 1 << 18
    geometry, image = Linear(rows=rows, in_features=1, out_features=1), conv((2, 1, 512, 256), (1, 1, 1, 1))
    numbers = torch.full((rows,), code, dtype=torch.uint8)
    numbers[:3] = 0x01
    ones = torch.full((rows // 2,), 0xFF, dtype=torch.uint8)
    exact = 15 * ((rows - 3) * E5M2.integers[code] + 3)
    for layer, shape in ((geometry, (rows, 1)), (image, (2, 1, 512, 256))):
        a = QTensor(numbers, torch.ones(()), E5M2, torch.Size(shape))
        b = QTensor(ones, torch.ones(()), formats.uint4, torch.Size(shape))
        found = native.gemm("wgrad", a, b, layer)
        assert found.item() == torch.tensor(exact).float().item() * float(E5M2.unit)


@pytest.mark.parametrize("kind", ["linear_odd", "panels", "batches", "many_rows", "strided"])
@pytest.mark.parametrize("gemm", GEMMS)
def test_products_do_not_depend_on_threads(isa: str, gemm: str, kind: str) -> None:
    """One thread, two and three give the same bits, also where float64 has to round: codes of every magnitude."""
    geometry = ALL[kind]
    pairs = [codes(NVFP4(), geometry, gemm), [float8(E5M2, s, 0) for s in operand_shapes(geometry, gemm)]]
    for a, b in pairs:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native.gemm(gemm, a, b, geometry))
        assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize("gemm", GEMMS)
def test_empty_sides(isa: str, gemm: str) -> None:
    """No rows, no features or no images give an empty result, or zeros where the reduction is empty."""
    for sides in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        geometry = Linear(**dict(zip(("rows", "in_features", "out_features"), sides, strict=True)))
        a, b = codes(NVFP4(), geometry, gemm)
        assert same(native.gemm(gemm, a, b, geometry), geometry.apply(gemm, a.dequantize(), b.dequantize()))
    image = conv((0, 3, 5, 5), (4, 3, 3, 3), padding=1)
    a, b = codes(NVFP4(), image, gemm)
    shape = {"fprop": image.output_shape, "dgrad": image.input_shape, "wgrad": image.weight_shape}[gemm]
    assert same(native.gemm(gemm, a, b, image), torch.zeros(shape))


def test_no_channels(isa: str) -> None:
    """A convolution that reads no channels gives zeros, also after another one has used the kernels' memory."""
    before = conv((4, 33, 12, 12), (40, 33, 3, 3), padding=1)
    nothing_in, nothing_out = conv((2, 0, 5, 5), (4, 0, 3, 3), padding=1), conv((2, 3, 5, 5), (0, 3, 3, 3), padding=1)
    for gemm, image, shape in (("fprop", nothing_in, (2, 4, 5, 5)), ("dgrad", nothing_out, (2, 3, 5, 5))):
        assert by_kernel(gemm, *codes(NVFP4(), before, gemm), before)
        assert same(native.gemm(gemm, *codes(NVFP4(), image, gemm), image), torch.zeros(shape))


def test_a_scale_of_nan_makes_every_product_nan(isa: str) -> None:
    """A block operand that held NaN gives NaN everywhere, also where a strided dgrad multiplies nothing."""
    geometry = conv((2, 3, 9, 9), (4, 3, 1, 2), stride=3)
    a, b = codes(NVFP4(), geometry, "dgrad")
    assert native.gemm("dgrad", replace(a, scale=torch.tensor(math.nan)), b, geometry).isnan().all()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("gemm", ["fprop", "dgrad"])
def test_prepared_operands_keep_their_panels(isa: str, gemm: str, rows: int) -> None:
    """Products with one prepared block operand are the reference's, and its panels are made once for each layout."""
    geometry = Linear(rows=rows, in_features=70, out_features=300)
    a, b = codes(MXFP4(), geometry, gemm)
    ready = native.prepare(b)
    for first, layouts in ((a, 1), (a, 1), (float8(E4M3, a.shape, 0), 2), (a, 2)):
        assert same(native.gemm(gemm, first, ready, geometry), reference.gemm(gemm, first, b, geometry))
        assert len(ready.numbers) == layouts


def test_panels_beyond_their_limit_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operand whose panels would take more than the limit is read for each product, with the same result."""
    geometry = Linear(rows=3, in_features=70, out_features=130)
    a, b = codes(NVFP4(), geometry, "fprop")
    ready = native.prepare(b)
    monkeypatch.setattr(importlib.import_module("halfbyte.kernels.native.numbers"), "_MOST_PANELS", 1000)
    assert same(native.gemm("fprop", a, ready, geometry), reference.gemm("fprop", a, b, geometry))
    assert not ready.numbers


def test_blocks_far_below_the_largest(isa: str) -> None:
    """MXFP4 blocks 2^50 and 2^90 below the largest one have the reference's results; the latter are its own."""
    geometry = Linear(rows=4, in_features=64, out_features=3)
    w = quantize(spread(3, 64), MXFP4())
    for power, by_library in ((50, True), (90, False)):
        x = spread(4, 64)
        x[:, 32:] *= 2.0**-power
        q = quantize(x, MXFP4())
        assert (native_gemm.product_of_numbers("fprop", q, w, geometry) is not None) == by_library
        assert same(native.gemm("fprop", q, w, geometry), reference.gemm("fprop", q, w, geometry))


def test_what_goes_to_the_reference() -> None:
    """Float32 scales of blocks, zero points beside blocks, and long sums of INT8 with E5M2 have no kernel."""
    geometry = Linear(rows=64, in_features=50, out_features=30)
    a, b = codes(NVFP4(), geometry, "fprop")
    rows = BitSplit().build().parts(spread(64, 30), use=use(geometry, "wgrad", 0))[0]
    long = Linear(rows=1 << 15, in_features=1, out_features=1)
    moved = replace(quantize(spread(30, 50), Sawb()), zero_point=torch.tensor(0.5).double())
    cases = {
        "scales of blocks that are float32": ("wgrad", rows, quantize(spread(64, 50), Sawb()), geometry),
        "a zero point beside scales of blocks or an 8-bit float": ("fprop", a, moved, geometry),
        "an 8-bit float with integers whose sums may pass 53 bits, or a format that reaches beyond 4096": (
            "wgrad", float8(E5M2, (1 << 15, 1), 0), quantize(spread(1 << 15, 1), Sawb(bits=8)), long,
        ),
    }  # fmt: skip
    for words, case in cases.items():
        assert native_gemm.reference_case(*case) == words
        assert native.computed_by(*case, "exact") == "reference"
        assert same(native.gemm(*case), reference.gemm(*case))
    assert native.computed_by("fprop", a, b, geometry, "exact") == "native"
    assert native.computed_by("fprop", a, b, geometry, "fp32") == "reference"
