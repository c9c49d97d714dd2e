"""Several results of one tensor, each composed of its parts: what other backends make from one read of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...formats import Format
from ...rng import Draw
from .clip import clip_bits
from .encode import encode, encode_each, has_nonfinite, value_range
from .stochastic import encode_stochastic


def encode_each_with_range(
    x: Tensor, fmts: Sequence[Format], *, inv_scale: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """`encode_each` and `value_range`: for a scale that does not depend on this tensor.

    Args:
        x: any floating type and shape. If it holds a NaN or an infinity, codes are those of ``x.nan_to_num(nan=0.0)``.
        fmts: the formats.
        inv_scale: reciprocal of the scale, float32 of shape ().

    Returns:
        The codes in each format; the smallest and the largest element of x itself.
    """
    low, high = value_range(x)
    return encode_each(numbers(x, low, high), fmts, inv_scale=inv_scale), low, high


def encode_clipped(
    x: Tensor, fmt: Format, *, clip: Tensor, code_range: tuple[int, int], mask: bool = True
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """`encode`, `value_range` and `clip_bits`: what an activation with a learned clip needs.

    Args:
        x: any floating type and shape. If it holds a NaN or an infinity, codes and bits are those of
            ``x.nan_to_num(nan=0.0)``.
        fmt: an integer format.
        clip: what the highest code stands for, above zero; float32 of shape ().
        code_range: lowest and highest integer used: (0, n), or (-n, n) for a clip at either side of zero.
        mask: whether bits are wanted.

    Returns:
        The codes, ``clamp(rint(x * (1 / clip * n)))`` with a factor rounded to float32; the range of x itself; and the
        bits, or twice None.
    """
    bottom, top = code_range
    low, high = value_range(x)
    clean = numbers(x, low, high)
    codes = encode(clean, fmt, inv_scale=(clip.double().reciprocal() * top).float(), code_range=code_range)
    least = -clip if bottom < 0 else torch.zeros_like(clip)
    return codes, (low, high), clip_bits(clean, least, clip) if mask else (None, None)


def encode_drawn(
    x: Tensor,
    fmt: Format,
    *,
    inv_scale: Tensor,
    draw: Draw,
    part: int = 0,
    code_range: tuple[int, int] | None = None,
) -> Tensor:
    """`encode_stochastic` with ``draw.uniform(x.numel(), part)`` for noise.

    Args:
        x: numbers but no NaN, of any floating type and shape.
        fmt: a format with a sign bit, or of signed integers.
        inv_scale: reciprocal of the scale, float32 of shape ().
        draw: where the random numbers come from.
        part: which of the draw's sets of numbers.
        code_range: lowest and highest integer used; the format's own if None. Integer formats only.
    """
    noise = draw.uniform(x.numel(), part)
    return encode_stochastic(x, fmt, inv_scale=inv_scale, noise=noise, code_range=code_range)


def uniform(numel: int, draw: Draw, part: int = 0) -> Tensor:
    """``draw.uniform(numel, part)``."""
    return draw.uniform(numel, part)


def numbers(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x, with numbers in the place of NaN and infinity if its range shows that there are any."""
    broken = has_nonfinite(low, high)
    # Elsewhere than on the CPU it costs less to replace what may not be there than to wait for the answer.
    return x if broken.device.type == "cpu" and not broken else x.nan_to_num(nan=0.0)
