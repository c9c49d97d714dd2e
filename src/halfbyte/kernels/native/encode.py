"""Numbers to codes by the library, rounded to nearest: each element is read once, whatever is made of it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...formats import Format, Phase, fp4_e2m1
from .. import reference
from .common import DTYPES, codes_memory, empty_codes, is_broken, is_mine, number, numbers_in_c
from .library import INT32, INT64, POINTER, address, constant, function, operator
from .sums import value_range

__all__ = ["encode", "encode_each", "encode_each_with_range", "ends", "level_rule"]

_encode_grid = function(
    "encode_grid", POINTER, INT32, INT64, POINTER, POINTER, INT32, INT32, INT32, INT32, POINTER, POINTER
)
_encode_levels = function("encode_levels", POINTER, INT32, INT64, POINTER, INT32, POINTER, POINTER, POINTER, POINTER)


@operator(
    "encode_grid(Tensor x, Tensor inv_scale, Tensor? low, int offset, int bottom, int top, int bits) -> Tensor",
    fake=lambda x, _inv_scale, _low, _offset, _bottom, _top, bits: empty_codes(x, bits),
)
def _encode_grid_op(
    x: Tensor, inv_scale: Tensor, low: Tensor | None, offset: int, bottom: int, top: int, bits: int
) -> Tensor:
    x, out = x.contiguous(), codes_memory(x, bits)
    limits = offset, bottom, top, bits
    _encode_grid(address(x), DTYPES[x.dtype], x.numel(), address(low), address(inv_scale), *limits, address(out), None)
    return out


@operator(
    "encode_levels(Tensor x, Tensor inv_scale, int[] rules) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, _inv_scale, rules: (
        empty_codes(x, _bits(rules)),
        empty_codes(x, _bits(rules[5:])) if len(rules) > 5 else x.new_empty(0, dtype=torch.uint8),
        x.new_empty(2, dtype=torch.float32),
    ),
)
def _encode_levels_op(x: Tensor, inv_scale: Tensor, rules: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in one or two formats, the second empty if there is one, and the range."""
    x, count = x.contiguous(), len(rules) // 5
    first = codes_memory(x, _bits(rules))
    second = codes_memory(x, _bits(rules[5:])) if count == 2 else torch.empty(0, dtype=torch.uint8)
    found = torch.empty(2)
    _encode_levels(
        address(x), DTYPES[x.dtype], x.numel(), address(inv_scale), count, numbers_in_c(rules),
        address(first), address(second), address(found),
    )  # fmt: skip
    return first, second, found


_MINIFLOAT = 2
"""The kind of rule that ends with the width of its codes; those of others have four bits."""


_LARGEST_BIAS = 100
"""Below it a format's smallest number is a normal one of float32."""


def _bits(rule: Sequence[int]) -> int:
    return rule[4] if rule[0] == _MINIFLOAT else 4


@constant
def level_rule(fmt: Format) -> tuple[int, ...] | None:
    """What `hb_encode_levels` needs to know of a format; None if it cannot encode it. See `reference.encode`."""
    return _level_rule(fmt)


@cache
def _level_rule(fmt: Format) -> tuple[int, ...] | None:
    (largest,) = struct.unpack("<i", struct.pack("<f", fmt.max))
    if fmt == fp4_e2m1:
        return 1, 0, 0, 0, 0
    if fmt.kind == "float" and abs(fmt.bias) < _LARGEST_BIAS:
        return _MINIFLOAT, fmt.mantissa_bits, fmt.bias, largest, fmt.bits
    if fmt.kind != "log" or fmt.radix not in (2, 4) or fmt.bits != 4:
        return None
    one = 1 << 23
    if fmt.radix == 4:
        carry, shift, base = one * 3 // 4 + one, 24, 64 - fmt.bias
    else:
        carry, shift, base = one // 2, 23, 127 - fmt.bias
    if fmt.phase is Phase.ODD:
        carry += one
    return 0, carry, shift, base, largest


@constant
def ends(fmt: Format, code_range: tuple[int, int] | None) -> tuple[int, int]:
    """The lowest and the highest integer used."""
    return code_range or (int(fmt.saturate[0]), int(fmt.saturate[1]))


def encode(
    x: Tensor,
    fmt: Format,
    *,
    inv_scale: Tensor,
    low: Tensor | None = None,
    offset: int = 0,
    code_range: tuple[int, int] | None = None,
) -> Tensor:
    """See `reference.encode`."""
    rule = None if fmt.kind == "int" else level_rule(fmt)
    if not is_mine(x) or (fmt.kind != "int" and rule is None):
        return reference.encode(x, fmt, inv_scale=inv_scale, low=low, offset=offset, code_range=code_range)
    if rule is not None:
        # As in the reference, `low` is subtracted whatever the format.
        shifted = x.detach() if low is None else x.detach().float() - low
        found: Tensor = _encode_levels_op(shifted, number(inv_scale), rule)[0]
        return found
    lowest = None if low is None else number(low)
    bottom, top = ends(fmt, code_range)
    codes: Tensor = _encode_grid_op(x.detach(), number(inv_scale), lowest, offset, bottom, top, fmt.bits)
    return codes


def encode_each(x: Tensor, fmts: Sequence[Format], *, inv_scale: Tensor) -> tuple[Tensor, ...]:
    """See `reference.encode_each`."""
    rules = _rules(x, fmts)
    if rules is None:
        return tuple(encode(x, fmt, inv_scale=inv_scale) for fmt in fmts)
    return _encode_by(x, rules, inv_scale)[0]


def encode_each_with_range(
    x: Tensor, fmts: Sequence[Format], *, inv_scale: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """See `reference.encode_each_with_range`; one read but for a tensor that is broken."""
    rules = _rules(x, fmts)
    if rules is None:
        low, high = value_range(x)
        return encode_each(reference.numbers(x, low, high), fmts, inv_scale=inv_scale), low, high
    codes, found = _encode_by(x, rules, inv_scale)
    if is_broken(*found.tolist()):
        codes, _ = _encode_by(x.nan_to_num(nan=0.0), rules, inv_scale)
    low, high = found.to(x.dtype).unbind()
    return codes, low, high


def _rules(x: Tensor, fmts: Sequence[Format]) -> list[int] | None:
    """The rules of all formats one after another; None if the library cannot do all of this."""
    if not fmts or not is_mine(x):
        return None
    rules: list[int] = []
    for fmt in fmts:
        rule = level_rule(fmt)
        if rule is None:
            return None
        rules += rule
    return rules


def _encode_by(x: Tensor, rules: Sequence[int], inv_scale: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The codes by each rule, two at a time, and the range."""
    codes: list[Tensor] = []
    for start in range(0, len(rules), 10):
        first, second, found = _encode_levels_op(x.detach(), number(inv_scale), rules[start : start + 10])
        codes += [first, second] if len(rules) - start > 5 else [first]
    return tuple(codes), found
