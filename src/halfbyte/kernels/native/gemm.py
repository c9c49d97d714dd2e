"""The three GEMMs on packed codes, by the native library: equal to `halfbyte.kernels.reference` bit for bit.

A product of whole numbers is exact in any order, so the library may choose its arithmetic by the operands. What it has
no kernel for goes to the reference; `REFERENCE_CASES` lists what that is.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ...formats import Format
from ...qtensor import QTensor
from .. import reference
from ..geometry import Batched, Conv, ConvTranspose, Gemm, Geometry, Linear
from ..reference.gemm import Accumulate, centered, output_scale
from .library import INT32, INT64, POINTER, address, function, library

__all__ = ["REFERENCE_CASES", "Prepared", "accumulators", "computed_by", "gemm", "prepare", "reference_case"]

_INT32_SUMS = 1 << 31
_INT64_SUMS = 1 << 63
_LARGEST = 4096
"""The largest magnitude that the kernels read: a 16-bit product of two fits 32 bits many times."""

_MOST_PANELS = 64 << 20
"""Bytes of panels that a `Prepared` operand may hold in one layout; a larger one is packed anew for each product."""

_WORDS = 3
"""The method that multiplies 16-bit numbers, whose panels have a layout of their own."""

_SLAB = 1024
"""Positions that wgrad of a convolution sums at a time (STRETCH of conv_weight.inc.cpp)."""


class Codes(ctypes.Structure):
    """``hb_codes`` of halfbyte.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("flip", ctypes.c_int32),
        ("low", ctypes.c_int32),
        ("high", ctypes.c_int32),
        ("table", ctypes.c_int16 * 16),
    )


class ConvShape(ctypes.Structure):
    """``hb_conv_shape`` of halfbyte.h."""

    _fields_ = (
        ("images", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("fan_in", ctypes.c_int64),
        ("fan_out", ctypes.c_int64),
        *((name, ctypes.c_int64 * 3) for name in ("input", "output", "kernel", "stride", "padding", "dilation")),
    )


_matmul = function("matmul", *(POINTER, INT32) * 2, POINTER, *[INT64] * 4, *[POINTER] * 4, ctypes.c_double, INT32)
_matmul_method = function("matmul_method", POINTER, POINTER, INT64, INT32, result=INT32)
_matmul_panels = function("matmul_panels", POINTER, INT32, INT64, INT64, INT32, POINTER, result=INT64)


@dataclass(frozen=True, eq=False, repr=False)
class Prepared(QTensor):
    """A second operand that many products share. The panels that a kernel makes of it are kept from the first on.

    They take 1 or 2 bytes a code and live as long as this object; the codes must not change meanwhile.
    """

    panels: dict[object, Tensor] = field(default_factory=dict, init=False)


def prepare(b: QTensor) -> QTensor:
    """The same operand, ready for many products: see `Prepared`."""
    return Prepared(b.qdata, b.scale, b.format, b.shape, b.zero_point, b.block_scale, b.blocks)


@cache
def _described(fmt: Format) -> bytes:
    """The ``hb_codes`` of a format, without a tensor."""
    whole = [i or 0 for i in fmt.integers]
    table = (whole + [0] * 16)[:16] if fmt.bits <= 4 else [0] * 16
    flip = 1 << (fmt.bits - 1) if fmt.signed else 0
    return bytes(Codes(None, 0, fmt.bits, flip, min(whole), max(whole), (ctypes.c_int16 * 16)(*table)))


def _codes(q: QTensor) -> Codes:
    codes = Codes.from_buffer_copy(_described(q.format))
    codes.codes, codes.numel = q.qdata.data_ptr(), q.numel
    return codes


def _readable(fmt: Format) -> bool:
    return fmt.kind != "scale" and (fmt.bits <= 4 or fmt.kind == "int") and fmt.max_integer <= _LARGEST


def _bound(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> int:
    """The largest magnitude that a sum can reach."""
    return geometry.reduction(which) * a.format.max_integer * b.format.max_integer


def _few(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> bool:
    """Whether a convolution's wgrad would have to empty its 32-bit sums within one stretch of positions."""
    if which != "wgrad" or not isinstance(geometry, Conv) or _bound(which, a, b, geometry) < _INT32_SUMS:
        return False
    stretch = max(_SLAB, _three(geometry.output_shape[2:], 1)[2] + 3)
    return stretch * a.format.max_integer * b.format.max_integer >= _INT32_SUMS


REFERENCE_CASES: dict[str, Callable[[Gemm, QTensor, QTensor, Geometry], bool]] = {
    "a device other than the CPU": lambda _which, a, b, _geo: {a.qdata.device.type, b.qdata.device.type} != {"cpu"},
    "a scale for each block": lambda _which, a, b, _geo: a.blocks is not None or b.blocks is not None,
    "8-bit floats, or 4-bit formats that reach beyond 4096": lambda _which, a, b, _geo: (
        not (_readable(a.format) and _readable(b.format))
    ),
    "sums beyond 63 bits": lambda which, a, b, geo: _bound(which, a, b, geo) >= _INT64_SUMS,
    "wgrad of a convolution that passes 31 bits within 1,024 products": _few,
}
"""What has no kernel, besides operands in floating point and ``accumulate`` other than ``"exact"``: words, and test."""


def reference_case(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> str | None:
    """Why the reference computes a product of codes instead of a kernel; None if a kernel does.

    A transposed convolution is asked for as the convolution that it mirrors.
    """
    return next((words for words, applies in REFERENCE_CASES.items() if applies(which, a, b, geometry)), None)


def computed_by(
    which: Gemm, a: QTensor | Tensor, b: QTensor | Tensor, geometry: Geometry, accumulate: Accumulate
) -> str:
    """``"native"`` where a kernel computes the product, ``"reference"`` where it is handed over."""
    if not (isinstance(a, QTensor) and isinstance(b, QTensor)) or accumulate != "exact":
        return "reference"
    return "native" if reference_case(*_mirrored(which, a, b, geometry)) is None else "reference"


def gemm(
    which: Gemm, a: QTensor | Tensor, b: QTensor | Tensor, geometry: Geometry, *, accumulate: Accumulate = "exact"
) -> Tensor:
    """One GEMM of a layer: see `halfbyte.kernels.reference.gemm`, whose result it gives bit for bit."""
    if computed_by(which, a, b, geometry, accumulate) == "reference":
        return reference.gemm(which, a, b, geometry, accumulate=accumulate)
    assert isinstance(a, QTensor)
    assert isinstance(b, QTensor)
    which, a, b, geometry = _mirrored(which, a, b, geometry)
    if a.zero_point is None and b.zero_point is None:
        return _product(which, a, b, geometry, scaled=True)
    sums = _product(which, a, b, geometry).double()
    return centered(which, a, b, geometry, sums).float().mul_(output_scale(a, b))


def accumulators(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> Tensor:
    """The exact sums of products of the operands' integers: see `halfbyte.kernels.reference.accumulators`. float64."""
    which, a, b, geometry = _mirrored(which, a, b, geometry)
    if reference_case(which, a, b, geometry) is not None:
        return reference.accumulators(which, a, b, geometry)
    return _product(which, a, b, geometry).double()


def _mirrored(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> tuple[Gemm, QTensor, QTensor, Geometry]:
    """A transposed convolution's GEMM as one of the convolution that it mirrors; others as they are."""
    if not isinstance(geometry, ConvTranspose):
        return which, a, b, geometry
    mirrored, first = geometry.mirrored(which, 0)
    return (mirrored, *((a, b) if first == 0 else (b, a)), geometry.conv)


def _product(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry, scaled: bool = False, method: int = 0) -> Tensor:
    """Exact sums, int32 or int64; or if `scaled` float32(sum) * `output_scale`. `method`: see ``hb_matmul``."""
    wide = _bound(which, a, b, geometry) >= _INT32_SUMS
    if isinstance(geometry, Conv):
        scale = output_scale(a, b) if scaled else None
        return (_weight_gradient if which == "wgrad" else _convolve)(which, a, b, geometry, scale, wide, method)
    assert isinstance(geometry, Linear | Batched)
    return _multiply(which, a, b, geometry, scaled, wide, method)


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _scaled(sums: Tensor, wide: Tensor | None, scale: Tensor | None) -> Tensor:
    """What a kernel of `matmul`'s manner left, in the type that the caller wants."""
    if wide is not None:
        return wide if scale is None else wide.float().mul_(scale)
    return sums if scale is None else sums.view(torch.float32)


def _multiply(
    which: Gemm, a: QTensor, b: QTensor, geometry: Linear | Batched, scaled: bool, wide: bool, method: int
) -> Tensor:
    """A product of matrices. What lies row-major runs along the reduction where that is its last dimension."""
    if isinstance(geometry, Batched):
        rows, inner, columns = geometry.rows, geometry.inner, geometry.columns
        batch: tuple[int, ...] = (geometry.batch,)
    else:
        rows, inner, columns = geometry.rows, geometry.in_features, geometry.out_features
        batch = ()
    m, n, k = {
        "fprop": (rows, columns, inner),
        "dgrad": (rows, inner, columns),
        "wgrad": (columns, inner, rows),
    }[which]
    sums = torch.empty((*batch, m, n), dtype=torch.int32)
    wider = torch.empty((*batch, m, n), dtype=torch.int64) if wide else None
    codes_a, codes_b = _codes(a), _codes(b)
    panels: Tensor | None = None
    if isinstance(b, Prepared) and not (batch or wide):
        method = _matmul_method(ctypes.byref(codes_a), ctypes.byref(codes_b), n, method)
        panels = _panels(b, codes_b, which == "fprop", n, k, method)
    scales = (a.scale, b.scale) if scaled and not wide else (None, None)
    _matmul(
        ctypes.byref(codes_a),
        which != "wgrad",
        ctypes.byref(codes_b),
        which == "fprop",
        *(address(panels), *(batch or (1,)), m, n, k, address(sums), address(wider)),
        *(*map(address, scales), _unit(a.format, b.format), method),
    )
    if wider is not None:
        return wider.float().mul_(output_scale(a, b)) if scaled else wider
    return sums.view(torch.float32) if scaled else sums


@cache
def _unit(a: Format, b: Format) -> float:
    return float(a.unit * b.unit)


def _panels(b: Prepared, codes: Codes, along: bool, n: int, k: int, method: int) -> Tensor | None:
    """The panels of an operand for that method, packed when they are first needed; None where they are too many."""
    key = library().hb_isa(), along, n, k, method == _WORDS
    if key not in b.panels:
        size = _matmul_panels(ctypes.byref(codes), along, n, k, method, None)
        if size > _MOST_PANELS:
            return None
        b.panels[key] = torch.empty(size, dtype=torch.uint8)
        _matmul_panels(ctypes.byref(codes), along, n, k, method, address(b.panels[key]))
    return b.panels[key]


def _convolve(
    which: Gemm, a: QTensor, b: QTensor, geometry: Conv, scale: Tensor | None, wide: bool, method: int
) -> Tensor:
    """fprop and dgrad of a convolution."""
    shape = geometry.input_shape if which == "dgrad" else geometry.output_shape
    sums = torch.empty(0 if wide else shape, dtype=torch.int32)
    wider = torch.empty(shape, dtype=torch.int64) if wide else None
    library().hb_convolve(
        ctypes.byref(_codes(a)),
        ctypes.byref(_codes(b)),
        ctypes.byref(_conv_shape(geometry)),
        ctypes.c_int32(which == "dgrad"),
        *map(_pointer, (sums, wider, scale)),
        ctypes.c_int32(method),
    )
    return _scaled(sums, wider, scale)


def _weight_gradient(
    which: Gemm, a: QTensor, b: QTensor, geometry: Conv, scale: Tensor | None, wide: bool, method: int
) -> Tensor:
    """wgrad of a convolution. The kernel's sums are (O, taps, I / G)."""
    assert which == "wgrad"
    out, fan_in, *kernel = geometry.weight_shape
    shape = (out, math.prod(kernel), fan_in) if scale is None else (0,)
    sums = torch.empty(shape, dtype=torch.int64 if wide else torch.int32)
    result = None if scale is None else torch.empty(geometry.weight_shape)
    library().hb_convolve_weight(
        ctypes.byref(_codes(a)),
        ctypes.byref(_codes(b)),
        ctypes.byref(_conv_shape(geometry)),
        *map(_pointer, (None if wide else sums, sums if wide else None, scale, result)),
        ctypes.c_int32(method),
    )
    return sums.transpose(1, 2).reshape(geometry.weight_shape) if result is None else result


def _three(lengths: tuple[int, ...], missing: int) -> tuple[int, int, int]:
    """Lengths in depth, height and width. One dimension is the height, along which a kernel can be cut."""
    if len(lengths) == 1:
        return (missing, lengths[0], missing)
    depth, height, width = (missing,) * (3 - len(lengths)) + lengths
    return (depth, height, width)


@cache
def _conv_shape(geometry: Conv) -> ConvShape:
    groups = geometry.groups
    out, fan_in = geometry.weight_shape[:2]
    spatial = (
        (geometry.input_shape[2:], 1),
        (geometry.output_shape[2:], 1),
        (geometry.weight_shape[2:], 1),
        (geometry.stride, 1),
        (geometry.padding, 0),
        (geometry.dilation, 1),
    )
    triples = [(ctypes.c_int64 * 3)(*_three(lengths, missing)) for lengths, missing in spatial]
    return ConvShape(geometry.input_shape[0], groups, fan_in, out // groups, *triples)
