"""Batch norm that keeps codes of its input, in plain PyTorch.

A tensor is seen as planes: one of S numbers for each image and channel. What a channel needs are sums over its planes.
They have one order, so that a kernel can follow it: within a plane in float64 by `plane_fold`, over the images by the
same. All that is computed per channel, and not per element, is the caller's.

Dimensions: N images, C channels, S numbers of a plane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...rng import Draw
from .stash import relu, relu_backward, stash_decode, stash_encode

__all__ = ["norm_backward", "norm_forward", "norm_sums", "plane_fold", "plane_moments"]

_ROW = 4096


def plane_fold(x: Tensor) -> Tensor:
    """Sums along the last dimension, in float64 and in one order on any machine.

    Rows of 4096, the last filled up with zeros to a power of two; each is folded in halves, ``x[i] + x[i + half]``,
    down to one; the rows' sums in the same way.

    Args:
        x: (..., S), float64, S > 0.

    Returns:
        (...), float64.
    """
    while x.shape[-1] > 1:
        x = torch.stack([_folded(row) for row in x.split(_ROW, -1)], -1)
    return x[..., 0] + 0.0


def _folded(row: Tensor) -> Tensor:
    size = 1 << (row.shape[-1] - 1).bit_length()
    row = torch.nn.functional.pad(row, (0, size - row.shape[-1]))
    while row.shape[-1] > 1:
        half = row.shape[-1] // 2
        row = row[..., :half] + row[..., half:]
    return row[..., 0]


def plane_moments(x_NCS: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of x and of x^2 over each plane.

    Args:
        x_NCS: float32.

    Returns:
        (N, C) each, float64.
    """
    wide = x_NCS.double()
    return plane_fold(wide), plane_fold(wide * wide)


def norm_forward(
    x_NCS: Tensor, factor_C: Tensor, shift_C: Tensor, bits: int, draw: Draw, *, with_relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """``x * factor + shift``, rounded after each, and the codes of x.

    Args:
        x_NCS: float32, contiguous.
        factor_C: float32.
        shift_C: float32.
        bits: of a code, see `stash_encode`.
        draw: for the codes.
        with_relu: whether the result passes through `relu`.

    Returns:
        The result; codes, steps of x; the bits of `relu` or None; and whether x was finite.
    """
    codes, steps, finite = stash_encode(x_NCS.view(-1), bits, draw)
    y = x_NCS * factor_C[:, None] + shift_C[:, None]
    y, positive = relu(y) if with_relu else (y, None)
    return y, codes, steps, positive, finite


def norm_sums(
    grad_NCS: Tensor, codes: Tensor, steps: Tensor, bits: int, positive: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sums of the gradient and of its products with the decoded x over each plane.

    Args:
        grad_NCS: float32, contiguous.
        codes: of x.
        steps: of x.
        bits: of a code.
        positive: what the gradient passes through first, or None.

    Returns:
        (N, C) each, float64.
    """
    grad = grad_NCS if positive is None else relu_backward(grad_NCS, positive)
    wide = grad.double()
    x = stash_decode(codes, steps, grad.numel(), bits).view(grad.shape)
    return plane_fold(wide), plane_fold(wide * x.double())


def norm_backward(
    grad_NCS: Tensor,
    codes: Tensor,
    steps: Tensor,
    bits: int,
    positive: Tensor | None,
    of_grad_C: Tensor,
    of_x_C: Tensor,
    shift_C: Tensor,
) -> Tensor:
    """``grad * of_grad + (x * of_x + shift)`` with the decoded x, rounded after each operation; the shape of grad."""
    grad = grad_NCS if positive is None else relu_backward(grad_NCS, positive)
    x = stash_decode(codes, steps, grad.numel(), bits).view(grad.shape)
    return grad * of_grad_C[:, None] + (x * of_x_C[:, None] + shift_C[:, None])
