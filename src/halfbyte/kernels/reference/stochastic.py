"""Random rounding in plain PyTorch: up or down, with the number itself as the mean.

Which way a number goes is decided exactly: its share of the way to the next value is compared with noise that is a
multiple of 2^-24, in float64, which holds all that is involved.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...formats import Format, fp4_e2m1
from ...qtensor import pack, packed_size
from .encode import PIECE, wide_dtype


def encode_stochastic(
    x: Tensor, fmt: Format, *, inv_scale: Tensor, noise: Tensor, code_range: tuple[int, int] | None = None
) -> Tensor:
    """The packed codes of a tensor rounded to one of the two values around each element, unbiased.

    ``|x * inv_scale|`` goes up if ``noise * (above - below)`` is less than what it exceeds `below` by.

    Args:
        x: numbers but no NaN, of any floating type and shape.
        fmt: a format with a sign bit, or of signed integers.
        inv_scale: reciprocal of the scale, float32 of shape ().
        noise: float32 of shape (x.numel(),), uniform in [0, 1), multiples of 2^-24.
        code_range: lowest and highest integer used; the format's own if None. Integer formats only.

    Returns:
        uint8 in the layout of `halfbyte.qtensor.pack`, in the row-major order of `x`.
    """
    flat = x.detach().reshape(-1)
    n = flat.numel()
    out = torch.empty(packed_size(n, fmt.bits), dtype=torch.uint8, device=x.device)
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        scaled = flat[start:stop].to(wide_dtype(x.dtype)) * inv_scale
        some = noise[start:stop]
        if fmt.kind == "int":
            codes = _integers(scaled, some, fmt, code_range)
        else:
            magnitude = scaled.abs().double()
            place = _e2m1_place(magnitude) if fmt == fp4_e2m1 else None
            codes = _at_random(place, some) if place is not None else _from_table(magnitude, some, fmt)
            codes.bitwise_or_(torch.signbit(scaled).to(torch.uint8) << (fmt.bits - 1))
        pack(codes, fmt.bits, out[packed_size(start, fmt.bits) : packed_size(stop, fmt.bits)])
    return out


def _integers(scaled: Tensor, noise: Tensor, fmt: Format, code_range: tuple[int, int] | None) -> Tensor:
    """Codes of signed integers in two's complement."""
    bottom, top = code_range or (int(fmt.saturate[0]), int(fmt.saturate[1]))
    magnitude = scaled.abs().double().clamp_max_(1 << fmt.bits)
    whole = magnitude.floor()
    whole += noise < magnitude.sub_(whole)
    signed = whole.copysign_(scaled).clamp_(bottom, top).to(torch.int8).view(torch.uint8)
    return signed.bitwise_and_((1 << fmt.bits) - 1)


def _e2m1_place(magnitude: Tensor) -> Tensor:
    """Where a magnitude lies on the axis of E2M1's codes: the whole part is the code below, the rest the share.

    The codes 0...4 stand for steps of 1/2, 4...6 for steps of 1 and 6, 7 for one of 2, so three straight lines meet at
    2 and 4, and the axis is the lowest of them.
    """
    steep, middle, flat = magnitude * 2, magnitude + 2, magnitude * 0.5 + 4
    return torch.minimum(torch.minimum(steep, middle, out=steep), flat, out=steep).clamp_max_(7)


def _at_random(place: Tensor, noise: Tensor) -> Tensor:
    """The code below a place, or above it with the rest as its probability. Overwrites `place`."""
    below = place.floor()
    below += noise < place.sub_(below)
    return below.to(torch.uint8)


def _from_table(magnitude: Tensor, noise: Tensor, fmt: Format) -> Tensor:
    """Codes, without sign, of any format by search among its values."""
    codes, values, gaps = _levels(fmt, magnitude.device)
    index = torch.bucketize(magnitude, values, right=True, out_int32=True).sub_(1)
    share = magnitude.sub_(values[index])
    index += share > gaps[index] * noise
    return codes[index]


@cache
def _levels(fmt: Format, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A format's magnitudes in ascending order: codes (uint8), values and distances to the next (float64).

    The last distance is infinite: nothing goes beyond the largest.
    """
    codes = torch.tensor([code for code, _ in fmt.levels], dtype=torch.uint8, device=device)
    values = torch.tensor([fmt.values[code] for code, _ in fmt.levels], dtype=torch.float64, device=device)
    return codes, values, torch.cat([values.diff(), values.new_full((1,), torch.inf)])
