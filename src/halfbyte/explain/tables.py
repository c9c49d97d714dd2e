"""What the page looks up: the library's own results on fine grids of inputs.

The page's scripts round nothing. Whatever a visitor drags stands on a grid, and for every place on it the codes, the
numbers that they stand for and the errors are computed here, by the same functions that train.

Dimensions: N inputs of a grid, B bits (1 to 8).
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..formats import Format, Phase
from ..picture import quantize_pixels
from ..qtensor import QTensor, pack
from ..quantizers import AbsMax, MinMax, Nearest, Radix4, quantize

__all__ = ["RANGE_STEPS", "named_formats", "phases", "pictures", "plain", "ranges", "spread", "unit"]

RANGE_STEPS = 20
"""The ends of a range lie on the twentieths of 0 to 1."""

_DOTS = 40  # Numbers of a layer, in the chapter on ranges: 15 k / 39 is never halfway between two codes.
_CLOUD = 60  # Gradients, in the chapter on scales, beside the largest.
_PER_DECADE = 20
_DECADES = 8


def plain(x: Tensor) -> list[float]:
    """A float32 tensor as numbers, each with just the digits that tell it from the next one."""
    return [float(f"{value:.9g}") for value in x.reshape(-1).tolist()]


def named_formats() -> dict[str, dict[str, Any]]:
    """Every code of the three formats of the story: its value, its value in words, its shade.

    Returns:
        For each format ``labels``, for example "-1/64", and ``shades``: 0 for the lowest code, 8 for zero, 15 for the
        highest. Index is the code.
    """
    return {
        fmt.name: {
            "values": [value + 0.0 for value in fmt.values],
            "labels": [str(Fraction(value)) for value in fmt.values],
            "shades": [_shade(fmt, code) for code in range(16)],
        }
        for fmt in (formats.int4, formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd)
    }


def _shade(fmt: Format, code: int) -> int:
    """Where a code stands among the sixteen shades: integers by value, the others by exponent with their sign."""
    if fmt.kind == "int":
        return 8 + int(fmt.values[code])
    return 8 + code if code < 8 else 16 - code


def pictures() -> dict[str, Any]:
    """What each of the 256 gray values becomes with 8 to 1 bits, black being the lowest code and white the highest.

    Returns:
        ``integers`` and ``grays``, both of shape (B, 256): the code as an integer and the gray value it stands for.
    """
    pixels_N = torch.arange(256.0)
    coded = [quantize_pixels(pixels_N, formats.integer(bits)) for bits in range(1, 9)]
    return {
        "integers": [_integers(q) for q in coded],
        "grays": [q.dequantize().round().int().tolist() for q in coded],
    }


def unit(steps: int = 200) -> dict[str, Any]:
    """[0, 1] as -8 to 7: what every number on the grid becomes.

    Args:
        steps: the grid's steps from 0 to 1.
    """
    x_N = torch.arange(steps + 1, dtype=torch.float64).div(steps).float()
    q = quantize(x_N, MinMax(bits=4))
    return {
        "inputs": plain(x_N),
        "integers": _integers(q),
        "values": plain(q.dequantize()),
        "levels": _levels(q),
    }


def ranges() -> dict[str, Any]:
    """A layer's numbers in every range on the grid, under a fixed ruler from 0 to 1 and under one that is stretched.

    Returns:
        ``fixed``, the sixteen numbers of the fixed ruler, and ``rows``: for ``"low,high"`` in twentieths the numbers,
        the sixteen numbers of the stretched ruler, and for both rulers the codes (integers), how many different ones
        there are, and the mean error.
    """
    at_N = torch.linspace(0, 1, _DOTS, dtype=torch.float64)
    whole = torch.tensor([0.0, 1.0])
    rows = {}
    for low in range(RANGE_STEPS):
        for high in range(low + 1, RANGE_STEPS + 1):
            x_N = ((low + at_N * (high - low)) / RANGE_STEPS).float()
            # The fixed ruler is that of numbers among which a 0 and a 1 always are.
            fixed, own = quantize(torch.cat([whole, x_N]), MinMax(bits=4)), quantize(x_N, MinMax(bits=4))
            rows[f"{low},{high}"] = {
                "inputs": plain(x_N),
                "levels": _levels(own),
                "own": _judged(x_N, own.dequantize(), _integers(own)),
                "fixed": _judged(x_N, fixed.dequantize()[2:], _integers(fixed)[2:]),
            }
    return {"fixed": _levels(quantize(whole, MinMax(bits=4))), "rows": rows}


def _judged(x_N: Tensor, x_hat_N: Tensor, integers: list[int]) -> dict[str, Any]:
    """What a ruler makes of some numbers."""
    error = (x_hat_N.double() - x_N.double()).abs().mean()
    return {"integers": integers, "used": len(set(integers)), "error": _short(float(error))}


def spread() -> dict[str, Any]:
    """Numbers over eight decades on four 4-bit scales, each with its top at the largest number, 1.

    Returns:
        ``inputs``, from 1 down to 10^-8; ``offsets``, where the numbers of a cloud lie beside its middle, in places of
        the grid; for each scale the ``levels`` above zero, the ``values`` that the inputs become, and, by the middle of
        the cloud, how many numbers of the cloud stay above zero and how far these move on average, as a share.
    """
    x_N = torch.tensor([10 ** (-k / _PER_DECADE) for k in range(_DECADES * _PER_DECADE + 1)], dtype=torch.float32)
    offsets = [round(0.9 * _PER_DECADE * float(z)) for z in _bell(_CLOUD)]
    scales = {"linear": quantize(x_N, AbsMax(bits=4))}
    for radix in (2, 4, 10):
        fmt = formats.logarithmic(radix)
        scales[f"base{radix}"] = quantize(x_N, Nearest(fmt=fmt), scale=1 / fmt.max)
    return {
        "inputs": plain(x_N),
        "offsets": offsets,
        "largest_middle": (_DECADES - 2) * _PER_DECADE,
        "scales": {name: _survival(x_N, q, offsets) for name, q in scales.items()},
    }


def _survival(x_N: Tensor, q: QTensor, offsets: list[int]) -> dict[str, Any]:
    """The numbers that a scale makes of a grid, and what becomes of a cloud at every place of its middle."""
    x_hat_N = q.dequantize()
    survivors, moved = [], []
    for middle in range((_DECADES - 2) * _PER_DECADE + 1):
        at = torch.tensor([min(max(middle + offset, 0), len(x_N) - 1) for offset in offsets])
        alive = at[x_hat_N[at] != 0]
        relative = (x_hat_N[alive].double() / x_N[alive].double() - 1).abs()
        survivors.append(len(alive))
        moved.append(_short(float(relative.mean())) if len(alive) else None)
    return {
        "levels": sorted({value for value in _levels(q) if value > 0}),
        "values": plain(x_hat_N),
        "survivors": survivors,
        "moved": moved,
    }


def phases(per_octave: int = 8) -> dict[str, Any]:
    """One gradient in both phases of radix 4, and the errors of the two.

    Args:
        per_octave: places of the grid between a number and its double; the grid goes from 2^-8 to 2^7.

    Returns:
        ``inputs``; for ``even`` and ``odd`` the ``levels`` above zero, and by input the number it becomes and its error
        as a share of the input; ``together`` and ``twice``, the sum of both phases' errors and of the even phase's with
        itself; ``signs``, over one period of evenly spread logarithms: how often the errors point apart, both down,
        both up; ``rms``, the root of the mean square of both sums over that period.
    """
    x_N = torch.tensor([2 ** (k / per_octave) for k in range(-8 * per_octave, 7 * per_octave + 1)], dtype=torch.float32)
    found: dict[str, Any] = {"inputs": plain(x_N)}
    for phase in Phase:
        q = quantize(x_N, Radix4(phase=phase))
        found[phase.value] = {
            "levels": sorted({value for value in _levels(q) if value > 0}),
            "values": plain(q.dequantize()),
            "labels": [str(Fraction(value)) for value in q.dequantize().tolist()],
            "error": _shorts(_relative_error(x_N, phase)),
        }
    even, odd = _relative_error(x_N, Phase.EVEN), _relative_error(x_N, Phase.ODD)
    found["together"], found["twice"] = _shorts(even + odd), _shorts(even + even)
    period_N = torch.logspace(0, 2, 4097, base=2.0, dtype=torch.float64)[:-1].float()
    even, odd = _relative_error(period_N, Phase.EVEN), _relative_error(period_N, Phase.ODD)
    share = {"apart": even * odd < 0, "both_down": (even < 0) & (odd < 0), "both_up": (even > 0) & (odd > 0)}
    found["signs"] = {name: float(chosen.double().mean()) for name, chosen in share.items()}
    found["rms"] = {"together": _rms(even + odd), "twice": _rms(even + even)}
    return found


def _relative_error(x_N: Tensor, phase: Phase) -> Tensor:
    return quantize(x_N, Radix4(phase=phase)).dequantize().double() / x_N.double() - 1


def _rms(x_N: Tensor) -> float:
    return math.sqrt(float(x_N.square().mean()))


def _short(number: float) -> float:
    """A measure with six digits."""
    return float(f"{number:.6g}")


def _shorts(x_N: Tensor) -> list[float]:
    return [_short(value) for value in x_N.tolist()]


def _integers(q: QTensor) -> list[int]:
    """The codes as integers; 4-bit ones from -8 to 7."""
    return [int(q.format.values[code]) for code in q.codes().reshape(-1).tolist()]


def _levels(q: QTensor) -> list[float]:
    """What the sixteen codes of a tensor stand for, from the lowest integer or code 0 up."""
    codes = torch.arange(16, dtype=torch.uint8)
    every = dataclasses.replace(q, qdata=pack(codes, 4), shape=torch.Size([16]))
    values = plain(every.dequantize())
    return sorted(values) if q.format.kind == "int" else values


def _bell(count: int) -> Tensor:
    """Evenly likely places of a standard normal distribution, in ascending order; float64 of shape (count,)."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return math.sqrt(2) * torch.erfinv(2 * share - 1)
