"""A GEMM's transform: both operands are rotated along the reduction, which cancels in their product.

A rotation spreads an outlier over its group, so that one large number costs its neighbors less precision: with H
orthogonal, ``(A H)(B H)^T = A B^T``, but the rotated operands round better. Random signs in front of the Hadamard
matrix (Tseng et al., arXiv 2502.20586) make the group Gaussian-like whatever stood in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels import Reduction
from ..rng import Draw
from .contract import require

__all__ = ["Hadamard"]

_NVIDIA = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The fixed signs of NVIDIA's NVFP4 recipe (arXiv 2509.25149; TransformerEngine's reference implementation)."""

_PIECE = 1 << 16
"""Elements rotated at a time."""


@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """``x -> x @ diag(signs) @ H / sqrt(size)`` in groups of `size` along the reduction.

    H is Sylvester's matrix. What is left of a reduction that `size` does not divide is cut into groups of smaller
    powers of two (13 into 8, 4 and 1), so no shape needs padding.

    Attributes:
        size: length of a group, a power of two.
        signs: ``"none"``; ``"random"``, drawn anew at each step; or ``"nvidia"``, sixteen fixed ones.
    """

    size: int = 32
    signs: Literal["none", "random", "nvidia"] = "none"

    def __post_init__(self) -> None:
        power = self.size >= 2 and self.size & (self.size - 1) == 0
        require(power, f"Hadamard(size={self.size})", "a power of two from 2 up is possible")
        known = self.signs in ("none", "random", "nvidia")
        require(known, f"Hadamard(signs={self.signs!r})", "'none', 'random' or 'nvidia' is possible")
        fits = self.signs != "nvidia" or self.size == len(_NVIDIA)
        require(fits, f"Hadamard(size={self.size}, signs='nvidia')", f"those signs are for size {len(_NVIDIA)}")

    def draw_signs(self, draw: Draw) -> Tensor | None:
        """The signs of one step: float32 of shape (size,), or None for none. All groups share them."""
        if self.signs == "none":
            return None
        if self.signs == "nvidia":
            return torch.tensor(_NVIDIA, dtype=torch.float32, device=draw.step.device)
        return draw.signs(self.size)

    def rotate(self, x: Tensor, view: Reduction, signs: Tensor | None) -> Tensor:
        """x rotated along the reduction.

        Args:
            x: any shape; float32 or float64.
            view: how it lies along the reduction.
            signs: from `draw_signs`.

        Returns:
            The shape of x, computed in its type: additions and subtractions stage by stage, one multiplication last.
        """
        return self._along(x, view, signs, back=False)

    def rotate_back(self, x: Tensor, view: Reduction, signs: Tensor | None) -> Tensor:
        """The inverse of `rotate`, up to rounding: the matrix is symmetric, so only the signs move to the end."""
        return self._along(x, view, signs, back=True)

    def _along(self, x: Tensor, view: Reduction, signs: Tensor | None, *, back: bool) -> Tensor:
        rows = x.reshape(view.shape).movedim(view.axis, -1)
        length = rows.shape[-1]
        pieces, start = [], 0
        while start < length:
            # All whole groups at once, then the rest's binary digits from the top.
            left = length - start
            size = min(self.size, 1 << (left.bit_length() - 1))
            stop = start + left // size * size
            group = rows[..., start:stop].unflatten(-1, (left // size, size))
            some = None if signs is None else signs[:size].to(group.dtype)
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
