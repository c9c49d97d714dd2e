"""torch's operators in ONNX's, as far as networks need them: a table from one to the other.

A function here takes the place where it is called (`At`) and the arguments of a node of `torch.export`'s graph: a
string for a value that the graph computes or holds, anything else as it is. Shapes are read off the nodes, so that what
only gives a tensor another shape becomes one Reshape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedError
from .neural import NEURAL
from .place import At, Operator, shape_of, unknown

__all__ = ["LIKE", "OPERATORS"]

LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full")
"""What is filled with one number in the shape of something: constants here."""


def _reshape(at: At, x: str, *_: Any, **__: Any) -> str:
    y: str = at.emit("Reshape", x, at.graph.whole(shape_of(at.node)))
    return y


def _same(at: At, x: str, *_: Any, **__: Any) -> str:
    return x if isinstance(x, str) else at.graph.constant(x)


def _cast(at: At, x: str, *_: Any, **__: Any) -> str:
    y: str = at.emit("Cast", x, to=at.graph.dtype(at.node.meta["val"].dtype))
    return y


def _plain(op: str, **attributes: Any) -> Operator:
    """An operator of one tensor."""
    return lambda at, x, *_, **__: at.emit(op, x, **attributes)


def _pair(op: str) -> Operator:
    """An operator of two tensors, or of one and a number."""

    def emit(at: At, x: Any, y: Any, *, alpha: float = 1, rounding_mode: str | None = None) -> str:
        if rounding_mode is not None:
            raise unknown(at.node, f"rounding_mode={rounding_mode!r}")
        dtype = _dtype(at)
        if dtype == torch.bool:  # of a comparison, which compares numbers of one type
            values: Any = [a.meta["val"] if isinstance(a, fx.Node) else a for a in at.node.args[:2]]
            dtype = torch.result_type(*values)
        given = [_operand(at, value, place, dtype) for place, value in enumerate((x, y))]
        if alpha != 1:
            given[1] = at.emit("Mul", given[1], at.graph.constant(torch.tensor(alpha, dtype=dtype)))
        result: str = at.emit(op, *given)
        return result

    return emit


def _dtype(at: At) -> torch.dtype:
    """The type of a node's result."""
    dtype: torch.dtype = at.node.meta["val"].dtype
    return dtype


def _operand(at: At, value: Any, place: int, dtype: torch.dtype) -> str:
    """An argument of a node in a type: ONNX's operators take one type, where torch's find a common one.

    Args:
        at: the place.
        value: a value of the graph, or a number.
        place: which of the node's arguments it is.
        dtype: the type.
    """
    if not isinstance(value, str):
        return at.graph.constant(torch.tensor(value, dtype=dtype))
    return _typed(at, value, at.node.args[place], dtype)


def _typed(at: At, name: str, source: Any, dtype: torch.dtype) -> str:
    """A value of the graph in a type, where `source` is the traced node that gives it."""
    return name if source.meta["val"].dtype == dtype else str(at.emit("Cast", name, to=at.graph.dtype(dtype)))


def _transpose(at: At, x: str, first: int = -1, second: int = -2) -> str:
    order = list(range(at.node.meta["val"].dim()))
    order[first], order[second] = order[second], order[first]
    y: str = at.emit("Transpose", x, perm=order)
    return y


def _permute(at: At, x: str, dims: Sequence[int]) -> str:
    rank = at.node.meta["val"].dim()
    y: str = at.emit("Transpose", x, perm=[d % rank for d in dims])
    return y


def _expand(at: At, x: str, *_: Any, **__: Any) -> str:
    source, wanted = at.node.args[0].meta["val"].shape, at.node.meta["val"].shape  # type: ignore[union-attr]
    padded = [1] * (len(wanted) - len(source)) + list(source)
    if any(not isinstance(w, int) and isinstance(s, int) for w, s in zip(wanted, padded, strict=True)):
        raise UnsupportedError(
            "A tensor is expanded over the batch; export a fixed one: save_onnx(..., open_batch=False)."
        )
    # 1 keeps a length that x has already: the batch, where that is open.
    y: str = at.emit("Expand", x, at.graph.whole([n if isinstance(n, int) else 1 for n in wanted]))
    return y


def _slice(at: At, x: str, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> str:
    source, kept = at.node.args[0].meta["val"].shape[dim], at.node.meta["val"].shape[dim]  # type: ignore[union-attr]
    start = 0 if start is None else start
    if not isinstance(start, int) or (not isinstance(end, int | None) and (start or str(source) != str(kept))):
        raise unknown(at.node, "a place that depends on the batch")
    end = end if isinstance(end, int) else 2**62
    places = (at.graph.whole([n]) for n in (start, end, dim, step))
    y: str = at.emit("Slice", x, *places)
    return y


def _select(at: At, x: str, dim: int, index: int) -> str:
    y: str = at.emit("Gather", x, at.graph.constant(torch.tensor(index)), axis=dim)
    return y


def _split(at: At, x: str, *args: Any) -> list[str]:
    dim = args[1] if len(args) > 1 else 0
    sizes = [part.shape[dim] for part in at.node.meta["val"]]
    y: Any = at.emit("Split", x, at.graph.whole(sizes), outputs=len(sizes), axis=dim)
    return [y] if isinstance(y, str) else list(y)


def _unbind(at: At, x: str, dim: int = 0) -> list[str]:
    return [_select(at, x, dim, index) for index in range(len(at.node.meta["val"]))]


def _linear(at: At, x: str, weight: str, bias: str | None = None) -> str:
    turned = at.emit("Transpose", weight, perm=[1, 0])
    y: str = at.emit("MatMul", x, turned)
    return y if bias is None else str(at.emit("Add", y, bias))


def _addmm(at: At, bias: str, x: str, weight: str) -> str:
    y: str = at.emit("Gemm", x, weight, bias)
    return y


def _embedding(at: At, weight: str, places: str, *_: Any) -> str:
    y: str = at.emit("Gather", weight, places)
    return y


def _reduce(op: str) -> Operator:
    def emit(at: At, x: str, dims: Any = None, keepdim: bool = False, **_: Any) -> str:
        axes = [] if dims is None else [at.graph.whole([dims] if isinstance(dims, int) else dims)]
        y: str = at.emit(op, _operand(at, x, 0, _dtype(at)), *axes, keepdims=int(keepdim))
        return y

    return emit


def _softmax(op: str) -> Operator:
    def emit(at: At, x: str, dim: int, *_: Any, **__: Any) -> str:
        y: str = at.emit(op, _operand(at, x, 0, _dtype(at)), axis=dim)
        return y

    return emit


def _cat(at: At, parts: Sequence[str], dim: int = 0) -> str:
    sources: Any = at.node.args[0]
    typed = [_typed(at, part, source, _dtype(at)) for part, source in zip(parts, sources, strict=True)]
    y: str = at.emit("Concat", *typed, axis=dim)
    return y


def _stack(at: At, parts: Sequence[str], dim: int = 0) -> str:
    axis = at.graph.whole([dim])
    return _cat(at, [at.emit("Unsqueeze", part, axis) for part in parts], dim)


def _pad(at: At, x: str, sides: Sequence[int], mode: Any = "constant", value: Any = None) -> str:
    if isinstance(mode, int | float):  # of constant_pad_nd, which has no mode
        mode, value = "constant", mode
    if mode != "constant":
        raise unknown(at.node, f"mode={mode!r}")
    rank = at.node.meta["val"].dim()
    pairs = [(0, 0)] * (rank - len(sides) // 2) + [tuple(sides[i : i + 2]) for i in range(len(sides) - 2, -1, -2)]
    places = at.graph.whole([p[0] for p in pairs] + [p[1] for p in pairs])
    y: str = at.emit("Pad", x, places, at.graph.constant(torch.tensor(value or 0.0, dtype=_dtype(at))))
    return y


def _clip(at: At, x: str, low: Any = None, high: Any = None) -> str:
    if isinstance(low, str) or isinstance(high, str):
        raise unknown(at.node, "tensors as ends")
    ends = ["" if end is None else at.graph.constant(torch.tensor(end, dtype=_dtype(at))) for end in (low, high)]
    y: str = at.emit("Clip", _operand(at, x, 0, _dtype(at)), *ends)
    return y


def _like(number: float) -> Operator:
    """A tensor of one number in the shape of another, where that is open."""

    def emit(at: At, x: str, *given: Any, **_: Any) -> str:
        value = torch.tensor([given[0] if given else number], dtype=at.node.meta["val"].dtype)
        shape = at.emit("Shape", x)
        y: str = at.emit("Expand", at.graph.constant(value), shape)
        return y

    return emit


def _gelu(at: At, x: str, *, approximate: str = "none") -> str:
    y: str = at.emit("Gelu", x, approximate=approximate)
    return y


def _masked_fill(at: At, x: str, mask: str, value: Any) -> str:
    y: str = at.emit("Where", mask, _operand(at, value, 2, _dtype(at)), x)
    return y


def _where(at: At, mask: str, yes: Any, no: Any) -> str:
    y: str = at.emit("Where", mask, *(_operand(at, value, n, _dtype(at)) for n, value in ((1, yes), (2, no))))
    return y


_SHAPES = ("view", "reshape", "_unsafe_view", "unflatten", "flatten", "squeeze", "unsqueeze")

OPERATORS: dict[str, Operator] = {
    **NEURAL,
    **dict.fromkeys(_SHAPES, _reshape),
    **dict.fromkeys(("dropout", "clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy"), _same),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    "add": _pair("Add"), "sub": _pair("Sub"), "mul": _pair("Mul"), "div": _pair("Div"), "pow": _pair("Pow"),
    "eq": _pair("Equal"), "lt": _pair("Less"), "le": _pair("LessOrEqual"), "gt": _pair("Greater"),
    "ge": _pair("GreaterOrEqual"), "logical_and": _pair("And"), "logical_or": _pair("Or"),
    "maximum": _pair("Max"), "minimum": _pair("Min"),
    "matmul": _pair("MatMul"), "bmm": _pair("MatMul"), "mm": _pair("MatMul"),
    "relu": _plain("Relu"), "sigmoid": _plain("Sigmoid"), "tanh": _plain("Tanh"), "exp": _plain("Exp"),
    "log": _plain("Log"), "sqrt": _plain("Sqrt"), "abs": _plain("Abs"), "neg": _plain("Neg"),
    "logical_not": _plain("Not"), "bitwise_not": _plain("Not"), "hardswish": _plain("HardSwish"),
    "silu": lambda at, x: at.emit("Mul", x, at.emit("Sigmoid", x)),
    "relu6": lambda at, x: _clip(at, x, 0.0, 6.0),
    "hardtanh": lambda at, x, low=-1.0, high=1.0: _clip(at, x, low, high),
    "leaky_relu": lambda at, x, slope=0.01: at.emit("LeakyRelu", x, alpha=slope),
    "clamp": _clip, "gelu": _gelu,
    "transpose": _transpose, "mT": _transpose, "t": _transpose, "numpy_T": _transpose, "permute": _permute,
    "expand": _expand, "slice": _slice, "select": _select, "cat": _cat, "stack": _stack,
    "pad": _pad, "constant_pad_nd": _pad,
    "split": _split, "split_with_sizes": _split, "chunk": _split, "unbind": _unbind,
    "zeros_like": _like(0), "ones_like": _like(1), "full_like": _like(0),
    "linear": _linear, "addmm": _addmm, "embedding": _embedding,
    "mean": _reduce("ReduceMean"), "sum": _reduce("ReduceSum"), "amax": _reduce("ReduceMax"),
    "amin": _reduce("ReduceMin"),
    "softmax": _softmax("Softmax"), "_softmax": _softmax("Softmax"), "log_softmax": _softmax("LogSoftmax"),
    "masked_fill": _masked_fill, "where": _where,
}  # fmt: skip
"""By the name of an operator of ATen, whatever its overload."""
