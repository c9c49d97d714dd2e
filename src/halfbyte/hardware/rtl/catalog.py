"""Every unit by name: what is synthesized, proven and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from amaranth.lib.wiring import Component

from .converter import Converter
from .dots import Dot
from .fma import FMA
from .fused import FusedDot
from .lanes import Kind, Lane
from .rounding import BF16, DLFLOAT16, FP8, FP16, FP32, FloatLayout, Rounder

__all__ = ["UNITS", "Role", "Unit"]

Role = Literal["baseline", "lane", "unit", "part"]
"""A floating-point unit to compare with, one product, a whole 4-bit unit, or what stands beside the units."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One entry of the catalog.

    Attributes:
        name: its name in `UNITS`.
        description: one sentence for people.
        macs: multiply-accumulates a cycle; 0 for what accumulates nothing.
        role: what it is for.
        build: makes the circuit; its ports are its ``signature``, documented by its class.
    """

    name: str
    description: str
    macs: int
    role: Role
    build: Callable[[], Component]


def _fma(name: str, description: str, factors: FloatLayout, sum_: FloatLayout) -> Unit:
    """A fused multiply-add."""
    return Unit(name=name, description=description, macs=1, role="baseline", build=partial(FMA, factors, sum_))


def _fused(name: str, description: str, sum_: FloatLayout) -> Unit:
    """A fused dot product of four FP16 pairs."""
    return Unit(name=name, description=description, macs=4, role="baseline", build=partial(FusedDot, FP16, sum_))


def _lane(name: str, description: str, kind: Kind, *, unsigned: bool = False) -> Unit:
    """One product."""
    return Unit(name=name, description=description, macs=0, role="lane", build=partial(Lane, kind, unsigned=unsigned))


def _dot(
    name: str,
    description: str,
    kind: Kind,
    lanes: int = 4,
    *,
    unsigned: bool = False,
    accumulator_bits: int | None = None,
    rounds: bool = False,
) -> Unit:
    """A 4-bit unit."""
    build = partial(Dot, kind, lanes, unsigned=unsigned, accumulator_bits=accumulator_bits, rounds=rounds)
    return Unit(name=name, description=description, macs=lanes, role="unit", build=build)


def _part(name: str, description: str, build: Callable[[], Component]) -> Unit:
    """What stands beside the units."""
    return Unit(name=name, description=description, macs=0, role="part", build=build)


_IN_ORDER = (
    _fma("fma_fp16", "FP16 fused multiply-add, sum in FP16: what the others are compared with.", FP16, FP16),
    _fma("fma_fp16_fp32", "FP16 factors, sum in FP32.", FP16, FP32),
    _fma("fma_dlf16", "DLFloat16 (1-6-9) fused multiply-add.", DLFLOAT16, DLFLOAT16),
    _fma("fma_fp8_dlf16", "Hybrid FP8 (1-5-3) factors, sum in DLFloat16.", FP8, DLFLOAT16),
    _fma("fma_bf16_fp32", "BF16 factors, sum in FP32.", BF16, FP32),
    _fused("dot4_fp16", "4-way FP16 dot, aligned to the largest exponent, sum in FP16.", FP16),
    _fused("dot4_fp16_fp32", "4-way FP16 dot, aligned to the largest exponent, sum in FP32.", FP32),
    _lane("lane_int4", "INT4 x INT4: a multiplier.", "int"),
    _lane("lane_fp4", "INT4 x radix-4 FP4: a shifter.", "fp4"),
    _lane("lane_fp4_unsigned", "INT4 or unsigned INT4 x radix-4 FP4: a shifter.", "fp4", unsigned=True),
    _dot("dot4_int4", "4-way INT4 x INT4, 16-bit sum.", "int"),
    _dot("dot4_fp4", "4-way INT4 x FP4, 24-bit sum: the unit of Sun et al. 2020, section 6.", "fp4"),
    _dot("dot4_fp4_unsigned", "4-way INT4 or unsigned INT4 x FP4, 24-bit sum.", "fp4", unsigned=True),
    _dot("dot4_mixed", "4-way INT4 x INT4 or FP4, by a mode bit.", "mixed"),
    _dot("dot4_mixed_unsigned", "4-way INT4 or unsigned INT4 x INT4 or FP4.", "mixed", unsigned=True),
    _dot("dot8_mixed", "8-way INT4 x INT4 or FP4.", "mixed", 8),
    _dot("dot4_fp4_acc32", "4-way INT4 x FP4, 32-bit sum.", "fp4", accumulator_bits=32),
    _dot("dot8_mixed_acc32", "8-way INT4 x INT4 or FP4, 32-bit sum.", "mixed", 8, accumulator_bits=32),
    _dot("dot4_fp4_round", "4-way INT4 x FP4 with a rounder of its own to FP16.", "fp4", rounds=True),
    _dot("dot4_mixed_round", "4-way INT4 x INT4 or FP4 with a rounder of its own to FP16.", "mixed", rounds=True),
    _dot("dot2_mixed", "2-way INT4 x INT4 or FP4, small enough to try every operand.", "mixed", 2),
    _dot("dot3_fp4", "3-way INT4 x FP4, small enough to try every operand.", "fp4", 3),
    _part("round_int24_fp16", "24-bit integer to FP16, to nearest even.", Rounder),
    _part("convert_fp16_fp4", "FP16 to radix-4 FP4 in either phase.", Converter),
)

UNITS: Mapping[str, Unit] = MappingProxyType({unit.name: unit for unit in _IN_ORDER})
"""Every unit by its name, in the order of the table that it becomes."""
