"""Products with scales for blocks or of 8-bit floats, by the library: codes become numbers, sums are float64.

The sums are those of `reference`, to the bit, where float64 holds them exactly, which it does but for blocks of one sum
that differ in scale by some 2^40 (docs/decisions/0012).
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...formats import Format, e8m0, fp8_e4m3
from ...qtensor import QTensor
from ..geometry import Batched, Conv, Gemm, Geometry, Linear
from .blocks import lengths, spread_but_one
from .library import INT32, INT64, POINTER, address, function, library
from .operands import codes_of, conv_shape, is_float8, readable

__all__ = ["Numbers", "in_numbers", "product"]

_EXACT_FLOAT32 = 1 << 24
_EXACT_FLOAT64 = 1 << 53
_LONGEST = 512
"""The most products that float32 adds up: what the kernels read at a time (NUMBER_LENGTH of numbers_matmul.inc.cpp)."""

_BLOCK_SCALES = {fp8_e4m3: 15, e8m0: 1}
"""The formats of blocks' scales that become numbers here, and the largest whole number of their mantissas."""

_MOST_PANELS = 64 << 20
"""Bytes of panels that an operand of many products may hold."""

_DOUBLE = ctypes.c_double
_factors = function("block_factors", POINTER, INT64, INT32, POINTER, result=INT32)
_decode = function("decode_numbers", POINTER, POINTER, *[INT64] * 4, POINTER, POINTER, result=INT32)
_panels = function("number_panels", POINTER, INT32, INT64, INT64, INT64, POINTER, result=INT64)
_matmul = function("matmul_numbers", *(POINTER, INT32) * 2, POINTER, *[INT64] * 5, INT32, _DOUBLE, INT32, POINTER)
_convolve = function("convolve_numbers", *[POINTER] * 3, INT32, INT64, INT32, _DOUBLE, INT32, POINTER)
_convolve_weight = function("convolve_weight_numbers", *[POINTER] * 3, INT64, INT32, _DOUBLE, INT32, POINTER)


@dataclass(frozen=True)
class Numbers:
    """An operand as float32 numbers, or as the panels that were made of them, times a power of two.

    Attributes:
        data: the numbers in the order of the codes; or the panels.
        power: the exponent of that power.
        packed: whether `data` are panels.
    """

    data: Tensor
    power: int
    packed: bool = False


def in_numbers(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> bool:
    """Whether the kernels of numbers compute a product: there are blocks or 8-bit floats, and all is exact here."""
    if {a.qdata.device.type, b.qdata.device.type} != {"cpu"} or not all(map(_known, (a, b))):
        return False
    return _in_float64(which, a, b, geometry) or _bound(which, a, b, geometry) < _EXACT_FLOAT64


def _known(q: QTensor) -> bool:
    scales = q.blocks is None or q.blocks.scale_format in _BLOCK_SCALES
    return scales and q.zero_point is None and (readable(q.format) or is_float8(q.format))


def _bound(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> int:
    """The largest magnitude that a sum of the codes' whole numbers can reach."""
    return geometry.reduction(which) * a.format.max_integer * b.format.max_integer


def _in_float64(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> bool:
    """Whether the reference sums the product in float64 and rounds it once: blocks, or two floats of a wide range."""
    if a.blocks is not None or b.blocks is not None:
        return True
    return a.format.kind == b.format.kind == "float" and _bound(which, a, b, geometry) >= _EXACT_FLOAT64


def product(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> Tensor | None:
    """One GEMM of operands for which `in_numbers` holds, float32; None if some block's scale is too small to be seen.

    Args:
        which: fprop, dgrad or wgrad.
        a: the first operand.
        b: the second one; what is made of it is kept if it is prepared for many products.
        geometry: a linear layer, a batch or a convolution.
    """
    flush = _flush(which, a, b, geometry)
    left, right = _numbers(a), _second(which, b, geometry, flush)
    if left is None or right is None:
        return None
    scales = a.scale.item() * b.scale.item() * _unit(a.format, b.format)
    last = left.power + right.power, scales, not _in_float64(which, a, b, geometry)
    if isinstance(geometry, Conv):
        return _conv(which, left.data, right.data, geometry, flush, last)
    m, n, k, batch = _sides(which, geometry)
    out = torch.empty(*(() if batch is None else (batch,)), m, n)
    panels, data = (right.data, None) if right.packed else (None, right.data)
    _matmul(
        left.data.data_ptr(), which != "wgrad", address(data), which == "fprop", address(panels),
        1 if batch is None else batch, m, n, k, flush, *last, out.data_ptr(),
    )  # fmt: skip
    return out


def _conv(which: Gemm, a: Tensor, b: Tensor, geometry: Conv, flush: int, last: tuple[int, float, bool]) -> Tensor:
    shape = ctypes.byref(conv_shape(geometry))
    if which == "wgrad":
        out = torch.empty(geometry.weight_shape)
        _convolve_weight(a.data_ptr(), b.data_ptr(), shape, flush, *last, out.data_ptr())
        return out
    out = torch.empty(geometry.input_shape if which == "dgrad" else geometry.output_shape)
    _convolve(a.data_ptr(), b.data_ptr(), shape, which == "dgrad", flush, *last, out.data_ptr())
    return out


def _sides(which: Gemm, geometry: Geometry) -> tuple[int, int, int, int | None]:
    """M, N and K of a product of matrices, and how many there are; None for one that is no batch."""
    if isinstance(geometry, Batched):
        rows, inner, columns, batch = geometry.rows, geometry.inner, geometry.columns, geometry.batch
    else:
        assert isinstance(geometry, Linear)
        rows, inner, columns, batch = geometry.rows, geometry.in_features, geometry.out_features, None
    m, n, k = {
        "fprop": (rows, columns, inner),
        "dgrad": (rows, inner, columns),
        "wgrad": (columns, inner, rows),
    }[which]
    return m, n, k, batch


@cache
def _unit(a: Format, b: Format) -> float:
    return float(a.unit * b.unit)


@cache
def _values(fmt: Format) -> ctypes.Array[ctypes.c_float]:
    """The whole numbers of an 8-bit float's codes."""
    return (ctypes.c_float * 256)(*(value / float(fmt.unit) for value in fmt.values))


def _numbers(q: QTensor) -> Numbers | None:
    """An operand's numbers; None if a block that is not empty has a scale too small beside the largest."""
    out = torch.empty(q.shape)
    values = _values(q.format) if is_float8(q.format) else None
    factors, cut, power = None, (1, q.numel, 1, 1), 0
    if q.blocks is not None:
        assert q.block_scale is not None
        codes, axis = spread_but_one(q.block_scale, q.blocks)
        factors, cut = torch.empty(codes.shape), (*lengths(q.blocks.view, axis), q.blocks.sizes[axis])
        power = _factors(codes.data_ptr(), codes.numel(), q.blocks.scale_format == e8m0, factors.data_ptr())
    whole = _decode(ctypes.byref(codes_of(q)), values, *cut, address(factors), out.data_ptr())
    return Numbers(out, power) if whole else None


def _second(which: Gemm, b: QTensor, geometry: Geometry, flush: int) -> Numbers | None:
    """The second operand, from what is kept of it where it is prepared."""
    kept: dict[object, Numbers] | None = getattr(b, "numbers", None)
    if kept is None or not isinstance(geometry, Linear):
        return _numbers(b)
    _, n, k, _ = _sides(which, geometry)
    key = library().hb_isa(), which == "fprop", n, k, flush > 0
    if key in kept:
        return kept[key]
    found = _numbers(b)
    size = _panels(None, which == "fprop", n, k, flush, None)
    if found is None or size > _MOST_PANELS:
        return found
    panels = torch.empty(size, dtype=torch.uint8)
    _panels(found.data.data_ptr(), which == "fprop", n, k, flush, panels.data_ptr())
    kept[key] = Numbers(panels, found.power, packed=True)
    return kept[key]


def _flush(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> int:
    """How many neighbors along the reduction have products that are whole multiples of one unit; 0 if not two."""
    found, largest = 0, a.format.max_integer * b.format.max_integer
    for place, q in enumerate((a, b)):
        if is_float8(q.format):
            return 0
        if q.blocks is None:
            continue
        view = geometry.reduction_view(which, place)
        if q.blocks.view != view.shape or q.blocks.scale_format is None:
            return 0
        largest *= _BLOCK_SCALES[q.blocks.scale_format]
        found = math.gcd(found, q.blocks.sizes[view.axis])
    return found if 1 < found <= _LONGEST and found * largest < _EXACT_FLOAT32 else 0
