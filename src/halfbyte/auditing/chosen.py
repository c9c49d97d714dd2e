"""Rounding to nearest, tested with the numbers that decide it: ties and their neighbors, the ends, the specials."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from .. import oracle
from ..formats import Format
from ..qtensor import QTensor
from ..quantizers import MinMax, Spec
from ..watching import code_range
from .published import levels_of
from .rounding import in_own_units, misrounded
from .subject import Subject

__all__ = ["nearest_is_nearest", "points"]

_MOST_LEVELS = 40
"""Of a longer list of levels so many are taken, evenly spread and with both ends: the oracle is exact and slow."""


def points(fmt: Format, low: float, high: float) -> Tensor:
    """Numbers in a format's own units on which rounding is decided, float32, from zero outwards.

    Levels, the middles between them and, for formats with exponents only, the border to zero; of each both neighbors
    in float32; numbers beyond both ends; zero with either sign and the smallest float.
    """
    levels = levels_of(fmt, low, high, torch.device("cpu"))
    if len(levels) > _MOST_LEVELS:
        places = torch.linspace(0, len(levels) - 2, _MOST_LEVELS).round().long()
        levels = torch.cat([levels[places], levels[places + 1]]).unique()
    borders = [levels, (levels[1:] + levels[:-1]) / 2]
    if fmt.kind == "log":
        small = fmt.min_positive * (1 + 1 / fmt.radix) / 2
        borders.append(torch.tensor([-small, small], dtype=torch.float64))
    exact = torch.cat(borders).float()
    far = torch.tensor([low - 0.5, high + 0.5, low * 1.3, high * 1.3, low * 100, high * 100, 1e-45, -1e-45, 0.0, -0.0])
    infinite = torch.tensor(math.inf)
    numbers: Tensor = torch.cat([exact, exact.nextafter(infinite), exact.nextafter(-infinite), far]).unique().flip(0)
    # From zero outwards, so that the first that is wrong is the simplest.
    return numbers[numbers.abs().argsort(stable=True)]


def nearest_is_nearest(subject: Subject) -> str:
    """Every code is the oracle's, on chosen numbers and on bell-shaped ones; NaN and infinity are treated as said."""
    spec = subject.spec
    for fmt in spec.formats:
        low, high = code_range(spec, fmt)
        chosen = points(fmt, low, high)
        if not fmt.signed and getattr(spec, "signed", False) is None:
            chosen = chosen[chosen >= 0]  # A negative number would make the tensor a signed one.
        if subject.takes_scale:
            for scale in (1.0, 0.125):
                x = chosen * scale
                q = subject.codes(x, scale=scale)
                if q.format == fmt and (wrong := _unlike_oracle(x, q, spec) or _specials(subject, spec, scale)):
                    return wrong
        else:
            for top in (high, 4.0, 7.0, 7.5):
                x = _in_blocks(chosen, top)
                if wrong := _unlike_oracle(x, subject.codes(x), spec):
                    return wrong
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    return misrounded(x.to(subject.device), subject.codes(x), spec)


def _in_blocks(chosen: Tensor, top: float) -> Tensor:
    """The numbers up to `top` in rows whose every block of 16 begins with `top`, so that its scale is a simple one.

    One more row brings the tensor's largest magnitude to 448 times the format's, so that the scale that NVFP4 gives to
    a tensor is 1.
    """
    inside = chosen[chosen.abs() <= top]
    rows = torch.nn.functional.pad(inside, (0, -len(inside) % 15)).view(-1, 15)
    rows = torch.cat([torch.full((len(rows), 1), top), rows], 1)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % 16)).view(-1, 16)
    anchor = torch.zeros(16, 16)
    anchor[0, 0] = 448 * 6
    return torch.cat([rows, anchor]).reshape(-1, 32)


def _unlike_oracle(x: Tensor, q: QTensor, spec: Spec) -> str:
    """The first number whose code is not the oracle's; empty if there is none.

    Where the scale is a power of two, ties must be decided as the format decides them; elsewhere a number within the
    scale's own rounding of a tie may go either way.
    """
    fmt = q.format
    low, high = code_range(spec, fmt)
    _, scales, slacks = in_own_units(x.to(q.qdata.device), q)
    offset = Fraction(0) if q.zero_point is None else Fraction(q.zero_point.item())
    shifted = getattr(spec, "ibm_shifted", False) or (isinstance(spec, MinMax) and spec.bits == 1)
    codes = q.codes().reshape(-1).tolist()
    numbers = zip(x.reshape(-1).tolist(), scales.reshape(-1).tolist(), slacks.reshape(-1).tolist(), codes, strict=True)
    for number, scale, slack, code in dict.fromkeys(numbers):
        if not (scale > 0 and math.isfinite(scale)):
            continue
        z = Fraction(number) / Fraction(scale) + offset
        exact = math.frexp(scale)[0] == 0.5 and not shifted
        if offset:  # Counted from the lowest level, which is subtracted first and rounds, too.
            from_lowest = Fraction(number) + (offset - Fraction(low)) * Fraction(scale)
            exact = exact and oracle.to_binary(from_lowest) == from_lowest
        around = (z,) if exact else (z - Fraction(slack), z + Fraction(slack))
        wanted = {min(max(oracle.round(fmt, at), Fraction(low)), Fraction(high)) for at in around}
        found = oracle.decode(fmt, code)
        if found not in wanted:
            return (
                f"{number!r} with scale {scale:g} became {float(found):g} in {fmt.name}, the nearest is "
                f"{' or '.join(f'{float(value):g}' for value in sorted(wanted))}"
            )
    return ""


def _specials(subject: Subject, spec: Spec, scale: float) -> str:
    """With a given scale infinity is the last code on its side; a NaN anywhere makes the whole tensor NaN."""
    if not isinstance(spec, MinMax):
        x = torch.tensor([math.inf, 1.0] if not subject.spec.formats[0].signed else [math.inf, -math.inf])
        q = subject.codes(x, scale=scale)
        ends = code_range(spec, q.format)
        offset = 0.0 if q.zero_point is None else q.zero_point.item()
        wanted = [(ends[1] - offset) * scale, (ends[0] - offset) * scale]
        found = q.dequantize().tolist()
        if found[0] != wanted[0] or (x[1] < 0 and found[1] != wanted[1]):
            return f"infinities became {found}, the ends of the range are {wanted}"
    if not bool(subject.codes(torch.tensor([1.0, math.nan, 2.0]), scale=scale).dequantize().isnan().all()):
        return "a tensor with a NaN did not become NaN"
    return ""
