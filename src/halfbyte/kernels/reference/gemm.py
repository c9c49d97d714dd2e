"""The three GEMMs on codes, with exact integer sums, in plain PyTorch.

The result of a GEMM is ``float32(sum of integer products) * scale``: the sum is exact, rounded once to float32 and
multiplied once. Exactness is bought as cheaply as the bounds allow: on a CPU int8 matrix products with 32-bit sums for
linear layers and for the wgrad of convolutions, and float32 while every partial sum stays below 2^24; otherwise, and on
other devices, float64. No choice changes the result.

Two kinds of operands are multiplied in float64 instead. A block format has a scale for each block, so its sums are not
of integers; products of E2M1 codes and E4M3 or E8M0 scales have few significant bits, though, and float64 adds them
exactly unless blocks of one sum differ in scale by more than some 2^40. Two 8-bit floats reach over 50 binades, more
than any exact sum holds; their products are exact, and the sum has float64's precision.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...qtensor import QTensor
from ..geometry import Conv, ConvTranspose, Gemm, Geometry, Linear
from .chunked import chunked_gemm
from .decode import PLANE_LIMIT, decode, planes
from .im2col import int_product, wgrad

Accumulate = Literal["exact", "fp32", "fp16_chunk64"]

_EXACT_FLOAT32 = 1 << 24
_EXACT_INT32 = 1 << 31
_EXACT_FLOAT64 = 1 << 53
_EXACT_INT64 = 1 << 63


def prepare(b: QTensor) -> QTensor:
    """The operand itself: what a backend may do to a second operand of many products, this one does not."""
    return b


def computed_by(*_: object) -> str:
    """``"reference"``, whatever the product."""
    return "reference"


def gemm(
    which: Gemm, a: QTensor | Tensor, b: QTensor | Tensor, geometry: Geometry, *, accumulate: Accumulate = "exact"
) -> Tensor:
    """One GEMM of a layer.

    Args:
        which: fprop, dgrad or wgrad.
        a: input (fprop) or grad_output (dgrad, wgrad).
        b: weight (fprop, dgrad) or input (wgrad). Where an operand is no `QTensor` the product is an ordinary
            floating one with the other dequantized.
        geometry: the layer's shape.
        accumulate: ``"exact"``; ``"fp32"``, one float32 product of the integers, rounded as the library pleases; or
            ``"fp16_chunk64"``, exact sums of 64 products rounded to float16 and added in float16, as the paper's
            hardware does. The last two need operands without a zero point.

    Returns:
        float32 (float64 where a floating operand is).
    """
    if not (isinstance(a, QTensor) and isinstance(b, QTensor)):
        other = a if isinstance(a, Tensor) else b
        dtype = other.dtype if isinstance(other, Tensor) else torch.float32
        return geometry.apply(which, _floating(a, dtype), _floating(b, dtype))
    if isinstance(geometry, ConvTranspose):
        which, a, b, geometry = _mirrored(which, a, b, geometry)
    with torch.autocast(a.qdata.device.type, enabled=False):
        return _on_codes(which, a, b, geometry, accumulate)


def _mirrored(which: Gemm, a: QTensor, b: QTensor, geometry: ConvTranspose) -> tuple[Gemm, QTensor, QTensor, Conv]:
    """A transposed convolution's GEMM as one of the convolution that it mirrors."""
    mirrored, first = geometry.mirrored(which, 0)
    return (mirrored, a, b, geometry.conv) if first == 0 else (mirrored, b, a, geometry.conv)


def _on_codes(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry, accumulate: Accumulate) -> Tensor:
    wide = a.format.kind == b.format.kind == "float" and _bound(which, a, b, geometry) >= _EXACT_FLOAT64
    if a.blocks is not None or b.blocks is not None or (wide and accumulate == "exact"):
        return _on_numbers(which, a, b, geometry, accumulate)
    if accumulate == "fp16_chunk64":
        # The float16 sums are of values, so the units are in them already.
        return chunked_gemm(which, a, b, geometry).mul_((a.scale.double() * b.scale.double()).float())
    if accumulate == "fp32":
        total = geometry.apply(which, decode(a), decode(b))
    elif a.zero_point is None and b.zero_point is None:
        total = _rounded(_products(which, a, b, geometry), _bound(which, a, b, geometry))
    else:
        total = centered(which, a, b, geometry, accumulators(which, a, b, geometry)).float()
    return total.mul_(output_scale(a, b))


def _on_numbers(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry, accumulate: Accumulate) -> Tensor:
    """A product of codes' values, with block scales but without the tensors' scales, summed in floating point."""
    dtype = torch.float32 if accumulate == "fp32" else torch.float64
    if accumulate == "fp16_chunk64":
        raise ValueError(
            "accumulate='fp16_chunk64' was asked for operands with a scale for each block; no unit sums their codes as "
            "integers. Use a recipe with one scale for a tensor, or accumulate='exact' or 'fp32'."
        )
    units = []
    for q in (a, b):
        factors = q.block_factors()
        wide = decode(q, torch.float64)
        if q.zero_point is not None:
            wide -= q.zero_point
        units.append((wide if factors is None else wide.mul_(factors)).to(dtype))
    with torch.backends.nnpack.flags(enabled=False):
        total = geometry.apply(which, *units)
    unit = float(a.format.unit * b.format.unit)
    return total.double().mul_(a.scale.double() * b.scale.double() * unit).float()


def accumulators(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> Tensor:
    """The sums of products of the two operands' integers, before zero points and scales; exact below 2^53. float64."""
    if isinstance(geometry, ConvTranspose):
        which, a, b, geometry = _mirrored(which, a, b, geometry)
    (weight, first), *others = _products(which, a, b, geometry)
    total = first.double()
    if weight != 1:
        total = total * weight
    for weight, part in others:
        total = total.add_(part, alpha=weight)
    return total


def output_scale(a: QTensor, b: QTensor) -> Tensor:
    """What an integer sum is multiplied by: both scales and both units, float32 of shape (), rounded once."""
    unit = float(a.format.unit * b.format.unit)
    return (a.scale.double() * b.scale.double() * unit).float()


def _floating(operand: QTensor | Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(operand, QTensor):
        return operand
    if operand.format.kind == "int" and operand.zero_point is None and operand.blocks is None:
        # The same numbers as `dequantize` gives, and several times sooner: one whole number times one scale.
        return decode(operand, dtype).mul_(operand.scale)
    return operand.dequantize(dtype)


def _bound(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> int:
    """The largest magnitude that a sum can reach."""
    return geometry.reduction(which) * a.format.max_integer * b.format.max_integer


def _products(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> list[tuple[int, Tensor]]:
    """Exact products, plane by plane: (weight, int32 or float tensor of exact integers)."""
    if a.qdata.device.type != "cpu":
        return [(1, _in_float64(which, a, b, geometry))]
    if not isinstance(geometry, Linear) and _bound(which, a, b, geometry) < _EXACT_FLOAT32:
        return [(1, _apply_float32(which, decode(a), decode(b), geometry))]
    if _bound(which, a, b, geometry) >= _EXACT_INT64:
        raise _too_long(which, a, b, geometry)
    planes_a, planes_b = planes(a), planes(b)
    if planes_a is None or planes_b is None:
        return [(1, _in_float64(which, a, b, geometry))]
    limits = [
        min(q.format.max_integer, PLANE_LIMIT) if len(found) > 1 else q.format.max_integer
        for q, found in ((a, planes_a), (b, planes_b))
    ]
    k = geometry.reduction(which)
    bound = k * limits[0] * limits[1]
    # Processors without VNNI add pairs of (unsigned) 255 times the smaller operand in 16 bits: 255 * 64 * 2 < 2^15.
    narrow = min(limits) <= PLANE_LIMIT and bound < _EXACT_INT32
    if isinstance(geometry, Conv) and which == "wgrad" and geometry.groups == 1 and narrow and len(planes_b) == 1:
        parts = wgrad([plane for _, plane in planes_a], planes_b[0][1], geometry)
        return [(weight, part) for (weight, _), part in zip(planes_a, parts, strict=True)]
    if not (narrow if isinstance(geometry, Linear) else bound < _EXACT_FLOAT32):
        return [(1, _in_float64(which, a, b, geometry))]
    results = []
    for weight_b, plane_b in planes_b:
        for weight_a, plane_a in planes_a:
            if isinstance(geometry, Linear):
                left, right = geometry.matrices(which, plane_a, plane_b)
                part = int_product(left, right)
            else:
                part = _apply_float32(which, plane_a.float(), plane_b.float(), geometry)
            results.append((weight_a * weight_b, part))
    return _merged(results, bound) if isinstance(geometry, Linear) else results


def _merged(products: list[tuple[int, Tensor]], bound: int) -> list[tuple[int, Tensor]]:
    """The same sum in fewer int32 parts, each |part| <= bound: added up while no result can pass 2^31."""
    merged: list[tuple[int, Tensor]] = []
    reach = 0
    for weight, part in sorted(products, key=lambda product: product[0]):
        if merged and weight % merged[-1][0] == 0 and reach + weight // merged[-1][0] * bound < _EXACT_INT32:
            merged[-1][1].add_(part, alpha=weight // merged[-1][0])
            reach += weight // merged[-1][0] * bound
        else:
            merged.append((weight, part))
            reach = bound
    return merged


def _apply_float32(which: Gemm, a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    # NNPACK transforms tiles (Winograd), which is not exact; every other CPU path only multiplies and adds.
    with torch.backends.nnpack.flags(enabled=False):
        return geometry.apply(which, a, b)


def _in_float64(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> Tensor:
    wide_a, wide_b = decode(a, torch.float64), decode(b, torch.float64)
    if _bound(which, a, b, geometry) < _EXACT_FLOAT64:
        return geometry.apply(which, wide_a, wide_b)
    raise _too_long(which, a, b, geometry)


def _too_long(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> OverflowError:
    return OverflowError(
        f"{which} sums {geometry.reduction(which)} products of {a.format.name} and {b.format.name}, more than any "
        "exact sum here can hold. Split the batch, or use a narrower format."
    )


def _rounded(products: list[tuple[int, Tensor]], bound: int) -> Tensor:
    """The weighted sum of exact parts, rounded once to float32. Overwrites the parts."""
    weight, total = products[0]
    if len(products) == 1:
        return total.float() if weight == 1 else total.double().mul_(weight).float()
    if total.dtype == torch.float32 and len(products) == 2:
        # The second weight is a power of two, so its multiple is exact and the addition rounds once.
        return total.add_(products[1][1], alpha=products[1][0])
    # Beyond 2^53 only int64 holds the sum; either way it is rounded once.
    exact = torch.float64 if bound < _EXACT_FLOAT64 else torch.int64
    wide = total.to(exact)
    for other_weight, part in products[1:]:
        wide.add_(part if exact == torch.float64 else part.to(exact), alpha=other_weight)
    return wide.float()


def centered(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry, total: Tensor) -> Tensor:
    """Sum of (a - z_a)(b - z_b) in float64, from exact integer sums: `total`, from `accumulators`; overwritten.

    The product is bilinear, so with S the product of the integers, A and B the sums of either operand over the other's
    ones, and n the number of products, it is S - z_b A - z_a B + z_a z_b n. Padding contributes to none of them.
    """
    if b.zero_point is not None:
        total -= b.zero_point * _sum_over(which, 0, a, geometry)
    if a.zero_point is not None:
        total -= a.zero_point * _sum_over(which, 1, b, geometry)
    if a.zero_point is not None and b.zero_point is not None:
        ones = torch.ones((1, *a.shape[1:]), dtype=torch.float64, device=a.qdata.device)
        count = geometry.sum_over(which, 0, ones.expand(a.shape) if which == "wgrad" else ones)
        total += (a.zero_point * b.zero_point) * count
    return total


def _sum_over(which: Gemm, operand: int, q: QTensor, geometry: Geometry) -> Tensor:
    """The exact sums of one operand's integers over the other's ones, in float64."""
    exact = geometry.reduction(which) * q.format.max_integer < _EXACT_FLOAT32
    with torch.backends.nnpack.flags(enabled=False):
        return geometry.sum_over(which, operand, decode(q, torch.float32 if exact else torch.float64)).double()
