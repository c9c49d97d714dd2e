"""Operands in an ONNX graph: QuantizeLinear and DequantizeLinear for a quantizer, packed codes for a weight.

What a quantizer does in evaluation is read off the quantizer itself: it is given numbers far outside any range, whose
codes are the ends of its range, and tells scale and zero point with them. So its arithmetic stands in one place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import UnsupportedError
from ..ops import Plan
from ..qtensor import QTensor
from ..quantizers import AbsMax, Quantizer
from .graph import Graph

__all__ = ["dequantized", "quantized"]

_FAR = (1e3, 1e30)
"""Magnitudes of two trial tensors: where a scale differs between them, it depends on the data."""


class _Grid(NamedTuple):
    """A uniform grid of numbers.

    Attributes:
        scale: between neighbors.
        low: the least code.
        high: the largest.
        bits: of a code.
        signed: whether codes are.
        shift: what the number of code 0 is, negated: ``x = scale * code - shift``.
    """

    scale: float
    low: int
    high: int
    bits: int
    signed: bool
    shift: float


def quantized(graph: Graph, x: str, quantizer: Quantizer | None, plan: Plan, slot: str) -> str:
    """A tensor rounded as a quantizer rounds it in evaluation.

    Args:
        graph: where nodes are added.
        x: a float32 value.
        quantizer: the slot's; None leaves x as it is.
        plan: whose slot it is.
        slot: for messages.

    Returns:
        The dequantized value.

    Raises:
        UnsupportedError: if ONNX has no such rounding, or the quantizer has not seen a batch.
    """
    if plan.recipe.fprop.transform is not None:
        raise _refused(plan, slot, f"a rotation ({plan.recipe.fprop.transform})")
    if quantizer is None:
        return x
    spec = quantizer.spec
    if isinstance(spec, AbsMax) and spec.rounding == "nearest":
        return _by_largest(graph, x, spec)
    grid = _grid(quantizer, plan, slot)
    if grid.shift:
        x = graph.emit("Add", x, graph.number(grid.shift))
    least, most = _ends(grid.bits, grid.signed)
    # Not Clip: ONNX Runtime (1.32) fuses one with the QuantizeLinear behind it, and knows no INT4 there. Where nothing
    # needs cutting a Max stays all the same: ONNX Runtime pulls a bare QuantizeLinear in front of a MaxPool, where it
    # knows no INT4 either.
    if grid.low != least or (grid.high == most and not grid.shift):
        x = graph.emit("Max", x, graph.number(grid.scale * grid.low))
    if grid.high != most:
        x = graph.emit("Min", x, graph.number(grid.scale * grid.high))
    scale, zero = graph.number(grid.scale), graph.zero_code(grid.bits, grid.signed)
    y: str = graph.emit("DequantizeLinear", graph.emit("QuantizeLinear", x, scale, zero), scale, zero)
    if grid.shift:
        y = graph.emit("Sub", y, graph.number(grid.shift))
    return y


def dequantized(graph: Graph, q: QTensor, plan: Plan, stem: str) -> str:
    """A weight's codes as a constant, and what they stand for.

    Args:
        graph: where they are added.
        q: the codes.
        plan: whose weight it is.
        stem: what the constant's name begins with.

    Raises:
        UnsupportedError: if the codes are no integers with one scale.
    """
    if q.format.kind != "int" or q.blocks is not None:
        blocks = "" if q.blocks is None else f" with scales for blocks of {q.blocks.sizes}"
        raise _refused(plan, "fprop.weight", f"{q.format.name}{blocks}")
    scale = graph.constant(q.scale, f"{stem}.scale")
    y: str = graph.emit("DequantizeLinear", graph.codes(q, stem), scale)
    if q.zero_point is not None:
        y = graph.emit("Sub", y, graph.number(float(q.zero_point * q.scale.double())))
    return y


def _grid(quantizer: Quantizer, plan: Plan, slot: str) -> _Grid:
    """The grid that a quantizer rounds to, whatever it is given."""
    device = next((t.device for t in (*quantizer.parameters(), *quantizer.buffers())), torch.device("cpu"))
    known = quantizer.format
    if known is None:
        raise _no_range(quantizer, plan, slot)
    least = -1.0 if known.signed else 0.0
    first, second = (quantizer.quantize(torch.tensor([least * far, far], device=device)).q for far in _FAR)
    if first.format.kind != "int" or first.blocks is not None or quantizer.spec.stochastic:
        raise _refused(plan, slot, str(quantizer.spec))
    still = torch.equal(first.scale, second.scale) and (
        first.zero_point is None or torch.equal(first.zero_point, second.zero_point)  # type: ignore[arg-type]
    )
    if not still:
        raise _no_range(quantizer, plan, slot)
    integers = [first.format.integers[c] for c in second.codes().tolist()]
    low, high = integers
    assert low is not None
    assert high is not None
    shift = 0.0 if first.zero_point is None else float(first.zero_point * first.scale.double())
    return _Grid(float(first.scale), low, high, first.format.bits, first.format.signed, shift)


def _ends(bits: int, signed: bool) -> tuple[int, int]:
    """Where ONNX cuts codes of that type."""
    width = 4 if bits <= 4 else 8
    return (-(1 << (width - 1)), (1 << (width - 1)) - 1) if signed else (0, (1 << width) - 1)


def _by_largest(graph: Graph, x: str, spec: AbsMax) -> str:
    """`AbsMax`: the scale is found in the graph, from the tensor."""
    fmt, top = spec.formats[0], (1 << (spec.bits - 1)) - 1
    scale = graph.emit("Div", graph.emit("ReduceMax", graph.emit("Abs", x), keepdims=0), graph.number(float(top)))
    scale = graph.emit("Max", scale, graph.number(torch.finfo(torch.float32).tiny))
    zero = graph.zero_code(fmt.bits, fmt.signed)
    y: str = graph.emit("DequantizeLinear", graph.emit("QuantizeLinear", x, scale, zero), scale, zero)
    return y


def _no_range(quantizer: Quantizer, plan: Plan, slot: str) -> UnsupportedError:
    return UnsupportedError(
        f"{slot} of a layer under {plan.recipe.name}: {quantizer.spec} has no range yet, or takes it from each "
        "tensor; a graph needs a fixed one. Run a training forward pass before exporting."
    )


def _refused(plan: Plan, slot: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{slot} of a layer under {plan.recipe.name} was to be exported to ONNX: {what}; integers of up to eight bits "
        "with one scale and no rotation are possible. Use --format safetensors, or --format torch for plain weights."
    )
