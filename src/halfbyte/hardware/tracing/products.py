"""The sizes of a matrix product, read from the operator that computes it, and those of its two backward products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..workload import Phase

__all__ = ["MULTIPLIES", "UNREADABLE", "Product", "distinct", "read_convolution", "read_product"]

_OPERANDS: dict[str, int] = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "vdot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
"""Where the two factors stand among an operator's arguments."""

MULTIPLIES = frozenset({*_OPERANDS, "convolution"})
"""Names of the operators whose sizes are read here; everything else that multiplies matrices is made of them."""

UNREADABLE: dict[str, str] = {
    "_trilinear": "torch.nn.Bilinear and F.bilinear; write the product with torch.einsum",
    "_scaled_dot_product": "a fused attention that the model asks for; let torch choose (no sdpa_kernel)",
    "_flash_attention": "a fused attention; call F.scaled_dot_product_attention",
    "_efficient_attention": "a fused attention; call F.scaled_dot_product_attention",
    "_native_multi_head_attention": "the fused attention of evaluation; trace the model in training",
    "_transformer_encoder_layer": "the fused layer of evaluation; trace the model in training",
    "mkldnn_rnn_layer": "a recurrent layer of a library; use torch.nn.LSTM, GRU or RNN on the CPU",
    "_cudnn_rnn": "a recurrent layer of a library; use torch.nn.LSTM, GRU or RNN on the CPU",
    "_grouped_mm": "a grouped product; write it with torch.bmm",
    "_scaled_grouped_mm": "a grouped product; write it with torch.bmm",
    "_scaled_mm": "a product in FP8; trace the model before it is converted by another library",
    "_int_mm": "a product of integers; trace the model before it is converted by another library",
    **dict.fromkeys(
        ("_linalg_", "linalg_inv", "linalg_qr", "linalg_lu", "linalg_cholesky", "linalg_eig", "linalg_solve"),
        "a decomposition or solver of linear algebra; trace the model without it",
    ),
    "_convolution_double_backward": "a second derivative; trace a loss without one",
}
"""Beginnings of names of operators with products inside that nothing is known of: what they are, and the cure."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """The sizes of an fprop GEMM, in the orientation of `halfbyte.hardware.workload`.

    Attributes:
        m: rows of the result.
        n: its columns.
        k: length of the sums.
        groups: how many independent products.
        taps: positions of a convolution's kernel; a factor of k.
        transposed: whether it is a transposed convolution.
        a_elements: of the first operand, as stored.
        a_read: how many of those are multiplied; fewer where a convolution's stride passes over some.
        b_elements: of the second operand, as stored.
        out_elements: of the result.
    """

    m: int
    n: int
    k: int
    groups: int = 1
    taps: int = 1
    transposed: bool = False
    a_elements: int
    a_read: int
    b_elements: int
    out_elements: int

    def sizes(self, phase: Phase) -> tuple[int, int, int]:
        """m, n and k of the GEMM of that phase. A transposed convolution unfolds grad_output for wgrad."""
        if phase == "fprop":
            return self.m, self.n, self.k
        if phase == "dgrad":
            return self.m, self.k // self.taps, self.n * self.taps
        return (self.n * self.taps, self.k // self.taps, self.m) if self.transposed else (self.n, self.k, self.m)

    def elements(self, phase: Phase) -> tuple[int, int, int]:
        """Elements of both operands and of the result of the GEMM of that phase."""
        return {
            "fprop": (self.a_read, self.b_elements, self.out_elements),
            "dgrad": (self.out_elements, self.b_elements, self.a_elements),
            "wgrad": (self.out_elements, self.a_read, self.b_elements),
        }[phase]

    def before_dgrad(self) -> Product:
        """The fprop whose dgrad this is, for a backward product that is known without the forward one."""
        out, a = self.out_elements, self.a_elements
        return replace(self, n=self.k, k=self.n, a_elements=out, a_read=out, out_elements=a)

    def columns(self, n: int) -> Product:
        """The part of it that gives n of its columns."""
        b, out = (count * n // self.n for count in (self.b_elements, self.out_elements))
        return replace(self, n=n, b_elements=b, out_elements=out)

    def some(self, part: int, whole: int) -> Product:
        """``part`` of every ``whole`` of its groups."""
        counts = (self.groups, self.a_elements, self.a_read, self.b_elements, self.out_elements)
        groups, a, a_read, b, out = (count * part // whole for count in counts)
        return replace(self, groups=groups, a_elements=a, a_read=a_read, b_elements=b, out_elements=out)


def distinct(tensor: Tensor) -> int:
    """Elements that a tensor really has: what `expand` repeats counts once."""
    return math.prod(size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step or size == 0)


def read_product(name: str, args: Sequence[Any], *, swapped: bool = False) -> tuple[Product, Tensor, Tensor]:
    """The sizes and the operands of a product of matrices or vectors.

    Args:
        name: of the operator; in `MULTIPLIES`.
        args: its arguments.
        swapped: whether to read ``a @ b`` as ``(b^T @ a^T)^T``, so that a weight that stands first is the second.

    Returns:
        The product, and the tensors that are its first and second operand.
    """
    start = _OPERANDS[name]
    a, b = args[start], args[start + 1]
    groups = a.shape[0] if a.dim() == 3 else 1
    k = a.shape[-1]
    m = a.shape[-2] if a.dim() > 1 else 1
    n = b.shape[-1] if b.dim() > 1 else 1
    if swapped:
        a, b, m, n = b, a, n, m
    product = Product(
        m=m,
        n=n,
        k=k,
        groups=groups,
        a_elements=distinct(a),
        a_read=distinct(a),
        b_elements=distinct(b),
        out_elements=groups * m * n,
    )
    return product, a, b


def read_convolution(x: Tensor, weight: Tensor, out: Tensor, *, transposed: bool, groups: int) -> Product:
    """The sizes of a convolution.

    Args:
        x: (N, C, *spatial).
        weight: (O, C / groups, *kernel), or (C, O / groups, *kernel) of a transposed one.
        out: (N, O, *spatial), or its gradient.
        transposed: whether it is a transposed one.
        groups: its groups.
    """
    taps = math.prod(weight.shape[2:])
    few, many = x.shape[1] // groups, out.shape[1] // groups
    rows = x if transposed else out
    m, k = rows.shape[0] * math.prod(rows.shape[2:]), few * taps
    return Product(
        m=m,
        n=many,
        k=k,
        groups=groups,
        taps=taps,
        transposed=transposed,
        a_elements=distinct(x),
        a_read=min(distinct(x), m * k * groups),
        b_elements=distinct(weight),
        out_elements=out.numel(),
    )
