"""Functions that know better than their inputs what their backward pass needs: bits, or codes and a few statistics.

Each takes the place of one of torch's while a model runs its forward pass under the stash, and gives what that gives.

Dimensions: N images, C channels, S numbers of a plane.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import plane_fold
from ..qtensor import pack_bits, unpack_bits
from .run import Run, in_memory_order, is_dense, refuse_graph

__all__ = ["batch_norm", "dropout", "gate", "relu"]


@dataclass(frozen=True)
class _Masked:
    """A function's result and the bits of where its gradient passes, both in the order of memory.

    Attributes:
        result: in the shape of the input.
        bits: packed.
        stride: of the input, or of a row-major copy of it.
        factor: what the gradient is multiplied with where the bit is set.
        slope: and where it is not.
    """

    result: Tensor
    bits: Tensor
    stride: tuple[int, ...]
    run: Run
    factor: Tensor | None = None
    slope: float = 0.0


class _Mask(torch.autograd.Function):
    """Gives a result that is computed already, and masks the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, done: _Masked, inplace: bool) -> Tensor:
        """`done.result`, which is x where `inplace`."""
        ctx.how = done.stride, done.run.kernels, done.factor, done.slope
        ctx.save_for_backward(done.bits)
        if inplace:
            ctx.mark_dirty(x)
            return x
        return _unviewed(done.result)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """The gradient where the bits are set; scaled, or with a slope elsewhere."""
        refuse_graph()
        stride, kernels, factor, slope = ctx.how
        (bits,) = ctx.saved_tensors
        grad = _in_order(grad_output, stride)
        if factor is not None:
            kept = unpack_bits(bits, grad.numel()).to(grad.dtype) * factor
            found = grad * kept
        elif slope:
            found = torch.where(unpack_bits(bits, grad.numel()), grad, grad * slope)
        else:
            found = kernels.relu_backward(grad, bits)
        return found.as_strided(grad_output.shape, stride), None, None


def _unviewed(x: Tensor) -> Tensor:
    """The same memory in the same shape as a tensor of its own: autograd lets nobody write into a function's views."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def _in_order(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The elements in the order of memory that a tensor of those strides has, (n,)."""
    if x.stride() != stride:
        x = x.new_empty_strided(x.shape, stride).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def relu(run: Run, x: Tensor, *, inplace: bool = False) -> Tensor:
    """`torch.relu`, which keeps one bit an element."""
    with torch.no_grad():
        into = inplace and is_dense(x)
        flat, stride = in_memory_order(x)
        result, bits = run.kernels.relu(flat, flat if into else None)
        result = result.as_strided(x.shape, stride)
        if inplace and not into:
            x.copy_(result)
    return _finish(run, x, _Masked(result, bits, stride, run), inplace)


def gate(run: Run, x: Tensor, result: Callable[[Tensor], Tensor], passes: Callable[[Tensor], Tensor],
         *, slope: float = 0.0, inplace: bool = False) -> Tensor:  # fmt: skip
    """An elementwise function whose derivative is 1 or a constant, which keeps one bit an element.

    Args:
        run: this forward pass.
        x: its input.
        result: the function.
        passes: where its derivative is 1.
        slope: its derivative elsewhere.
        inplace: whether x takes the result.
    """
    with torch.no_grad():
        flat, stride = in_memory_order(x)
        bits = pack_bits(passes(flat))
        found = result(flat).as_strided(x.shape, stride)
        if inplace:
            x.copy_(found)
    return _finish(run, x, _Masked(found, bits, stride, run, slope=slope), inplace)


def dropout(run: Run, x: Tensor, p: float, *, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout` in training: the same random numbers and bits of the result, one bit kept."""
    with torch.no_grad():
        noise, stride = in_memory_order(torch.empty_like(x).bernoulli_(1 - p))
        bits = pack_bits(noise != 0)
        factor = torch.ones((), dtype=x.dtype).div_(1 - p)
        noise = noise.div_(1 - p).as_strided(x.shape, stride)
        found = x.mul_(noise) if inplace else x * noise
    return _finish(run, x, _Masked(found, bits, stride, run, factor), inplace)


def _finish(run: Run, x: Tensor, done: _Masked, inplace: bool) -> Tensor:
    run.ledger.add(run.operation, "1 bit", x.numel() * x.element_size(), done.bits.numel())
    with run.counted():
        result: Tensor = _Mask.apply(x, done, inplace)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Normed:
    """What batch norm computed: its result, and what its backward pass needs."""

    result: Tensor
    codes: Tensor
    steps: Tensor
    positive: Tensor | None
    mean: Tensor
    inv_std: Tensor
    bits: int
    run: Run


class _Norm(torch.autograd.Function):
    """Gives a result that is computed already, and batch norm's gradients from the codes of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, done: _Normed) -> Tensor:
        """The result in the shape and type of x."""
        ctx.how = done.run.kernels, done.bits
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(done.codes, done.steps.view(torch.uint8), done.positive, done.mean, done.inv_std, weight)
        return _unviewed(_shaped(done.result, x))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """With u = x - mean: ``w / std (g - mean(g) - u mean(g u) / var)``, and the gradients of weight and bias."""
        refuse_graph()
        kernels, bits = ctx.how
        codes, steps, positive, mean_C, inv_std_C, weight = ctx.saved_tensors
        kept = codes, steps.view(torch.bfloat16), bits, positive
        grad_NCS = _planes(grad_output)
        count = grad_NCS.shape[0] * grad_NCS.shape[2]
        of_grad_C, of_products_C = (plane_fold(sums_NC.t()) for sums_NC in kernels.norm_sums(grad_NCS, *kept))
        along_C = (of_products_C - mean_C * of_grad_C) * inv_std_C
        found: Tensor | None = None
        if ctx.needs_input_grad[0]:
            factor_C = inv_std_C if weight is None else inv_std_C * weight
            of_x_C = -factor_C * inv_std_C * along_C / count
            shift_C = -of_x_C * mean_C - factor_C * of_grad_C / count
            found = kernels.norm_backward(grad_NCS, *kept, factor_C.float(), of_x_C.float(), shift_C.float())
            found = _shaped(found, grad_output).to(ctx.dtypes[0])
        grad_weight = along_C.to(weight.dtype) if ctx.needs_input_grad[1] else None
        return found, grad_weight, of_grad_C.to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None, None


def _planes(x: Tensor) -> Tensor:
    """(N, C, *) to (N, C, S) in float32, contiguous."""
    return x.detach().float().contiguous().view(x.shape[0], x.shape[1], -1)


def _shaped(x_NCS: Tensor, like: Tensor) -> Tensor:
    """From (N, C, S) to the shape, type and order of dimensions of a tensor."""
    x = x_NCS.view(like.shape).to(like.dtype)
    return x.contiguous(memory_format=torch.channels_last) if _is_channels_last(like) else x


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def batch_norm(
    run: Run,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    *,
    with_relu: bool = False,
) -> Tensor | None:
    """`torch.nn.functional.batch_norm` in training, which keeps codes of its input; statistics are sums in float64.

    Args:
        run: this forward pass.
        x: (N, C, *), float32, bfloat16 or float16.
        running_mean: (C,) or None; follows by `momentum`.
        running_var: (C,) or None; the same.
        weight: (C,) or None.
        bias: (C,) or None.
        momentum: how far the running statistics follow.
        eps: is added to the variance.
        with_relu: whether `torch.relu` of the result is wanted; its bits are kept, too.

    Returns:
        The shape and type of x; None, with nothing done, where x holds a NaN or an infinity.
    """
    with torch.no_grad():
        x_NCS = _planes(x)
        count = x_NCS.shape[0] * x_NCS.shape[2]
        sum_C, squares_C = (plane_fold(sums_NC.t()) for sums_NC in run.kernels.plane_moments(x_NCS))
        mean_C = sum_C / count
        var_C = (squares_C / count - mean_C * mean_C).clamp_min_(0.0)
        inv_std_C = (var_C + eps).rsqrt()
        factor_C = inv_std_C if weight is None else inv_std_C * weight
        shift_C = -mean_C * factor_C if bias is None else bias - mean_C * factor_C
        y_NCS, codes, steps, positive, finite = run.kernels.norm_forward(
            x_NCS, factor_C.float(), shift_C.float(), run.bits, run.draw(), with_relu=with_relu
        )
        if not finite:
            return None
        unbiased_C = var_C * (count / (count - 1))
        for running, found_C in ((running_mean, mean_C), (running_var, unbiased_C)):
            if running is not None:
                running.mul_(1 - momentum).add_(found_C.to(running.dtype), alpha=momentum)
    normed = _Normed(y_NCS, codes, steps, positive, mean_C, inv_std_C, run.bits, run)
    kept = [x for x in (codes, steps, positive, mean_C, inv_std_C) if x is not None]
    after = sum(part.numel() * part.element_size() for part in kept)
    run.ledger.add(run.operation, f"int{run.bits}", x.numel() * x.element_size(), after)
    with run.counted():
        result: Tensor = _Norm.apply(x, weight, bias, normed)  # type: ignore[no-untyped-call]
    return result
