"""Accumulation as narrow hardware does it: exact within a chunk of 64 products, float16 between chunks.

Wang et al. (NeurIPS 2018) add long sums in chunks to keep 16-bit error small; the 4-bit unit of Sun et al. 2020 sums a
chunk as integers and hands FP16 to the rest. The order of the reduction is: kernel taps outermost, then channels (for
wgrad: output positions), 64 at a time.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ...qtensor import QTensor, round_once
from ..geometry import Batched, Conv, Gemm, Geometry, Linear
from .decode import decode

CHUNK = 64


def chunked_gemm(which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> Tensor:
    """The product of the operands' values (integers times units, before scales), accumulated in float16 by chunks.

    A chunk of 64 products of INT4 (at most 15) and radix-4 FP4 (at most 64) is at most 61,440, which float16 holds;
    what lies beyond float16 becomes infinite, as in hardware.

    Returns:
        float32 holding float16 values.

    Raises:
        ValueError: if an operand has a zero point: an affine product is a sum of four, and no unit does that.
    """
    if a.zero_point is not None or b.zero_point is not None:
        raise ValueError(
            "accumulate='fp16_chunk64' was asked for operands with a zero point (min-max or 16-level SAWB); "
            "use symmetric or unsigned quantizers, or accumulate='exact'."
        )
    value_a = decode(a) * float(a.format.unit)
    value_b = decode(b) * float(b.format.unit)
    if isinstance(geometry, Linear):
        left, right = geometry.matrices(which, value_a, value_b)
        return _add_chunks(left, right, left.new_zeros(left.shape[0], right.shape[1], dtype=torch.float16)).float()
    if isinstance(geometry, Batched):
        one = Linear(rows=geometry.rows, in_features=geometry.inner, out_features=geometry.columns)
        pairs = [one.matrices(which, *pair) for pair in zip(value_a, value_b, strict=True)]
        sums = [_add_chunks(m, n, m.new_zeros(m.shape[0], n.shape[1], dtype=torch.float16)) for m, n in pairs]
        return torch.stack(sums).float()
    assert isinstance(geometry, Conv)
    return _conv(which, value_a, value_b, geometry).float()


def _add_chunks(left: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """total + left_MK @ right_KN, chunk after chunk of K, in float16."""
    for start in range(0, left.shape[1], CHUNK):
        # float64 holds 64 products of any of our formats exactly; float16 rounds their sum once.
        part = left[:, start : start + CHUNK].double() @ right[start : start + CHUNK].double()
        total = total + round_once(part, torch.float16)
    return total


def _conv(which: Gemm, a: Tensor, b: Tensor, geo: Conv) -> Tensor:
    """A convolution as one matrix product a kernel tap and group."""
    pads = [p for pad in reversed(geo.padding) for p in (pad, pad)]
    out_spatial, kernel = geo.output_shape[2:], geo.weight_shape[2:]
    padded_shape = (
        geo.input_shape[0],
        geo.input_shape[1],
        *(size + 2 * pad for size, pad in zip(geo.input_shape[2:], geo.padding, strict=True)),
    )
    if which == "fprop":
        x, w, result = F.pad(a, pads), b, a.new_zeros(geo.output_shape, dtype=torch.float16)
    elif which == "dgrad":
        g, w, result = a, b, a.new_zeros(padded_shape, dtype=torch.float16)
    else:
        g, x, result = a, F.pad(b, pads), a.new_zeros(geo.weight_shape, dtype=torch.float16)
    fan_in, fan_out = geo.weight_shape[1], geo.weight_shape[0] // geo.groups
    for tap in itertools.product(*(range(k) for k in kernel)):
        window = tuple(
            slice(t * d, t * d + s * (o - 1) + 1, s)
            for t, d, s, o in zip(tap, geo.dilation, geo.stride, out_spatial, strict=True)
        )
        for group in range(geo.groups):
            ins = slice(group * fan_in, (group + 1) * fan_in)
            outs = slice(group * fan_out, (group + 1) * fan_out)
            seen: tuple[slice, ...] = (slice(None), ins, *window)
            at: tuple[slice | int, ...] = (outs, slice(None), *tap)
            if which == "fprop":
                part = _add_chunks(_rows(x[seen]), w[at].t(), _rows(result[:, outs]))
                result[:, outs] = _unrows(part, result[:, outs])
            elif which == "dgrad":
                part = _add_chunks(_rows(g[:, outs]), w[at], _rows(result[seen]))
                result[seen] = _unrows(part, result[seen])
            else:
                result[at] = _add_chunks(_rows(g[:, outs]).t(), _rows(x[seen]), result[at])
    if which == "dgrad":
        inner = tuple(slice(p, p + n) for p, n in zip(geo.padding, geo.input_shape[2:], strict=True))
        return result[(slice(None), slice(None), *inner)]
    return result


def _rows(x: Tensor) -> Tensor:
    """(N, C, *spatial) to (N * positions, C)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    return rows.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
