"""Block formats and rotations by the library: two reads of a tensor, for its blocks' scales and for their codes."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from ...qtensor import Blocks, packed_size
from ...rng import Draw
from .. import reference
from ..geometry import Reduction
from .common import DTYPES, is_mine
from .library import INT32, INT64, POINTER, address, function
from .stochastic import philox

__all__ = ["axes", "block_amax", "encode_blocks", "lengths", "mx_scales", "nv_scales", "rotate", "spread_but_one"]

_LARGEST_GROUP = 256
"""Of a rotation (LARGEST_GROUP of rotate.inc.cpp)."""

_FLOAT = ctypes.c_float
_block_amax = function("block_amax", POINTER, INT32, *[INT64] * 4, POINTER, POINTER)
_nv_scales = function("nv_scales", POINTER, INT64, _FLOAT, _FLOAT, *[POINTER] * 3)
_mx_scales = function("mx_scales", POINTER, INT64, INT32, _FLOAT, POINTER, POINTER)
_encode = function("encode_in_blocks", POINTER, INT32, *[INT64] * 4, *[POINTER] * 3)
_rotate = function("rotate", POINTER, *[INT64] * 3, INT32, POINTER, INT32, POINTER, POINTER)


def lengths(shape: tuple[int, ...], dim: int) -> tuple[int, int, int]:
    """A row-major shape seen along one dimension: what lies before it, itself, what lies behind it."""
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def axes(blocks: Blocks) -> list[int]:
    """The dimensions that are cut into blocks of more than one; at least one."""
    return [dim for dim, size in enumerate(blocks.sizes) if size > 1] or [len(blocks.sizes) - 1]


def spread_but_one(per_block: Tensor, blocks: Blocks) -> tuple[Tensor, int]:
    """A number for each block, repeated along all dimensions but the last of `axes`; and that dimension."""
    *others, axis = axes(blocks)
    if others:
        sizes = tuple(1 if dim == axis else size for dim, size in enumerate(blocks.sizes))
        view = tuple(
            n if dim == axis else length
            for dim, (n, length) in enumerate(zip(per_block.shape, blocks.view, strict=True))
        )
        per_block = Blocks(view, sizes, None).spread(per_block)
    return per_block.contiguous(), axis


def block_amax(x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """See `reference.block_amax`."""
    if not is_mine(x):
        return reference.block_amax(x, blocks)
    found = x.detach().contiguous()
    shape, top = list(blocks.view), torch.empty(())
    for dim in reversed(axes(blocks)):
        before, length, behind = lengths(tuple(shape), dim)
        shape[dim] = -(-length // blocks.sizes[dim])
        out = torch.empty(shape)
        cut = before, length, behind, blocks.sizes[dim]
        _block_amax(found.data_ptr(), DTYPES[found.dtype], *cut, out.data_ptr(), top.data_ptr())
        found = out
    return found, top


def nv_scales(amax: Tensor, *, limit: float, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nv_scales`."""
    if amax.device.type != "cpu" or amax.dtype != torch.float32:
        return reference.nv_scales(amax, limit=limit, largest=largest)
    scale, codes, inverse = torch.empty(()), torch.empty(amax.shape, dtype=torch.uint8), torch.empty(amax.shape)
    amax = amax.contiguous()
    _nv_scales(
        amax.data_ptr(), amax.numel(), limit, limit * largest, scale.data_ptr(), codes.data_ptr(), inverse.data_ptr()
    )
    return scale, codes, inverse


def mx_scales(amax: Tensor, *, rule: str, factor: float) -> tuple[Tensor, Tensor]:
    """See `reference.mx_scales`."""
    if amax.device.type != "cpu" or amax.dtype != torch.float32:
        return reference.mx_scales(amax, rule=rule, factor=factor)
    codes, inverse = torch.empty(amax.shape, dtype=torch.uint8), torch.empty(amax.shape)
    amax = amax.contiguous()
    number = ("floor", "ceil", "even", "rceil").index(rule)
    _mx_scales(amax.data_ptr(), amax.numel(), number, factor, codes.data_ptr(), inverse.data_ptr())
    return codes, inverse


def encode_blocks(x: Tensor, inverse: Tensor, blocks: Blocks, *, draw: Draw | None = None, part: int = 0) -> Tensor:
    """See `reference.encode_blocks`; random numbers are never in memory as a whole."""
    if not is_mine(x) or inverse.dtype != torch.float32:
        return reference.encode_blocks(x, inverse, blocks, draw=draw, part=part)
    found = x.detach().contiguous()
    inverse, axis = spread_but_one(inverse, blocks)
    out = torch.empty(packed_size(found.numel(), 4), dtype=torch.uint8)
    words = None if draw is None else philox(draw, part)
    cut = *lengths(blocks.view, axis), blocks.sizes[axis]
    _encode(found.data_ptr(), DTYPES[found.dtype], *cut, inverse.data_ptr(), words, out.data_ptr())
    return out


def rotate(x: Tensor, view: Reduction, size: int, signs: Tensor | None, *, back: bool = False) -> Tensor:
    """See `reference.rotate`."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or size > _LARGEST_GROUP:
        return reference.rotate(x, view, size, signs, back=back)
    found = x.contiguous()
    out = torch.empty(found.shape)
    signs = None if signs is None else signs.float().contiguous()
    cut = lengths(view.shape, view.axis)
    _rotate(found.data_ptr(), *cut, size, address(signs), back, _factors(), out.data_ptr())
    return out


@cache
def _factors() -> ctypes.Array[ctypes.c_float]:
    """What a group of each power of two is multiplied by."""
    count = _LARGEST_GROUP.bit_length()
    return (ctypes.c_float * count)(*(1 / math.sqrt(1 << power) for power in range(count)))
