"""Converted layers in an ONNX graph: a product of two rounded operands; a recurrent layer as a loop over its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..nn import PlannedMany
from ..ops import Plan
from ..qtensor import QTensor
from .graph import Graph
from .rounding import dequantized, quantized

__all__ = ["Codes", "product", "recurrent"]

Codes = Mapping[Plan, tuple[str, QTensor]]
"""For each plan with a packed weight its name and its codes."""


def product(
    graph: Graph, codes: Codes, plan: Plan, x: str, weight: str | None, bias: str, kind: str, steps: Sequence[int]
) -> str:
    """What `halfbyte.ops` computes in evaluation.

    Args:
        graph: where nodes are added.
        codes: of the model's weights.
        plan: the layer's.
        x: its input: of a linear layer (N, I).
        weight: the second operand where it is no packed weight: an activation, or a weight in floating point.
        bias: of the layer; empty for none.
        kind: ``"linear"``, ``"conv"``, ``"conv_transpose"`` or ``"matmul"``.
        steps: of a convolution, as in `halfbyte.ops.operator.lay_out`.

    Raises:
        UnsupportedError: if ONNX has no such rounding.
    """
    a = quantized(graph, x, plan.input, plan, "fprop.input")
    if plan in codes:
        name, q = codes[plan]
        b = dequantized(graph, q, plan, name)
    else:
        assert weight is not None
        b = quantized(graph, weight, plan.weight, plan, "fprop.weight")
    if kind == "linear":
        inputs = (a, b, bias) if bias else (a, b)
        y: str = graph.emit("Gemm", *inputs, transB=1)
    elif kind == "matmul":
        y = graph.emit("MatMul", a, graph.emit("Transpose", b, perm=[0, 2, 1]))
    else:
        y = convolution(graph, a, b, bias, steps, transposed=kind == "conv_transpose")
    return y


def convolution(graph: Graph, x: str, weight: str, bias: str, steps: Sequence[int], *, transposed: bool) -> str:
    """A convolution.

    Args:
        graph: where it is added.
        x: (N, I, *spatial).
        weight: torch's shape of it, which is ONNX's.
        bias: empty for none.
        steps: groups, then stride, padding, dilation and, transposed, output padding of each dimension.
        transposed: whether it is.
    """
    groups, per_dim = steps[0], steps[1:]
    dims = len(per_dim) // (4 if transposed else 3)
    stride, padding, dilation, *more = (list(per_dim[i : i + dims]) for i in range(0, len(per_dim), dims))
    inputs = (x, weight, bias) if bias else (x, weight)
    extra: dict[str, Any] = {"output_padding": more[0]} if transposed else {}
    op = "ConvTranspose" if transposed else "Conv"
    y: str = graph.emit(
        op, *inputs, group=groups, strides=stride, pads=[*padding, *padding], dilations=dilation, **extra
    )
    return y


def recurrent(graph: Graph, codes: Codes, module: nn.RNNBase, x: str, states: Sequence[str]) -> tuple[str, list[str]]:
    """A recurrent layer, converted or not: for each layer and direction a product over all steps and a Scan.

    Args:
        graph: where nodes are added.
        codes: of the model's weights.
        module: the layer.
        x: (T, N, I), or (N, T, I) if ``batch_first``.
        states: the first h, and of an LSTM c; each (layers * directions, N, H).

    Returns:
        The output in the layout of x, and the last states.

    Raises:
        UnsupportedError: for a projection, or where ONNX has no such rounding.
    """
    if module.proj_size:
        raise UnsupportedError(
            f"An LSTM with proj_size={module.proj_size} was to be exported to ONNX; one without a projection is "
            "possible. Use --format safetensors."
        )
    if module.batch_first:
        x = graph.emit("Transpose", x, perm=[1, 0, 2])
    finals: list[list[str]] = [[] for _ in states]
    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        outputs = []
        for number, suffix in enumerate(suffixes):
            place = layer * len(suffixes) + number
            first = [graph.emit("Gather", s, graph.constant(torch.tensor(place)), axis=0) for s in states]
            y, last = _direction(graph, codes, module, f"l{layer}{suffix}", x, first)
            outputs.append(y)
            for kept, state in zip(finals, last, strict=True):
                kept.append(graph.emit("Unsqueeze", state, graph.whole([0])))
        x = graph.emit("Concat", *outputs, axis=-1) if len(outputs) > 1 else outputs[0]
    if module.batch_first:
        x = graph.emit("Transpose", x, perm=[1, 0, 2])
    return x, [graph.emit("Concat", *kept, axis=0) for kept in finals]


def _direction(
    graph: Graph, codes: Codes, module: nn.RNNBase, suffix: str, x: str, first: Sequence[str]
) -> tuple[str, list[str]]:
    """One layer in one direction: (T, N, I) to (T, N, H), and the states after its last step."""
    given = _matrix(graph, codes, module, f"ih_{suffix}")(graph, x)
    given = _plus_bias(graph, module, f"bias_ih_{suffix}", given)
    # The weight and the clip of the hidden state stand outside the loop's body, which sees them.
    multiply = _matrix(graph, codes, module, f"hh_{suffix}")
    body = Graph(graph)
    step, states = body.fresh("gates"), [body.fresh("state") for _ in first]
    hidden = _plus_bias(body, module, f"bias_hh_{suffix}", multiply(body, states[0]))
    after = _STEPS[module.mode](body, step, hidden, states)
    shape = [None, module.hidden_size]
    outputs = [*after, body.emit("Identity", after[0])]
    width = getattr(module, f"weight_hh_{suffix}").shape[0]

    def declared(values: Sequence[str]) -> list[Any]:
        return [body.described(name, torch.float32, shape) for name in values]

    sealed = body.seal(
        body.fresh("step"),
        [
            *(body.described(s, torch.float32, shape) for s in states),
            body.described(step, torch.float32, [None, width]),
        ],
        [body.described(name, torch.float32, shape) for name in outputs],
        inner=True,
    )
    backwards = int(suffix.endswith("_reverse"))
    *last, y = graph.emit(
        "Scan",
        *first,
        given,
        outputs=len(first) + 1,
        body=sealed,
        num_scan_inputs=1,
        scan_input_directions=[backwards],
        scan_output_directions=[backwards],
    )
    return y, last


def _matrix(graph: Graph, codes: Codes, module: nn.RNNBase, name: str) -> Callable[[Graph, str], str]:
    """The product with one matrix, as a function of the graph that it is added to and of its first operand."""
    plan = module.find_plan(name) if isinstance(module, PlannedMany) else None
    if plan is not None and plan.in_floating_point:
        raise UnsupportedError(
            f"{name} of a recurrent layer computes in {plan.recipe.dtype}, which is not exported to ONNX."
        )
    if plan is not None and plan in codes:
        stem, q = codes[plan]
        matrix = dequantized(graph, q, plan, stem)
    else:
        matrix = graph.constant(getattr(module, f"weight_{name}"), name)
    turned = graph.emit("Transpose", matrix, perm=[1, 0])

    def multiply(where: Graph, operand: str) -> str:
        rounded = operand if plan is None else quantized(where, operand, plan.input, plan, f"{name}: fprop.input")
        y: str = where.emit("MatMul", rounded, turned)
        return y

    return multiply


def _plus_bias(graph: Graph, module: nn.RNNBase, name: str, y: str) -> str:
    if not module.bias:
        return y
    bias: Tensor = getattr(module, name)
    total: str = graph.emit("Add", y, graph.constant(bias, name))
    return total


def _lstm(graph: Graph, given: str, hidden: str, states: Sequence[str]) -> list[str]:
    i, f, g, o = graph.emit("Split", graph.emit("Add", given, hidden), outputs=4, axis=-1, num_outputs=4)
    kept = graph.emit("Mul", graph.emit("Sigmoid", f), states[1])
    new = graph.emit("Mul", graph.emit("Sigmoid", i), graph.emit("Tanh", g))
    c = graph.emit("Add", kept, new)
    return [graph.emit("Mul", graph.emit("Sigmoid", o), graph.emit("Tanh", c)), c]


def _gru(graph: Graph, given: str, hidden: str, states: Sequence[str]) -> list[str]:
    r, z, n = graph.emit("Split", given, outputs=3, axis=-1, num_outputs=3)
    h_r, h_z, h_n = graph.emit("Split", hidden, outputs=3, axis=-1, num_outputs=3)
    reset = graph.emit("Sigmoid", graph.emit("Add", r, h_r))
    update = graph.emit("Sigmoid", graph.emit("Add", z, h_z))
    new = graph.emit("Tanh", graph.emit("Add", n, graph.emit("Mul", reset, h_n)))
    step = graph.emit("Mul", update, graph.emit("Sub", states[0], new))
    return [graph.emit("Add", new, step)]


def _plain(function: str) -> Callable[[Graph, str, str, Sequence[str]], list[str]]:
    return lambda graph, given, hidden, _: [graph.emit(function, graph.emit("Add", given, hidden))]


_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _plain("Tanh"), "RNN_RELU": _plain("Relu")}
"""The next states from both parts of the gates, by torch's name of the layer."""
