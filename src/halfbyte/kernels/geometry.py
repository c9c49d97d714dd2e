"""How a layer's three GEMMs are laid out: shapes and index arithmetic, no number formats.

A layer computes y = x * w. Its three GEMMs are bilinear, so each can be written as a function of two operands:

    fprop(input, weight) -> output
    dgrad(grad_output, weight) -> grad_input
    wgrad(grad_output, input) -> grad_weight

A transposed convolution is a convolution whose fprop and dgrad have changed places. A product of two activations (the
two in attention) has the same three, with the second activation in the weight's place.

Dimension letters: N rows or images, I input and O output features or channels, G groups, K reduction length, B batch of
matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

Gemm = Literal["fprop", "dgrad", "wgrad"]


@dataclass(frozen=True)
class Reduction:
    """How one operand of a GEMM lies: a view of it with the reduction along one axis.

    Attributes:
        shape: of the view; as many elements as the operand, in the same order.
        axis: the dimension that the GEMM sums over (with others, for a convolution's taps and positions).
        across: a dimension that stays in the result; with `axis` it spans the blocks of a 16x16 scale.
    """

    shape: tuple[int, ...]
    axis: int
    across: int


class Geometry(Protocol):
    """What a backend needs to know of a layer's shape. Both operands are floating tensors of one type."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the result of fprop."""
        ...

    def apply(self, gemm: Gemm, a: Tensor, b: Tensor) -> Tensor:
        """The product in plain PyTorch, in the operands' type."""
        ...

    def reduction(self, gemm: Gemm) -> int:
        """K, the largest number of products that one element of the result sums."""
        ...

    def sum_over(self, gemm: Gemm, operand: int, x: Tensor) -> Tensor:
        """The product of operand 0 or 1 with a tensor of ones in the other's place, broadcastable to the result."""
        ...

    def macs(self, gemm: Gemm) -> int:
        """Multiply-accumulates of the GEMM, those with a convolution's padding included."""
        ...

    def reduction_view(self, gemm: Gemm, operand: int) -> Reduction:
        """How operand 0 or 1 lies along the reduction."""
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

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, O)."""
        return (self.rows, self.out_features)

    def macs(self, gemm: Gemm) -> int:
        """See `Geometry.macs`."""
        return self.rows * self.in_features * self.out_features

    def reduction_view(self, gemm: Gemm, operand: int) -> Reduction:
        """See `Geometry.reduction_view`."""
        features = self.out_features if gemm == "dgrad" or (gemm, operand) == ("wgrad", 0) else self.in_features
        if operand == 1 and gemm != "wgrad":
            return Reduction((self.out_features, self.in_features), *((1, 0) if gemm == "fprop" else (0, 1)))
        return Reduction((self.rows, features), *((0, 1) if gemm == "wgrad" else (1, 0)))


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

    def macs(self, gemm: Gemm) -> int:
        """See `Geometry.macs`."""
        return math.prod(self.output_shape) * self.weight_shape[1] * math.prod(self.weight_shape[2:])

    def reduction_view(self, gemm: Gemm, operand: int) -> Reduction:
        """See `Geometry.reduction_view`.

        A sum over channels, taps and positions is cut along the channels of a group for fprop and dgrad, and along the
        images for wgrad: there both operands of every product lie at the same place of their block.
        """
        images, in_channels, *spatial = self.input_shape
        out_channels, fan_in, *kernel = self.weight_shape
        fan_out = out_channels // self.groups
        if gemm == "wgrad":
            if operand == 0:
                return Reduction((images, out_channels, math.prod(self.output_shape[2:])), 0, 1)
            return Reduction((images, in_channels, math.prod(spatial)), 0, 1)
        if operand == 1:
            shape = (self.groups, fan_out, fan_in, math.prod(kernel))
            return Reduction(shape, *((2, 1) if gemm == "fprop" else (1, 2)))
        if gemm == "fprop":
            return Reduction((images, self.groups, fan_in, math.prod(spatial)), 2, 0)
        return Reduction((images, self.groups, fan_out, math.prod(self.output_shape[2:])), 2, 0)


_MIRRORED: dict[Gemm, Gemm] = {"fprop": "dgrad", "dgrad": "fprop", "wgrad": "wgrad"}


@dataclass(frozen=True, kw_only=True)
class ConvTranspose:
    """y = conv_transpose(x, w): the dgrad of a convolution that leads from y's shape to x's.

    Attributes:
        conv: that convolution. Its weight (O, I / G, *kernel) is the transposed layer's (I, O / G, *kernel).
    """

    conv: Conv

    def mirrored(self, gemm: Gemm, operand: int) -> tuple[Gemm, int]:
        """Which GEMM and operand of `conv` this layer's are: in wgrad the two operands change places."""
        return _MIRRORED[gemm], 1 - operand if gemm == "wgrad" else operand

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, O, *spatial)."""
        return self.conv.input_shape

    def reduction(self, gemm: Gemm) -> int:
        """See `Geometry.reduction`."""
        return self.conv.reduction(_MIRRORED[gemm])

    def apply(self, gemm: Gemm, a: Tensor, b: Tensor) -> Tensor:
        """See `Geometry.apply`."""
        return self.conv.apply("wgrad", b, a) if gemm == "wgrad" else self.conv.apply(_MIRRORED[gemm], a, b)

    def sum_over(self, gemm: Gemm, operand: int, x: Tensor) -> Tensor:
        """See `Geometry.sum_over`."""
        return self.conv.sum_over(*self.mirrored(gemm, operand), x)

    def macs(self, gemm: Gemm) -> int:
        """See `Geometry.macs`."""
        return self.conv.macs(gemm)

    def reduction_view(self, gemm: Gemm, operand: int) -> Reduction:
        """See `Geometry.reduction_view`."""
        return self.conv.reduction_view(*self.mirrored(gemm, operand))


@dataclass(frozen=True, kw_only=True)
class Batched:
    """A batch of products of two activations, y_BMN = a_BMK @ b_BNK.T; b has the place of a weight.

    Attributes:
        batch: B.
        rows: M.
        columns: N.
        inner: K.
    """

    batch: int
    rows: int
    columns: int
    inner: int

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(B, M, N)."""
        return (self.batch, self.rows, self.columns)

    def apply(self, gemm: Gemm, a: Tensor, b: Tensor) -> Tensor:
        """See `Geometry.apply`."""
        if gemm == "fprop":
            return a @ b.mT  # a_BMK @ b_BNK.T -> y_BMN
        if gemm == "dgrad":
            return a @ b  # g_BMN @ b_BNK -> (B, M, K)
        return a.mT @ b  # g_BMN.T @ a_BMK -> (B, N, K)

    def reduction(self, gemm: Gemm) -> int:
        """See `Geometry.reduction`."""
        return {"fprop": self.inner, "dgrad": self.columns, "wgrad": self.rows}[gemm]

    def sum_over(self, gemm: Gemm, operand: int, x: Tensor) -> Tensor:
        """See `Geometry.sum_over`."""
        summed = x.sum(self.reduction_view(gemm, operand).axis)
        return summed.unsqueeze(-1 if operand == 0 else -2)

    def macs(self, gemm: Gemm) -> int:
        """See `Geometry.macs`."""
        return self.batch * self.rows * self.columns * self.inner

    def reduction_view(self, gemm: Gemm, operand: int) -> Reduction:
        """See `Geometry.reduction_view`."""
        a, b, y = (self.rows, self.inner), (self.columns, self.inner), (self.rows, self.columns)
        shape, axis = {
            ("fprop", 0): (a, 2),
            ("fprop", 1): (b, 2),
            ("dgrad", 0): (y, 2),
            ("dgrad", 1): (b, 1),
            ("wgrad", 0): (y, 1),
            ("wgrad", 1): (a, 1),
        }[gemm, operand]
        return Reduction((self.batch, *shape), axis, 3 - axis)
