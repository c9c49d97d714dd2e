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

from ...formats import Format, Phase
from ...oracle import to_binary
from ...qtensor import BLOCK, pack, packed_size

PIECE = 2048 * BLOCK
"""Elements encoded at a time; a multiple of the packed block, so that pieces can be packed one after another."""

_ROW = 4096
"""Length of the rows that `stable_sum` adds first."""

_MANTISSA = 23
_SIGN_CLEARED = 0x7FFFFFFF


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic on numbers of that type is done in: float64 for float64, else float32 (16-bit ones are widened)."""
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
    """The means of |x| and of x^2, float64 of shape (); 0 for an empty tensor."""
    flat = x.detach().reshape(-1)
    n = flat.numel()
    if n == 0:
        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        return zero, zero
    wide = flat.double().abs_()
    return stable_sum(wide) / n, stable_sum(wide.square_()) / n


def stable_sum(x: Tensor) -> Tensor:
    """The sum of a tensor of shape (n,) in float64, the same for any number of threads.

    Rows of fixed length are summed first, each by one thread; the few row sums that are left fit one thread too.
    """
    whole = x.numel() // _ROW * _ROW
    wide = x.double()
    return wide[:whole].view(-1, _ROW).sum(1).sum() + wide[whole:].view(1, -1).sum(1).sum()


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
    ``x * inv_scale`` by the format's own rule. NaN gets the code of zero: detect it first (`has_nonfinite`).

    Args:
        x: numbers of any floating type and shape; float64 is computed in float64, all else in float32.
        fmt: the format.
        inv_scale: reciprocal of the scale, float32 of shape ().
        low: what is subtracted first, float32 of shape (); None for nothing. Integer formats only.
        offset: what is added to the nearest integer. Integer formats only.
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
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        wide = scratch[: stop - start]
        if x.dtype != dtype:
            piece = wide.copy_(flat[start:stop])
        else:
            piece = flat[start:stop]
        if low is not None:
            piece = torch.sub(piece, low, out=wide)
        scaled = torch.mul(piece, inv_scale, out=wide)
        for fmt, out in zip(fmts, outs, strict=True):
            if fmt.kind == "int":
                codes = _integer_codes(scaled, fmt, offset, code_range)
            elif fmt.kind == "log" and fmt.radix in (2, 4) and fmt.bits == 4 and dtype == torch.float32:
                codes = _log_codes(scaled, fmt)
            else:
                codes = _table_codes(scaled, fmt)
            pack(codes, fmt.bits, out[packed_size(start, fmt.bits) : packed_size(stop, fmt.bits)])
    return outs


def _integer_codes(scaled: Tensor, fmt: Format, offset: int, code_range: tuple[int, int] | None) -> Tensor:
    """Round half to even, shift, clamp; the two's complement of the result. Overwrites `scaled`."""
    bottom, top = code_range or (int(fmt.saturate[0]), int(fmt.saturate[1]))
    whole = scaled.round_()
    if offset:
        whole = whole.add_(offset)
    whole = whole.clamp_(bottom, top).nan_to_num_(nan=0.0)
    return whole.to(torch.int8).view(torch.uint8) if fmt.signed else whole.to(torch.uint8)


def _log_codes(scaled: Tensor, fmt: Format) -> Tensor:
    """Radix 2 and 4 from the bits of a float32: one addition whose carry does the rounding, then a shift.

    Radix 4: a number m * 2^e goes to the even exponent e, or, for odd e, up if m >= 1.25 and down otherwise. Adding
    0.75 of a mantissa carries into the exponent exactly where it must, and what is left is to halve the exponent.
    Radix 2 carries at m >= 1.5, so it adds half a mantissa. The odd phase is the even phase of twice the number: one
    more exponent. Clamping the bits first keeps the result in 0...7 and the sum within 32 bits.
    """
    one = 1 << _MANTISSA
    if fmt.radix == 4:
        # floor((E - 127) / 2) = ((E + 1) >> 1) - 64, so one exponent more is added and 64 - 4 steps are taken off.
        carry, shift, base = one * 3 // 4 + one, _MANTISSA + 1, 64 - fmt.bias
    else:
        carry, shift, base = one // 2, _MANTISSA, 127 - fmt.bias
    if fmt.phase is Phase.ODD:
        carry += one
    lowest = (base << shift) - carry
    highest = ((base + 7) << shift) - carry
    bits = scaled.view(torch.int32)
    codes = bits & _SIGN_CLEARED
    nan = scaled.isnan() if bool(codes.max() > 0x7F800000) else None
    codes = codes.clamp_(lowest, highest).sub_(lowest).bitwise_right_shift_(shift)
    if nan is not None:
        codes.masked_fill_(nan, 0)
    return codes.bitwise_or_((bits >> 28).bitwise_and_(8)).to(torch.uint8)


def _table_codes(scaled: Tensor, fmt: Format) -> Tensor:
    """Any format with a sign bit or without negatives, in float32 or float64, by search among its thresholds."""
    bounds, codes = _bounds(fmt, scaled.dtype, scaled.device)
    magnitude = codes[torch.bucketize(scaled.abs() if fmt.signed else scaled, bounds, right=True)]
    if fmt.signed:
        magnitude = magnitude.bitwise_or_(torch.signbit(scaled).to(torch.uint8) << (fmt.bits - 1))
    nan_code = next((c for c, v in enumerate(fmt.values) if v != v), 0)
    return magnitude.masked_fill_(scaled.isnan(), nan_code)


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
