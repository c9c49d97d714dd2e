"""Linear layers and convolutions, forward and transposed, under a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import Plan
from .planned import Planned, refuse_nested

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear"]


class Linear(Planned, nn.Linear):
    """`torch.nn.Linear` under a plan."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        refuse_nested("Linear", (input,))
        return ops.linear(input, self.weight, self.bias, self.plan)


if TYPE_CHECKING:
    _ConvBase = nn.modules.conv._ConvNd
    _ConvTransposeBase = nn.modules.conv._ConvTransposeNd
else:
    _ConvBase = _ConvTransposeBase = object


class _Conv(_ConvBase):
    """What the convolutions share: padding by mode, and inputs without a batch dimension."""

    plan: Plan

    def forward(self, input: Tensor) -> Tensor:
        """([N,] in_channels, *spatial) to ([N,] out_channels, *spatial)."""
        dims = len(self.kernel_size)
        unbatched = input.dim() == dims + 1
        x = input.unsqueeze(0) if unbatched else input
        x, padding = self._pad(x)
        stride = self.stride
        if not any(padding) and max(stride) > 1 == max(self.kernel_size):
            # Such a kernel passes over what lies between its strides: that needs no code and no place in a statistic.
            x = x[(slice(None), slice(None), *(slice(None, None, step) for step in stride))]
            stride = (1,) * dims
        y = ops.conv(
            x,
            self.weight,
            self.bias,
            self.plan,
            stride=stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y.squeeze(0) if unbatched else y

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input with whatever padding the GEMM cannot do itself, and what is left for the GEMM."""
        dims = len(self.kernel_size)
        sides = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            return F.pad(x, sides, mode=self.padding_mode), (0,) * dims
        if not isinstance(self.padding, str):
            return x, tuple(int(p) for p in self.padding)
        left, right = sides[0::2][::-1], sides[1::2][::-1]
        if left == right:
            return x, tuple(left)
        return F.pad(x, sides), (0,) * dims


class Conv1d(Planned, _Conv, nn.Conv1d):
    """`torch.nn.Conv1d` under a plan."""


class Conv2d(Planned, _Conv, nn.Conv2d):
    """`torch.nn.Conv2d` under a plan."""


class Conv3d(Planned, _Conv, nn.Conv3d):
    """`torch.nn.Conv3d` under a plan."""


class _ConvTranspose(_ConvTransposeBase):
    """What the transposed convolutions share: the size of the output, and inputs without a batch dimension."""

    plan: Plan

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """([N,] in_channels, *spatial) to ([N,] out_channels, *spatial).

        Args:
            input: the tensor.
            output_size: which of the sizes that a stride leaves open the output has; with or without its first
                dimensions.
        """
        dims = len(self.kernel_size)
        assert not isinstance(self.padding, str)
        stride, padding, dilation = list(self.stride), list(self.padding), list(self.dilation)
        sizes = None if output_size is None else list(output_size)
        extra = self._output_padding(input, sizes, stride, padding, list(self.kernel_size), dims, dilation)
        unbatched = input.dim() == dims + 1
        x = input.unsqueeze(0) if unbatched else input
        if all(more < step for more, step in zip(extra, stride, strict=True)):
            y = self._transposed(x, self.bias, padding, extra)
        else:
            # No convolution leads back from that many rows: cut the full result instead, and add the bias to all of it.
            y = self._transposed(x, None, [0] * dims, [0] * dims)
            cuts = [(-pad, more - pad) for pad, more in zip(padding, extra, strict=True)]
            y = F.pad(y, [cut for pair in reversed(cuts) for cut in pair])
            y = y if self.bias is None else y + self.bias.to(y.dtype).view(-1, *(1,) * dims)
        return y.squeeze(0) if unbatched else y

    def _transposed(self, x: Tensor, bias: Tensor | None, padding: list[int], extra: list[int]) -> Tensor:
        return ops.conv_transpose(
            x,
            self.weight,
            bias,
            self.plan,
            stride=self.stride,
            padding=tuple(padding),
            output_padding=tuple(extra),
            dilation=self.dilation,
            groups=self.groups,
        )


class ConvTranspose1d(Planned, _ConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` under a plan."""


class ConvTranspose2d(Planned, _ConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` under a plan."""


class ConvTranspose3d(Planned, _ConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` under a plan."""
