"""Numbers to codes, in plain PyTorch.

A tensor is walked in pieces that fit the cache, each through scratch memory that is reused: in eager PyTorch a fresh
large tensor costs more (page faults) than the arithmetic on it. Every formula is exact or rounds exactly where
`oracle.quantize` says: once after the subtraction, once after the multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...formats import Format, Phase, fp4_e2m1, fp8_e4m3, fp8_e5m2
from ...oracle import to_binary
from ...qtensor import BLOCK, pack, packed_size

PIECE = 2048 * BLOCK
"""Elements encoded at a time; a multiple of the packed block, so that pieces can be packed one after another."""

_ROW = 4096
"""Length of the rows that `stable_sum` adds first."""

_MANTISSA = 23
_SIGN_CLEARED = 0x7FFFFFFF


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic on numbers of that type is done in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def value_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest element, shape () each; NaN if any element is; (0, 0) for an empty tensor."""
    if x.numel() == 0:
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        return zero, zero
    low, high = torch.aminmax(x)
    return low, high


def has_nonfinite(low: Tensor, high: Tensor) -> Tensor:
    """Whether a tensor of that `value_range` held a NaN or an infinity; bool of shape ()."""
    return ~(torch.isfinite(low) & torch.isfinite(high))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The means of |x| and of x^2, float64 of shape (); 0 for an empty tensor. Summed as by `stable_sum`."""
    flat = x.detach().reshape(-1)
    n = flat.numel()
    scratch = torch.empty(min(n, PIECE), dtype=torch.float64, device=x.device)
    first, second = [], []
    for start in range(0, n, PIECE):
        wide = scratch[: min(n - start, PIECE)].copy_(flat[start : start + PIECE])
        first.append(_row_sums(wide.abs_()))
        second.append(_row_sums(wide.square_()))
    if n == 0:
        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        return zero, zero
    return stable_sum(torch.cat(first)) / n, stable_sum(torch.cat(second)) / n


def stable_sum(x: Tensor) -> Tensor:
    """The sum of a tensor of shape (n,) in float64, with the same bits on any machine and any number of threads.

    Rows of fixed length are summed first, then rows of the rows' sums, until one is left. A row is folded in halves:
    additions of whole tensors have one order, which `Tensor.sum` chooses by the processor.
    """
    sums = x.double()
    while sums.numel() > 1:
        sums = _row_sums(sums)
    return sums.sum()


def _row_sums(x: Tensor) -> Tensor:
    """The sum of each stretch of 4096 numbers, the last one filled up with zeros; float64 of shape (rows,)."""
    short = -x.numel() % _ROW
    rows = (torch.nn.functional.pad(x, (0, short)) if short else x).view(-1, _ROW)
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows.reshape(-1)


def encode(
    x: Tensor,
    fmt: Format,
    *,
    inv_scale: Tensor,
    low: Tensor | None = None,
    offset: int = 0,
    code_range: tuple[int, int] | None = None,
) -> Tensor:
    """The packed codes of a tensor.

    Integer formats: ``clamp(rint((x - low) * inv_scale) + offset)``, ties to even. Others: the nearest value to
    ``x * inv_scale`` by the format's own rule. What NaN becomes is not defined: replace it first.

    Args:
        x: numbers but no NaN, of any floating type and shape; float64 is computed in float64, all else in float32.
        fmt: the format.
        inv_scale: reciprocal of the scale, float32 of shape ().
        low: what is subtracted first, float32 of shape (); None for nothing. Integer formats only.
        offset: what is added to the nearest integer, at most the lowest one used. Integer formats only.
        code_range: lowest and highest integer used; the format's own if None. Integer formats only.

    Returns:
        uint8 in the layout of `halfbyte.qtensor.pack`, in the row-major order of `x`.
    """
    (qdata,) = _encode(x, (fmt,), inv_scale, low, offset, code_range)
    return qdata


def encode_each(x: Tensor, fmts: Sequence[Format], *, inv_scale: Tensor) -> tuple[Tensor, ...]:
    """The packed codes of one tensor in several formats, from one walk over it: a gradient for its two GEMMs."""
    return _encode(x, tuple(fmts), inv_scale, None, 0, None)


def _encode(
    x: Tensor,
    fmts: tuple[Format, ...],
    inv_scale: Tensor,
    low: Tensor | None,
    offset: int,
    code_range: tuple[int, int] | None,
) -> tuple[Tensor, ...]:
    flat = x.detach().reshape(-1)
    n = flat.numel()
    outs = tuple(torch.empty(packed_size(n, f.bits), dtype=torch.uint8, device=x.device) for f in fmts)
    dtype = wide_dtype(x.dtype)
    scratch = torch.empty(min(n, PIECE), dtype=dtype, device=x.device)
    codes = torch.empty(min(n, PIECE), dtype=torch.uint8, device=x.device)
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        wide, piece_codes = scratch[: stop - start], codes[: stop - start]
        piece = flat[start:stop] if x.dtype == dtype else wide.copy_(flat[start:stop])
        if low is not None:
            piece = torch.sub(piece, low, out=wide)
        scaled = torch.mul(piece, inv_scale, out=wide)
        for fmt, out in zip(fmts, outs, strict=True):
            if fmt.kind == "int":
                _integer_codes(scaled if len(fmts) == 1 else scaled.clone(), fmt, offset, code_range, piece_codes)
            elif dtype == torch.float32 and fmt in NATIVE:
                piece_codes.view(NATIVE[fmt]).copy_(scaled.clamp(-fmt.max, fmt.max))
            elif dtype == torch.float32 and fmt.kind == "log" and fmt.radix in (2, 4) and fmt.bits == 4:
                _log_codes(scaled, fmt, piece_codes)
            elif dtype == torch.float32 and fmt == fp4_e2m1:
                _e2m1_codes(scaled, piece_codes)
            else:
                piece_codes.copy_(_table_codes(scaled, fmt))
            pack(piece_codes, fmt.bits, out[packed_size(start, fmt.bits) : packed_size(stop, fmt.bits)])
    return outs


NATIVE = {fp8_e4m3: torch.float8_e4m3fn, fp8_e5m2: torch.float8_e5m2}
"""Formats that torch itself can round to; its codes are ours."""


def _integer_codes(scaled: Tensor, fmt: Format, offset: int, code_range: tuple[int, int] | None, out: Tensor) -> None:
    """Round half to even, clamp, shift; the two's complement of the result. Overwrites `scaled`."""
    bottom, top = code_range or (int(fmt.saturate[0]), int(fmt.saturate[1]))
    whole = scaled.round_().clamp_(bottom - offset, top - offset)
    if fmt.signed and not offset:
        out.view(torch.int8).copy_(whole)
    else:
        # Counted from the lowest code there are no negative numbers; the addition wraps to two's complement.
        out.copy_(whole).add_(offset % 256)
    if fmt.bits not in (4, 8):
        out.bitwise_and_((1 << fmt.bits) - 1)


def _log_codes(scaled: Tensor, fmt: Format, out: Tensor) -> None:
    """Radix 2 and 4 from the bits of a float32: one addition whose carry does the rounding, then a shift.

    Radix 4: a number m * 2^e goes to the even exponent e, or, for odd e, up if m >= 1.25 and down otherwise. Adding
    0.75 of a mantissa carries into the exponent exactly where it must, and what is left is to halve the exponent.
    Radix 2 carries at m >= 1.5, so it adds half a mantissa. The odd phase is the even phase of twice the number: one
    more exponent. The sign bit stays out of the way, because the magnitude is clamped first.
    """
    one = 1 << _MANTISSA
    if fmt.radix == 4:
        # floor((E - 127) / 2) = ((E + 1) >> 1) - 64, so one exponent more is added and 64 - 4 steps are taken off.
        carry, shift, base = one * 3 // 4 + one, _MANTISSA + 1, 64 - fmt.bias
    else:
        carry, shift, base = one // 2, _MANTISSA, 127 - fmt.bias
    if fmt.phase is Phase.ODD:
        carry += one
    clamped = scaled.clamp(-fmt.max, fmt.max)
    bits = clamped.view(torch.int32)
    sign = torch.signbit(scaled) if shift == _MANTISSA else None
    if sign is not None:
        bits.bitwise_and_(_SIGN_CLEARED)
    top = bits.add_(carry).bitwise_right_shift_(shift)
    # The top byte: with radix 4 the sign and seven bits of exponent, with radix 2 eight bits of exponent.
    out.copy_(top)
    if sign is None:
        sign_bit = (out >> 4).bitwise_and_(8)
        out.bitwise_and_(127)
    else:
        sign_bit = sign.to(torch.uint8) << 3
    out.clamp_(base, base + 7).sub_(base).bitwise_or_(sign_bit)


def _e2m1_codes(scaled: Tensor, out: Tensor) -> None:
    """E2M1 from the bits of a float32: one addition rounds to the one bit of mantissa, ties to even.

    From 1 up, exponent and top mantissa bit of the sum are the code but for a constant. Below 1 the codes are whole
    halves, ties to even as well.
    """
    magnitude = scaled.abs().clamp_max_(fp4_e2m1.max)
    below = (magnitude * 2).round_()
    bits = magnitude.view(torch.int32)
    cut = _MANTISSA - 1
    # Half a unit of the last bit kept, less one, and one more if that bit is set: ties go to the even code.
    top = (bits >> cut).bitwise_and_(1).add_(bits).add_((1 << (cut - 1)) - 1).bitwise_right_shift_(cut)
    code = torch.where(magnitude < 1, below.int(), top.sub_(2 * 127 - 2))
    out.copy_(code).bitwise_or_(torch.signbit(scaled).to(torch.uint8) << 3)


def _table_codes(scaled: Tensor, fmt: Format) -> Tensor:
    """Any format with a sign bit or without negatives, in float32 or float64, by search among its thresholds."""
    bounds, codes = _bounds(fmt, scaled.dtype, scaled.device)
    magnitude = codes[torch.bucketize(scaled.abs() if fmt.signed else scaled, bounds, right=True)]
    if fmt.signed:
        magnitude = magnitude.bitwise_or_(torch.signbit(scaled).to(torch.uint8) << (fmt.bits - 1))
    return magnitude


@cache
def _bounds(fmt: Format, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The smallest number of that type that rounds to each level but the first, and the codes of all levels.

    An exact threshold that the type cannot hold is rounded up to the next number that it can; a tie that goes down
    moves the bound one number up. So ``x >= bound`` decides exactly.
    """
    double = dtype == torch.float64
    limits = {"precision": 53, "min_exponent": -1022, "max_exponent": 1023} if double else {}
    bounds = []
    for threshold, tie_goes_up in fmt.thresholds:
        bound = torch.tensor(to_binary(threshold, **limits), dtype=dtype)
        if bound.item() < threshold or (bound.item() == threshold and not tie_goes_up):
            bound = torch.nextafter(bound, torch.tensor(float("inf"), dtype=dtype))
        bounds.append(bound)
    levels = torch.tensor([code for code, _ in fmt.levels], dtype=torch.uint8, device=device)
    return torch.stack(bounds).to(device), levels
