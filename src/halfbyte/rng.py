"""Random numbers as a function of what they are for: Philox-4x32-10 (Salmon et al., SC 2011).

There is no generator with a state. A number is a function of the seed, the rank, the layer, the step, the operand and
the element, so it is the same on any number of threads, after resuming, and when a forward pass is run again, and two
different uses never share one by accident. The ranks of a distributed run differ on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Draw", "philox", "uniform"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_PIECE = 1 << 14
"""Blocks of four numbers made at a time, so that what lies between stays in the cache."""


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
        high0, high1 = (p0 >> 32).bitwise_and_(_MASK), (p1 >> 32).bitwise_and_(_MASK)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1.bitwise_and_(_MASK), high0 ^ c3 ^ k1, p0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(numel: int, *, seed: int, layer: int, step: Tensor, operand: int, rank: int = 0) -> Tensor:
    """Numbers in [0, 1), whole multiples of 2^-24.

    Args:
        numel: how many.
        seed: of the run, below 2^64.
        layer: the layer's number.
        step: which of the layer's draws this is; int64 of shape (), below 2^32; its device is the result's.
        operand: which of the layer's operands, below 2^32.
        rank: the process in a distributed run.

    Returns:
        float32 of shape (numel,). Element i does not depend on `numel`.
    """
    layers = torch.full_like(step, layer)
    operands = torch.full_like(step, operand)
    # The rank goes into the seed's high word, spread so that neighboring seeds and ranks do not meet.
    key = (seed & _MASK, ((seed >> 32) ^ (rank * _WEYL[0])) & _MASK)
    out = torch.empty((numel + 3) // 4, 4, dtype=torch.float32, device=step.device)
    for start in range(0, len(out), _PIECE):
        some = out[start : start + _PIECE]
        blocks = torch.arange(start, start + len(some), dtype=torch.int64, device=step.device)
        for column, word in enumerate(philox((blocks, step, layers, operands), key)):
            some[:, column] = word.bitwise_right_shift_(8)
    return out.view(-1)[:numel].mul_(2.0**-24)


@dataclass(frozen=True, eq=False)
class Draw:
    """What one operand's random numbers are a function of.

    Attributes:
        seed: of the run.
        layer: the layer's number.
        step: which forward pass of the layer; int64 of shape ().
        operand: which of the layer's operands, below 256.
        rank: the process in a distributed run.
    """

    seed: int
    layer: int
    step: Tensor
    operand: int
    rank: int = 0

    def uniform(self, numel: int, part: int = 0) -> Tensor:
        """Numbers in [0, 1), float32 of shape (numel,); each `part` below 2^24 is another, independent, set."""
        return uniform(
            numel,
            seed=self.seed,
            layer=self.layer,
            step=self.step,
            operand=self.operand | part << 8,
            rank=self.rank,
        )

    def signs(self, numel: int, part: int = 0) -> Tensor:
        """Fair signs, -1 or 1, float32 of shape (numel,)."""
        return torch.where(self.uniform(numel, part) < 0.5, 1.0, -1.0)
