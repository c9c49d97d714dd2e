"""wgrad of a convolution as an int8 matrix product: exact 32-bit sums, several times faster than float on a CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Conv

_PATCH_BYTES = 1 << 22
"""How much of the unfolded input exists at a time; it should stay in the cache."""


def wgrad(planes_g: Sequence[Tensor], plane_x: Tensor, geometry: Conv) -> list[Tensor]:
    """The sum over images and positions of grad_output times the input under each kernel tap.

    Args:
        planes_g: int8 tensors of shape (N, O, *output spatial).
        plane_x: int8 of shape (N, I, *spatial).
        geometry: the convolution; one group.

    Returns:
        For each plane exact integers in float64, shape (O, I, *kernel).
    """
    images, in_channels = plane_x.shape[:2]
    out_channels, _, *kernel = geometry.weight_shape
    out_spatial = geometry.output_shape[2:]
    positions, taps = math.prod(out_spatial), math.prod(kernel)
    pads = [p for pad in reversed(geometry.padding) for p in (pad, pad)]
    totals = [torch.zeros(out_channels, taps * in_channels, dtype=torch.float64) for _ in planes_g]
    if images * positions == 0:
        return [_kernel_last(total, geometry) for total in totals]
    count = max(1, _PATCH_BYTES // max(1, positions * taps * in_channels))
    patches = torch.empty(taps, in_channels, min(count, images), *out_spatial, dtype=torch.int8)
    for start in range(0, images, count):
        x = F.pad(plane_x[start : start + count], pads).transpose(0, 1)
        patch = patches[:, :, : x.shape[1]]
        for number, tap in enumerate(itertools.product(*(range(k) for k in kernel))):
            window = tuple(
                slice(t * d, t * d + s * (o - 1) + 1, s)
                for t, d, s, o in zip(tap, geometry.dilation, geometry.stride, out_spatial, strict=True)
            )
            patch[number] = x[(slice(None), slice(None), *window)]
        right = patch.reshape(taps * in_channels, -1).t()  # x_P(TI)
        for total, plane in zip(totals, planes_g, strict=True):
            left = plane[start : start + count].transpose(0, 1).reshape(out_channels, -1)  # g_OP
            total.add_(int_product(left, right))
    return [_kernel_last(total, geometry) for total in totals]


def int_product(left: Tensor, right: Tensor) -> Tensor:
    """The exact product of two int8 matrices, (M, K) and (K, N), in int32.

    torch's own reads past the end of an operand with a side of 1 and both strides 1, which a transposed vector has: it
    takes that 1 for the length of a row (torch 2.13, CPU). Viewing the vector anew gives it the usual strides.
    """
    left, right = (x.reshape(-1).view(x.shape) if 1 in x.shape else x for x in (left, right))
    return torch._int_mm(left.contiguous(), right)


def _kernel_last(total: Tensor, geometry: Conv) -> Tensor:
    """(O, taps * I) to (O, I, *kernel)."""
    out_channels, in_channels, *kernel = geometry.weight_shape
    return total.view(out_channels, math.prod(kernel), in_channels).transpose(1, 2).reshape(geometry.weight_shape)
