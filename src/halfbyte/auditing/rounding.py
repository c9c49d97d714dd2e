"""Whether codes are what rounding makes of numbers: of all those in a step, and of those that the self-test chooses.

A code is judged by the tensor's own scale: it must stand for the nearest of the numbers that there are, or, where
rounding is random, for one of the two around. So it does not matter how a scale was found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..qtensor import QTensor
from ..quantizers import BitSplit, Spec
from ..watching import code_range
from .published import allowed_places, levels_of

__all__ = ["in_own_units", "judged", "misrounded"]

_SLACK = 2.0**-22
"""How near to a border, relatively, a number may fall on either side: the scale's inverse and a product are rounded."""


def judged(spec: Spec | None) -> bool:
    """Whether codes can be judged one by one.

    MS-EDEN moves scales after rounding, bit splitting makes two codes of one number: those are judged by their means.
    """
    return spec is not None and not isinstance(spec, BitSplit) and getattr(spec, "rounding", "") != "ms_eden"


def in_own_units(x: Tensor, q: QTensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as the format counts, each element's scale, and how far off the first may be; float64 of x's shape."""
    scale = q.scale.double().expand(q.shape)
    factors = q.block_factors()
    if factors is not None:
        scale = scale * factors
    scale = scale.reshape(x.shape)
    z = x.detach().double() / scale
    slack = z.abs() * _SLACK
    if q.zero_point is not None:
        z = z + q.zero_point
        slack = slack + q.zero_point.abs() * _SLACK
    return z, scale, slack


def misrounded(x: Tensor, q: QTensor, spec: Spec) -> str:
    """What is wrong with the codes of x; empty if nothing is.

    Args:
        x: what was quantized.
        q: its codes.
        spec: what made them, see `judged`.
    """
    low, high = code_range(spec, q.format)
    levels = levels_of(q.format, low, high, q.qdata.device)
    z, scale, slack = in_own_units(x, q)
    table = torch.tensor(q.format.values, dtype=torch.float64, device=q.qdata.device)
    values = table[q.codes().int()].reshape(x.shape)
    # Blocks whose scale rounded to zero hold nothing, and a tensor with a NaN is NaN as a whole.
    sound = (scale > 0) & scale.isfinite() & z.isfinite()
    z, values, slack = z[sound], values[sound], slack[sound]
    if z.numel() == 0:
        return ""
    place = torch.bucketize(values, levels)
    known = levels[place.clamp_max(len(levels) - 1)] == values
    if not bool(known.all()):
        return f"{values[~known][0].item():g} is no number of {q.format.name} in the range of {spec}"
    nearest = not spec.stochastic
    lowest, highest = allowed_places(z, slack, levels, q.format, nearest=nearest)
    wrong = (place < lowest) | (place > highest)
    if not bool(wrong.any()):
        return ""
    at = int(wrong.int().argmax())
    what = "the nearest number" if nearest else "one of the two numbers around"
    return (
        f"{int(wrong.sum())} of {wrong.numel()} codes are not {what}: {z[at].item():.6g} became {values[at].item():g} "
        f"in {q.format.name}"
    )
