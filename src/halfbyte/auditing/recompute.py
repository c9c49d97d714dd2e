"""A layer's three GEMMs once more, in plain torch float64: what a backend's result is held against.

Written from the layers' definitions with torch's own functions, and so by another way than `halfbyte.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from ..kernels import Batched, Conv, ConvTranspose, Gemm, Geometry, Linear
from ..qtensor import QTensor
from ..watching import dense

__all__ = ["difference", "product"]

_TWO_ROUNDINGS = 2.0**-22
"""Of the sum, and of its product with the scales, to float32: each 2^-24 at most; the rest for the scales' own."""


def product(which: Gemm, a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """One GEMM of a layer in the operands' type.

    Args:
        which: fprop, dgrad or wgrad.
        a: input (fprop) or grad_output (dgrad, wgrad).
        b: weight (fprop, dgrad) or input (wgrad).
        geometry: the layer's shape.
    """
    if isinstance(geometry, Linear):
        return {"fprop": lambda: F.linear(a, b), "dgrad": lambda: a @ b, "wgrad": lambda: a.t() @ b}[which]()
    if isinstance(geometry, Batched):
        if which == "fprop":
            return torch.einsum("bmk,bnk->bmn", a, b)
        return torch.einsum("bmn,bnk->bmk" if which == "dgrad" else "bmn,bmk->bnk", a, b)
    if isinstance(geometry, ConvTranspose):
        # What a transposed convolution computes is a convolution's grad_input.
        if which == "wgrad":
            return _conv("wgrad", b, a, geometry.conv)
        return _conv("dgrad" if which == "fprop" else "fprop", a, b, geometry.conv)
    if isinstance(geometry, Conv):
        return _conv(which, a, b, geometry)
    return geometry.apply(which, a, b)


def _conv(which: Gemm, a: Tensor, b: Tensor, conv: Conv) -> Tensor:
    dims = len(conv.stride)
    how = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    if which == "fprop":
        forward: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        return forward(a, b, None, **how)
    if which == "dgrad":
        backward: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        short = [
            size - ((out - 1) * step - 2 * pad + dil * (kernel - 1) + 1)
            for size, out, step, pad, dil, kernel in zip(
                conv.input_shape[2:],
                a.shape[2:],
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.weight_shape[2:],
                strict=True,
            )
        ]
        return backward(a, b, None, output_padding=short, **how)
    weight: Callable[..., Tensor] = (grad.conv1d_weight, grad.conv2d_weight, grad.conv3d_weight)[dims - 1]
    return weight(b, conv.weight_shape, a, **how)


@torch.no_grad()
def difference(
    which: Gemm,
    a: Sequence[QTensor | Tensor],
    b: QTensor | Tensor,
    geometry: Geometry,
    result: Tensor,
    accumulate: str,
) -> str:
    """How a result differs from the float64 product of what its operands stand for; empty if only by last roundings.

    Where every operand is codes and sums are exact, two roundings to float32 may differ. Where an operand is floating,
    or sums are rounded on purpose, each of the K sums may: the bound is K roundings of the sum of magnitudes.
    """
    wide_b = dense(b)
    parts = [product(which, dense(part), wide_b, geometry) for part in a]
    wanted = torch.stack(parts).sum(0)
    found = result.detach().double().reshape(wanted.shape)
    bound = torch.stack([part.abs() for part in parts]).sum(0) * _TWO_ROUNDINGS
    if torch.equal(found.isnan(), wanted.isnan()) and bool(
        ((found - wanted).abs() <= bound).logical_or(found.isnan()).all()
    ):
        return ""
    magnitudes = torch.stack([product(which, _magnitude(part), _magnitude(b), geometry) for part in a]).sum(0)
    exact = accumulate == "exact" and all(isinstance(operand, QTensor) for operand in (*a, b))
    bound = bound + magnitudes * (2.0**-40 if exact else _each_rounded(result, geometry.reduction(which), accumulate))
    wrong = ~((found - wanted).abs() <= bound) & ~(found.isnan() & wanted.isnan())
    if not wrong.any():
        return ""
    at = int(((found - wanted).abs() - bound).nan_to_num(nan=torch.inf).argmax())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} numbers differ from the float64 product of the codes, for example "
        f"{found.flatten()[at].item():.6g} instead of {wanted.flatten()[at].item():.6g}"
    )


def _magnitude(operand: QTensor | Tensor) -> Tensor:
    """What rounding errors of an operand's products are relative to: with a zero point, code and zero point alone."""
    found = dense(operand).abs()
    if isinstance(operand, QTensor) and operand.zero_point is not None:
        found = found + 2 * operand.zero_point.abs() * operand.scale.double()
    return found


def _each_rounded(result: Tensor, length: int, accumulate: str) -> float:
    """The error of a sum of that length, relative to its magnitudes, if each addition is rounded."""
    if accumulate == "fp16_chunk64":
        return (length / 64 + 2) * 2.0**-10
    # TensorFloat-32, which a GPU may use for convolutions, keeps 10 bits.
    narrow = result.dtype in (torch.float16, torch.bfloat16)
    step = 2.0**-7 if narrow else 2.0**-10 if result.is_cuda else 2.0**-23
    return step if narrow or result.is_cuda else (length + 2) * step
