"""Layers that run under a `Plan`: torch's own classes with another `forward`, and the plan in their `repr`.

A layer is converted by changing its class, not by replacing it: its parameters, hooks, and every reference to it stay.
`TWINS` is the table from torch's class to ours; only exact classes are in it, because a subclass may use its weight
in ways of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .ops import Plan

__all__ = ["TWINS", "Conv1d", "Conv2d", "Conv3d", "Linear", "adopt", "release"]


class _Planned(nn.Module):
    """What the twins share. `plan` is a submodule, so its state is in the layer's ``state_dict``."""

    plan: Plan
    why: str

    def extra_repr(self) -> str:
        slots = ", ".join(f"{name}={fmt}" for name, fmt in self.plan.formats.items())
        return f"{super().extra_repr()}, recipe={self.plan.recipe.name}, {slots}"


class Linear(_Planned, nn.Linear):
    """`torch.nn.Linear` under a plan."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return ops.linear(input, self.weight, self.bias, self.plan)


if TYPE_CHECKING:
    _ConvBase = nn.modules.conv._ConvNd
else:
    _ConvBase = object


class _Conv(_ConvBase):
    """What the convolutions share: padding by mode, and inputs without a batch dimension."""

    plan: Plan

    def forward(self, input: Tensor) -> Tensor:
        """([N,] in_channels, *spatial) to ([N,] out_channels, *spatial)."""
        dims = len(self.kernel_size)
        unbatched = input.dim() == dims + 1
        x = input.unsqueeze(0) if unbatched else input
        x, padding = self._pad(x)
        y = ops.conv(
            x,
            self.weight,
            self.bias,
            self.plan,
            stride=self.stride,
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


class Conv1d(_Planned, _Conv, nn.Conv1d):
    """`torch.nn.Conv1d` under a plan."""


class Conv2d(_Planned, _Conv, nn.Conv2d):
    """`torch.nn.Conv2d` under a plan."""


class Conv3d(_Planned, _Conv, nn.Conv3d):
    """`torch.nn.Conv3d` under a plan."""


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}
"""torch's class to ours."""

_ORIGINALS = {ours: theirs for theirs, ours in TWINS.items()}


def adopt(module: nn.Module, plan: Plan, why: str) -> None:
    """Turns one of torch's layers into our twin of it, in place.

    Args:
        module: a layer whose exact class is in `TWINS`.
        plan: its numerics.
        why: the rule that chose them, for `summary`.
    """
    module.__class__ = TWINS[type(module)]
    module.plan = plan
    module.why = why  # type: ignore[assignment]
    plan.train(module.training)


def release(module: nn.Module) -> None:
    """Turns our twin back into torch's layer, in place; its quantizers' state is dropped."""
    module.__class__ = _ORIGINALS[type(module)]
    del module.plan
    del module.why
