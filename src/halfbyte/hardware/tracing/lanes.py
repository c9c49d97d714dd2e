"""What an operator that is no matrix product costs: operations, bytes, and whether it can ride on a GEMM.

Operations are counted as the formulas have them: one for each addition, multiplication, comparison, division, root,
exponential or random number. What can ride along ("fusible") is what handles each element, or a small window, by
itself; what needs the sum over a row, a channel or a batch before it can give its first number cannot. A sum by itself
can: it is added up while the numbers pass.

An operator with two large operands is two entries. One operand passes by on its way out of a GEMM or into one, but the
other (the shortcut of a residual sum, the input that a ReLU's gradient is masked with) is read from memory either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..workload import StepPhase, VectorOp
from .products import distinct

__all__ = ["is_fill", "is_view", "label_of", "mutated", "outputs_of", "per_element", "work_of"]

_VIEWS = frozenset({
    "_unsafe_view", "_reshape_alias", "unsafe_split", "unsafe_split_with_sizes", "lift_fresh", "detach_", "alias",
    "_local_scalar_dense", "resize_", "set_",
})  # fmt: skip
"""Operators that give another name to memory, or a number, whose schema does not say so."""

_FILLS = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros",
    "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange", "scalar_tensor", "zero_", "fill_",
    "_efficientzerotensor",
})  # fmt: skip
"""Operators that make memory, empty or full of a constant."""

_NAMES: dict[str, str] = {
    "threshold": "relu",
    "hardtanh": "clamp",
    "clamp_min": "clamp",
    "safe_softmax": "softmax",
    "max_pool2d_with_indices": "max_pool",
    "max_pool3d_with_indices": "max_pool",
    "avg_pool2d": "avg_pool",
    "avg_pool3d": "avg_pool",
    "adaptive_avg_pool2d": "avg_pool",
    "adaptive_avg_pool3d": "avg_pool",
    "embedding_dense": "embedding",
    "nll_loss2d": "nll_loss",
    "cudnn_batch_norm": "batch_norm",
    "clone": "copy",
    "to_copy": "copy",
    "cat": "copy",
    "stack": "copy",
    "select": "copy",
    "slice": "copy",
    "split": "copy",
    "split_with_sizes": "copy",
    "constant_pad_nd": "copy",
    "index_select": "copy",
    "bernoulli": "dropout",
}
"""What an operator's root is called where that is not its name."""

# Forward and backward, for each element of the largest tensor.
_FLOPS: dict[str, tuple[int, int]] = {
    "copy": (0, 0),
    "embedding": (0, 1),  # backward: a sum
    "dropout": (3, 2),  # draw, compare, multiply by the mask, which holds the scale
    "gelu": (8, 12),  # an error function and its derivative, by a polynomial of five terms
    "silu": (3, 6),
    "hardswish": (4, 4),
    "hardsigmoid": (4, 2),
    "sigmoid": (3, 3),  # 1 / (1 + exp(-x)); g y (1 - y)
    "tanh": (4, 3),
    "elu": (3, 3),
    "leaky_relu": (2, 2),
    "softmax": (4, 3),  # largest (1), subtract, exponential, sum, and a division; g y, its sum, subtract, multiply
    "log_softmax": (4, 4),
    "layer_norm": (6, 9),  # sum, square and sum, subtract and divide, weight, bias
    "group_norm": (6, 9),
    "rms_norm": (4, 7),
    "lerp": (3, 3),
    "addcmul": (3, 3),
    "addcdiv": (3, 3),
    "mse_loss": (3, 2),
    "var_mean": (3, 3),
    "var": (3, 3),
}

_ROWWISE = frozenset({"softmax", "log_softmax", "layer_norm", "group_norm", "rms_norm", "cumsum", "sort", "topk"})
_WINDOWS = frozenset({"max_pool", "avg_pool", "copy", "embedding", "dropout", "upsample", "relu", "fill"})
_SUMS = frozenset({"sum", "mean", "amax", "amin", "max", "min", "var", "var_mean", "norm", "linalg_vector_norm"})
_SMALL = 8
"""An operand this many times smaller than the largest is no memory traffic worth an entry of its own."""


def label_of(name: str) -> tuple[str, bool]:
    """An operator's plain name, and whether it is a gradient: ``native_batch_norm_backward`` is batch_norm, true."""
    root = name.strip("_").removeprefix("native_")
    backward = root.endswith(("_backward", "_backward_data"))
    root = root.removesuffix("_data").removesuffix("_backward").removesuffix("_forward")
    if root.startswith("batch_norm"):
        root = "batch_norm"
    return _NAMES.get(root, "upsample" if root.startswith("upsample") else root), backward


def mutated(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for name in written for leaf in tree_leaves(named.get(name)) if isinstance(leaf, Tensor)]


def outputs_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Tensor]:
    """The tensors that an operator gives, or writes into where it gives none."""
    found = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    return found or mutated(func, args, kwargs)


def is_view(func: Any, name: str) -> bool:
    """Whether an operator gives memory that there is under another shape."""
    return name in _VIEWS or any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def is_fill(name: str) -> bool:
    """Whether an operator only makes memory."""
    return name in _FILLS


def per_element(name: str, kwargs: dict[str, Any] | None = None) -> int:
    """Operations for each element of an elementwise operator; a sum with a factor multiplies first."""
    label, backward = label_of(name)
    scaled = label in ("add", "sub") and (kwargs or {}).get("alpha", 1) != 1
    return _FLOPS.get(label, (1, 1))[backward] + int(scaled)


def work_of(
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    out: Any,
    *,
    layer: str,
    phase: StepPhase,
    high: int,
    prefix: str = "",
) -> Iterator[VectorOp]:
    """The entries of one call of an operator.

    Args:
        func: the operator, no product, view or fill.
        args: its arguments.
        kwargs: its keyword arguments.
        out: its result.
        layer: whose it is.
        phase: when.
        high: bytes of a floating-point element.
        prefix: before the names.
    """
    name = func._schema.name.partition("::")[2]
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    made = outputs_of(func, args, kwargs, out)
    count = max((distinct(t) for t in (*given, *made)), default=0)
    if not made or count <= 1:
        return
    label, backward = label_of(name)

    def entry(what: str, flops: int, read: float, written: float, fusible: bool) -> VectorOp:
        return VectorOp(
            layer=layer,
            name=prefix + what,
            phase=phase,
            elements=count,
            flops=flops,
            read_bytes=round(read),
            written_bytes=round(written),
            fusible=fusible,
        )

    size = _sizer(high, small=label == "max_pool")
    reads = sorted(map(size, given), reverse=True) or [0]
    written = sum(map(size, made))
    if label == "batch_norm":
        yield from _batch_norm(entry, count, backward, reads, written, training=_in_training(func, args))
        return
    fusible = torch.Tag.pointwise in func.tags or label in _WINDOWS or label in _SUMS
    if label in _ROWWISE:
        fusible = False
    others = sum(reads[1:])
    # All that a copy reads passes by.
    if fusible and label != "copy" and others * _SMALL >= reads[0]:
        yield entry(label, _flops(label, name, args, kwargs, count, made), reads[0], written, True)
        yield entry(f"{label}_operand", 0, others, 0, False)
    else:
        yield entry(label, _flops(label, name, args, kwargs, count, made), reads[0] + others, written, fusible)


def _sizer(high: int, *, small: bool) -> Callable[[Tensor], int]:
    """Bytes of a tensor; where a window's largest number stood needs one, not the eight of torch's index."""

    def size(tensor: Tensor) -> int:
        if tensor.is_floating_point():
            return distinct(tensor) * high
        return distinct(tensor) * (1 if small else tensor.element_size())

    return size


def _flops(
    label: str, name: str, args: Sequence[Any], kwargs: dict[str, Any], count: int, made: Sequence[Tensor]
) -> int:
    if label in ("max_pool", "avg_pool") and len(args) > 1 and "adaptive" not in name and "backward" not in name:
        window = args[1]
        dims = 3 if "3d" in name else 2 if "2d" in name else 1
        taps = math.prod(window) if len(window) > 1 else window[0] ** dims
        return distinct(made[0]) * int(taps)
    return count * per_element(name, kwargs)


def _in_training(func: Any, args: Sequence[Any]) -> bool:
    """Whether a batch norm measures its batch, by the argument that says so."""
    names = [argument.name for argument in func._schema.arguments]
    for name in ("training", "train"):
        if name in names and names.index(name) < len(args):
            return bool(args[names.index(name)])
    return "no_training" not in func._schema.name


def _batch_norm(
    entry: Callable[[str, int, float, float, bool], VectorOp],
    count: int,
    backward: bool,
    reads: Sequence[float],
    written: float,
    *,
    training: bool,
) -> Iterator[VectorOp]:
    """Sums over the batch, then, when all of it has passed, one multiplication and one addition for each element.

    Forward: x and x^2 are added up (3 operations), then ``x a + b`` (2). Backward: g and ``g x`` are added up (3), then
    ``g a + x b + c`` (4), from both again.
    """
    if not training:
        yield entry("batch_norm", 2 * count, sum(reads), written, True)
    elif not backward:
        yield entry("batch_norm_statistics", 3 * count, reads[0], 0, True)
        yield entry("batch_norm", 2 * count, reads[0], written, False)
    else:
        yield entry("batch_norm_statistics", 3 * count, reads[0], 0, True)
        yield entry("batch_norm_statistics_operand", 0, reads[1], 0, False)
        yield entry("batch_norm", 4 * count, reads[0] + reads[1], written, False)
