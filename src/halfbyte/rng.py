"""Random numbers as a function of what they are for: Philox-4x32-10 (Salmon et al., SC 2011).

There is no generator with a state. A number is a function of the seed, the layer, the step, the operand and the
element, so it is the same on any number of threads, after resuming, and when a forward pass is run again, and two
different uses never share one by accident.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["philox", "uniform"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit words from a counter of four and a key of two.

    Args:
        counter: int64 tensors that broadcast together, each holding unsigned 32-bit words.
        key: two unsigned 32-bit words.

    Returns:
        Four int64 tensors holding unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps in int64 to the right 64 bits; the mask undoes the sign of the arithmetic shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(numel: int, *, seed: int, layer: int, step: Tensor, operand: int) -> Tensor:
    """Numbers in [0, 1), whole multiples of 2^-24.

    Args:
        numel: how many.
        seed: of the run, below 2^64.
        layer: the layer's number.
        step: which of the layer's draws this is; int64 of shape (), below 2^32; its device is the result's.
        operand: which of the layer's operands.

    Returns:
        float32 of shape (numel,). Element i does not depend on `numel`.
    """
    blocks = torch.arange((numel + 3) // 4, dtype=torch.int64, device=step.device)
    layers = torch.full_like(step, layer)
    words = philox((blocks, step, layers, torch.full_like(step, operand)), (seed & _MASK, (seed >> 32) & _MASK))
    return (torch.stack(words, dim=1).view(-1)[:numel] >> 8).float().mul_(2.0**-24)
