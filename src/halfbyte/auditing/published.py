"""The formats as their papers and standards print them: lists of numbers, typed here and taken from none of our tables.

And rounding as it is defined on such a list: which of its numbers is the nearest, which two lie around.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format

__all__ = ["LEVELS", "allowed_places", "levels_of", "table_error"]

_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
_E4M3 = (
    *(m / 8 * 2.0**-6 for m in range(8)),
    *((1 + m / 8) * 2.0**e for e in range(-6, 8) for m in range(8)),
    *(256, 288, 320, 352, 384, 416, 448),
)
_E5M2 = (*(m / 4 * 2.0**-14 for m in range(4)), *((1 + m / 4) * 2.0**e for e in range(-14, 16) for m in range(4)))

LEVELS: dict[str, tuple[float, ...]] = {
    "int4": tuple(range(-8, 8)),
    "uint4": tuple(range(16)),
    "int8": tuple(range(-128, 128)),
    "uint8": tuple(range(256)),
    # Sun et al. 2020, Fig. 2c (bias 4, radix 4) and section 3.3 (the odd phase is half of it).
    "fp4_e3m0_r4": (0, 0.015625, 0.0625, 0.25, 1, 4, 16, 64),
    "fp4_e3m0_r4_odd": (0, 0.0078125, 0.03125, 0.125, 0.5, 2, 8, 32),
    # The same with radix 2: the 1-3-0 of Sun et al., and of LUQ up to a factor.
    "fp4_e3m0": (0, 0.125, 0.25, 0.5, 1, 2, 4, 8),
    # OCP Microscaling Formats 1.0, section 5.3.3.
    "fp4_e2m1": _E2M1,
    "fp4_e1m2": (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75),
    # OCP 8-bit Floating Point Specification 1.0, Table 1: largest 448 and 57344, smallest 2^-9 and 2^-16.
    "fp8_e4m3": _E4M3,
    "fp8_e5m2": _E5M2,
    "e8m0": tuple(2.0**e for e in range(-127, 128)),
}
"""The numbers of each format; of those with a sign bit the ones from zero up."""


def _signed(name: str) -> list[float]:
    positive = LEVELS[name]
    mirrored = [-level for level in positive if level > 0] if name.startswith("fp") else []
    return sorted({float(level) for level in (*mirrored, *positive)})


def table_error(fmt: Format) -> str:
    """How a format differs from the published one of its name; empty if it does not, or if there is none."""
    if fmt.name not in LEVELS:
        return ""
    finite = sorted({value + 0.0 for value in fmt.values if abs(value) < float("inf")})
    wanted = _signed(fmt.name)
    if finite != wanted:
        odd = sorted(set(finite) ^ set(wanted))
        return f"{fmt.name} has {len(finite)} different numbers, published are {len(wanted)}; {odd[:4]} are in only one"
    bits = 4 if len(LEVELS[fmt.name]) <= 16 else 8
    if len(fmt.values) > 1 << bits or fmt.bits > bits:
        return f"{fmt.name} has {len(fmt.values)} codes of {fmt.bits} bits; {bits} bits have {1 << bits}"
    return ""


def levels_of(fmt: Format, low: float, high: float, device: torch.device) -> Tensor:
    """The numbers of a format from `low` to `high`, in ascending order, float64; the published ones where there are."""
    known = _signed(fmt.name) if fmt.name in LEVELS else sorted({v + 0.0 for v in fmt.values if abs(v) < float("inf")})
    return torch.tensor([v for v in known if low <= v <= high], dtype=torch.float64, device=device)


def _borders(levels: Tensor, fmt: Format) -> Tensor:
    """Where the nearest level changes: the middles, but next to the zero of a format with exponents only.

    There underflow starts at the middle between the smallest level and the one that would follow below it.
    """
    borders = (levels[1:] + levels[:-1]) / 2
    if fmt.kind == "log":
        beside = (levels[1:] == 0) | (levels[:-1] == 0)
        borders = torch.where(beside, borders * (1 + 1 / fmt.radix), borders)
    return borders


def allowed_places(z: Tensor, slack: Tensor, levels: Tensor, fmt: Format, *, nearest: bool) -> tuple[Tensor, Tensor]:
    """The lowest and the highest place in `levels` that each number may be rounded to.

    Args:
        z: numbers in the format's own units, float64.
        slack: how far from z the number that was rounded may have been, because of the scale's rounding.
        levels: from `levels_of`.
        fmt: the format.
        nearest: to the nearest level, or to one of the two around.
    """
    last = len(levels) - 1
    if nearest:
        borders = _borders(levels, fmt)
        return torch.bucketize(z - slack, borders), torch.bucketize(z + slack, borders, right=True)
    below = torch.bucketize(z - slack, levels, right=True) - 1
    return below.clamp(0, last), torch.bucketize(z + slack, levels).clamp(0, last)
