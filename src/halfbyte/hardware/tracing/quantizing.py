"""What quantizing costs: the floating-point operations of every quantizer, element by element, and what they move.

The figures are counted from the formulas in `halfbyte.quantizers`: one for each multiplication, addition, comparison,
rounding and exponent that is cut out of a number; memory of a tensor's codes is four or eight bits an element. Sun et
al. (NeurIPS 2020, section 6) give about 10 FP16 operations for each element of a gradient. Here they are two for the
largest magnitude that the layer's scale follows and four for each of the two phases: scale, multiply by 1.6, cut to the
exponent, saturate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...quantizers import (
    MXFP4,
    NVFP4,
    AbsMax,
    BitSplit,
    ExactGradScale,
    Grid,
    Hadamard,
    Lsq,
    Luq,
    MinMax,
    Nearest,
    Pact,
    Sawb,
    Spec,
)
from ...recipes import Recipe, Requantize
from ..workload import Phase, StepPhase, VectorOp, format_bits
from .numerics import Place
from .products import Product

__all__ = ["Cost", "cost_of", "moves", "quantizers", "scale_update"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations for an element.

    Attributes:
        statistics: of what is measured on the tensor.
        quantize: of rounding it.
        backward: of its gradient, beyond letting it pass.
        first: whether all of the tensor must have been measured before any of it can be rounded.
    """

    statistics: int = 0
    quantize: int = 4
    backward: int = 0
    first: bool = False


def cost_of(spec: Spec) -> Cost:
    """The cost of a spec; of one that is not ours, four operations after two of statistics."""
    random = int(spec.stochastic)
    match spec:
        case Pact():  # Two limits, scale, round. Backward: the mask on x, and the sum of what it stops.
            return Cost(backward=3)
        case Sawb():  # |w|, its sum, w^2, its sum. A mask only where the gradient stops at the clip.
            return Cost(statistics=4, backward=int(spec.ste == "clipped"), first=True)
        case Lsq():  # Two limits, scale, round. Backward: the mask on x; the residue, its product and sum for the step.
            return Cost(backward=4)
        case MinMax():  # Both ends. Subtract, scale, round, saturate.
            return Cost(statistics=2, first=True)
        case AbsMax():  # |x|, the largest. Scale, round, saturate.
            return Cost(statistics=2, quantize=3 + random, first=True)
        case Luq():  # |x|, the largest. Scale, cut to the exponent, what is left, compare with the random number.
            return Cost(statistics=2, quantize=5, first=True)
        case BitSplit():  # |x|, the largest. Both parts: scale, round, two limits; norms and scales of kept rows.
            return Cost(statistics=2, quantize=8 + 4 * int(spec.sampling == "leverage"), first=True)
        case MXFP4():  # In each block |x|, the largest (x and x^2, their sums). Scale, round, saturate; the headroom.
            measured = 4 if spec.scale_rule == "quest" else 2
            return Cost(quantize=measured + 3 + random + int(spec.headroom), backward=int(spec.scale_rule == "quest"))
        case NVFP4():  # |x|, the largest, of the tensor; the same in each block. Scale, round, saturate; twice for 4/6.
            tries = 2 if spec.four_over_six else 1
            return Cost(statistics=2, quantize=2 + 3 * tries + random, first=True)
        case Nearest() if spec.own_scale == "amax":  # |x|, the largest. Scale, round, saturate.
            return Cost(statistics=2, quantize=3, first=True)
        case Grid():  # Scale, times 1.6, cut to the exponent, saturate.
            return Cost(quantize=4 + random)
        case _:
            return Cost(statistics=2, first=True)


def gradient_cost(spec: Spec, recipe: Recipe) -> Cost:
    """The cost of a gradient's spec: where that is nothing but a format, its magnitude is measured for the scale."""
    if not isinstance(spec, Grid):
        return cost_of(spec)
    # The scale in force was decided steps ago, so that rounding waits for nothing.
    return Cost(statistics=2, quantize=4 + int(spec.stochastic), first=isinstance(recipe.grad_scale, ExactGradScale))


def quantizers(
    place: Place,
    product: Product,
    phase: Phase,
    *,
    signed: bool,
    widths: tuple[int, int],
    weight: bool,
    measured: bool,
    held: bool,
) -> Iterator[VectorOp]:
    """The work around one GEMM that its recipe adds.

    Args:
        place: of the GEMM.
        product: its sizes.
        phase: fprop, dgrad or wgrad.
        signed: whether the layer's input may hold negative numbers.
        widths: bytes of an element of an activation or gradient in high precision, and of a weight.
        weight: whether the second operand of fprop is a weight, which the optimizer holds in its own format.
        measured: whether the other backward GEMM has dealt with what both share of grad_output.
        held: whether an earlier step of a sequence left the weight's codes for this one.
    """
    recipe = place.recipe
    high, master = widths
    wide_b = master if weight else high
    if recipe is None:
        if phase == "fprop" and weight and not held and master > high:
            count = product.b_elements
            yield _op(place, "cast", phase, count, 1, read=count * master, written=count * high)
        return
    formats = place.formats(phase, signed=signed)
    a_count, b_count, out_count = product.elements(phase)
    transform = recipe.transforms[phase]
    specs = recipe.gemms.operands(phase)
    if phase == "fprop":
        yield from _turned(place, phase, transform, a_count, high)
        yield from _operand(place, phase, specs[0], a_count, high, formats[0])
        if not held:
            yield from _turned(place, phase, transform, b_count, wide_b)
            yield from _operand(place, phase, specs[1], b_count, wide_b, formats[1])
        return
    gradient = recipe.slots[f"{phase}.grad_output"]
    yield from _turned(place, phase, transform, a_count, high)
    if isinstance(gradient, Spec):
        cost = gradient_cost(gradient, recipe)
        if cost.statistics and not (measured and transform is None):
            yield _statistics(place, phase, cost, a_count, high)
        samples = (recipe.dgrad if phase == "dgrad" else recipe.wgrad).samples
        for _ in range(0 if measured and recipe.one_gradient else samples):
            yield _quantize(place, phase, cost, a_count, high, formats[0])
    kept = recipe.slots["dgrad.weight" if phase == "dgrad" else "wgrad.input"]
    if isinstance(kept, Spec | Requantize) and not (held and phase == "dgrad"):
        # Codes of fprop are read where they are quantized anew.
        wide = format_bits(place.formats("fprop", signed=signed)[phase == "dgrad"]) / 8
        read = wide if isinstance(kept, Requantize) else wide_b if phase == "dgrad" else high
        yield from _turned(place, phase, transform, b_count, high)
        yield from _operand(place, phase, specs[1], b_count, read, formats[1])
    source = recipe.fprop.input if phase == "dgrad" else recipe.fprop.weight
    if source is not None and (backward := cost_of(source).backward):
        yield _op(place, "clip_gradient", phase, out_count, backward, read=out_count * high, written=out_count * high)
    yield from _turned(place, phase, recipe.fprop.transform, out_count, high)


def scale_update(place: Place) -> VectorOp | None:
    """The vote on a layer's gradient scale, once a step; None where there is none to move."""
    recipe = place.recipe
    if recipe is None or recipe.grad_scale is None or isinstance(recipe.grad_scale, ExactGradScale):
        return None
    # The observed magnitude times the scale, two comparisons with MAX and MAX / 2, the step and its two limits.
    return _op(place, "layer_scale", "update", 1, 6, read=8, written=8)


def moves(place: Place) -> bool:
    """Whether a layer needs grad_input although nothing before it does, because its input's clip is learned."""
    spec = None if place.recipe is None else place.recipe.fprop.input
    return spec is not None and spec.learns


def _operand(place: Place, phase: Phase, spec: Spec | None, count: int, wide: float, fmt: str) -> Iterator[VectorOp]:
    if spec is None:
        return
    cost = cost_of(spec)
    if cost.statistics:
        yield _statistics(place, phase, cost, count, wide)
    yield _quantize(place, phase, cost, count, wide, fmt)


def _statistics(place: Place, phase: Phase, cost: Cost, count: int, wide: float) -> VectorOp:
    return _op(place, "statistics", phase, count, cost.statistics, read=count * wide, written=4)


def _quantize(place: Place, phase: Phase, cost: Cost, count: int, wide: float, fmt: str) -> VectorOp:
    codes = count * format_bits(fmt) / 8
    return _op(place, "quantize", phase, count, cost.quantize, read=count * wide, written=codes, fusible=not cost.first)


def _turned(place: Place, phase: Phase, transform: Hadamard | None, count: int, wide: float) -> Iterator[VectorOp]:
    """A rotation: an addition for each doubling of the group, the root of its size, and its signs."""
    if transform is not None:
        flops = transform.size.bit_length() - 1 + 1 + int(transform.signs != "none")
        yield _op(place, "transform", phase, count, flops, read=count * wide, written=count * wide)


def _op(
    place: Place,
    name: str,
    phase: StepPhase,
    count: int,
    flops: int,
    *,
    read: float,
    written: float,
    fusible: bool = True,
) -> VectorOp:
    return VectorOp(
        layer=place.layer,
        name=name,
        phase=phase,
        elements=count,
        flops=count * flops,
        read_bytes=math.ceil(read),
        written_bytes=math.ceil(written),
        fusible=fusible,
    )
