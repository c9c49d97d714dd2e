"""One number of a quantizer's arithmetic: a Python number where its tensor is on the CPU, else a tensor.

Each operation on a tensor of one element costs microseconds, and a quantizer takes dozens of them to find one scale. On
other devices reading a number would wait for the device, so there it stays a tensor of shape (). The functions here
take either, so that a formula is written once; floating numbers are float64 until `stored` rounds them to float32, and
both ways give the same bits.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

__all__ = [
    "Number",
    "Truth",
    "absolute",
    "choose",
    "clamp",
    "finite",
    "frexp",
    "inverse",
    "larger",
    "magnitude",
    "power_of_two",
    "put",
    "read",
    "root",
    "rounded",
    "stored",
]

Number = float | Tensor
"""A Python float or int; or a tensor of shape (), its floating types widened to float64."""

Truth = bool | Tensor
"""A Python bool, or a bool tensor of shape ()."""

_LARGEST = torch.finfo(torch.float32).max


def read(x: Tensor | Number) -> Number:
    """The one element of a tensor."""
    if not isinstance(x, Tensor):
        return x
    if x.is_cpu:
        found: float = x.item()
        return found
    return (x.detach().double() if x.is_floating_point() else x).reshape(())


def stored(value: Number) -> Tensor:
    """A number rounded to float32, shape ()."""
    if isinstance(value, Tensor):
        return value.float()
    # torch.full refuses what is too large for float32, where a conversion in C gives an infinity.
    return torch.full((), ctypes.c_float(value).value)


def rounded(value: Number) -> Number:
    """A number rounded to float32."""
    return value.float().double() if isinstance(value, Tensor) else ctypes.c_float(value).value


def root(x: Number) -> Number:
    """The square root."""
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def put(buffer: Tensor, value: Number) -> None:
    """Writes a number into a tensor of shape ()."""
    if isinstance(value, Tensor):
        buffer.copy_(value)
    elif buffer.item() != value:
        buffer.fill_(value)


def choose(condition: Truth | Number, yes: Number, no: Number) -> Number:
    """One of two numbers."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def finite(x: Number) -> Truth:
    """Whether a number is neither NaN nor infinite."""
    return x.isfinite() if isinstance(x, Tensor) else math.isfinite(x)


def absolute(x: Number) -> Number:
    """The magnitude of a number."""
    return x.abs() if isinstance(x, Tensor) else abs(x)


def larger(x: Number, other: Number) -> Number:
    """The larger of two numbers; NaN if one is."""
    if isinstance(x, Tensor) and isinstance(other, Tensor):
        return torch.maximum(x, other)
    return other if x < other or other != other else x


def clamp(x: Number, least: float, most: float) -> Number:
    """A number, or the end of a range beyond which it lies."""
    return x.clamp(least, most) if isinstance(x, Tensor) else min(max(x, least), most)


def magnitude(low: Number, high: Number) -> Number:
    """The largest magnitude in a tensor of that range."""
    return larger(absolute(low), absolute(high))


def inverse(whole: float, x: Number) -> Number:
    """``1 / x * whole``, at most the largest float32; 0 unless x is above zero."""
    if isinstance(x, Tensor):
        return torch.where(x > 0, x.reciprocal() * whole, 0.0).clamp_max(_LARGEST)
    return min(1 / x * whole, _LARGEST) if x > 0 else 0.0


def frexp(x: Number) -> tuple[Number, Number]:
    """Mantissa in [1/2, 1) and exponent."""
    return torch.frexp(x.double()) if isinstance(x, Tensor) else math.frexp(x)


def power_of_two(exponent: Number) -> Tensor:
    """2 to that power, -126 to 127, exactly, in float32: a library's exp2 or pow may be one unit off."""
    if isinstance(exponent, Tensor):
        return ((exponent.int() + 127) << 23).view(torch.float32)
    return torch.full((), math.ldexp(1.0, int(exponent)))
