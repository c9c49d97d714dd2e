"""What is kept for the backward pass, in plain PyTorch: numbers as codes of 4 or 8 bits, masks as bits.

Numbers are cut into blocks of 128, in the order of memory. A block has a minimum and a step, two bfloat16 of which the
first is rounded down and the second up, so that every number lies between two codes and none beyond the last. Which of
the two it gets is drawn, with the number itself as the mean (ActNN, arXiv 2104.14129, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...qtensor import BLOCK, pack, pack_bits, packed_size, unpack, unpack_bits
from ...rng import Draw, philox
from .encode import PIECE

__all__ = ["philox_words", "relu", "relu_backward", "stash_decode", "stash_encode", "stash_noise"]

_COUNTERS = BLOCK // 8
"""Philox counters of a block: one gives eight numbers of 16 bits."""

_LEAST_STEP = 2.0**-120
"""Below it a step is 0: its reciprocal would be infinite."""

_LOW_HALF = 0xFFFF
_WORD = 0xFFFFFFFF
_WEYL = 0x9E3779B9


def philox_words(draw: Draw) -> tuple[int, int, int, int, int]:
    """Philox's key, and words 1 to 3 of its counter, as in `halfbyte.rng.uniform`."""
    high = (draw.seed >> 32) ^ (draw.rank * _WEYL)
    return draw.seed & _WORD, high & _WORD, int(draw.step) & _WORD, draw.layer & _WORD, draw.operand & _WORD


def stash_noise(blocks: Tensor, draw: Draw) -> Tensor:
    """The noise of some blocks: (k + 1/2) / 2^16 with k from 0 to 65,535.

    Number 32 w + 16 h + j of a block is the low (h = 0) or high (h = 1) half of word w of the block's counter j.

    Args:
        blocks: numbers of blocks, int64 of shape (B,).
        draw: where random numbers come from.

    Returns:
        float32 of shape (B, 128).
    """
    counters = (blocks[:, None] * _COUNTERS + torch.arange(_COUNTERS, device=blocks.device)).reshape(-1)
    key0, key1, *others = philox_words(draw)
    step, layer, operand = (torch.full_like(counters[:1], word) for word in others)
    words = torch.stack(
        [
            word.expand_as(counters).view(-1, _COUNTERS)
            for word in philox((counters, step, layer, operand), (key0, key1))
        ],
        1,
    )
    halves = torch.stack([words & _LOW_HALF, words >> 16], 2).view(-1, BLOCK)
    return (2 * halves + 1).float() * 2.0**-17


def stash_encode(x: Tensor, bits: int, draw: Draw) -> tuple[Tensor, Tensor, bool]:
    """Numbers to codes: ``floor((x - low) / step + noise)``.

    Args:
        x: numbers of any floating type and of shape (n,), n > 0, contiguous; they are computed with in float32.
        bits: 4 or 8.
        draw: where random numbers come from.

    Returns:
        The codes, uint8 in the layout of `halfbyte.qtensor.pack`; minimum and step of each block, bfloat16 of shape
        (blocks, 2); and whether all of x, and of these, are finite. Where they are not the codes mean nothing.
    """
    n, levels = x.numel(), (1 << bits) - 1
    out = torch.empty(packed_size(n, bits), dtype=torch.uint8, device=x.device)
    steps = torch.empty(-(-n // BLOCK), 2, dtype=torch.bfloat16, device=x.device)
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        piece = x[start:stop].float()
        short = -piece.numel() % BLOCK
        if short:
            piece = torch.cat([piece, piece[-1:].expand(short)])
        x_BK = piece.view(-1, BLOCK)
        low, high = torch.aminmax(x_BK, dim=1)
        base = _to_bfloat16(low + 0.0, up=False)
        step = (high - base.float()) / levels
        step = _to_bfloat16(torch.where(step < _LEAST_STEP, 0.0, step), up=True)
        first = start // BLOCK
        steps[first : first + len(base)] = torch.stack([base, step], 1)
        finite &= (torch.isfinite(base) & torch.isfinite(step) & torch.isfinite(low) & torch.isfinite(high)).all()
        inverse = torch.where(step > 0, 1.0 / step.float(), 0.0)
        noise = stash_noise(torch.arange(first, first + len(base), device=x.device), draw)
        codes = (x_BK - base.float()[:, None]).mul_(inverse[:, None]).add_(noise).clamp_(0, levels).to(torch.uint8)
        pack(codes.view(-1)[: stop - start], bits, out[packed_size(start, bits) : packed_size(stop, bits)])
    return out, steps, bool(finite)


def _to_bfloat16(x: Tensor, *, up: bool) -> Tensor:
    """float32 to bfloat16, never below x (up) or never above it."""
    bits = x.view(torch.int32)
    away = ((bits < 0) != up) & (bits & _LOW_HALF != 0)
    return ((bits >> 16) + away).to(torch.int16).view(torch.bfloat16)


def stash_decode(codes: Tensor, steps: Tensor, numel: int, bits: int) -> Tensor:
    """``low + code * step``, float32 of shape (numel,); the product is exact, the sum is rounded once."""
    whole = unpack(codes, numel, bits)
    low, step = (steps[:, k].float().repeat_interleave(BLOCK)[:numel] for k in range(2))
    return low + whole * step


def relu(x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``max(x, 0)``, and the packed bits of where its gradient passes: where x is not at or below 0, or is NaN.

    Args:
        x: any floating type and shape, contiguous.
        out: where the result goes; it may be x. A new tensor if None.

    Returns:
        The shape of x, and uint8 of shape ((n + 7) // 8,).
    """
    passes = ~(x <= 0)
    bits = pack_bits(passes.view(-1))
    return torch.where(passes, x, torch.zeros((), dtype=x.dtype, device=x.device), out=out), bits


def relu_backward(grad: Tensor, bits: Tensor) -> Tensor:
    """The gradient where a bit is set, else 0.

    Args:
        grad: contiguous.
        bits: of `relu`.
    """
    return grad.masked_fill(~unpack_bits(bits, grad.numel()).view(grad.shape), 0.0)
