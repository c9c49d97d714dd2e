"""Batch norm that keeps codes of its input, by the library."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rng import Draw
from .. import reference
from .common import empty_bits, empty_codes
from .library import INT32, INT64, POINTER, address, function, uint32s
from .stash import empty_steps

__all__ = ["norm_backward", "norm_forward", "norm_sums", "plane_moments"]

_moments = function("plane_moments", POINTER, INT64, INT64, POINTER)
_forward = function("norm_forward", POINTER, INT64, INT64, INT64, POINTER, POINTER, INT32, *[POINTER] * 6)
_sums = function("norm_sums", POINTER, POINTER, POINTER, INT32, POINTER, INT64, INT64, POINTER)
_backward = function("norm_backward", POINTER, POINTER, POINTER, INT32, POINTER, INT64, INT64, INT64, *[POINTER] * 4)


def plane_moments(x_NCS: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.plane_moments`."""
    if x_NCS.device.type != "cpu":
        return reference.plane_moments(x_NCS)
    images, channels, size = x_NCS.shape
    out = torch.empty(images, channels, 2, dtype=torch.float64)
    _moments(address(x_NCS), images * channels, size, address(out))
    return out[..., 0], out[..., 1]


def norm_forward(
    x_NCS: Tensor, factor_C: Tensor, shift_C: Tensor, bits: int, draw: Draw, *, with_relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """See `reference.norm_forward`."""
    if x_NCS.device.type != "cpu":
        return reference.norm_forward(x_NCS, factor_C, shift_C, bits, draw, with_relu=with_relu)
    images, channels, size = x_NCS.shape
    out, codes, steps = torch.empty_like(x_NCS), empty_codes(x_NCS, bits), empty_steps(x_NCS)
    positive, finite = empty_bits(x_NCS) if with_relu else None, torch.empty((), dtype=torch.int32)
    _forward(
        address(x_NCS), images * channels, channels, size, address(factor_C), address(shift_C), bits,
        uint32s(reference.philox_words(draw)), address(out), address(codes), address(steps), address(positive),
        address(finite),
    )  # fmt: skip
    return out, codes, steps, positive, bool(finite)


def norm_sums(
    grad_NCS: Tensor, codes: Tensor, steps: Tensor, bits: int, positive: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_sums`."""
    if grad_NCS.device.type != "cpu":
        return reference.norm_sums(grad_NCS, codes, steps, bits, positive)
    images, channels, size = grad_NCS.shape
    out = torch.empty(images, channels, 2, dtype=torch.float64)
    of = address(grad_NCS), address(codes), address(steps), bits, address(positive)
    _sums(*of, images * channels, size, address(out))
    return out[..., 0], out[..., 1]


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
    """See `reference.norm_backward`."""
    if grad_NCS.device.type != "cpu":
        return reference.norm_backward(grad_NCS, codes, steps, bits, positive, of_grad_C, of_x_C, shift_C)
    images, channels, size = grad_NCS.shape
    out = torch.empty_like(grad_NCS)
    of = address(grad_NCS), address(codes), address(steps), bits, address(positive)
    per_channel = address(of_grad_C), address(of_x_C), address(shift_C)
    _backward(*of, images * channels, channels, size, *per_channel, address(out))
    return out
