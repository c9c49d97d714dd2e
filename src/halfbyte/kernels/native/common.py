"""Which tensors the library takes, and what every operator needs of one."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...qtensor import packed_size
from .library import int32s

__all__ = [
    "DTYPES",
    "HANDED_OVER",
    "bits_memory",
    "codes_memory",
    "empty_bits",
    "empty_codes",
    "is_broken",
    "is_mine",
    "number",
    "numbers_in_c",
]

HANDED_OVER: dict[str, str] = {
    "any function": "tensors on other devices than the CPU, or of other types than float32, bfloat16 and float16",
    "moments, stable_sum": "the same, but float64 is computed here",
    "encode, encode_each": "formats other than integers, radix 2 and 4 of four bits, and floats of up to eight bits",
    "encode_stochastic": "formats other than signed integers, radix 2 and 4 of four bits, and E2M1",
    "clip_backward": "gradients that are not contiguous",
    "rotate": "groups of more than 256 numbers",
    "has_nonfinite": "always: two numbers",
}
"""What `reference` does instead of the library: function, and for what."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def is_mine(x: Tensor, *, double: bool = False) -> bool:
    """Whether the library takes a tensor of that type and place."""
    return x.device.type == "cpu" and x.dtype in DTYPES and (double or x.dtype != torch.float64)


def number(x: Tensor) -> Tensor:
    """A tensor of one number as the library reads it."""
    return x.detach().float()


def is_broken(low: float, high: float) -> bool:
    """Whether a tensor of that range held a NaN or an infinity."""
    return not (math.isfinite(low) and math.isfinite(high))


def empty_codes(x: Tensor, bits: int) -> Tensor:
    """Packed codes of x as a fake kernel gives them."""
    return x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)


def empty_bits(x: Tensor) -> Tensor:
    """One packed bit of each element of x as a fake kernel gives them."""
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def codes_memory(x: Tensor, bits: int) -> Tensor:
    """Memory for the packed codes of x, which is on the CPU."""
    return torch.empty(packed_size(x.numel(), bits), dtype=torch.uint8)


def bits_memory(x: Tensor) -> Tensor:
    """Memory for one packed bit of each element of x, which is on the CPU."""
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)


def numbers_in_c(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    """Whole numbers that describe a format as an array in C, which is made once and only read."""
    return _numbers_in_c(tuple(values))


@cache
def _numbers_in_c(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int32]:
    return int32s(values)
