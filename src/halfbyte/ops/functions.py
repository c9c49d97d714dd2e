"""`linear`, `conv`, `conv_transpose` and `matmul` under a `Plan`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .layer_pass import Pass
from .operator import Kind, lay_out, traced
from .plan import Plan
from .three_gemms import ThreeGemms, add_bias, out_dtype

__all__ = ["conv", "conv_transpose", "in_dtype", "is_abstract", "linear", "matmul", "not_compiled"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """``x @ weight.T + bias`` with the plan's numerics.

    Args:
        x: (..., I), any floating type.
        weight: (O, I).
        bias: (O,) or None; added in floating point.
        plan: the numerics.

    Returns:
        (..., O) in the type of x, or autocast's where that is on.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: an input of shape {tuple(x.shape)} was given to a weight of shape {tuple(weight.shape)}; "
            f"the input's last dimension must be {weight.shape[1]}."
        )
    if plan.in_floating_point:
        return in_dtype(torch.nn.functional.linear, plan, x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _run(rows, weight, bias, plan, "linear").view(*x.shape[:-1], weight.shape[0])


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """A convolution in one, two or three spatial dimensions with the plan's numerics.

    Args:
        x: (N, I, *spatial), any floating type.
        weight: (O, I / groups, *kernel).
        bias: (O,) or None; added in floating point.
        plan: the numerics.
        stride: per spatial dimension.
        padding: zeros on either side, per spatial dimension.
        dilation: per spatial dimension.
        groups: how many groups the channels form.

    Returns:
        (N, O, *spatial) in the type of x, or autocast's where that is on.
    """
    if plan.in_floating_point:
        function = (torch.conv1d, torch.conv2d, torch.conv3d)[len(stride) - 1]
        return in_dtype(function, plan, x, weight, bias, stride, padding, dilation, groups)
    return _run(x, weight, bias, plan, "conv", (groups, *stride, *padding, *dilation))


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """A transposed convolution in one, two or three spatial dimensions with the plan's numerics.

    Args:
        x: (N, I, *spatial), any floating type.
        weight: (I, O / groups, *kernel).
        bias: (O,) or None; added in floating point.
        plan: the numerics.
        stride: per spatial dimension.
        padding: rows taken off the result on either side, per spatial dimension.
        output_padding: rows added to one side of the result, per spatial dimension.
        dilation: per spatial dimension.
        groups: how many groups the channels form.

    Returns:
        (N, O, *spatial) in the type of x, or autocast's where that is on.
    """
    if plan.in_floating_point:
        function = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[len(stride) - 1]
        return in_dtype(function, plan, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _run(x, weight, bias, plan, "conv_transpose", (groups, *stride, *padding, *dilation, *output_padding))


def matmul(a: Tensor, b: Tensor, plan: Plan) -> Tensor:
    """``a @ b.mT`` for a batch of matrices, both quantized: a in the input's slots, b in the weight's.

    Args:
        a: (B, M, K), any floating type.
        b: (B, N, K), the same type.
        plan: the numerics.

    Returns:
        (B, M, N) in the type of a, or autocast's where that is on.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise ValueError(
            f"matmul: shapes {tuple(a.shape)} and {tuple(b.shape)} were given; (B, M, K) and (B, N, K) are possible."
        )
    if plan.in_floating_point:
        return in_dtype(lambda x, w, _: x @ w.mT, plan, a, b, None)
    return _run(a, b, None, plan, "matmul")


def in_dtype(function: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """The ordinary operation in the recipe's dtype, whatever autocast says, its result in that of x or autocast's."""
    dtype = plan.recipe.dtype
    with torch.autocast(x.device.type, enabled=False):
        result: Tensor = function(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *args)
    return result.to(out_dtype(x))


def is_abstract(*tensors: Tensor) -> bool:
    """Whether a tensor has a shape but no numbers: then there is nothing to round, and only the shape is computed."""
    return any(t.is_meta or isinstance(t, FakeTensor) for t in tensors)


def not_compiled(function: Any, *args: Any) -> Any:
    """Calls a function, outside the graph where one is being compiled.

    A compiler may fuse a product and a sum and so round once where the definition rounds twice: break the graph.
    """
    return torch.compiler.disable(function)(*args) if torch.compiler.is_compiling() else function(*args)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, kind: Kind, steps: tuple[int, ...] = ()) -> Tensor:
    """A layer, eagerly or as an operator of the graph that is being compiled; see `lay_out`."""
    if torch.compiler.is_compiling():
        return traced(x, weight, bias, plan, kind, steps)
    geometry = lay_out(kind, x.shape, weight.shape, steps)
    if is_abstract(x, weight):
        return add_bias(geometry.apply("fprop", x, weight), bias).to(out_dtype(x))
    learned = [None if q is None else q.learned for q in (plan.input, plan.weight)]
    run = Pass.start(plan, geometry, weight)
    result: Tensor = ThreeGemms.apply(x, weight, bias, *learned, run)  # type: ignore[no-untyped-call]
    return result
