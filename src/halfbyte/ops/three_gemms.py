"""fprop in forward, dgrad and wgrad in backward, and the autograd function of the two."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..formats import Format
from ..kernels import Gemm
from ..qtensor import Blocks, QTensor
from .layer_pass import Operand, Pass, Saved

__all__ = ["ThreeGemms", "add_bias", "backward", "forward", "load", "out_dtype", "refuse_second_derivative", "save"]


class ThreeGemms(torch.autograd.Function):
    """A layer's product with its bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_learned: Tensor | None,
        weight_learned: Tensor | None,
        run: Pass,
    ) -> Tensor:
        """The layer's output; the learned numbers are arguments so that autograd gives them their gradients."""
        return forward(ctx, x, weight, bias, run).to(out_dtype(x))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """grad_input, grad_weight, grad_bias and the gradients of what was learned."""
        return (*backward(ctx, grad_output), None)


def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, run: Pass) -> Tensor:
    """The layer's output in the type that it is computed in.

    Args:
        ctx: autograd's context, or what stands for it: ``needs_input_grad`` tells which of x, weight, bias, input's and
            weight's learned number need a gradient; ``save_for_backward`` takes tensors.
        x: the input.
        weight: the weight.
        bias: the bias, or None.
        run: the pass.
    """
    need_x, need_w, _, need_x_learned, need_w_learned = ctx.needs_input_grad[:5]
    need_dgrad, need_wgrad = run.graph and (need_x or need_x_learned), run.graph and (need_w or need_w_learned)
    wide_x, wide_w = run.widen("input", x), run.widen("weight", weight)
    with run.inside():
        xq, x_saved = run.encode("fprop.input", wide_x, differentiable=need_dgrad)
        wq, w_saved = run.encode("fprop.weight", wide_w, differentiable=need_wgrad)
        result = add_bias(run.product("fprop", (xq,), wq), bias)
        ctx.run = run
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.need = (need_dgrad, need_wgrad)
        # dgrad multiplies the weight and then passes the input's quantizer; wgrad the other way round.
        operands: list[tuple[Operand | None, Saved]] = [
            (run.keep("weight", wide_w, wq) if need_dgrad else None, ()),
            (run.keep("input", wide_x, xq) if need_wgrad else None, ()),
            (xq if need_dgrad and x_saved else None, x_saved),
            (wq if need_wgrad and w_saved else None, w_saved),
        ]
    save(ctx, operands)
    return result


def backward(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    """The gradients of x, weight, bias, and the learned numbers of the input's and the weight's quantizer.

    Args:
        ctx: what `forward` was given.
        grad_output: of the layer's output.
    """
    refuse_second_derivative()
    run: Pass = ctx.run
    (kept_w, _), (kept_x, _), (xq, x_saved), (wq, w_saved) = load(ctx)
    grad = run.widen("grad_output", grad_output)
    grads: list[Tensor | None] = [None] * 5
    with run.inside():
        partners: dict[Gemm, Operand] = {}
        if ctx.need[0]:
            partners["dgrad"] = run.take("weight", kept_w)
        if ctx.need[1]:
            partners["wgrad"] = run.take("input", kept_x)
        parts = run.gradients(grad, partners)
        if ctx.need[0]:
            product = run.product("dgrad", parts["dgrad"], partners["dgrad"])
            grad_x, grads[3] = run.through("input", product, xq, x_saved)
            grads[0] = grad_x.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        if ctx.need[1]:
            product = run.product("wgrad", parts["wgrad"], partners["wgrad"])
            grad_w, grads[4] = run.through("weight", product, wq, w_saved)
            grads[1] = grad_w.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[2]:
            dims = [d for d in range(grad.dim()) if d != 1]
            grads[2] = grad.sum(dims, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.dtypes[2])
    return grads


def out_dtype(x: Tensor) -> torch.dtype:
    """What a layer returns: autocast's type where that is on, else the type of its input."""
    kind = x.device.type
    if x.dtype == torch.float64:
        return x.dtype
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y plus a bias along its second dimension, in place."""
    if bias is not None:
        y += bias.to(y.dtype).view(-1, *(1,) * (y.dim() - 2))
    return y


def refuse_second_derivative() -> None:
    """Raises `UnsupportedError` in a backward pass that builds a graph."""
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "A second derivative through a 4-bit layer was asked for (create_graph=True); rounding has none. "
            "Leave create_graph out, or give the layer Rule(fqn=..., recipe='fp32')."
        )


class _Kept(NamedTuple):
    """Where among the saved tensors an operand and its quantizer's own tensors are; with a format it is a `QTensor`."""

    parts: list[int]
    fmt: Format | None
    shape: torch.Size
    blocks: Blocks | None
    saved: list[int]


def save(ctx: Any, operands: list[tuple[Operand | None, Saved]]) -> None:
    """Keeps (operand, quantizer's tensors) pairs through autograd, so that saved-tensor hooks see every byte, once."""
    tensors: list[Tensor | None] = []
    places: dict[int, int] = {}

    def keep(tensor: Tensor | None) -> int:
        if id(tensor) not in places:
            places[id(tensor)] = len(tensors)
            tensors.append(tensor)
        return places[id(tensor)]

    ctx.layout = []
    for operand, saved in operands:
        if isinstance(operand, QTensor):
            parts = [keep(t) for t in (operand.qdata, operand.scale, operand.zero_point, operand.block_scale)]
            kept = _Kept(parts, operand.format, operand.shape, operand.blocks, [keep(t) for t in saved])
        else:
            kept = _Kept([keep(operand)], None, torch.Size(), None, [keep(t) for t in saved])
        ctx.layout.append(kept)
    ctx.save_for_backward(*tensors)


def load(ctx: Any) -> list[tuple[Any, Saved]]:
    """The pairs that were given to `save`."""
    tensors = ctx.saved_tensors
    operands: list[tuple[Any, Saved]] = []
    for kept in ctx.layout:
        parts = [tensors[i] for i in kept.parts]
        operand = parts[0]
        if kept.fmt is not None:
            qdata, scale, zero_point, block_scale = parts
            operand = QTensor(qdata, scale, kept.fmt, kept.shape, zero_point, block_scale, kept.blocks)
        operands.append((operand, tuple(tensors[i] for i in kept.saved)))
    return operands
