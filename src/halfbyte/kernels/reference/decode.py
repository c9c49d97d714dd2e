"""Codes back to the whole numbers that they stand for: what the reference GEMMs multiply.

A code stands for an integer times the format's unit. Where those integers are small, or are few powers of four, they
are split into *planes* of int8 whose weighted sum they are; 8-bit and 24-bit arithmetic then gives exact sums. FP8 is
split into digits of base 64. All other formats are decoded to float64.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...formats import Format, fp4_e2m1
from ...qtensor import QTensor, packed_size, unpack
from .encode import NATIVE, PIECE

PLANE_LIMIT = 64
"""The largest magnitude in a plane where there are several: 4^3, or a digit of base 64."""

_HIGH_PLANE = 256
"""Weight of the second plane of radix 4: 4^4."""


def decode(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The integers that the codes stand for, before unit, zero point and scale, in the tensor's shape.

    Exact in float32 for every format of at most 24 significant bits, which is all of them.
    """
    if q.format in NATIVE:
        return _native_integers(q).to(dtype)
    found = planes(q)
    if found is None:
        codes = unpack(q.qdata, q.numel, q.format.bits)
        table = _table(q.format, dtype, codes.device)
        return table[codes.int()].view(q.shape)
    total = found[0][1].to(dtype)
    for weight, plane in found[1:]:
        total = total.add_(plane, alpha=weight)
    return total


def planes(q: QTensor) -> tuple[tuple[int, Tensor], ...] | None:
    """The integers as a weighted sum of int8 tensors: ((weight, plane), ...), each plane in the tensor's shape.

    None for formats that have no such sum of few terms: logarithmic ones of other radices.
    """
    fmt = q.format
    if fmt in NATIVE:
        return _digits(_native_integers(q))
    small = min(i or 0 for i in fmt.integers) >= -128 and max(i or 0 for i in fmt.integers) <= 127
    if not (small or (fmt.kind == "log" and fmt.radix == 4 and fmt.bits == 4)):
        return None
    weights = (1,) if small else (1, _HIGH_PLANE)
    n = q.numel
    outs = [torch.empty(n, dtype=torch.int8, device=q.qdata.device) for _ in weights]
    codes = torch.empty(min(n, PIECE), dtype=torch.uint8, device=q.qdata.device)
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        packed = q.qdata[packed_size(start, fmt.bits) : packed_size(stop, fmt.bits)]
        piece = unpack(packed, stop - start, fmt.bits, out=codes[: stop - start])
        _split(piece, fmt, [out[start:stop] for out in outs])
    return tuple((weight, out.view(q.shape)) for weight, out in zip(weights, outs, strict=True))


def _native_integers(q: QTensor) -> Tensor:
    """FP8 codes as integers in float32: a number of the format divided by its unit, a power of two."""
    values = q.qdata.view(NATIVE[q.format]).to(torch.float32)
    return values.mul_(float(1 / q.format.unit)).view(q.shape)


def _digits(whole: Tensor) -> tuple[tuple[int, Tensor], ...]:
    """Integers of few significant bits as base-64 digits with their sign, as many as the largest one needs.

    Overwrites `whole`. Every step is exact: a digit is some of the number's few bits, the rest is the others.
    """
    top = float(whole.abs().max()) if whole.numel() else 0.0
    weight = 1
    while top >= weight * PLANE_LIMIT:
        weight *= PLANE_LIMIT
    found = []
    while weight > 1:
        digit = (whole * (1.0 / weight)).trunc_()
        whole = whole.sub_(digit, alpha=weight)
        found.append((weight, digit.to(torch.int8)))
        weight //= PLANE_LIMIT
    found.append((1, whole.to(torch.int8)))
    return tuple(reversed(found))


def _split(codes: Tensor, fmt: Format, outs: list[Tensor]) -> None:
    """Writes the planes of a piece of codes. Overwrites `codes`."""
    if fmt.kind == "int":
        half = 1 << (fmt.bits - 1)
        whole = codes.bitwise_xor_(half).sub_(half) if fmt.signed else codes
        outs[0].copy_(whole.view(torch.int8))
    elif fmt.kind == "log" and fmt.radix in (2, 4) and fmt.bits == 4:
        # -1 for a negative code, else 0: d ^ s - s negates where s is -1.
        sign = (codes >> 3).view(torch.int8).neg_()
        # 1 << k for the exponent k of the lowest plane; a k outside 0...7 (255, say, for code 0) shifts to zero.
        exponent = codes.bitwise_and_(7)
        exponent = exponent.sub_(1) if fmt.radix == 2 else exponent.mul_(2).sub_(2)
        one = torch.ones((), dtype=torch.uint8, device=codes.device)
        for out in outs:
            torch.bitwise_left_shift(one, exponent, out=out.view(torch.uint8))
            out.bitwise_xor_(sign).sub_(sign)
            exponent.sub_(8)
    elif fmt == fp4_e2m1:
        # Exponent e and mantissa bit m, in halves: m where e is 0, else 2 + m shifted by e - 1.
        sign = (codes >> 3).view(torch.int8).neg_()
        exponent = ((codes >> 1) & 3).sub_(1)
        mantissa = codes.bitwise_and_(1)
        # Exponent 0 became 255, whose shift gives 0: the mantissa bit alone is left.
        torch.bitwise_left_shift(mantissa + 2, exponent, out=outs[0].view(torch.uint8))
        outs[0].add_(mantissa.mul_(exponent.eq_(255)).view(torch.int8))
        outs[0].bitwise_xor_(sign).sub_(sign)
    else:
        outs[0].copy_(_table(fmt, torch.int8, codes.device)[codes.int()])


@cache
def _table(fmt: Format, dtype: torch.dtype, device: torch.device) -> Tensor:
    whole = [0 if i is None else i for i in fmt.integers]
    return torch.tensor(whole, dtype=torch.float64).to(dtype).to(device)
