"""Ranges, means and sums by the library."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .common import DTYPES, is_mine
from .library import INT32, INT64, POINTER, address, function, operator

__all__ = ["moments", "stable_sum", "value_range"]

_ROW = 4096
"""Numbers in a row of `reference.stable_sum`."""

_value_range = function("value_range", POINTER, INT32, INT64, POINTER)
_moments = function("moments", POINTER, INT32, INT64, POINTER, POINTER)
_stable_sum = function("stable_sum", POINTER, INT32, INT64, POINTER, POINTER)


@operator("value_range(Tensor x) -> Tensor", fake=lambda x: x.new_empty(2, dtype=torch.float32))
def _value_range_op(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty(2)
    _value_range(address(x), DTYPES[x.dtype], x.numel(), address(out))
    return out


@operator("moments(Tensor x) -> Tensor", fake=lambda x: x.new_empty(2, dtype=torch.float64))
def _moments_op(x: Tensor) -> Tensor:
    x = x.contiguous()
    scratch, out = torch.empty(2 * (x.numel() // _ROW + 1), dtype=torch.float64), torch.empty(2, dtype=torch.float64)
    _moments(address(x), DTYPES[x.dtype], x.numel(), address(scratch), address(out))
    return out


@operator("stable_sum(Tensor x) -> Tensor", fake=lambda x: x.new_empty((), dtype=torch.float64))
def _stable_sum_op(x: Tensor) -> Tensor:
    x = x.contiguous()
    scratch, out = torch.empty(x.numel() // _ROW + 1, dtype=torch.float64), torch.empty((), dtype=torch.float64)
    _stable_sum(address(x), DTYPES[x.dtype], x.numel(), address(scratch), address(out))
    return out


def value_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.value_range`."""
    if not is_mine(x):
        return reference.value_range(x)
    low, high = _value_range_op(x.detach()).to(x.dtype).unbind()
    return low, high


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.moments`."""
    if not is_mine(x, double=True):
        return reference.moments(x)
    mean_abs, mean_square = _moments_op(x.detach()).unbind()
    return mean_abs, mean_square


def stable_sum(x: Tensor) -> Tensor:
    """See `reference.stable_sum`."""
    return _stable_sum_op(x.detach()) if is_mine(x, double=True) else reference.stable_sum(x)
