"""The native GEMMs: the sums and results of the reference, bit for bit, on each instruction set of this machine."""

from __future__ import annotations

import ctypes
import importlib
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halfbyte import formats
from halfbyte.formats import Format
from halfbyte.kernels import Batched, ConvTranspose, Geometry, Linear, native, reference
from halfbyte.kernels.native.library import library
from halfbyte.qtensor import QTensor, pack
from shapes import GEMMS, GEOMETRIES, conv, operand_shapes

native_gemm = importlib.import_module("halfbyte.kernels.native.gemm")  # the package's `gemm` is the function

R4, R4_ODD = formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd
NARROW = [formats.int4, formats.uint4]
PAIRS = [
    *itertools.product([formats.int4, formats.uint4, formats.int8], NARROW),
    *itertools.product([R4, R4_ODD, formats.fp4_e3m0, formats.fp4_e2m1], NARROW),
    *itertools.product(NARROW, [R4]),
    (formats.int8, formats.int8),
    (formats.integer(8, signed=False), formats.int8),
    (formats.integer(6), formats.integer(2)),
    (R4, R4),
]
METHODS = {"chosen": 0, "bytes": 1, "window": 2, "words": 3}
MORE = {
    "strided": conv((3, 5, 11, 9), (7, 5, 3, 2), stride=3, padding=2),
    "stride_beyond_kernel": conv((2, 3, 9, 9), (4, 3, 1, 2), stride=3),
    "panels": conv((2, 70, 5, 5), (67, 70, 3, 3), padding=1),
    "tall": conv((1, 2, 2100, 3), (3, 2, 3, 3), padding=1),
    "3d_grouped": conv((2, 4, 5, 4, 4), (6, 2, 3, 1, 2), stride=2, padding=1, groups=2),
    "many_images": conv((37, 20, 4, 4), (18, 20, 3, 3), padding=1),
    "cut_rows": conv((1, 17, 40, 33), (66, 17, 3, 3), padding=2, dilation=2),
    "depthwise_many": conv((2, 48, 9, 9), (48, 1, 3, 3), padding=1, groups=48),
    "many_rows": Linear(rows=1300, in_features=70, out_features=131),
    "many_columns": Linear(rows=5, in_features=3, out_features=8300),
    "long": Linear(rows=30, in_features=1300, out_features=67),
    "batches": Batched(batch=9, rows=5, columns=66, inner=33),
}
ALL = {**GEOMETRIES, **MORE}
METHOD_KINDS = ["many_rows", "long", "batches", "panels", "strided", "many_images", "cut_rows"]


@pytest.fixture(autouse=True)
def best_isa_afterwards() -> Iterator[None]:
    """Whatever a test forces, the next one starts with the machine's best instruction set."""
    yield
    library().hb_force_isa(None)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that this machine has."""
    if library().hb_force_isa(ctypes.c_char_p(request.param.encode())) != 0:
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def qtensor(codes: Tensor, fmt: Format, scale: float = 0.37) -> QTensor:
    qdata = pack(codes.to(torch.uint8).reshape(-1).contiguous(), fmt.bits)
    return QTensor(qdata, torch.tensor(scale), fmt, codes.shape)


def random_codes(fmt: Format, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(1 << fmt.bits, shape)


def gradient_codes(shape: tuple[int, ...], bottom: int, outside: float) -> Tensor:
    """Radix-4 codes, most of them zero or in the four levels from `bottom` on."""
    inside = torch.where(torch.rand(shape) < 0.2, 0, torch.randint(4, shape) + bottom + 1)
    magnitude = torch.where(torch.rand(shape) < outside, torch.randint(8, shape), inside)
    return magnitude + 8 * torch.randint(2, shape)


def operands(which: str, geometry: Geometry, fmt_a: Format, fmt_b: Format) -> tuple[QTensor, QTensor]:
    shape_a, shape_b = operand_shapes(geometry, which)
    return qtensor(random_codes(fmt_a, shape_a), fmt_a), qtensor(random_codes(fmt_b, shape_b), fmt_b, 0.011)


def check(which: str, a: QTensor, b: QTensor, geometry: Geometry) -> None:
    assert torch.equal(native.accumulators(which, a, b, geometry), reference.accumulators(which, a, b, geometry))
    assert torch.equal(native.gemm(which, a, b, geometry), reference.gemm(which, a, b, geometry))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("which", GEMMS)
def test_every_pair_of_formats(isa: str, which: str, kind: str) -> None:
    """Sums and results are the reference's for every pair of formats, layer and instruction set."""
    for fmt_a, fmt_b in PAIRS:
        check(which, *operands(which, ALL[kind], fmt_a, fmt_b), ALL[kind])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", GEMMS)
def test_every_method_and_window(isa: str, which: str, method: str) -> None:
    """Each way to multiply gives the same sums, wherever the window lies and however many codes are outside."""
    for geometry, bottom, outside in itertools.product(
        [MORE[kind] for kind in METHOD_KINDS], range(4), (0.0, 0.03, 0.9)
    ):
        shape_a, shape_b = operand_shapes(geometry, which)
        a = qtensor(gradient_codes(shape_a, bottom, outside), R4)
        b = qtensor(random_codes(formats.int4, shape_b), formats.int4)
        got = native_gemm._product(which, a, b, geometry, method=METHODS[method])
        assert torch.equal(got.double(), reference.accumulators(which, a, b, geometry))


@pytest.mark.parametrize("method", METHODS)
def test_one_row_of_every_length(isa: str, method: str) -> None:
    """A vector times a small matrix is exact for every length from 1 to 140, so for every end of a packed block."""
    for inner in range(1, 141):
        geometry = Linear(rows=2, in_features=inner, out_features=3)
        a = qtensor(gradient_codes((2, inner), 2, 0.2), R4)
        b = qtensor(random_codes(formats.int4, (3, inner)), formats.int4)
        got = native_gemm._product("fprop", a, b, geometry, method=METHODS[method])
        assert torch.equal(got.double(), reference.accumulators("fprop", a, b, geometry))


def largest(fmt: Format, shape: tuple[int, ...]) -> QTensor:
    codes = max(range(1 << fmt.bits), key=lambda c: abs(fmt.integers[c] or 0))
    return qtensor(torch.full(shape, codes), fmt)


@pytest.mark.parametrize(("fmt_a", "fmt_b"), [(R4, formats.uint4), (formats.int8, formats.int8), (R4, R4)], ids=str)
def test_sums_beyond_32_bits(isa: str, fmt_a: Format, fmt_b: Format) -> None:
    """A reduction of the largest codes that passes 2^31 is exact, in a linear layer and in a batch of matrices."""
    length = (1 << 31) // (fmt_a.max_integer * fmt_b.max_integer) + 700
    for geometry in (
        Linear(rows=2, in_features=length, out_features=3),
        Batched(batch=2, rows=2, inner=length, columns=1),
    ):
        shape_a, shape_b = operand_shapes(geometry, "fprop")
        a, b = largest(fmt_a, shape_a), largest(fmt_b, shape_b)
        each_a, each_b = (q.format.integers[int(q.codes().flatten()[0])] for q in (a, b))
        exact = float(length * each_a * each_b)
        assert abs(exact) >= 1 << 31
        assert torch.equal(
            native.accumulators("fprop", a, b, geometry), torch.full(geometry.output_shape, exact, dtype=torch.float64)
        )
        check("fprop", a, b, geometry)


@pytest.mark.parametrize("which", GEMMS)
def test_convolutions_beyond_32_bits(isa: str, which: str) -> None:
    """A convolution whose sums pass 2^31 in one of its GEMMs is exact there."""
    geometry = {
        "fprop": conv((1, 4500, 3, 3), (1, 4500, 3, 3), padding=1),
        "dgrad": conv((1, 1, 3, 3), (4500, 1, 3, 3), padding=1),
        "wgrad": conv((5, 1, 90, 90), (1, 1, 2, 3), padding=1),
    }[which]
    shape_a, shape_b = operand_shapes(geometry, which)
    a, b = largest(R4, shape_a), largest(formats.uint4, shape_b)
    assert reference.accumulators(which, a, b, geometry).abs().max() >= 1 << 31
    check(which, a, b, geometry)


@pytest.mark.parametrize("kind", ["linear_odd", "conv2d_grouped", "conv_transpose", "batched"])
@pytest.mark.parametrize("which", GEMMS)
def test_zero_points(which: str, kind: str) -> None:
    """Zero points of either operand or both give the reference's bits."""
    geometry = GEOMETRIES[kind]
    a, b = operands(which, geometry, formats.int4, formats.int4)
    moved_a, moved_b = (replace(q, zero_point=torch.tensor(z).double()) for q, z in ((a, 1 / 3), (b, -0.3)))
    for pair in ((moved_a, b), (a, moved_b), (moved_a, moved_b)):
        assert torch.equal(native.gemm(which, *pair, geometry), reference.gemm(which, *pair, geometry))


@pytest.mark.parametrize("kind", [*MORE, "conv_transpose_grouped"])
@pytest.mark.parametrize("which", GEMMS)
def test_results_do_not_depend_on_threads(which: str, kind: str) -> None:
    """One thread, two and three give the same bits."""
    geometry = ALL[kind]
    a, b = operands(which, geometry, R4, formats.int4)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(native.gemm(which, a, b, geometry))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("which", GEMMS)
def test_empty_sides(isa: str, which: str) -> None:
    """No rows, no features or no images give an empty result, or zeros where the reduction is empty."""
    for sides in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        geometry = Linear(**dict(zip(("rows", "in_features", "out_features"), sides, strict=True)))
        a, b = operands(which, geometry, R4, formats.int4)
        wanted = geometry.apply(which, a.dequantize(), b.dequantize())
        assert torch.equal(native.gemm(which, a, b, geometry), wanted)
    geometry = conv((0, 3, 5, 5), (4, 3, 3, 3), padding=1)
    a, b = operands(which, geometry, R4, formats.int4)
    shape = {"fprop": geometry.output_shape, "dgrad": geometry.input_shape, "wgrad": geometry.weight_shape}[which]
    assert torch.equal(native.gemm(which, a, b, geometry), torch.zeros(shape))


def test_a_scale_of_nan_makes_every_product_nan() -> None:
    """An operand that held NaN gives NaN everywhere, also where a strided dgrad multiplies nothing."""
    geometry = MORE["stride_beyond_kernel"]
    a, b = operands("dgrad", geometry, R4, formats.int4)
    broken = replace(a, scale=torch.tensor(float("nan")))
    assert native.gemm("dgrad", broken, b, geometry).isnan().all()


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("which", GEMMS)
def test_prepared_operands(isa: str, which: str, rows: int) -> None:
    """Products with one prepared operand are the reference's, whichever method each of them takes."""
    geometry = Linear(rows=rows, in_features=70, out_features=1300)
    shape_a, shape_b = operand_shapes(geometry, which)
    b = qtensor(random_codes(formats.int4, shape_b), formats.int4)
    ready = native_gemm.prepare(b)
    for a in (
        qtensor(random_codes(formats.uint4, shape_a), formats.uint4),
        qtensor(gradient_codes(shape_a, 2, 0.03), R4),
        qtensor(gradient_codes(shape_a, 0, 0.9), R4),
        qtensor(random_codes(formats.int8, shape_a), formats.int8),
    ):
        assert torch.equal(native.gemm(which, a, ready, geometry), reference.gemm(which, a, b, geometry))


def test_a_prepared_operand_is_packed_once_for_each_layout() -> None:
    """Many products with a prepared operand share its panels: 8-bit ones, and 16-bit ones where they are needed."""
    geometry = Linear(rows=3, in_features=70, out_features=130)
    a, b = operands("dgrad", geometry, formats.int4, formats.int4)
    ready = native_gemm.prepare(b)
    spread = qtensor(gradient_codes((3, 130), 0, 0.9), R4)
    for left, packed in ((a, 1), (a, 1), (spread, 2), (a, 2), (spread, 2)):
        before = list(ready.panels.values())
        native.gemm("dgrad", left, ready, geometry)
        assert len(ready.panels) == packed
        assert all(old is kept for old, kept in zip(before, ready.panels.values(), strict=False))


def test_the_window_is_taken_where_few_codes_are_outside(isa: str) -> None:
    """A gradient of four levels is multiplied in 8 bits wherever they lie, one of all levels in 16."""
    if isa != "avx512":
        pytest.skip("the window needs AVX-512 with VNNI")
    geometry = Linear(rows=40, in_features=140, out_features=130)
    b = qtensor(random_codes(formats.int4, (130, 140)), formats.int4)
    for bottom, outside, words in ((0, 0.02, False), (2, 0.02, False), (3, 0.0, False), (1, 0.8, True)):
        ready = native_gemm.prepare(b)
        native.gemm("dgrad", qtensor(gradient_codes((40, 130), bottom, outside), R4), ready, geometry)
        assert [key[-1] for key in ready.panels] == [words]


def test_panels_beyond_their_limit_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operand whose panels would take more than the limit is packed for each product, with the same result."""
    geometry = Linear(rows=3, in_features=70, out_features=130)
    a, b = operands("fprop", geometry, formats.int4, formats.int4)
    ready = native_gemm.prepare(b)
    monkeypatch.setattr(native_gemm, "_MOST_PANELS", 1000)
    assert torch.equal(native.gemm("fprop", a, ready, geometry), reference.gemm("fprop", a, b, geometry))
    assert not ready.panels


def test_sums_that_are_emptied_often(isa: str) -> None:
    """wgrad of a convolution over a million positions, whose 32-bit sums are emptied again and again, is exact."""
    shape = (2, 1, 1024, 512)
    positions = torch.Size(shape).numel()
    a = QTensor(torch.full((positions // 2,), 0x77, dtype=torch.uint8), torch.ones(()), R4, torch.Size(shape))
    b = QTensor(torch.full_like(a.qdata, 0xFF), torch.ones(()), formats.uint4, torch.Size(shape))
    sums = native_gemm._product("wgrad", a, b, conv(shape, (1, 1, 1, 1)), method=METHODS["words"])
    assert sums.item() == positions * R4.integers[7] * 15


def test_scales_beyond_float32_multiply_first(isa: str) -> None:
    """Scales whose product passes float32 before the unit brings it back give the reference's finite result."""
    geometry = Linear(rows=1, in_features=1, out_features=20)
    a, b = qtensor(torch.ones(1, 1), R4, 2e30), qtensor(torch.ones(20, 1), formats.int4, 2e8)
    got = native.gemm("fprop", a, b, geometry)
    assert got.isfinite().all()
    assert torch.equal(got, reference.gemm("fprop", a, b, geometry))


def test_what_goes_to_the_reference() -> None:
    """The table names every product of codes that has no kernel, and those alone."""
    linear = GEOMETRIES["linear_odd"]
    long = conv((1, 1, 2, 40000), (1, 1, 1, 1))
    cases = {
        "fprop of INT4": (native_gemm.reference_case("fprop", *operands("fprop", linear, *NARROW), linear), None),
        "FP8": (
            native_gemm.reference_case("fprop", *operands("fprop", linear, formats.fp8_e4m3, formats.int4), linear),
            None,
        ),
        "radix 16": (
            native_gemm.reference_case(
                "fprop", *operands("fprop", linear, formats.logarithmic(16), formats.int4), linear
            ),
            "an 8-bit float with integers whose sums may pass 53 bits, or a format that reaches beyond 4096",
        ),
        "wide rows": (
            native_gemm.reference_case("wgrad", *operands("wgrad", long, R4, formats.uint4), long),
            "wgrad of a convolution that passes 31 bits within 1,024 products",
        ),
    }
    for got, wanted in cases.values():
        assert got == wanted
    for fmt_a, fmt_b in ((formats.fp8_e4m3, formats.int4),):
        a, b = operands("fprop", linear, fmt_a, fmt_b)
        a = replace(a, qdata=a.qdata & 0x77)  # no NaN among the codes
        assert torch.equal(native.gemm("fprop", a, b, linear), reference.gemm("fprop", a, b, linear))
    a, b = operands("wgrad", long, R4, formats.uint4)
    check("wgrad", a, b, long)


def test_floating_operands_and_other_sums_are_the_references() -> None:
    """An operand in floating point, and sums that are not exact, are computed as the reference does."""
    geometry = GEOMETRIES["linear_odd"]
    a, b = operands("fprop", geometry, formats.int4, formats.int4)
    x = torch.randn(a.shape)
    assert torch.equal(native.gemm("fprop", x, b, geometry), reference.gemm("fprop", x, b, geometry))
    got = native.gemm("fprop", a, b, geometry, accumulate="fp16_chunk64")
    assert torch.equal(got, reference.gemm("fprop", a, b, geometry, accumulate="fp16_chunk64"))


def test_a_transposed_convolution_is_its_mirror() -> None:
    """wgrad of a transposed convolution has its gradient on the other side, and is still exact."""
    geometry = GEOMETRIES["conv_transpose"]
    assert isinstance(geometry, ConvTranspose)
    shape_a, shape_b = operand_shapes(geometry, "wgrad")
    a, b = qtensor(gradient_codes(shape_a, 2, 0.03), R4), qtensor(random_codes(formats.uint4, shape_b), formats.uint4)
    check("wgrad", a, b, geometry)
