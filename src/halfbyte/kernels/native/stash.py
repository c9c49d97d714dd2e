"""What is kept for the backward pass, by the library: numbers as codes, masks as bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ...qtensor import BLOCK
from ...rng import Draw
from .. import reference
from .common import DTYPES, empty_bits, empty_codes, is_mine
from .library import INT32, INT64, POINTER, address, function, uint32s

__all__ = ["empty_steps", "relu", "relu_backward", "stash_decode", "stash_encode"]

_encode = function("stash_encode", POINTER, INT32, INT64, INT32, *[POINTER] * 4)
_decode = function("stash_decode", POINTER, POINTER, INT64, INT32, POINTER)
_relu = function("relu", POINTER, INT64, POINTER, POINTER)
_relu_backward = function("relu_backward", POINTER, POINTER, INT64, POINTER)


def empty_steps(x: Tensor) -> Tensor:
    """Memory for the minimum and the step of each block of x."""
    return x.new_empty((-(-x.numel() // BLOCK), 2), dtype=torch.bfloat16)


def stash_encode(x: Tensor, bits: int, draw: Draw) -> tuple[Tensor, Tensor, bool]:
    """See `reference.stash_encode`."""
    if not is_mine(x):
        return reference.stash_encode(x, bits, draw)
    out, steps, finite = empty_codes(x, bits), empty_steps(x), torch.empty((), dtype=torch.int32)
    words = uint32s(reference.philox_words(draw))
    _encode(address(x), DTYPES[x.dtype], x.numel(), bits, words, address(out), address(steps), address(finite))
    return out, steps, bool(finite)


def stash_decode(codes: Tensor, steps: Tensor, numel: int, bits: int) -> Tensor:
    """See `reference.stash_decode`."""
    if codes.device.type != "cpu":
        return reference.stash_decode(codes, steps, numel, bits)
    out = torch.empty(numel)
    _decode(address(codes), address(steps), numel, bits, address(out))
    return out


def relu(x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.relu`."""
    if not (is_mine(x) and x.dtype == torch.float32):
        return reference.relu(x, out)
    out, bits = torch.empty_like(x) if out is None else out, empty_bits(x)
    _relu(address(x), x.numel(), address(out), address(bits))
    return out, bits


def relu_backward(grad: Tensor, bits: Tensor) -> Tensor:
    """See `reference.relu_backward`."""
    if not (is_mine(grad) and grad.dtype == torch.float32):
        return reference.relu_backward(grad, bits)
    out = torch.empty_like(grad)
    _relu_backward(address(grad), address(bits), grad.numel(), address(out))
    return out
