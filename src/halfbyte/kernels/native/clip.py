"""The learned clip of an activation by the library."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ...qtensor import QTensor
from .. import reference
from .common import DTYPES, bits_memory, codes_memory, empty_bits, empty_codes, is_broken, is_mine, number
from .library import INT32, INT64, POINTER, address, function, operator

__all__ = ["clip_backward", "clip_bits", "encode_clipped"]

_PIECE = 262144
"""Elements whose part of the clip's gradient is summed by itself, as in the reference."""

_clip_bits = function("clip_bits", POINTER, INT32, INT64, POINTER, POINTER, POINTER, POINTER, POINTER)
_encode_clipped = function("encode_clipped", POINTER, INT32, INT64, POINTER, INT32, INT32, INT32, *[POINTER] * 4)
_clip_backward = function(
    "clip_backward", POINTER, INT32, INT64, POINTER, INT32, INT32, POINTER, POINTER, POINTER, POINTER
)


@operator(
    "clip_bits(Tensor x, Tensor low, Tensor high) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, *_: (empty_bits(x), empty_bits(x), x.new_empty((), dtype=torch.int32)),
)
def _clip_bits_op(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    inside, ties, any_tie = bits_memory(x), bits_memory(x), torch.empty((), dtype=torch.int32)
    _clip_bits(
        address(x), DTYPES[x.dtype], x.numel(), address(low), address(high),
        address(inside), address(ties), address(any_tie),
    )  # fmt: skip
    return inside, ties, any_tie


@operator(
    "encode_clipped(Tensor x, Tensor clip, int bottom, int top, int bits, bool mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, _clip, _bottom, _top, bits, mask: (
        empty_codes(x, bits),
        x.new_empty(3, dtype=torch.float32),
        *(empty_bits(x if mask else x.new_empty(0)) for _ in range(2)),
    ),
)
def _encode_clipped_op(
    x: Tensor, clip: Tensor, bottom: int, top: int, bits: int, mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes; the smallest and the largest number and whether one is at the clip; the bits, empty without a mask."""
    x, out, found = x.contiguous(), codes_memory(x, bits), torch.empty(3)
    inside, ties = (bits_memory(x) if mask else torch.empty(0, dtype=torch.uint8) for _ in range(2))
    _encode_clipped(
        address(x), DTYPES[x.dtype], x.numel(), address(clip), bottom, top, bits, address(out), address(found),
        address(inside) if mask else None, address(ties),
    )  # fmt: skip
    return out, found, inside, ties


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
    x: Tensor, fmt: Format, *, clip: Tensor, code_range: tuple[int, int], mask: bool = True
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """See `reference.encode_clipped`; one read but for a tensor that is broken."""
    if not is_mine(x) or fmt.kind != "int":
        return reference.encode_clipped(x, fmt, clip=clip, code_range=code_range, mask=mask)
    codes, found, inside, ties = _encode_clipped_op(x.detach(), number(clip), *code_range, fmt.bits, mask)
    low, high, tie = found.tolist()
    if is_broken(low, high):
        clean = x.detach().nan_to_num(nan=0.0)
        codes, other, inside, ties = _encode_clipped_op(clean, number(clip), *code_range, fmt.bits, mask)
        tie = other[2].item()
    smallest, largest, _ = found.to(x.dtype).unbind()
    return codes, (smallest, largest), (inside, ties if tie else None) if mask else (None, None)


def clip_backward(grad: Tensor, q: QTensor, inside: Tensor, ties: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `reference.clip_backward`."""
    if not (is_mine(grad) and grad.is_contiguous() and q.format.bits in (4, 8)):
        return reference.clip_backward(grad, q, inside, ties)
    return grad, _clip_backward_op(grad, q.qdata, q.format.bits, q.format.signed, inside, ties)
