"""The layers as two operators of torch, which `torch.compile` puts into its graphs and does not look into.

A compiler that looked inside would fuse a product and a sum and so round once where the definition rounds twice. The
operators run what the eager layers run. What the forward pass keeps for the backward pass hangs on the storage of a
token, a tensor of one byte that autograd keeps in its place, and lives as long as that (docs/decisions/0019).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..kernels import Batched, Conv, ConvTranspose, Geometry, Linear
from .layer_pass import Pass
from .plan import Plan, plan_of
from .three_gemms import backward, forward, out_dtype

__all__ = ["Kind", "lay_out", "traced"]

Kind = Literal["linear", "conv", "conv_transpose", "matmul"]

_LIBRARY = torch.library.Library("halfbyte", "FRAGMENT")
# A call moves the plan's state, may draw random numbers, and does what no recording of a device's work repeats; the
# second tag is younger than the oldest torch that works.
_TAGS = [
    getattr(torch.Tag, name) for name in ("nondeterministic_seeded", "cudagraph_unsafe") if hasattr(torch.Tag, name)
]
_LIBRARY.define(
    "layer(Tensor x, Tensor weight, Tensor? bias, Tensor? input_learned, Tensor? weight_learned, Tensor handle, "
    "str kind, int[] steps, bool grad, bool[] needs, ScalarType dtype, int call) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "layer_backward(Tensor grad, Tensor token, SymInt[] x_shape, SymInt[] weight_shape, bool[] needs, "
    "ScalarType x_dtype, ScalarType weight_dtype, ScalarType bias_dtype) -> Tensor[]",
    tags=_TAGS,
)
_CALLS = itertools.count()


def lay_out(kind: Kind, x: Sequence[int], weight: Sequence[int], steps: Sequence[int]) -> Geometry:
    """The geometry of a layer.

    Args:
        kind: of the layer.
        x: shape of its input.
        weight: shape of its weight.
        steps: of a convolution the groups, then for each spatial dimension stride, padding and dilation, and for a
            transposed one the output padding; else empty.
    """
    if kind == "linear":
        return Linear(rows=x[0], in_features=weight[1], out_features=weight[0])
    if kind == "matmul":
        return Batched(batch=x[0], rows=x[1], columns=weight[1], inner=x[2])
    dims = len(x) - 2
    stride, padding, dilation, *more = (tuple(steps[i : i + dims]) for i in range(1, len(steps), dims))
    if kind == "conv_transpose":
        spatial = (
            (size - 1) * step - 2 * pad + dil * (kernel - 1) + extra + 1
            for size, step, pad, dil, kernel, extra in zip(
                x[2:], stride, padding, dilation, weight[2:], more[0], strict=True
            )
        )
        x = (x[0], weight[1] * steps[0], *spatial)
    mirror = Conv(
        input_shape=tuple(x),
        weight_shape=tuple(weight),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=steps[0],
    )
    return ConvTranspose(conv=mirror) if kind == "conv_transpose" else mirror


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _next_call() -> int:
    """A number that no other call in a graph has: the compiler would make one of two equal calls."""
    return next(_CALLS)


def traced(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, kind: Kind, steps: Sequence[int]) -> Tensor:
    """A layer's output as an operator of the graph that is being compiled; see `lay_out`."""
    learned = [None if q is None else q.learned for q in (plan.input, plan.weight)]
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (x, weight, bias, *learned)]
    y, _ = torch.ops.halfbyte.layer(
        x, weight, bias, *learned, plan.handle, kind, steps, grad, needs, out_dtype(x), _next_call()
    )
    result: Tensor = y
    return result


class _Kept:
    """What autograd's context is to `forward` and `backward`, with the saved tensors themselves."""

    saved_tensors: tuple[Tensor | None, ...]

    def __init__(self, given: Sequence[Tensor | None], needs: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs)
        self._given = {t.untyped_storage().data_ptr() for t in given if t is not None}

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps tensors. An argument's memory may hold something else by the time of the backward pass: copies it."""
        self.saved_tensors = tuple(
            t.clone() if t is not None and t.untyped_storage().data_ptr() in self._given else t for t in tensors
        )


def _layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_learned: Tensor | None,
    weight_learned: Tensor | None,
    handle: Tensor,
    kind: Kind,
    steps: Sequence[int],
    grad: bool,
    needs: Sequence[bool],
    dtype: torch.dtype,
    _call: int,
) -> tuple[Tensor, Tensor]:
    geometry = lay_out(kind, x.shape, weight.shape, steps)
    run = Pass.start(plan_of(handle), geometry, weight, grad=grad, trained=needs[1])
    kept = _Kept((x, weight, bias, input_learned, weight_learned), needs)
    y = forward(kept, x, weight, bias, run)
    token = torch.zeros(1, dtype=torch.uint8, device=x.device)
    if any(needs):
        token.untyped_storage().kept = kept  # type: ignore[attr-defined]
    return y.to(dtype).contiguous(), token


def _layer_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kind, steps, dtype = rest[4], rest[5], rest[8]
    shape = lay_out(kind, x.shape, weight.shape, steps).output_shape
    return x.new_empty(shape, dtype=dtype), x.new_empty(1, dtype=torch.uint8)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *_, needs, _, _ = inputs
    ctx.save_for_backward(output[1])
    dtypes = x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
    ctx.args = (x.shape, weight.shape, needs, *dtypes)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    found = iter(torch.ops.halfbyte.layer_backward(grad, *ctx.saved_tensors, *ctx.args))
    needs = ctx.args[2]
    return (*(next(found) if need else None for need in needs), *(None,) * 7)


def _layer_backward(grad: Tensor, token: Tensor, *_: Any) -> list[Tensor]:
    kept = getattr(token.untyped_storage(), "kept", None)
    if kept is None:
        raise UnsupportedError(
            "The backward pass of a compiled 4-bit layer was given a copy of the token that its forward pass returned. "
            "Saved-tensor hooks make such copies: leave them out, or do not compile the layer."
        )
    grads = backward(kept, grad)
    return [g.contiguous() for g in grads if g is not None]


def _layer_backward_fake(
    grad: Tensor,
    _token: Tensor,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    needs: Sequence[bool],
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> list[Tensor]:
    one = ([1], torch.float32)  # what a quantizer learns
    made = ((x_shape, x_dtype), (weight_shape, weight_dtype), (grad.shape[1:2], bias_dtype), one, one)
    return [grad.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(made, needs, strict=True) if need]


_LIBRARY.impl("layer", _layer, "CompositeExplicitAutograd")
_LIBRARY.impl("layer_backward", _layer_backward, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::layer", _layer_fake, lib=_LIBRARY)
torch.library.register_fake("halfbyte::layer_backward", _layer_backward_fake, lib=_LIBRARY)
torch.library.register_autograd("halfbyte::layer", _differentiate, setup_context=_remember, lib=_LIBRARY)
