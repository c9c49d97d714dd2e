"""Rotations by Hadamard matrices in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..geometry import Reduction

_PIECE = 1 << 16
"""Elements rotated at a time."""


def rotate(x: Tensor, view: Reduction, size: int, signs: Tensor | None, *, back: bool = False) -> Tensor:
    """x in groups of `size` along the reduction times ``diag(signs) @ H / sqrt(size)``, H being Sylvester's matrix.

    What is left of a reduction that `size` does not divide is cut into groups of smaller powers of two.

    Args:
        x: any shape; float32 or float64.
        view: how it lies along the reduction.
        size: a power of two.
        signs: of shape (size,), or None for none.
        back: whether the signs come after the matrix: the inverse, up to rounding, as the matrix is symmetric.

    Returns:
        The shape of x, computed in its type: additions and subtractions stage by stage, one multiplication last.
    """
    rows = x.reshape(view.shape).movedim(view.axis, -1)
    length = rows.shape[-1]
    pieces, start = [], 0
    while start < length:
        # All whole groups at once, then the rest's binary digits from the top.
        left = length - start
        some_size = min(size, 1 << (left.bit_length() - 1))
        stop = start + left // some_size * some_size
        group = rows[..., start:stop].unflatten(-1, (left // some_size, some_size))
        some = None if signs is None else signs[:some_size].to(group.dtype)
        if some is not None and not back:
            group = group * some
        group = _butterflies(group)
        if some is not None and back:
            group = group * some
        pieces.append(group.flatten(-2))
        start = stop
    turned = torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0] if pieces else rows
    return turned.movedim(-1, view.axis).reshape(x.shape)


def _butterflies(x: Tensor) -> Tensor:
    """The last dimension, a power of two long, times Sylvester's matrix over the root of its size."""
    size = x.shape[-1]
    if size == 1:
        return x
    x = x.contiguous().clone()
    # In pieces that stay in the cache through all stages.
    for piece in x.view(-1, size).split(max(1, _PIECE // size)):
        half = 1
        while half < size:
            pairs = piece.view(-1, size // (2 * half), 2, half)
            low, high = pairs[:, :, 0], pairs[:, :, 1]
            difference = low - high
            low += high
            high.copy_(difference)
            half *= 2
        piece.mul_(1 / math.sqrt(size))
    return x
