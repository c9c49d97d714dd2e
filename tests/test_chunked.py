"""Accumulation in float16 by chunks of 64 equals a scalar emulation that rounds with the oracle."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from halfbyte import formats, oracle
from halfbyte.formats import Format
from halfbyte.kernels import Conv, Linear, reference
from halfbyte.qtensor import QTensor, pack

R4, R4_ODD = formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd
PAIRS = [
    (formats.uint4, formats.int4),
    (R4, formats.int4),
    (R4_ODD, formats.uint4),
    (formats.fp4_e2m1, formats.int4),
    (formats.fp4_e3m0, formats.uint4),
]
GEMMS = ("fprop", "dgrad", "wgrad")


def qtensor(codes: Tensor, fmt: Format, scale: float = 1.0) -> QTensor:
    qdata = pack(codes.to(torch.uint8).reshape(-1).contiguous(), fmt.bits)
    return QTensor(qdata, torch.tensor(scale), fmt, codes.shape)


def random_operand(fmt: Format, shape: tuple[int, ...]) -> QTensor:
    """Random numbers of a format, mostly of the larger half of its codes, so that sums leave float16's exact range."""
    return qtensor(torch.randint(1 << fmt.bits, shape) | 4, fmt)


def half(x: Fraction | float) -> float:
    """x rounded to float16; an infinity stays."""
    if isinstance(x, float) and not math.isfinite(x):
        return x
    return oracle.to_binary(x, precision=11, min_exponent=-14, max_exponent=15)


def add_chunks(total: float, products: list[Fraction]) -> float:
    """total plus the products, each chunk of 64 summed exactly and rounded, each addition rounded."""
    for start in range(0, len(products), 64):
        part = half(sum(products[start : start + 64], Fraction(0)))
        exact = math.isfinite(total) and math.isfinite(part)
        total = half(Fraction(total) + Fraction(part) if exact else total + part)
    return total


def values(q: QTensor) -> list:
    """What the codes stand for, exactly, as nested lists."""

    def decoded(codes: list | int) -> list | Fraction:
        return oracle.decode(q.format, codes) if isinstance(codes, int) else [decoded(c) for c in codes]

    return decoded(q.codes().tolist())


def linear_emulation(which: str, a: QTensor, b: QTensor) -> list[list[float]]:
    """A linear layer's GEMM, element by element."""
    left, right = values(a), values(b)
    if which == "wgrad":
        left = list(zip(*left, strict=True))
    columns = right if which == "fprop" else list(zip(*right, strict=True))
    return [[add_chunks(0.0, [p * q for p, q in zip(row, column, strict=True)]) for column in columns] for row in left]


def conv_emulation(which: str, a: QTensor, b: QTensor, geo: Conv) -> list[float]:
    """A convolution's GEMM, element by element: over taps, then channels (wgrad: images and positions) in chunks."""
    left, right = values(a), values(b)
    fan_in, fan_out = geo.weight_shape[1], geo.weight_shape[0] // geo.groups
    (images, _, height, width), (_, outs, rows, columns) = geo.input_shape, geo.output_shape
    taps = list(itertools.product(*map(range, geo.weight_shape[2:])))

    def at(x: list, n: int, channel: int, y: int, z: int) -> Fraction:
        return x[n][channel][y][z] if 0 <= y < height and 0 <= z < width else Fraction(0)

    def under(place: tuple[int, int], tap: tuple[int, int]) -> list[int]:
        """Where in the input an output position and a tap meet."""
        return [
            p * s + t * d - pad
            for p, s, t, d, pad in zip(place, geo.stride, tap, geo.dilation, geo.padding, strict=True)
        ]

    places = list(itertools.product(range(rows), range(columns)))
    result = []
    if which == "fprop":
        for n, o, place in itertools.product(range(images), range(outs), places):
            total, first = 0.0, o // fan_out * fan_in
            for tap in taps:
                y, z = under(place, tap)
                total = add_chunks(
                    total, [at(left, n, first + i, y, z) * right[o][i][tap[0]][tap[1]] for i in range(fan_in)]
                )
            result.append(total)
    elif which == "dgrad":
        for n, channel, y, z in itertools.product(*map(range, geo.input_shape)):
            total, first = 0.0, channel // fan_in * fan_out
            for tap in taps:
                for place in places:
                    if under(place, tap) == [y, z]:
                        products = [
                            left[n][o][place[0]][place[1]] * right[o][channel % fan_in][tap[0]][tap[1]]
                            for o in range(first, first + fan_out)
                        ]
                        total = add_chunks(total, products)
            result.append(total)
    else:
        for o, i, tap in itertools.product(range(outs), range(fan_in), taps):
            channel = o // fan_out * fan_in + i
            products = [
                left[n][o][place[0]][place[1]] * at(right, n, channel, *under(place, tap))
                for n, place in itertools.product(range(images), places)
            ]
            result.append(add_chunks(0.0, products))
    return result


def operands(which: str, geometry: Linear | Conv, fmt_a: Format, fmt_b: Format) -> tuple[QTensor, QTensor]:
    if isinstance(geometry, Linear):
        x, w = (geometry.rows, geometry.in_features), (geometry.out_features, geometry.in_features)
        y = (geometry.rows, geometry.out_features)
    else:
        x, w, y = geometry.input_shape, geometry.weight_shape, geometry.output_shape
    shape_a, shape_b = {"fprop": (x, w), "dgrad": (y, w), "wgrad": (y, x)}[which]
    return random_operand(fmt_a, shape_a), random_operand(fmt_b, shape_b)


def chunked(which: str, a: QTensor, b: QTensor, geometry: Linear | Conv) -> Tensor:
    return reference.gemm(which, a, b, geometry, accumulate="fp16_chunk64")


@pytest.mark.parametrize("sides", [(5, 3, 200), (4, 65, 2), (150, 3, 4), (1, 1, 1), (2, 64, 128)], ids=str)
@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS, ids=str)
@pytest.mark.parametrize("which", GEMMS)
def test_linear_equals_the_emulation(which: str, fmt_a: Format, fmt_b: Format, sides: tuple[int, int, int]) -> None:
    """A linear layer's sums, of less than one chunk to four, are those of the scalar emulation."""
    geometry = Linear(rows=sides[0], in_features=sides[1], out_features=sides[2])
    a, b = operands(which, geometry, fmt_a, fmt_b)
    assert chunked(which, a, b, geometry).tolist() == linear_emulation(which, a, b)


CONVS = {
    "plain": Conv(
        input_shape=(1, 2, 4, 4), weight_shape=(3, 2, 3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1
    ),
    "deep": Conv(
        input_shape=(2, 70, 2, 3), weight_shape=(66, 70, 1, 2), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
    ),
    "all": Conv(
        input_shape=(4, 4, 6, 7), weight_shape=(6, 2, 3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2
    ),
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("which", GEMMS)
def test_conv_equals_the_emulation(which: str, kind: str) -> None:
    """A convolution's sums run over taps, then channels, as the emulation's do; stride, padding and groups included."""
    fmt_a, fmt_b = (formats.uint4, formats.int4) if which == "fprop" else (R4, formats.uint4)
    a, b = operands(which, CONVS[kind], fmt_a, fmt_b)
    assert chunked(which, a, b, CONVS[kind]).reshape(-1).tolist() == conv_emulation(which, a, b, CONVS[kind])


@pytest.mark.parametrize("which", GEMMS)
def test_both_scales_multiply_the_float16_sum(which: str) -> None:
    """The scales are applied once, after the accumulation, in float32; the units are part of what is accumulated."""
    geometry = Linear(rows=3, in_features=4, out_features=5)
    a, b = operands(which, geometry, R4, formats.int4)
    plain = linear_emulation(which, a, b)
    a = QTensor(a.qdata, torch.tensor(2.0**-12), a.format, a.shape)
    b = QTensor(b.qdata, torch.tensor(0.1), b.format, b.shape)
    step = oracle.to_binary(Fraction(2.0**-12) * Fraction(b.scale.item()))
    wanted = [[oracle.to_binary(Fraction(v) * Fraction(step)) for v in row] for row in plain]
    assert chunked(which, a, b, geometry).tolist() == wanted


@pytest.mark.parametrize("fmt", [formats.int4, R4, R4_ODD, formats.fp4_e2m1, formats.fp8_e4m3], ids=str)
@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
def test_small_sums_are_exact(which: str, fmt: Format) -> None:
    """Where every sum fits the eleven bits of float16 the result is that of exact accumulation, in every format."""
    geometry = Linear(rows=100, in_features=6, out_features=100)
    one = fmt.values.index(0.5 if fmt is R4_ODD else 1.0)
    a = qtensor(torch.where(torch.rand(100, 100) < 0.5, one, 0), fmt)
    b = qtensor(torch.randint(0, 8, (100, 6)), formats.int4)
    assert torch.equal(chunked(which, a, b, geometry), reference.gemm(which, a, b, geometry))


def test_it_differs_from_exact_accumulation() -> None:
    """4096 + 1 is no float16: a sum of two chunks loses the 1 that exact accumulation keeps."""
    codes = torch.zeros(1, 128, dtype=torch.int64)
    codes[0, :64], codes[0, 64] = R4.values.index(64.0), R4.values.index(1.0)
    a, b = qtensor(codes, R4), qtensor(torch.ones(1, 128), formats.int4)
    geometry = Linear(rows=1, in_features=128, out_features=1)
    assert reference.gemm("fprop", a, b, geometry).item() == 4097
    assert chunked("fprop", a, b, geometry).item() == 4096


def test_within_a_chunk_the_sum_is_exact() -> None:
    """The same 1 in the same chunk as what cancels the rest is kept: only whole chunks are rounded."""
    codes = torch.zeros(1, 64, dtype=torch.int64)
    codes[0, :31], codes[0, 31], codes[0, 32:63] = R4.values.index(64.0), R4.values.index(1.0), R4.values.index(-64.0)
    a, b = qtensor(codes, R4), qtensor(torch.full((1, 64), 7), formats.int4)
    assert chunked("fprop", a, b, Linear(rows=1, in_features=64, out_features=1)).item() == 7


def test_within_a_chunk_the_sum_is_exact_for_fp8() -> None:
    """8 * 448 * 15 + 2^-9 - 8 * 448 * 15 spans 25 bits, more than float32 has, and still is 2^-9."""
    big, least, negative = (formats.fp8_e4m3.values.index(v) for v in (448.0, 2.0**-9, -448.0))
    a = qtensor(torch.tensor([[big] * 8 + [least] + [negative] * 8]), formats.fp8_e4m3)
    b = qtensor(torch.tensor([[15] * 8 + [1] + [15] * 8]), formats.uint4)
    assert chunked("fprop", a, b, Linear(rows=1, in_features=17, out_features=1)).item() == 2.0**-9


def test_a_full_chunk_of_the_largest_products_fits_float16() -> None:
    """64 products of 64 and 15 are 61,440, which float16 holds; a second such chunk is infinite, as in hardware."""
    a = qtensor(torch.full((1, 128), R4.values.index(64.0)), R4)
    b = qtensor(torch.full((1, 128), 15), formats.uint4)
    first = qtensor(torch.full((1, 64), R4.values.index(64.0)), R4), qtensor(torch.full((1, 64), 15), formats.uint4)
    assert chunked("fprop", *first, Linear(rows=1, in_features=64, out_features=1)).item() == 61440
    assert chunked("fprop", a, b, Linear(rows=1, in_features=128, out_features=1)).item() == math.inf


@pytest.mark.parametrize("affine", [0, 1])
@pytest.mark.parametrize("geometry", [Linear(rows=2, in_features=3, out_features=4), CONVS["plain"]], ids=type)
def test_zero_points_are_refused(geometry: Linear | Conv, affine: int) -> None:
    """An operand with a zero point is refused by name of the option, with the cure."""
    pair = list(operands("fprop", geometry, formats.int4, formats.int4))
    zero = torch.tensor(0.5, dtype=torch.float64)
    q = pair[affine]
    pair[affine] = QTensor(q.qdata, q.scale, q.format, q.shape, zero)
    with pytest.raises(ValueError, match=r"accumulate='fp16_chunk64' .* zero point .* accumulate='exact'"):
        chunked("fprop", pair[0], pair[1], geometry)


@pytest.mark.parametrize("which", GEMMS)
def test_empty_layers(which: str) -> None:
    """No rows give an empty result or zeros."""
    geometry = Linear(rows=0, in_features=3, out_features=4)
    a, b = operands(which, geometry, formats.int4, formats.int4)
    assert torch.equal(chunked(which, a, b, geometry), reference.gemm(which, a, b, geometry))


@pytest.mark.parametrize("which", GEMMS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_results_do_not_depend_on_threads(kind: str, which: str) -> None:
    """One thread and two give the same bits."""
    geometry = Linear(rows=130, in_features=140, out_features=150) if kind == "linear" else CONVS["deep"]
    a, b = operands(which, geometry, R4, formats.int4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with_two = chunked(which, a, b, geometry)
        torch.set_num_threads(1)
        assert torch.equal(chunked(which, a, b, geometry), with_two)
    finally:
        torch.set_num_threads(before)
