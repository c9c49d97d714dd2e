"""Numbers as bit planes: bit k of 64 numbers in one machine word, so that one instruction is 64 gates.

>>> planes = to_planes(np.array([1, 2, 3]), width=2)
>>> [hex(int(p)) for p in planes[:, 0]]  # lowest bits 1, 0, 1 and next bits 0, 1, 1, first number first
['0x5', '0x6']
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Planes", "Words", "from_planes", "to_planes"]

Planes = NDArray[np.uint64]
"""Shape (bits, words): the numbers' lowest bits first; in each word the first number in the lowest bit."""

Words = NDArray[Any]
"""Integers of any NumPy type, shape (n,)."""


def to_planes(values: Words, width: int) -> Planes:
    """The lowest `width` bits of n integers, in two's complement.

    Args:
        values: shape (n,).
        width: how many bits of each, 1 to 64.

    Returns:
        Shape (width, ceil(n / 64)); what is missing to a whole word is zero.
    """
    count = -(-len(values) // 64)
    octets = np.zeros((width, 8 * count), np.uint8)
    for k in range(width):
        packed = np.packbits((values >> np.array(k, values.dtype)).astype(np.uint8) & 1, bitorder="little")
        octets[k, : len(packed)] = packed
    return octets.view("<u8").astype(np.uint64, copy=False)


def from_planes(planes: Planes, n: int, *, signed: bool = False) -> NDArray[np.int64]:
    """The n integers whose bits are given.

    Args:
        planes: shape (width, words), at most 63 bits.
        n: how many numbers there are.
        signed: read as two's complement.
    """
    width = len(planes)
    values = np.zeros(n, np.int64)
    octets = np.ascontiguousarray(planes).astype("<u8", copy=False).view(np.uint8)
    for k in range(width):
        bits = np.unpackbits(octets[k], count=n, bitorder="little").astype(np.int64)
        values += bits * (-(1 << k) if signed and k == width - 1 else 1 << k)
    return values
