"""The three GEMMs on packed codes, by the native library: equal to `halfbyte.kernels.reference` bit for bit.

A product of whole numbers is exact in any order, so the library may choose its arithmetic by the operands. What has
scales for blocks or 8-bit floats is summed in float64 (`numbers`). What has no kernel goes to the reference;
`REFERENCE_CASES` lists what that is.
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
from .numbers import Numbers, in_numbers
from .numbers import product as product_of_numbers
from .operands import Codes, codes_of, conv_shape, is_float8, readable, three

__all__ = ["REFERENCE_CASES", "Prepared", "accumulators", "computed_by", "gemm", "prepare", "reference_case"]

_INT32_SUMS = 1 << 31
_INT64_SUMS = 1 << 63
_MOST_PANELS = 64 << 20
"""Bytes of panels that a `Prepared` operand may hold in one layout; a larger one is packed anew for each product."""

_BYTES, _WORDS = 1, 3
"""The methods that multiply 8-bit and 16-bit numbers, whose panels have a layout of their own."""

_PLANE = 128
"""The largest magnitude in a plane of an 8-bit float."""

_LARGEST_BESIDE_PLANES = 32
"""The largest magnitude in the other operand of planes: see ``hb_codes``."""

_SLAB = 1024
"""Positions that wgrad of a convolution sums at a time (STRETCH of conv_weight.inc.cpp)."""


_matmul = function("matmul", *(POINTER, INT32) * 2, POINTER, *[INT64] * 4, *[POINTER] * 4, ctypes.c_double, INT32)
_matmul_method = function("matmul_method", POINTER, POINTER, INT64, INT32, result=INT32)
_plane_count = function("plane_count", POINTER, result=INT32)
_matmul_panels = function("matmul_panels", POINTER, INT32, INT64, INT64, INT32, POINTER, result=INT64)


@dataclass(frozen=True, eq=False, repr=False)
class Prepared(QTensor):
    """A second operand that many products share. The panels that a kernel makes of it are kept from the first on.

    They take 1 or 2 bytes a code, those of numbers 4 or 8, and live as long as this object; the codes must not change
    meanwhile.
    """

    panels: dict[object, Tensor] = field(default_factory=dict, init=False)
    numbers: dict[object, Numbers] = field(default_factory=dict, init=False)


def prepare(b: QTensor) -> QTensor:
    """The same operand, ready for many products: see `Prepared`."""
    return Prepared(b.qdata, b.scale, b.format, b.shape, b.zero_point, b.block_scale, b.blocks)


def _bound(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> int:
    """The largest magnitude that a sum can reach."""
    return geometry.reduction(which) * a.format.max_integer * b.format.max_integer


def _few(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> bool:
    """Whether a convolution's wgrad would have to empty its 32-bit sums within one stretch of positions."""
    if which != "wgrad" or not isinstance(geometry, Conv) or _bound(which, a, b, geometry) < _INT32_SUMS:
        return False
    largest = _PLANE if is_float8(a.format) else a.format.max_integer
    stretch = max(_SLAB, three(geometry.output_shape[2:], 1)[2] + 3)
    return stretch * largest * b.format.max_integer >= _INT32_SUMS


def _whole(a: QTensor, b: QTensor) -> bool:
    """Whether a product is one of whole numbers under one scale each."""
    return all(readable(q.format) and q.blocks is None for q in (a, b))


def _in_planes(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> bool:
    """Whether a product is wgrad's of an 8-bit float, in planes of whole numbers, with whole numbers."""
    whole = which == "wgrad" and is_float8(a.format)
    whole = whole and readable(b.format) and b.format.max_integer <= _LARGEST_BESIDE_PLANES
    plain = all(q.blocks is None and q.zero_point is None and q.qdata.is_cpu for q in (a, b))
    return whole and plain and _bound(which, a, b, geometry) < _INT64_SUMS and not _few(which, a, b, geometry)


REFERENCE_CASES: dict[str, Callable[[Gemm, QTensor, QTensor, Geometry], bool]] = {
    "a device other than the CPU": lambda _which, a, b, _geo: {a.qdata.device.type, b.qdata.device.type} != {"cpu"},
    "scales of blocks that are float32": lambda _which, a, b, _geo: any(
        q.blocks is not None and q.blocks.scale_format is None for q in (a, b)
    ),
    "a zero point beside scales of blocks or an 8-bit float": lambda _which, a, b, _geo: (
        not _whole(a, b) and not (a.zero_point is None and b.zero_point is None)
    ),
    "an 8-bit float with integers whose sums may pass 53 bits, or a format that reaches beyond 4096": (
        lambda which, a, b, geo: not (_whole(a, b) or in_numbers(which, a, b, geo) or _in_planes(which, a, b, geo))
    ),
    "sums beyond 63 bits": lambda which, a, b, geo: _whole(a, b) and _bound(which, a, b, geo) >= _INT64_SUMS,
    "wgrad of a convolution that passes 31 bits within 1,024 products": lambda which, a, b, geo: (
        _whole(a, b) and _few(which, a, b, geo)
    ),
}
"""What has no kernel, besides operands in floating point and ``accumulate`` other than ``"exact"``: words, and test.

Blocks of powers of two go to the reference, too, where one that is not empty lies more than 60 powers below another.
"""


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
    if _in_planes(which, a, b, geometry):
        return _product_of_planes(which, a, b, geometry)
    if not _whole(a, b):
        found = product_of_numbers(which, a, b, geometry)
        return reference.gemm(which, a, b, geometry) if found is None else found
    if a.zero_point is None and b.zero_point is None:
        return _product(which, a, b, geometry, scaled=True)
    sums = _product(which, a, b, geometry).double()
    return centered(which, a, b, geometry, sums).float().mul_(output_scale(a, b))


def accumulators(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> Tensor:
    """The exact sums of products of the operands' integers: see `halfbyte.kernels.reference.accumulators`. float64."""
    which, a, b, geometry = _mirrored(which, a, b, geometry)
    if not _whole(a, b) or reference_case(which, a, b, geometry) is not None:
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


def _product_of_planes(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> Tensor:
    """float32(sum) * `output_scale` where the first operand is an 8-bit float."""
    if isinstance(geometry, Conv):
        return _weight_gradient(which, a, b, geometry, output_scale(a, b), wide=True, method=_BYTES)
    assert isinstance(geometry, Linear | Batched)
    wide = geometry.reduction(which) * _PLANE * b.format.max_integer >= _INT32_SUMS
    total: Tensor | None = None
    for plane in range(_plane_count(ctypes.byref(codes_of(a)))):
        sums = _multiply(which, a, b, geometry, scaled=False, wide=wide, method=_BYTES, plane=plane).long()
        total = sums if total is None else total.add_(sums, alpha=1 << 8 * plane)
    assert total is not None
    return total.float().mul_(output_scale(a, b))


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _scaled(sums: Tensor, wide: Tensor | None, scale: Tensor | None) -> Tensor:
    """What a kernel of `matmul`'s manner left, in the type that the caller wants."""
    if wide is not None:
        return wide if scale is None else wide.float().mul_(scale)
    return sums if scale is None else sums.view(torch.float32)


def _multiply(
    which: Gemm,
    a: QTensor,
    b: QTensor,
    geometry: Linear | Batched,
    scaled: bool,
    wide: bool,
    method: int,
    plane: int = 0,
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
    codes_a, codes_b = codes_of(a), codes_of(b)
    codes_a.plane = plane
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
        ctypes.byref(codes_of(a)),
        ctypes.byref(codes_of(b)),
        ctypes.byref(conv_shape(geometry)),
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
        ctypes.byref(codes_of(a)),
        ctypes.byref(codes_of(b)),
        ctypes.byref(conv_shape(geometry)),
        *map(_pointer, (None if wide else sums, sums if wide else None, scale, result)),
        ctypes.c_int32(method),
    )
    return sums.transpose(1, 2).reshape(geometry.weight_shape) if result is None else result
