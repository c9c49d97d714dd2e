"""The three GEMMs on codes: exact integer sums whatever the shape, the format and the path taken.

The truth here is computed from the formats' tables in int64, by matrix products and loops over kernel taps that share
no code with the package, and for small cases in fractions.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte import formats, oracle
from halfbyte.formats import Format
from halfbyte.kernels import Conv, Geometry, Linear, reference
from halfbyte.qtensor import QTensor, pack

GEMMS = ("fprop", "dgrad", "wgrad")
R4, R4_ODD = formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd
# What recipes multiply: an activation or a gradient with a weight, a gradient with an activation.
PAIRS = [
    *itertools.product([formats.int4, formats.uint4, formats.int8], [formats.int4]),
    *itertools.product(
        [R4, R4_ODD, formats.fp4_e3m0, formats.fp4_e2m1, formats.fp8_e5m2, formats.fp8_e4m3],
        [formats.int4, formats.uint4],
    ),
    (R4, formats.int8),
    (formats.int8, formats.int8),
    (formats.fp8_e4m3, formats.fp8_e4m3),
    (R4, R4),
]
PAIR_IDS = [f"{a.name}-{b.name}" for a, b in PAIRS]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch computes with two threads during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def qtensor(codes: Tensor, fmt: Format, scale: float = 1.0, zero_point: float | None = None) -> QTensor:
    zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.float64)
    qdata = pack(codes.to(torch.uint8).reshape(-1).contiguous(), fmt.bits)
    return QTensor(qdata, torch.tensor(scale), fmt, codes.shape, zero)


def random_codes(fmt: Format, shape: tuple[int, ...]) -> Tensor:
    numbers = torch.tensor([c for c, i in enumerate(fmt.integers) if i is not None])
    return numbers[torch.randint(len(numbers), shape)]


def largest_codes(fmt: Format, shape: tuple[int, ...]) -> Tensor:
    """The code of the largest magnitude, whatever its sign."""
    numbers = [c for c, i in enumerate(fmt.integers) if i is not None]
    return torch.full(shape, max(numbers, key=lambda c: abs(fmt.integers[c] or 0)))


def integers(q: QTensor) -> Tensor:
    """What the codes stand for, int64, from the format's table."""
    return torch.tensor([0 if i is None else i for i in q.format.integers])[q.codes().long()]


def shapes(which: str, geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a GEMM's two operands."""
    if isinstance(geometry, Linear):
        x = (geometry.rows, geometry.in_features)
        w = (geometry.out_features, geometry.in_features)
        y = (geometry.rows, geometry.out_features)
    else:
        assert isinstance(geometry, Conv)
        x, w, y = geometry.input_shape, geometry.weight_shape, geometry.output_shape
    return {"fprop": (x, w), "dgrad": (y, w), "wgrad": (y, x)}[which]


def operands(which: str, geometry: Geometry, fmt_a: Format, fmt_b: Format) -> tuple[QTensor, QTensor]:
    """Random operands of a GEMM."""
    shape_a, shape_b = shapes(which, geometry)
    return qtensor(random_codes(fmt_a, shape_a), fmt_a), qtensor(random_codes(fmt_b, shape_b), fmt_b)


def linear_truth(which: str, a: Tensor, b: Tensor) -> Tensor:
    """The products of int64 matrices, which wrap only beyond 2^63."""
    if which == "fprop":
        return a @ b.T
    return a @ b if which == "dgrad" else a.T @ b


def conv_truth(which: str, a: Tensor, b: Tensor, geo: Conv) -> Tensor:
    """A convolution and its two gradients in int64: a sum over kernel taps and groups of strided windows."""
    pads = [p for pad in reversed(geo.padding) for p in (pad, pad)]
    images, in_channels, *spatial = geo.input_shape
    out_channels, fan_in, *kernel = geo.weight_shape
    out_spatial = geo.output_shape[2:]
    fan_out = out_channels // geo.groups
    padded = torch.zeros(images, in_channels, *(s + 2 * p for s, p in zip(spatial, geo.padding, strict=True))).long()
    result = {"fprop": torch.zeros(geo.output_shape), "dgrad": padded, "wgrad": torch.zeros(geo.weight_shape)}[which]
    result = result.long()
    x = None if which == "dgrad" else F.pad(a if which == "fprop" else b, pads)
    for tap in itertools.product(*map(range, kernel)):
        at = [
            torch.arange(o) * s + t * d for o, s, t, d in zip(out_spatial, geo.stride, tap, geo.dilation, strict=True)
        ]
        grid = torch.meshgrid(*at, indexing="ij")
        for group in range(geo.groups):
            ins, outs = range(group * fan_in, (group + 1) * fan_in), range(group * fan_out, (group + 1) * fan_out)
            for i, o in itertools.product(range(fan_in), range(fan_out)):
                if which == "fprop":
                    result[:, outs[o]] += x[:, ins[i]][:, *grid] * b[(outs[o], i, *tap)]
                elif which == "dgrad":
                    result[:, ins[i]][:, *grid] += a[:, outs[o]] * b[(outs[o], i, *tap)]
                else:
                    result[(outs[o], i, *tap)] += (a[:, outs[o]] * x[:, ins[i]][:, *grid]).sum()
    if which == "dgrad":
        return result[:, :, *(slice(p, p + s) for p, s in zip(geo.padding, spatial, strict=True))]
    return result


def truth(which: str, a: QTensor, b: QTensor, geometry: Geometry) -> Tensor:
    """The exact sums of products, int64."""
    if isinstance(geometry, Linear):
        return linear_truth(which, integers(a), integers(b))
    assert isinstance(geometry, Conv)
    return conv_truth(which, integers(a), integers(b), geometry)


def check(which: str, a: QTensor, b: QTensor, geometry: Geometry) -> Tensor:
    """Asserts that the accumulators are exact and that gemm() rounds them once and scales them once."""
    exact = truth(which, a, b, geometry)
    sums = reference.accumulators(which, a, b, geometry)
    assert sums.dtype == torch.float64
    assert sums.shape == exact.shape
    assert torch.equal(sums, exact.double())
    unit = Fraction(a.scale.item()) * Fraction(b.scale.item()) * a.format.unit * b.format.unit
    assert torch.equal(reference.gemm(which, a, b, geometry), exact.float() * oracle.to_binary(unit))
    return exact


def conv(
    x: tuple[int, ...],
    w: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Conv:
    dims = len(x) - 2
    each = [v if isinstance(v, tuple) else (v,) * dims for v in (stride, padding, dilation)]
    return Conv(input_shape=x, weight_shape=w, stride=each[0], padding=each[1], dilation=each[2], groups=groups)


CONVS = {
    "1d": conv((3, 4, 11), (6, 4, 3), stride=2, padding=1),
    "1d_dilated": conv((2, 3, 13), (2, 3, 3), padding=2, dilation=3),
    "2d": conv((2, 4, 7, 8), (6, 4, 3, 3), padding=1),
    "2d_1x1": conv((3, 5, 4, 4), (7, 5, 1, 1)),
    "2d_strided_1x1": conv((2, 5, 5, 4), (3, 5, 1, 1), stride=2),
    "2d_even_kernel": conv((2, 3, 6, 7), (4, 3, 2, 4), padding=(1, 2)),
    "2d_all": conv((2, 4, 9, 8), (6, 4, 3, 2), stride=(2, 3), padding=(2, 1), dilation=(2, 1)),
    "2d_unused_border": conv((2, 3, 8, 9), (4, 3, 3, 3), stride=3),
    "2d_wide_padding": conv((1, 2, 2, 2), (3, 2, 3, 3), padding=3),
    "2d_grouped": conv((2, 6, 6, 5), (4, 3, 3, 3), padding=1, groups=2),
    "2d_depthwise": conv((2, 4, 6, 6), (4, 1, 3, 3), padding=1, groups=4),
    "2d_depthwise_multiplied": conv((2, 3, 5, 5), (6, 1, 3, 3), stride=2, groups=3),
    "2d_single": conv((1, 1, 1, 1), (1, 1, 1, 1)),
    "2d_many_images": conv((17, 3, 5, 5), (4, 3, 3, 3), padding=1),
    "3d": conv((2, 2, 4, 3, 5), (3, 2, 2, 2, 2), padding=1),
    "3d_grouped": conv((1, 4, 3, 4, 4), (4, 2, 3, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1), groups=2),
}
SIDES = (1, 2, 3, 33)
LINEAR = Linear(rows=7, in_features=5, out_features=9)
LINEARS = [Linear(rows=r, in_features=i, out_features=o) for r, i, o in itertools.product(SIDES, SIDES, SIDES)]


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("which", GEMMS)
def test_linear_sums_are_exact(which: str, fmt_a: Format, fmt_b: Format) -> None:
    """A linear layer's sums are exact for every pair of formats and every shape, sides of one included."""
    for geometry in LINEARS:
        check(which, *operands(which, geometry, fmt_a, fmt_b), geometry)


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("which", GEMMS)
def test_conv_sums_are_exact(which: str, kind: str) -> None:
    """A convolution's sums are exact for stride, padding, dilation, groups, even kernels, one to three dimensions."""
    for fmt_a, fmt_b in [(formats.uint4, formats.int4), (R4, formats.uint4), (formats.fp8_e5m2, formats.int4)]:
        check(which, *operands(which, CONVS[kind], fmt_a, fmt_b), CONVS[kind])


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("which", GEMMS)
def test_conv_sums_are_exact_for_every_pair_of_formats(which: str, fmt_a: Format, fmt_b: Format) -> None:
    """A plain and a grouped convolution multiply every pair of formats exactly."""
    for kind in ("2d_all", "2d_grouped", "1d"):
        check(which, *operands(which, CONVS[kind], fmt_a, fmt_b), CONVS[kind])


@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("fmt", [formats.uint4, R4, formats.fp8_e5m2], ids=str)
def test_one_position_convolutions_are_exact(fmt: Format, shape: tuple[int, int], which: str) -> None:
    """A convolution of one image and one output position is exact, where matrices have sides of one."""
    out_channels, in_channels = shape
    for images, size in itertools.product((1, 2), (1, 3)):
        geometry = conv((images, in_channels, size, size), (out_channels, in_channels, size, size))
        check(which, *operands(which, geometry, fmt, formats.int4), geometry)


@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.parametrize("geometry", [LINEAR, CONVS["1d"]], ids=["linear", "conv"])
def test_small_sums_equal_the_oracle(geometry: Geometry, which: str) -> None:
    """For a linear layer the sums in units are `oracle.matmul` of the codes; a conv's int64 truth agrees too."""
    a, b = operands(which, geometry, R4_ODD, formats.int4)
    sums = reference.accumulators(which, a, b, geometry)
    if isinstance(geometry, Linear):
        codes_a, codes_b = a.codes(), b.codes()
        left = codes_a.T if which == "wgrad" else codes_a
        right = codes_b.T if which == "fprop" else codes_b
        wanted = oracle.matmul(left.tolist(), right.tolist(), a.format, b.format)
        assert [[Fraction(s) * a.format.unit for s in row] for row in sums.tolist()] == wanted
    assert torch.equal(sums, truth(which, a, b, geometry).double())


@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.parametrize("kind", ["1d", "2d_all", "2d_grouped", "3d"])
def test_a_conv_is_the_product_of_torch(kind: str, which: str) -> None:
    """The int64 truth of this file agrees with torch's float64 convolution and its gradients, on whole numbers."""
    geometry = CONVS[kind]
    x = torch.randint(-9, 9, geometry.input_shape).double().requires_grad_()
    w = torch.randint(-9, 9, geometry.weight_shape).double().requires_grad_()
    function = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.stride) - 1]
    y = function(x, w, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    g = torch.randint(-9, 9, y.shape).double()
    grads = torch.autograd.grad(y, (x, w), g)
    a, b = {"fprop": (x, w), "dgrad": (g, w), "wgrad": (g, x)}[which]
    wanted = {"fprop": y, "dgrad": grads[0], "wgrad": grads[1]}[which].detach()
    assert torch.equal(conv_truth(which, a.detach().long(), b.detach().long(), geometry).double(), wanted)


@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.parametrize("sides", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty_linear_layers(sides: tuple[int, int, int], which: str) -> None:
    """A side of zero gives an empty result, or zeros where nothing is summed."""
    geometry = Linear(rows=sides[0], in_features=sides[1], out_features=sides[2])
    a, b = operands(which, geometry, R4, formats.int4)
    check(which, a, b, geometry)
    affine = replace(a, zero_point=torch.tensor(0.5).double())
    assert reference.gemm(which, affine, b, geometry).shape == reference.gemm(which, a, b, geometry).shape


@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.parametrize("fmt", [formats.uint4, R4, formats.fp8_e5m2], ids=str)
def test_empty_batches_of_a_conv(fmt: Format, which: str) -> None:
    """No images give an empty output and input gradient, and a weight gradient of zeros."""
    geometry = conv((0, 4, 5, 5), (6, 2, 3, 3), padding=1, groups=2)
    check(which, *operands(which, geometry, fmt, formats.int4), geometry)
    geometry = conv((0, 4, 5, 5), (6, 4, 3, 3), padding=1)
    check(which, *operands(which, geometry, fmt, formats.int4), geometry)


def extreme(which: str, geometry: Geometry, fmt_a: Format, fmt_b: Format) -> tuple[QTensor, QTensor]:
    """Operands of the largest magnitudes throughout but for one small odd number, so a lost unit shows."""
    shape_a, shape_b = shapes(which, geometry)
    codes_a, codes_b = largest_codes(fmt_a, shape_a), largest_codes(fmt_b, shape_b)
    codes_a.view(-1)[0] = fmt_a.integers.index(1)
    codes_b.view(-1)[0] = fmt_b.integers.index(1)
    return qtensor(codes_a, fmt_a), qtensor(codes_b, fmt_b)


# Largest products: uint4 x int4 15 * 8 = 120, r4 x uint4 4096 * 15 = 61440 (64 * 15 = 960 in a plane), e5m2 x int4
# 57344 * 2^16 * 8 = 3 * 10^10. So sums of K = 16 * 3 * 3 = 144 stay below 2^24 for the first, and the others do not.
@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.parametrize(
    ("fmt_a", "fmt_b"),
    [
        (formats.uint4, formats.int4),
        (R4, formats.uint4),
        (formats.fp8_e5m2, formats.int4),
        (formats.int8, formats.int8),
        (R4, R4),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [16, 32])
def test_conv_sums_of_the_largest_magnitudes(channels: int, fmt_a: Format, fmt_b: Format, which: str) -> None:
    """Below and above 2^24, where float32 stops being exact, sums of the largest products miss no unit."""
    geometry = conv((9, channels, 6, 6), (channels, channels, 3, 3), padding=1)
    check(which, *extreme(which, geometry, fmt_a, fmt_b), geometry)


@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.parametrize(
    ("fmt_a", "fmt_b"),
    [(formats.int4, formats.int4), (R4, formats.uint4), (formats.fp8_e4m3, formats.uint4), (formats.int8, R4)],
    ids=str,
)
def test_linear_sums_of_the_largest_magnitudes(fmt_a: Format, fmt_b: Format, which: str) -> None:
    """Sums of 5,000 of the largest products miss no unit, though they pass 2^24 and 2^31."""
    geometry = {
        "fprop": Linear(rows=3, in_features=5000, out_features=2),
        "dgrad": Linear(rows=3, in_features=2, out_features=5000),
        "wgrad": Linear(rows=5000, in_features=2, out_features=3),
    }[which]
    check(which, *extreme(which, geometry, fmt_a, fmt_b), geometry)


def test_sums_beyond_int32() -> None:
    """2.3 million products of at most 960 in a plane pass 2^31, where 32-bit sums would wrap."""
    geometry = Linear(rows=2_300_000, in_features=2, out_features=2)
    a = torch.full((geometry.rows, 2), R4.integers.index(64))
    b = torch.full((geometry.rows, 2), 15)
    exact = check("wgrad", qtensor(a, R4), qtensor(b, formats.uint4), geometry)
    assert exact.min() > 1 << 31


@pytest.mark.parametrize("groups", [1, 2])
def test_a_long_wgrad_of_a_conv(groups: int) -> None:
    """20,000 positions of products up to 960 in a plane pass 2^24, with groups and without."""
    geometry = conv((2, 4, 10_000), (4, 4 // groups, 1), groups=groups)
    a, b = extreme("wgrad", geometry, R4, formats.uint4)
    check("wgrad", a, b, geometry)
    in_one_plane = qtensor(torch.where(a.codes() == 7, R4.integers.index(64), a.codes()), R4)
    check("wgrad", in_one_plane, b, geometry)


def test_wgrad_of_many_images_at_a_time() -> None:
    """A wgrad whose unfolded input exceeds what is held at a time is exact, its last share of images odd-sized."""
    geometry = conv((37, 16, 30, 30), (2, 16, 3, 3), padding=1)
    check("wgrad", *operands("wgrad", geometry, R4, formats.uint4), geometry)


def test_sums_that_nothing_exact_could_hold_are_refused() -> None:
    """Where no exact sum could hold the products an error says which; the GEMM of two FP8 operands sums in float64."""
    rows = (1 << 63) // (formats.fp8_e5m2.max_integer * formats.fp8_e4m3.max_integer) + 1
    geometry = Linear(rows=rows, in_features=2, out_features=2)
    a, b = operands("wgrad", geometry, formats.fp8_e5m2, formats.fp8_e4m3)
    with pytest.raises(OverflowError, match=rf"wgrad sums {rows} products of fp8_e5m2 and fp8_e4m3, more than any"):
        reference.accumulators("wgrad", a, b, geometry)
    wanted = (a.dequantize(torch.float64).t() @ b.dequantize(torch.float64)).float()
    found = reference.gemm("wgrad", a, b, geometry)
    # Products of FP8 are exact in float64, so only the sum's roundings and the last one to float32 can differ.
    assert ((found - wanted).abs() <= 2.0**-22 * wanted.abs().max()).all()


def test_sums_of_planes_beyond_float64_are_rounded_once() -> None:
    """Sums of planes that pass 2^53 keep their last unit until float32, where it decides a tie.

    2^18 products of 57344 * 2^16 and 15 are 105 * 2^47. 2^29 more is half a float32 unit, a tie that goes down; yet
    one more, which float64 could not hold, takes it up to 105 * 2^47 + 2^30. A large batch in FP8 has such sums.
    """
    geometry = Linear(rows=(1 << 18) + 2, in_features=2, out_features=2)
    tail = torch.tensor([formats.fp8_e5m2.values.index(8192.0), formats.fp8_e5m2.values.index(2.0**-16)])
    a = torch.cat([largest_codes(formats.fp8_e5m2, (1 << 18,)), tail])
    b = torch.cat([torch.full((1 << 18,), 15), torch.ones(2)])
    a, b = (codes.long()[:, None].expand(-1, 2) for codes in (a, b))
    got = reference.gemm("wgrad", qtensor(a, formats.fp8_e5m2), qtensor(b, formats.uint4), geometry)
    assert torch.equal(got, torch.full((2, 2), (105 * 2.0**47 + 2.0**30) * 2.0**-16))


@pytest.mark.parametrize("geometry", [LINEAR, CONVS["2d_all"]], ids=["linear", "conv"])
@pytest.mark.parametrize("which", GEMMS)
def test_scales_multiply_the_sum_once(which: str, geometry: Geometry) -> None:
    """The result is float32(sum) times float32(both scales and units), each rounded once."""
    a, b = operands(which, geometry, R4, formats.int4)
    for scale_a, scale_b in [(0.1, 0.3), (2.0**-20, 1 / 3), (1e-30, 1e20)]:
        check(which, replace(a, scale=torch.tensor(scale_a)), replace(b, scale=torch.tensor(scale_b)), geometry)


@pytest.mark.parametrize("geometry", [LINEAR, CONVS["2d"], CONVS["2d_grouped"]], ids=["linear", "conv", "grouped"])
@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
def test_the_odd_phase_of_the_same_codes_is_half(which: str, geometry: Geometry) -> None:
    """The same codes read as the odd phase give exactly half the result (Sun et al. 2020, section 6)."""
    even, b = operands(which, geometry, R4, formats.int4)
    odd = replace(even, format=R4_ODD)
    assert torch.equal(
        reference.accumulators(which, even, b, geometry), reference.accumulators(which, odd, b, geometry)
    )
    assert torch.equal(reference.gemm(which, even, b, geometry), 2 * reference.gemm(which, odd, b, geometry))


def centered_fractions(which: str, a: QTensor, b: QTensor, geometry: Geometry) -> list[Fraction]:
    """Sum of (a - z_a)(b - z_b) over the products that exist, in fractions; padding is no product.

    Every product is listed as the three flat positions that it joins, found by a convolution of one-hot tensors' index
    arithmetic written out: for each output position and tap, the input position under it if it lies inside.
    """
    zero_a, zero_b = (Fraction(0) if q.zero_point is None else Fraction(q.zero_point.item()) for q in (a, b))
    left = [v - zero_a for v in integers(a).reshape(-1).tolist()]
    right = [v - zero_b for v in integers(b).reshape(-1).tolist()]
    shape_x, shape_y = shapes("wgrad", geometry)[::-1]
    shape_w = shapes("fprop", geometry)[1]
    triples = linear_products(geometry) if isinstance(geometry, Linear) else conv_products(geometry)
    size = {"fprop": shape_y, "dgrad": shape_x, "wgrad": shape_w}[which]
    result = [Fraction(0)] * torch.Size(size).numel()
    for x, w, y in triples:
        p, q, r = {"fprop": (x, w, y), "dgrad": (y, w, x), "wgrad": (y, x, w)}[which]
        result[r] += left[p] * right[q]
    return result


def linear_products(geometry: Linear) -> Iterator[tuple[int, int, int]]:
    """Flat positions in x, w and y of every product of a linear layer."""
    features, outs = geometry.in_features, geometry.out_features
    for n, i, o in itertools.product(range(geometry.rows), range(features), range(outs)):
        yield n * features + i, o * features + i, n * outs + o


def conv_products(geo: Conv) -> Iterator[tuple[int, int, int]]:
    """Flat positions in x, w and y of every product of a convolution, those with padding left out."""

    def flat(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
        position = 0
        for i, n in zip(index, shape, strict=True):
            position = position * n + i
        return position

    fan_in, fan_out = geo.weight_shape[1], geo.weight_shape[0] // geo.groups
    for n, o, *place in itertools.product(*map(range, geo.output_shape)):
        for i, *tap in itertools.product(*map(range, geo.weight_shape[1:])):
            under = [
                y * s + t * d - p
                for y, s, t, d, p in zip(place, geo.stride, tap, geo.dilation, geo.padding, strict=True)
            ]
            if all(0 <= u < size for u, size in zip(under, geo.input_shape[2:], strict=True)):
                channel = o // fan_out * fan_in + i
                x = flat((n, channel, *under), geo.input_shape)
                yield x, flat((o, i, *tap), geo.weight_shape), flat((n, o, *place), geo.output_shape)


AFFINE = {
    "linear": Linear(rows=3, in_features=5, out_features=4),
    "linear_1": Linear(rows=1, in_features=1, out_features=1),
    "conv1d": conv((2, 2, 5), (3, 2, 3), stride=2, padding=1),
    "conv2d": conv((2, 2, 4, 3), (3, 2, 3, 3), padding=1),
    "conv2d_all": conv((2, 2, 6, 5), (2, 2, 3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
    "grouped": conv((2, 4, 4, 4), (6, 2, 3, 3), padding=1, groups=2),
    "depthwise": conv((2, 3, 4, 4), (6, 1, 3, 3), stride=2, padding=1, groups=3),
    "conv3d": conv((1, 2, 3, 3, 2), (2, 2, 2, 2, 2), padding=1),
}


# Zero points that are multiples of 1/8 make every term exact in float64: MinMax counts from -8 - low / step, SAWB with
# 16 levels has -1/2. The sum is then rounded twice: to float32, and when it is multiplied by the scale.
@pytest.mark.parametrize("zeros", [(-3.125, -0.5), (4.5, None), (None, -0.5), (-100.25, 7.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("kind", AFFINE)
@pytest.mark.parametrize("which", GEMMS)
def test_affine_products_are_exact(which: str, kind: str, zeros: tuple[float | None, float | None]) -> None:
    """With zero points the result is the exact sum of (a - z_a)(b - z_b) over the real products, padding left out."""
    geometry = AFFINE[kind]
    shape_a, shape_b = shapes(which, geometry)
    fmt_a = formats.int4 if which == "fprop" else R4
    a = qtensor(random_codes(fmt_a, shape_a), fmt_a, 0.3, zeros[0])
    b = qtensor(random_codes(formats.int4, shape_b), formats.int4, 0.7, zeros[1])
    scale = oracle.to_binary(Fraction(a.scale.item()) * Fraction(b.scale.item()) * fmt_a.unit)
    exact = centered_fractions(which, a, b, geometry)
    wanted = [oracle.to_binary(Fraction(oracle.to_binary(total)) * Fraction(scale)) for total in exact]
    assert reference.gemm(which, a, b, geometry).reshape(-1).tolist() == wanted


@pytest.mark.parametrize("kind", ["linear", "conv2d_all", "depthwise"])
@pytest.mark.parametrize("which", GEMMS)
def test_affine_products_with_any_zero_point(which: str, kind: str) -> None:
    """With zero points that are no short fractions the float64 rounding stays below 2^-45 of the terms' size.

    There are four terms of magnitude at most K * 4200 * 20, each rounded a few times at 2^-53.
    """
    geometry = AFFINE[kind]
    shape_a, shape_b = shapes(which, geometry)
    a = qtensor(random_codes(R4, shape_a), R4, 1.0, 1 / 3)
    b = qtensor(random_codes(formats.int4, shape_b), formats.int4, 1.0, -(2**0.5))
    limit = geometry.reduction(which) * 4200 * 20 * 2.0**-45
    got = reference.gemm(which, a, b, geometry).reshape(-1).tolist()
    for found, exact in zip(got, centered_fractions(which, a, b, geometry), strict=True):
        value = float(exact * R4.unit)
        assert abs(found - value) <= limit + 2.0**-23 * abs(value)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.parametrize("zero_point", [None, -0.5])
def test_sums_are_exact_without_onednn(which: str, zero_point: float | None) -> None:
    """Where torch has no oneDNN, as on a Mac, its NNPACK must not be used: its transforms are not exact."""
    geometry = conv((32, 40, 14, 14), (8, 40, 3, 3), padding=1)
    a, b = operands(which, geometry, formats.uint4, formats.int4)
    zero = None if zero_point is None else torch.tensor(zero_point).double()
    a, b = replace(a, zero_point=zero), replace(b, zero_point=zero)
    wanted = reference.gemm(which, a, b, geometry)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(reference.gemm(which, a, b, geometry), wanted)


@pytest.mark.parametrize("accumulate", ["exact", "fp32", "fp16_chunk64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", [Linear(rows=8, in_features=200, out_features=7), CONVS["2d_all"]], ids=type)
def test_autocast_does_not_reach_the_products(geometry: Geometry, dtype: torch.dtype, accumulate: str) -> None:
    """Under autocast, in which a forward pass may run, the products are the same numbers of the same type."""
    a, b = operands("fprop", geometry, formats.uint4, formats.int4)
    wanted = reference.gemm("fprop", a, b, geometry, accumulate=accumulate)
    with torch.autocast("cpu", dtype):
        got = reference.gemm("fprop", a, b, geometry, accumulate=accumulate)
    assert got.dtype == wanted.dtype == torch.float32
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("geometry", [LINEAR, CONVS["2d_all"], CONVS["2d_grouped"]], ids=["linear", "conv", "groups"])
@pytest.mark.parametrize("which", GEMMS)
def test_float32_accumulation_of_small_sums_is_exact(which: str, geometry: Geometry) -> None:
    """accumulate="fp32" is the exact result where no partial sum passes 2^24, for any order of summation."""
    a, b = operands(which, geometry, formats.uint4, formats.int4)
    wanted = reference.gemm(which, a, b, geometry)
    assert torch.equal(reference.gemm(which, a, b, geometry, accumulate="fp32"), wanted)


def test_float32_accumulation_is_one_float32_product() -> None:
    """accumulate="fp32" is torch's own float32 product of the integers, and long sums of it are not exact."""
    geometry = Linear(rows=4, in_features=50_000, out_features=4)
    a = qtensor(torch.randint(1, 8, (4, 50_000)), R4, 0.5)
    b = qtensor(torch.randint(1, 8, (4, 50_000)), formats.int4)
    got = reference.gemm("fprop", a, b, geometry, accumulate="fp32")
    assert torch.equal(got, (integers(a).float() @ integers(b).float().T) / 128)
    assert not torch.equal(got, reference.gemm("fprop", a, b, geometry))


@pytest.mark.parametrize("other_first", [True, False])
def test_a_floating_operand_multiplies_the_dequantized_other(other_first: bool) -> None:
    """Where one operand is no `QTensor` the product is torch's own with the other dequantized, in the former's type."""
    geometry = Linear(rows=6, in_features=9, out_features=4)
    x, w = operands("fprop", geometry, formats.int4, formats.int4)
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(6, 9, dtype=dtype) if other_first else x
        b = w if other_first else torch.randn(4, 9, dtype=dtype)
        got = reference.gemm("fprop", a, b, geometry)
        plain_a = a if isinstance(a, Tensor) else a.dequantize(dtype)
        plain_b = b if isinstance(b, Tensor) else b.dequantize(dtype)
        assert got.dtype == dtype
        assert torch.equal(got, plain_a @ plain_b.T)


def test_a_scale_of_nan_makes_every_product_nan() -> None:
    """An operand that held NaN, and so has a scale of NaN, gives NaN everywhere, also where its codes are zero."""
    geometry = Linear(rows=2, in_features=3, out_features=2)
    a = qtensor(torch.zeros(2, 3), formats.int4, float("nan"))
    b = qtensor(torch.ones(2, 3), formats.int4)
    for accumulate in ("exact", "fp32", "fp16_chunk64"):
        assert reference.gemm("fprop", a, b, geometry, accumulate=accumulate).isnan().all()


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.usefixtures("two_threads")
def test_results_do_not_depend_on_threads(which: str, kind: str) -> None:
    """One thread and two give the same bits, zero points included."""
    geometry = {
        "linear": Linear(rows=300, in_features=200, out_features=150),
        "conv": conv((8, 16, 15, 15), (24, 16, 3, 3), padding=1),
        "grouped": conv((8, 16, 15, 15), (32, 8, 3, 3), padding=1, groups=2),
    }[kind]
    a, b = operands(which, geometry, R4, formats.int4)
    affine = replace(a, zero_point=torch.tensor(1 / 3).double()), replace(b, zero_point=torch.tensor(-0.3).double())
    with_two = reference.gemm(which, a, b, geometry), reference.gemm(which, *affine, geometry)
    torch.set_num_threads(1)
    assert torch.equal(reference.gemm(which, a, b, geometry), with_two[0])
    assert torch.equal(reference.gemm(which, *affine, geometry), with_two[1])


@pytest.mark.parametrize("fmt", [*formats.FORMATS.values()][:-1], ids=str)
def test_decode_gives_the_integers(fmt: Format) -> None:
    """Every code decodes to its integer, in float32 and in float64, in any shape and beyond one block."""
    codes = torch.tensor([c for c, i in enumerate(fmt.integers) if i is not None]).repeat(301)[:-5]
    q = qtensor(codes.view(1, -1, 1), fmt)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(reference.decode(q, dtype), integers(q).to(dtype))


@pytest.mark.parametrize("fmt", [formats.int4, formats.uint4, R4, formats.fp4_e3m0, formats.fp8_e5m2], ids=str)
def test_planes_add_up(fmt: Format) -> None:
    """The weighted sum of the int8 planes is the integers, across pieces and for an odd number of codes."""
    q = qtensor(random_codes(fmt, (2 * 262144 + 4321,)), fmt)
    found = reference.planes(q)
    assert found is not None
    assert all(plane.dtype == torch.int8 and plane.shape == q.shape for _, plane in found)
    assert torch.equal(sum(weight * plane.long() for weight, plane in found), integers(q))


def test_planes_are_merged_by_the_ratio_of_their_weights() -> None:
    """Four parts of base 64 that reach 2^30 / 4096 each fill two groups, and their weighted sum stays the same."""
    bound = (1 << 30) // 4096
    parts = [(64**i, torch.full((2,), bound - i, dtype=torch.int32)) for i in range(4)]
    wanted = sum(weight * int(part[0]) for weight, part in parts)
    merge = sys.modules["halfbyte.kernels.reference.gemm"]._merged  # the function `gemm` hides its module
    merged = merge([(weight, part.clone()) for weight, part in reversed(parts)], bound)
    assert [weight for weight, _ in merged] == [1, 64**3]
    assert sum(weight * int(part[0]) for weight, part in merged) == wanted
    again = merge([(weight, part.clone()) for weight, part in parts[1:]], bound)
    assert [weight for weight, _ in again] == [64]
    assert sum(weight * int(part[0]) for weight, part in again) == wanted - bound
