"""The learned clip of an activation: which elements lay inside it, and what its gradient is (PACT, arXiv 1805.06085).

One bit an element is kept: whether it lay inside the clip, ends included. With the code that says on which side the
others lay. An element that equals the clip exactly lies inside and yet moves the clip; there is almost never one, and
only where there is are those elements marked by a second bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...qtensor import QTensor, pack_bits, packed_size, unpack, unpack_bits
from .encode import PIECE, stable_sum, wide_dtype


def clip_bits(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where ``low <= x <= high``, and where x equals a clip.

    Args:
        x: the unquantized tensor, any shape.
        low: the lower clip, or 0 for an unsigned activation; float32 of shape ().
        high: the upper clip; float32 of shape ().

    Returns:
        Packed bits of shape ((n + 7) // 8,): inside; and at the clip (upper, or lower if that is not 0), or None if no
        element is.
    """
    flat = x.detach().reshape(-1)
    n = flat.numel()
    dtype = wide_dtype(x.dtype)
    low, high = low.to(dtype), high.to(dtype)
    inside = torch.empty((n + 7) // 8, dtype=torch.uint8, device=x.device)
    at_clip = torch.empty_like(inside)
    scratch = torch.empty(min(n, PIECE), dtype=dtype, device=x.device)
    mask, ends = (torch.empty(min(n, PIECE), dtype=torch.bool, device=x.device) for _ in range(2))
    ties = torch.zeros((), dtype=torch.bool, device=x.device)
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        bits = slice(start // 8, (stop + 7) // 8)
        piece = flat[start:stop].to(dtype)
        clipped = torch.clamp(piece, low, high, out=scratch[: stop - start])
        within = torch.eq(piece, clipped, out=mask[: stop - start])
        pack_bits(within, inside[bits])
        # |low| is the upper clip or 0, so one comparison of the magnitude finds both ends.
        pack_bits(torch.eq(clipped.abs_(), high, out=ends[: stop - start]).logical_and_(within), at_clip[bits])
        ties |= at_clip[bits].max() > 0
    return inside, at_clip if ties else None


def clip_backward(grad: Tensor, q: QTensor, inside: Tensor, ties: Tensor | None) -> tuple[Tensor, Tensor]:
    """The straight-through gradient of a clipped tensor and the gradient of its clip.

    Args:
        grad: gradient of the dequantized tensor, its shape; overwritten.
        q: the codes; symmetric about zero if the format is signed.
        inside: packed bits of `clip_bits`.
        ties: the same, of the elements at the clip, or None.

    Returns:
        The gradient of x, zero outside the clip; and that of the clip, float32 of shape (): the sum over the elements
        at or above it, minus the sum over those at or below its negative.
    """
    flat = grad.view(-1)
    n = flat.numel()
    bits = q.format.bits
    negative = 1 << (bits - 1)
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        piece = flat[start:stop]
        outside = unpack_bits(inside[start // 8 : (stop + 7) // 8], stop - start).logical_not_()
        moving = outside
        if ties is not None:
            moving = outside | unpack_bits(ties[start // 8 : (stop + 7) // 8], stop - start)
        where = moving.nonzero().squeeze(1)
        codes = unpack(q.qdata[packed_size(start, bits) : packed_size(stop, bits)], stop - start, bits)[where]
        # Outside or at the clip a code is the extreme one, or 0 below an unsigned clip's zero.
        weight = torch.where(codes >= negative, -1.0, 1.0) if q.format.signed else (codes > 0)
        total += stable_sum(piece[where].double() * weight)
        piece.masked_fill_(outside, 0.0)
    return grad, total.float()
