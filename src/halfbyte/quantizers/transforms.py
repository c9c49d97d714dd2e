"""A GEMM's transform: both operands are rotated along the reduction, which cancels in their product.

A rotation spreads an outlier over its group, so that one large number costs its neighbors less precision: with H
orthogonal, ``(A H)(B H)^T = A B^T``, but the rotated operands round better. Random signs in front of the Hadamard
matrix (Tseng et al., arXiv 2502.20586) make the group Gaussian-like whatever stood in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import kernels
from ..kernels import Reduction
from ..rng import Draw
from .contract import require

__all__ = ["Hadamard"]

_NVIDIA = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The fixed signs of NVIDIA's NVFP4 recipe (arXiv 2509.25149; TransformerEngine's reference implementation)."""


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

    def rotate(self, x: Tensor, view: Reduction, signs: Tensor | None, *, backend: str = "reference") -> Tensor:
        """x rotated along the reduction.

        Args:
            x: any shape; float32 or float64.
            view: how it lies along the reduction.
            signs: from `draw_signs`.
            backend: a name in `halfbyte.kernels.BACKENDS`.

        Returns:
            The shape of x, computed in its type: additions and subtractions stage by stage, one multiplication last.
        """
        return kernels.get(backend).rotate(x, view, self.size, signs)

    def rotate_back(self, x: Tensor, view: Reduction, signs: Tensor | None, *, backend: str = "reference") -> Tensor:
        """The inverse of `rotate`, up to rounding: the matrix is symmetric, so only the signs move to the end."""
        return kernels.get(backend).rotate(x, view, self.size, signs, back=True)
