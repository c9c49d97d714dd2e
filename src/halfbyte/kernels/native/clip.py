"""The learned clip of an activation by the library."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ...qtensor import QTensor
from .. import reference
from .common import DTYPES, empty_bits, empty_codes, is_mine, number
from .encode import encode
from .library import INT32, INT64, POINTER, address, function, operator
from .sums import value_range

__all__ = ["clip_backward", "clip_bits", "encode_clipped"]

_PIECE = 262144
"""Elements whose part of the clip's gradient is summed by itself, as in the reference."""

_clip_bits = function("clip_bits", POINTER, INT32, INT64, POINTER, POINTER, POINTER, POINTER, POINTER)
_encode_clipped = function("encode_clipped", POINTER, INT32, INT64, POINTER, INT32, INT32, INT32, *[POINTER] * 7)
_clip_backward = function(
    "clip_backward", POINTER, INT32, INT64, POINTER, INT32, INT32, POINTER, POINTER, POINTER, POINTER
)


@operator(
    "clip_bits(Tensor x, Tensor low, Tensor high) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, *_: (empty_bits(x), empty_bits(x), x.new_empty((), dtype=torch.int32)),
)
def _clip_bits_op(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    inside, ties, any_tie = empty_bits(x), empty_bits(x), torch.empty((), dtype=torch.int32)
    _clip_bits(
        address(x), DTYPES[x.dtype], x.numel(), address(low), address(high),
        address(inside), address(ties), address(any_tie),
    )  # fmt: skip
    return inside, ties, any_tie


@operator(
    "encode_clipped(Tensor x, Tensor inv_scale, int bottom, int top, int bits, Tensor low, Tensor high) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, _inv_scale, _bottom, _top, bits, *_: (
        empty_codes(x, bits),
        x.new_empty(2, dtype=torch.float32),
        empty_bits(x),
        empty_bits(x),
        x.new_empty((), dtype=torch.int32),
    ),
)
def _encode_clipped_op(
    x: Tensor, inv_scale: Tensor, bottom: int, top: int, bits: int, low: Tensor, high: Tensor
) -> tuple[Tensor, ...]:
    x, out, ends = x.contiguous(), empty_codes(x, bits), torch.empty(2)
    inside, ties, any_tie = empty_bits(x), empty_bits(x), torch.empty((), dtype=torch.int32)
    _encode_clipped(
        address(x), DTYPES[x.dtype], x.numel(), address(inv_scale), bottom, top, bits, address(low), address(high),
        address(out), address(ends), address(inside), address(ties), address(any_tie),
    )  # fmt: skip
    return out, ends, inside, ties, any_tie


@operator(
    "clip_backward(Tensor(a!) grad, Tensor qdata, int bits, bool signed, Tensor inside, Tensor? ties) -> Tensor",
    fake=lambda grad, *_: grad.new_empty((), dtype=torch.float32),
)
def _clip_backward_op(
    grad: Tensor, qdata: Tensor, bits: int, signed: bool, inside: Tensor, ties: Tensor | None
) -> Tensor:
    scratch = torch.empty(grad.numel() // _PIECE + 1, dtype=torch.float64)
    out = torch.empty(())
    _clip_backward(
        address(grad), DTYPES[grad.dtype], grad.numel(), address(qdata), bits, signed,
        address(inside), address(ties), address(scratch), address(out),
    )  # fmt: skip
    return out


def clip_bits(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
    """See `reference.clip_bits`."""
    if not is_mine(x):
        return reference.clip_bits(x, low, high)
    inside, ties, any_tie = _clip_bits_op(x.detach(), number(low), number(high))
    return inside, ties if any_tie else None


def encode_clipped(
    x: Tensor, fmt: Format, *, inv_scale: Tensor, code_range: tuple[int, int], low: Tensor, high: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
    """`encode`, `value_range` and `clip_bits` from one read: what an activation with a learned clip needs.

    Codes of a tensor that held a NaN mean nothing; the range is NaN then.

    Args:
        x: numbers, of any floating type and shape.
        fmt: an integer format.
        inv_scale: reciprocal of the scale, float32 of shape ().
        code_range: lowest and highest integer used.
        low: the lower clip; float32 of shape ().
        high: the upper clip; float32 of shape ().

    Returns:
        The codes, the range, and the bits.
    """
    if not is_mine(x) or fmt.kind != "int":
        codes = encode(x, fmt, inv_scale=inv_scale, code_range=code_range)
        return codes, value_range(x), clip_bits(x, low, high)
    codes, ends, inside, ties, any_tie = _encode_clipped_op(
        x.detach(), number(inv_scale), *code_range, fmt.bits, number(low), number(high)
    )
    smallest, largest = ends.to(x.dtype).unbind()
    return codes, (smallest, largest), (inside, ties if any_tie else None)


def clip_backward(grad: Tensor, q: QTensor, inside: Tensor, ties: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `reference.clip_backward`."""
    if not (is_mine(grad) and grad.is_contiguous() and q.format.bits in (4, 8)):
        return reference.clip_backward(grad, q, inside, ties)
    return grad, _clip_backward_op(grad, q.qdata, q.format.bits, q.format.signed, inside, ties)
