"""How a layer's three GEMMs are laid out: shapes and index arithmetic, no number formats.

A layer computes y = x * w. Its three GEMMs are bilinear, so each can be written as a function of two operands:

    fprop(input, weight) -> output
    dgrad(grad_output, weight) -> grad_input
    wgrad(grad_output, input) -> grad_weight

Dimension letters: N rows or images, I input and O output features or channels, G groups, K reduction length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

Gemm = Literal["fprop", "dgrad", "wgrad"]


class Geometry(Protocol):
    """What a backend needs to know of a layer's shape. Both operands are floating tensors of one type."""

    def apply(self, gemm: Gemm, a: Tensor, b: Tensor) -> Tensor:
        """The product in plain PyTorch, in the operands' type."""
        ...

    def reduction(self, gemm: Gemm) -> int:
        """K, the largest number of products that one element of the result sums."""
        ...

    def sum_over(self, gemm: Gemm, operand: int, x: Tensor) -> Tensor:
        """The product of operand 0 or 1 with a tensor of ones in the other's place, broadcastable to the result."""
        ...


@dataclass(frozen=True, kw_only=True)
class Linear:
    """The matrix product y_NO = x_NI @ w_OI.T.

    Attributes:
        rows: N.
        in_features: I.
        out_features: O.
    """

    rows: int
    in_features: int
    out_features: int

    def matrices(self, gemm: Gemm, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The operands as two matrices, (M, K) and (K, N), whose product is the result."""
        if gemm == "fprop":
            return a, b.t()  # x_NI @ w_OI.T -> y_NO
        if gemm == "dgrad":
            return a, b  # g_NO @ w_OI -> (N, I)
        return a.t(), b  # g_NO.T @ x_NI -> (O, I)

    def apply(self, gemm: Gemm, a: Tensor, b: Tensor) -> Tensor:
        """See `Geometry.apply`."""
        left, right = self.matrices(gemm, a, b)
        return left @ right

    def reduction(self, gemm: Gemm) -> int:
        """See `Geometry.reduction`."""
        return {"fprop": self.in_features, "dgrad": self.out_features, "wgrad": self.rows}[gemm]

    def sum_over(self, gemm: Gemm, operand: int, x: Tensor) -> Tensor:
        """See `Geometry.sum_over`."""
        left, right = self.matrices(gemm, x, x)
        return left.sum(1, keepdim=True) if operand == 0 else right.sum(0, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Conv:
    """y = conv(x, w) in one, two or three spatial dimensions.

    Attributes:
        input_shape: (N, I, *spatial).
        weight_shape: (O, I / G, *kernel).
        stride: per spatial dimension.
        padding: per spatial dimension, zeros added on either side.
        dilation: per spatial dimension.
        groups: G.
    """

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, O, *spatial)."""
        spatial = (
            (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
            for size, pad, dil, kernel, step in zip(
                self.input_shape[2:], self.padding, self.dilation, self.weight_shape[2:], self.stride, strict=True
            )
        )
        return (self.input_shape[0], self.weight_shape[0], *spatial)

    def reduction(self, gemm: Gemm) -> int:
        """See `Geometry.reduction`."""
        taps = math.prod(self.weight_shape[2:])
        if gemm == "fprop":
            return self.weight_shape[1] * taps
        if gemm == "dgrad":
            return self.weight_shape[0] // self.groups * taps
        return self.output_shape[0] * math.prod(self.output_shape[2:])

    def apply(self, gemm: Gemm, a: Tensor, b: Tensor) -> Tensor:
        """See `Geometry.apply`."""
        dims = len(self.stride)
        if gemm == "fprop":
            output: Tensor = torch.ops.aten.convolution(
                a, b, None, self.stride, self.padding, self.dilation, False, (0,) * dims, self.groups
            )
            return output
        # One operand of the backward product is only there for its shape.
        if gemm == "dgrad":
            g, w = a, b
            x = a.new_empty(1).expand(a.shape[0], *self.input_shape[1:])
        else:
            g, x = a, b
            w = a.new_empty(1).expand(self.weight_shape)
        results: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            g,
            x,
            w,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0,) * dims,
            self.groups,
            (gemm == "dgrad", gemm == "wgrad", False),
        )
        return results[0 if gemm == "dgrad" else 1]

    def sum_over(self, gemm: Gemm, operand: int, x: Tensor) -> Tensor:
        """See `Geometry.sum_over`."""
        # A tensor of ones has equal channels, so one channel a group is computed and then repeated.
        images, in_channels, *spatial = self.input_shape
        out_channels, fan_in, *kernel = self.weight_shape
        groups = self.groups
        ones = x.new_ones
        if gemm == "fprop":
            if operand == 1:
                return self.apply(gemm, ones(1, in_channels, *spatial), x)
            narrow = replace(self, weight_shape=(groups, fan_in, *kernel))
            result = narrow.apply(gemm, x, ones(narrow.weight_shape))
            return result.repeat_interleave(out_channels // groups, 1)
        if gemm == "dgrad":
            if operand == 1:
                return self.apply(gemm, ones(1, *self.output_shape[1:]), x)
            narrow = replace(self, input_shape=(images, groups, *spatial), weight_shape=(out_channels, 1, *kernel))
            return narrow.apply(gemm, x, ones(narrow.weight_shape)).repeat_interleave(fan_in, 1)
        if operand == 0:
            narrow = replace(self, input_shape=(images, groups, *spatial), weight_shape=(out_channels, 1, *kernel))
            return narrow.apply(gemm, x, ones(narrow.input_shape))
        narrow = replace(self, weight_shape=(groups, fan_in, *kernel))
        return narrow.apply(gemm, ones(narrow.output_shape), x).repeat_interleave(out_channels // groups, 0)
