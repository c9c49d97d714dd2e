"""What a backend can do for what is kept for the backward pass."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..rng import Draw

__all__ = ["StashKernels"]


class StashKernels(Protocol):
    """The part of `Backend` that `halfbyte.stash` asks for."""

    def stash_encode(self, x: Tensor, bits: int, draw: Draw) -> tuple[Tensor, Tensor, bool]:
        """Numbers to codes, with minimum and step of each block, and whether they were finite."""
        ...

    def stash_decode(self, codes: Tensor, steps: Tensor, numel: int, bits: int) -> Tensor:
        """Codes to numbers."""
        ...

    def relu(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``max(x, 0)`` and bits."""
        ...

    def relu_backward(self, grad: Tensor, bits: Tensor) -> Tensor:
        """A gradient where bits are set."""
        ...

    def plane_moments(self, x_NCS: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over planes."""
        ...

    def norm_forward(
        self, x_NCS: Tensor, factor_C: Tensor, shift_C: Tensor, bits: int, draw: Draw, *, with_relu: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
        """A norm's result and the codes of its input."""
        ...

    def norm_sums(
        self, grad_NCS: Tensor, codes: Tensor, steps: Tensor, bits: int, positive: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sums of a norm's backward pass."""
        ...

    def norm_backward(
        self,
        grad_NCS: Tensor,
        codes: Tensor,
        steps: Tensor,
        bits: int,
        positive: Tensor | None,
        of_grad_C: Tensor,
        of_x_C: Tensor,
        shift_C: Tensor,
    ) -> Tensor:
        """A norm's grad_input."""
        ...
