"""The three GEMMs as differentiable functions: `linear` and `conv` under a `Plan`.

A plan is a recipe's six slots with their quantizers' state. Between the forward and the backward pass an operation
keeps packed codes, scales and, where a learned clip needs it, one bit an element; a floating slot keeps its tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .errors import UnsupportedError
from .formats import Format
from .kernels import Conv, Geometry, Linear
from .qtensor import QTensor
from .quantizers import GradQuantizer, GradScaleState, Quantizer, Spec, in_backward
from .recipes import REUSE, Recipe

__all__ = ["Plan", "conv", "linear"]


class Plan(nn.Module):
    """The six operand slots of one layer: a recipe and the state of its quantizers.

    Attributes:
        recipe: what it was built from; at least one slot holds a spec, or `Recipe.dtype` is set.
        backend: a name in `halfbyte.kernels.BACKENDS`.
        input: quantizer of ``fprop.input``, or None.
        weight: quantizer of ``fprop.weight``, or None.
        dgrad_weight: quantizer of ``dgrad.weight`` where it is not reused, or None.
        wgrad_input: quantizer of ``wgrad.input`` where it is not reused, or None.
        grad_output: quantizer of both grad_output slots, or None.
    """

    input: Quantizer | None
    weight: Quantizer | None
    dgrad_weight: Quantizer | None
    wgrad_input: Quantizer | None
    grad_output: GradQuantizer | None
    weight_checksum: Tensor

    def __init__(
        self,
        recipe: Recipe,
        *,
        device: torch.device | None = None,
        backend: str = "reference",
        shared_scale: GradScaleState | None = None,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        """Fresh state for a recipe.

        Args:
            recipe: the recipe.
            device: where the state lives.
            backend: a name in `halfbyte.kernels.BACKENDS`.
            shared_scale: the model's one gradient scale, for a recipe that has one (`GradScaleSpec.shared`).
            seed: what random rounding draws from, with the layer's number and the step.
            layer: the layer's number in its model.

        Raises:
            UnknownNameError: if there is no such backend.
        """
        super().__init__()
        kernels.get(backend)
        # A layer has no use for the rules that chose its recipe, and they may hold functions that cannot be pickled.
        self.recipe = replace(recipe, rules=())
        self.backend = backend
        slots = {
            "input": recipe.fprop.input,
            "weight": recipe.fprop.weight,
            "dgrad_weight": recipe.dgrad.weight,
            "wgrad_input": recipe.wgrad.input,
        }
        for name, spec in slots.items():
            self.register_module(name, spec.build(device=device, backend=backend) if isinstance(spec, Spec) else None)
        grad_output = None
        if recipe.grad_scale is not None:
            scale = shared_scale if shared_scale is not None else recipe.grad_scale.build(device=device)
            grad_output = GradQuantizer(
                recipe.dgrad.grad_output,
                recipe.wgrad.grad_output,
                scale,
                device=device,
                backend=backend,
                seed=seed,
                layer=layer,
            )
        self.register_module("grad_output", grad_output)
        # No weight's: the first forward pass after building or loading settles what a checkpoint left to be settled.
        self.register_buffer("weight_checksum", torch.tensor(1 << 40, device=device), persistent=False)
        self._weight_version = -1
        self._passed_over = False

    @property
    def kernels(self) -> kernels.Backend:
        """The backend's functions."""
        return kernels.get(self.backend)

    @property
    def formats(self) -> dict[str, str]:
        """The format of each slot by name, as `summary` prints it."""
        shown = {}
        for name, spec in self.recipe.slots.items():
            if spec is REUSE:
                shown[name] = "reuse"
            elif spec is None:
                shown[name] = "float" if self.recipe.dtype is None else str(self.recipe.dtype).removeprefix("torch.")
            else:
                quantizer = getattr(self, name.split(".")[1]) if name.startswith("fprop") else None
                known: Format | None = quantizer.format if quantizer is not None else None
                shown[name] = known.name if known else "|".join(f.name for f in spec.formats)
        return shown

    def begin(self, weight: Tensor) -> bool:
        """Starts a forward pass: settles the vote if the optimizer has stepped; returns whether state may move.

        A step is seen by the weight's version, which in-place updates raise, or its bits, of which a checksum is kept
        (fused optimizers raise no version, and a parametrization's weight is new each time). A weight that is not
        trained has no steps, so there each training forward counts; a scale that other layers share follows theirs.
        Activation checkpointing runs a forward pass twice, the first time, in one of its two forms, without gradients:
        then the second moves the state in its place.
        """
        if not (self.training and torch.is_grad_enabled()):
            self._passed_over = self.training
            return False
        again = in_backward() and not self._passed_over
        self._passed_over = False
        if again:
            return False
        if self.grad_output is not None:
            seen = _checksum(weight)
            stepped = (seen != self.weight_checksum) | (weight._version != self._weight_version)
            if not weight.requires_grad:
                shared = self.grad_output.grad_scale.spec.shared
                stepped = torch.full_like(stepped, not shared)
            self.grad_output.grad_scale.advance(stepped)
            self.weight_checksum.copy_(seen)
            self._weight_version = weight._version
        return True

    def extra_repr(self) -> str:
        return f"recipe={self.recipe.name}, backend={self.backend}"


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
    if plan.recipe.in_floating_point:
        return _in_dtype(torch.nn.functional.linear, plan, x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    geometry = Linear(rows=rows.shape[0], in_features=weight.shape[1], out_features=weight.shape[0])
    return _run(rows, weight, bias, plan, geometry).view(*x.shape[:-1], weight.shape[0])


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
    if plan.recipe.in_floating_point:
        function = (torch.conv1d, torch.conv2d, torch.conv3d)[len(stride) - 1]
        return _in_dtype(function, plan, x, weight, bias, stride, padding, dilation, groups)
    geometry = Conv(
        input_shape=tuple(x.shape),
        weight_shape=tuple(weight.shape),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    return _run(x, weight, bias, plan, geometry)


def _in_dtype(function: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """The ordinary operation in the recipe's dtype, its result in the type of x."""
    dtype = plan.recipe.dtype
    result: Tensor = function(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *args)
    return result.to(x.dtype)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, geometry: Geometry) -> Tensor:
    if torch.compiler.is_compiling():
        # A compiler may fuse a product and a sum and so round once where the definition rounds twice: break the graph.
        eager: Tensor = torch.compiler.disable(_run_eagerly)(x, weight, bias, plan, geometry)
        return eager
    return _run_eagerly(x, weight, bias, plan, geometry)


def _run_eagerly(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, geometry: Geometry) -> Tensor:
    observe = plan.begin(weight)
    clips = [None if q is None else q.clip for q in (plan.input, plan.weight)]
    result: Tensor = _ThreeGemms.apply(x, weight, bias, *clips, plan, geometry, observe)  # type: ignore[no-untyped-call]
    return result


class _Kept(NamedTuple):
    """Where among the saved tensors an operand and its quantizer's own tensors are; with a format it is a `QTensor`."""

    parts: list[int]
    fmt: Format | None
    shape: torch.Size
    saved: list[int]


class _ThreeGemms(torch.autograd.Function):
    """fprop in forward, dgrad and wgrad in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_clip: Tensor | None,
        weight_clip: Tensor | None,
        plan: Plan,
        geometry: Geometry,
        observe: bool,
    ) -> Tensor:
        out_dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        need_x, need_w, _, need_x_clip, need_w_clip = ctx.needs_input_grad[:5]
        need_dgrad, need_wgrad = need_x or need_x_clip, need_w or need_w_clip
        wide_x, wide_w = _wide(x), _wide(weight)

        def encode(quantizer: Quantizer | None, operand: Tensor, differentiable: bool) -> tuple[Any, tuple[Any, ...]]:
            if quantizer is None:
                return operand, ()
            return quantizer.quantize(operand, observe=observe, differentiable=differentiable)

        xq, x_saved = encode(plan.input, wide_x, need_dgrad)
        wq, w_saved = encode(plan.weight, wide_w, need_wgrad)
        result = plan.kernels.gemm("fprop", xq, wq, geometry, accumulate=plan.recipe.accumulate)
        if bias is not None:
            result += bias.to(result.dtype).view(-1, *(1,) * (result.dim() - 2))
        ctx.plan, ctx.geometry, ctx.observe = plan, geometry, observe
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.need = (need_dgrad, need_wgrad)
        # dgrad multiplies the weight and then passes the input's clip; wgrad the other way round.
        recipe = plan.recipe
        operands: list[tuple[Any, tuple[Any, ...]]] = []
        dgrad_w = wq if recipe.dgrad.weight is REUSE else encode(plan.dgrad_weight, wide_w, False)[0]
        wgrad_x = xq if recipe.wgrad.input is REUSE else encode(plan.wgrad_input, wide_x, False)[0]
        operands.append((dgrad_w if need_dgrad else None, ()))
        operands.append((wgrad_x if need_wgrad else None, ()))
        operands.append((xq if need_dgrad and x_saved else None, x_saved))
        operands.append((wq if need_wgrad and w_saved else None, w_saved))
        _save(ctx, operands)
        return result.to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "A second derivative through a 4-bit layer was asked for (create_graph=True); rounding has none. "
                "Leave create_graph out, or give the layer Rule(fqn=..., recipe='fp32')."
            )
        plan: Plan = ctx.plan
        accumulate = plan.recipe.accumulate
        (dgrad_w, _), (wgrad_x, _), (xq, x_saved), (wq, w_saved) = _load(ctx)
        grad = _wide(grad_output)
        for_dgrad: QTensor | Tensor = grad
        for_wgrad: QTensor | Tensor = grad
        if plan.grad_output is not None:
            for_dgrad, for_wgrad = plan.grad_output.quantize_pair(grad, observe=ctx.observe)
        grads: list[Tensor | None] = [None] * 8
        if ctx.need[0]:
            grad_x = plan.kernels.gemm("dgrad", for_dgrad, dgrad_w, ctx.geometry, accumulate=accumulate)
            if plan.input is not None:
                grad_x, grads[3] = plan.input.backward(grad_x, xq, x_saved)
            grads[0] = grad_x.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        if ctx.need[1]:
            grad_w = plan.kernels.gemm("wgrad", for_wgrad, wgrad_x, ctx.geometry, accumulate=accumulate)
            if plan.weight is not None:
                grad_w, grads[4] = plan.weight.backward(grad_w, wq, w_saved)
            grads[1] = grad_w.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[2]:
            grads[2] = grad.sum([d for d in range(grad.dim()) if d != 1]).to(ctx.dtypes[2])
        return tuple(grads)


def _checksum(weight: Tensor) -> Tensor:
    """The sum of a tensor's bits, word by word, modulo 2^32: the same on any number of threads. int64 of shape ()."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().reshape(-1).view(words).sum(dtype=torch.int32).long()


def _wide(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _save(ctx: Any, operands: list[tuple[Any, tuple[Any, ...]]]) -> None:
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
            parts = [keep(t) for t in (operand.qdata, operand.scale, operand.zero_point)]
            kept = _Kept(parts, operand.format, operand.shape, [keep(t) for t in saved])
        else:
            kept = _Kept([keep(operand)], None, torch.Size(), [keep(t) for t in saved])
        ctx.layout.append(kept)
    ctx.save_for_backward(*tensors)


def _load(ctx: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    tensors = ctx.saved_tensors
    operands: list[tuple[Any, tuple[Any, ...]]] = []
    for kept in ctx.layout:
        parts = [tensors[i] for i in kept.parts]
        if kept.fmt is None:
            operand = parts[0]
        else:
            operand = QTensor(parts[0], parts[1], kept.fmt, kept.shape, parts[2])
        operands.append((operand, tuple(tensors[i] for i in kept.saved)))
    return operands
