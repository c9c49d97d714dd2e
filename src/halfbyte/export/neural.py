"""The operators that networks are made of, in ONNX's: convolutions, norms, pooling, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .layers import convolution
from .place import At, Operator, unknown

__all__ = ["NEURAL"]


def _conv(dims: int) -> Operator:
    def emit(
        at: At, x: str, weight: str, bias: str | None = None,
        stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> str:  # fmt: skip
        steps = [n for given in (stride, padding, dilation) for n in _many(given, dims)]
        return convolution(at.graph, x, weight, bias or "", [groups, *steps], transposed=False)

    return emit


def _conv_transpose(dims: int) -> Operator:
    def emit(
        at: At, x: str, weight: str, bias: str | None = None, stride: Any = 1,
        padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> str:  # fmt: skip
        steps = [n for given in (stride, padding, dilation, output_padding) for n in _many(given, dims)]
        return convolution(at.graph, x, weight, bias or "", [groups, *steps], transposed=True)

    return emit


def _many(given: Any, dims: int) -> list[int]:
    sizes = [given] if isinstance(given, int) else list(given)
    return sizes * dims if len(sizes) == 1 else sizes


def _batch_norm(at: At, x: str, weight: Any, bias: Any, mean: str, var: str, *rest: Any) -> Any:
    """Both of torch's operators for it: one takes (training, momentum, eps, cudnn) and gives one tensor."""
    whole = len(rest) == 2  # (momentum, eps): it gives the statistics of training besides
    channels = at.node.args[0].meta["val"].shape[1]  # type: ignore[union-attr]
    scale, shift = (
        at.graph.constant(torch.full((channels,), number)) if given is None else given
        for given, number in ((weight, 1.0), (bias, 0.0))
    )
    y: str = at.emit("BatchNormalization", x, scale, shift, mean, var, epsilon=rest[1 if whole else 2])
    return [y] if whole else y


def _layer_norm(at: At, x: str, shape: Sequence[int], weight: Any = None, bias: Any = None, *rest: Any) -> str:
    scale = at.graph.constant(torch.ones(list(shape))) if weight is None else weight
    y: str = at.emit(
        "LayerNormalization", x, scale, *([] if bias is None else [bias]),
        axis=-len(shape), epsilon=rest[0] if rest else 1e-5,
    )  # fmt: skip
    return y


def _max_pool(dims: int) -> Operator:
    def emit(
        at: At, x: str, kernel: Any, stride: Any = (), padding: Any = 0,
        dilation: Any = 1, ceil: bool = False,
    ) -> str:  # fmt: skip
        sizes = _many(kernel, dims)
        y: str = at.emit(
            "MaxPool", x, kernel_shape=sizes, strides=_many(stride, dims) or sizes, pads=_many(padding, dims) * 2,
            dilations=_many(dilation, dims), ceil_mode=int(ceil),
        )  # fmt: skip
        return y

    return emit


def _avg_pool(dims: int) -> Operator:
    def emit(
        at: At, x: str, kernel: Any, stride: Any = (), padding: Any = 0,
        ceil: bool = False, padded: bool = True, divisor: Any = None,
    ) -> str:  # fmt: skip
        if divisor is not None:
            raise unknown(at.node, f"divisor_override={divisor}")
        sizes = _many(kernel, dims)
        y: str = at.emit(
            "AveragePool", x, kernel_shape=sizes, strides=_many(stride, dims) or sizes,
            pads=_many(padding, dims) * 2, ceil_mode=int(ceil), count_include_pad=int(padded),
        )  # fmt: skip
        return y

    return emit


def _adaptive_pool(at: At, x: str, sizes: Any) -> str:
    given = at.node.args[0].meta["val"].shape[2:]  # type: ignore[union-attr]
    wanted = _many(sizes, len(given))
    if any(n % size for n, size in zip(given, wanted, strict=True)):
        raise unknown(at.node, f"{list(given)} places to {wanted}, which do not divide them")
    kernel = [n // size for n, size in zip(given, wanted, strict=True)]
    y: str = at.emit("AveragePool", x, kernel_shape=kernel, strides=kernel)
    return y


def _attention(
    at: At, q: str, k: str, v: str, mask: str | None = None, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> str:  # fmt: skip
    """Scaled products of queries and keys, what the mask adds, softmax, products with the values."""
    if dropout or enable_gqa:
        raise unknown(at.node, f"dropout_p={dropout}, enable_gqa={enable_gqa}")
    query, key = (arg.meta["val"].shape for arg in at.node.args[:2])  # type: ignore[union-attr]
    factor = 1 / math.sqrt(query[-1]) if scale is None else scale
    rank = len(query)
    turned = at.emit("Transpose", k, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = at.emit("Mul", at.emit("MatMul", q, turned), at.graph.number(factor))
    if causal:
        hidden = torch.ones(int(query[-2]), int(key[-2]), dtype=torch.bool).triu(1)
        scores = at.emit("Add", scores, at.graph.constant(torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)))
    if mask is not None:
        bools = at.node.args[3].meta["val"].dtype == torch.bool  # type: ignore[union-attr]
        if bools:
            scores = at.emit("Where", mask, scores, at.graph.number(-math.inf))
        else:
            scores = at.emit("Add", scores, mask)
    y: str = at.emit("MatMul", at.emit("Softmax", scores, axis=-1), v)
    return y


NEURAL: dict[str, Operator] = {
    **{f"conv{d}d": _conv(d) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _conv_transpose(d) for d in (1, 2, 3)},
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "layer_norm": _layer_norm,
    **{f"max_pool{d}d": _max_pool(d) for d in (1, 2, 3)},
    **{f"avg_pool{d}d": _avg_pool(d) for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": _adaptive_pool for d in (1, 2, 3)},
    "scaled_dot_product_attention": _attention,
}
"""By the name of an operator of ATen."""
