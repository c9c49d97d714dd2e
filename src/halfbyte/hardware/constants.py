"""What an operation and a byte cost: published energy tables, every number with its unit, node, source and confidence.

No table prices a four-bit operation, so their multiply-accumulate is the table's own FP16 one, divided by a ratio that
was counted: how much fewer picojoules the gates of a four-bit unit switch than those of an FP16 unit on the same data
(`MAC_RATIOS`, or the results of our own synthesis, see `halfbyte.hardware.presets.isoarea`). Memory is not scaled.

    table         node    multiply-accumulate FP16    SRAM, by size        DRAM
    JOUPPI_7NM    7 nm    0.50 pJ                     0.94-1.75 pJ/B       HBM2 44, GDDR6 52, DDR4 163 pJ/B
    HOROWITZ_45NM 45 nm   1.50 pJ                     1.25-12.5 pJ/B       DDR3 160 pJ/B
    EYERISS       65 nm   relative: 1                 6 a 16-bit word      200 a 16-bit word

This module imports neither torch nor anything else of ours except the errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from ..errors import SpecError, UnknownNameError

__all__ = [
    "ENERGY_TABLES",
    "EYERISS",
    "HOROWITZ_45NM",
    "JOUPPI_7NM",
    "MAC_RATIOS",
    "PRECISIONS",
    "Confidence",
    "Constant",
    "EnergyTable",
    "derived",
]

Confidence = Literal["verified", "secondary", "derived", "assumed"]
"""How far a number can be trusted.

``"verified"``: read in the primary source, or measured here. ``"secondary"``: read where somebody quotes the source.
``"derived"``: computed from such numbers. ``"assumed"``: from memory or chosen; check it before you quote it.
"""

PRECISIONS = ("fp4", "int4", "int8", "fp8", "fp16", "fp32")
"""The classes of multipliers. ``"int4"`` multiplies two integers, ``"fp4"`` an integer and a four-bit float."""


@dataclass(frozen=True)
class Constant:
    """A number and where it comes from.

    Attributes:
        value: the number; finite.
        unit: its unit, such as ``"pJ"``; ``"1"`` for a ratio or a count.
        node: technology it holds for, such as ``"7 nm"``; ``"any"`` where there is none.
        source: who says so.
        confidence: how far to trust it.
    """

    value: float
    unit: str
    node: str
    source: str
    confidence: Confidence

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise SpecError(f"A constant of value {self.value!r} was given; a finite number is possible.")
        for name in ("unit", "node", "source"):
            if not getattr(self, name):
                raise SpecError(f"The constant {self.value} has no {name}; say it, a ratio has the unit '1'.")
        if self.confidence not in get_args(Confidence):
            raise UnknownNameError("confidence", str(self.confidence), get_args(Confidence))


def derived(value: float, unit: str, node: str, source: str, *parts: Constant) -> Constant:
    """A constant computed from others: no surer than the least sure of them.

    Args:
        value: the result.
        unit: its unit.
        node: its technology.
        source: how it was computed.
        parts: the constants that it was computed from.
    """
    assumed = any(part.confidence == "assumed" for part in parts)
    return Constant(value, unit, node, source, "assumed" if assumed else "derived")


@dataclass(frozen=True, kw_only=True)
class EnergyTable:
    """Picojoules of what a machine does.

    Attributes:
        name: its name in `ENERGY_TABLES`.
        node: technology.
        macs: pJ of a multiply-accumulate, by precision; all of `PRECISIONS`.
        rounding: pJ of rounding one sum of a chunk to FP16; narrow integer units need it, floating-point ones do not.
        vector_flop: pJ of one operation of a vector lane.
        sram: pJ a byte, by the size in bytes of the memory; an access costs what the next larger listed size does.
        dram: pJ a byte, by kind of memory.
    """

    name: str
    node: str
    macs: Mapping[str, Constant]
    rounding: Constant
    vector_flop: Constant
    sram: Mapping[int, Constant]
    dram: Mapping[str, Constant]

    def __post_init__(self) -> None:
        if set(self.macs) != set(PRECISIONS):
            raise SpecError(f"Energy table {self.name!r} prices {sorted(self.macs)}; it must price {PRECISIONS}.")
        if not self.sram or not self.dram:
            raise SpecError(f"Energy table {self.name!r} needs at least one SRAM size and one kind of DRAM.")
        every = (*self.macs.values(), self.rounding, self.vector_flop, *self.sram.values(), *self.dram.values())
        if any(constant.value < 0 for constant in every):
            raise SpecError(f"Energy table {self.name!r} has a negative energy; zero or more is possible.")
        for name in ("macs", "sram", "dram"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def sram_pj_per_byte(self, size_bytes: int) -> Constant:
        """Of an access to a memory of that size: the next larger size listed, or the largest."""
        fitting = [size for size in sorted(self.sram) if size >= size_bytes]
        return self.sram[fitting[0] if fitting else max(self.sram)]

    def dram_pj_per_byte(self, memory: str) -> Constant:
        """Of that kind of memory.

        Raises:
            UnknownNameError: if the table does not price it.
        """
        if memory not in self.dram:
            raise UnknownNameError(f"memory in energy table {self.name}", memory, self.dram)
        return self.dram[memory]

    def with_ratios(self, ratios: Mapping[str, Constant]) -> EnergyTable:
        """This table with other FP16-to-X ratios, by precision.

        Raises:
            SpecError: if a ratio is not above zero.
            UnknownNameError: if a name is no precision.
        """
        macs = dict(self.macs)
        for precision, ratio in ratios.items():
            if precision not in PRECISIONS:
                raise UnknownNameError("precision", precision, PRECISIONS)
            if ratio.value <= 0:
                raise SpecError(f"The energy ratio FP16 to {precision} was given as {ratio.value}; it is above zero.")
            macs[precision] = _scaled(self.macs["fp16"], ratio)
        return dataclasses.replace(self, macs=macs)


def _scaled(anchor: Constant, ratio: Constant) -> Constant:
    """The multiply-accumulate that takes `ratio` times less than `anchor`."""
    how = f"FP16 multiply-accumulate of {anchor.value:g} pJ / {ratio.value:.4g} ({ratio.source})"
    return derived(anchor.value / ratio.value, "pJ", anchor.node, how, anchor, ratio)


def _mac(multiply: Constant, add: Constant) -> Constant:
    """A multiplication and an addition."""
    how = f"{multiply.value:g} pJ multiply + {add.value:g} pJ add; {multiply.source}"
    return derived(multiply.value + add.value, "pJ", multiply.node, how, multiply, add)


def _mean_flop(multiply: Constant, add: Constant) -> Constant:
    """One operation of a lane that adds as often as it multiplies."""
    how = f"mean of {multiply.value:g} pJ multiply and {add.value:g} pJ add; {multiply.source}"
    return derived((multiply.value + add.value) / 2, "pJ", multiply.node, how, multiply, add)


def _per_byte(access: Constant, size: int = 8) -> Constant:
    """Of an access to `size` bytes the share of one."""
    how = f"{access.value:g} pJ / {size} B; {access.source}"
    return derived(access.value / size, "pJ/B", access.node, how, access)


_TOGGLES = "own synthesis, ./dev synth: toggles of the netlists on drawn operands, no glitches or wires"

MAC_RATIOS: Mapping[str, Constant] = MappingProxyType(
    {
        "fp8": Constant(2.13, "1", "unit gates", f"fma_fp16 / fma_fp8_dlf16, mean of both data; {_TOGGLES}", "derived"),
        "int4": Constant(7.30, "1", "unit gates", f"fma_fp16 / dot4_int4, forward data; {_TOGGLES}", "derived"),
        "fp4": Constant(8.25, "1", "unit gates", f"fma_fp16 / dot4_fp4, gradients; {_TOGGLES}", "derived"),
    }
)
"""How many times less a narrow multiply-accumulate takes than an FP16 one."""

# A rounder works once for four MACs: 4 x (dot4_fp4_round - dot4_fp4) = 4 x (77.59 - 61.54) fJ; fma_fp16 takes 507.92.
_ROUNDING = Constant(7.91, "1", "unit gates", f"fma_fp16 / 4 x (dot4_fp4_round - dot4_fp4); {_TOGGLES}", "derived")


def _table(
    name: str,
    operations: Mapping[str, Constant],
    sram: Mapping[int, Constant],
    dram: Mapping[str, Constant],
) -> EnergyTable:
    """A table from single operations: FP16, FP32 and INT8 as published, the rest by ratio to FP16."""
    fp16 = _mac(operations["fp16_mul"], operations["fp16_add"])
    macs = {p: _scaled(fp16, ratio) for p, ratio in MAC_RATIOS.items()}
    macs |= {"fp16": fp16, "fp32": _mac(operations["fp32_mul"], operations["fp32_add"])}
    macs["int8"] = _mac(operations["int8_mul"], operations["int32_add"])
    return EnergyTable(
        name=name,
        node=fp16.node,
        macs=macs,
        rounding=_scaled(fp16, _ROUNDING),
        vector_flop=_mean_flop(operations["fp16_mul"], operations["fp16_add"]),
        sram=sram,
        dram=dram,
    )


_HOROWITZ = "Horowitz, ISSCC 2014, doi 10.1109/ISSCC.2014.6757323"
_JOUPPI = "Jouppi et al., ISCA 2021, Table 2, doi 10.1109/ISCA52012.2021.00010"


def _at(node: str, source: str, confidence: Confidence, unit: str = "pJ", **values: float) -> dict[str, Constant]:
    return {name: Constant(value, unit, node, source, confidence) for name, value in values.items()}


HOROWITZ_OPERATIONS: Mapping[str, Constant] = MappingProxyType(
    _at("45 nm", _HOROWITZ, "secondary", int8_add=0.03, int8_mul=0.2, fp16_add=0.4, fp16_mul=1.1)
    | _at("45 nm", _HOROWITZ, "secondary", int32_add=0.1, int32_mul=3.1, fp32_add=0.9, fp32_mul=3.7)
)
"""Single operations at 45 nm and 0.9 V, in pJ."""

JOUPPI_OPERATIONS: Mapping[str, Constant] = MappingProxyType(
    _at("7 nm", _JOUPPI, "secondary", int8_add=0.007, int32_add=0.03, int8_mul=0.07, fp16_mul=0.34, fp32_mul=1.31)
    | _at("7 nm", _JOUPPI, "assumed", bf16_add=0.11, fp16_add=0.16, fp32_add=0.38, int32_mul=1.48, bf16_mul=0.21)
)
"""Single operations at 7 nm, in pJ."""


def _memory(node: str, source: str, **access_pj: float) -> dict[int, Constant]:
    """The SRAM sizes of a table, of an access to 64 bits: a size is named as in ``k32``, in units of 1024 bytes."""
    found = _at(node, f"64-bit SRAM access; {source}", "secondary", "pJ", **access_pj)
    return {int(name[1:]) << 10: _per_byte(constant) for name, constant in found.items()}


def _range(node: str, source: str, low: float, high: float) -> Constant:
    """The middle of a published range for 64 bits, as pJ a byte."""
    access = Constant((low + high) / 2, "pJ", node, f"middle of {low:g}-{high:g} pJ for 64 bits; {source}", "secondary")
    return _per_byte(access)


HOROWITZ_45NM = _table(
    "horowitz45",
    HOROWITZ_OPERATIONS,
    _memory("45 nm", _HOROWITZ, k8=10, k32=20, k1024=100),
    {"ddr3": _per_byte(Constant(640, "pJ", "45 nm", f"32-bit DRAM access; {_HOROWITZ}", "secondary"), 4)},
)
"""45 nm, 0.9 V: a second opinion, at another node."""

JOUPPI_7NM = _table(
    "jouppi7",
    JOUPPI_OPERATIONS,
    _memory("7 nm", _JOUPPI, k8=7.5, k32=8.5, k1024=14),
    {
        "hbm2": _range("7 nm", f"HBM2; {_JOUPPI}", 250, 450),
        "gddr6": _range("7 nm", f"GDDR6; {_JOUPPI}", 350, 480),
        "ddr4": _range("7 nm", f"DDR3/4; {_JOUPPI}", 1300, 1300),
    },
)
"""7 nm, the node of IBM's training chip; logic and memory from one table. The default."""


def _eyeriss() -> EnergyTable:
    """Eyeriss' relative costs, in picojoules of the 7 nm table's FP16 multiply-accumulate."""
    source = "Chen et al., Eyeriss, ISCA 2016: 1 MAC : 2 PE to PE : 6 buffer : 200 DRAM, a 16-bit word"
    anchor = JOUPPI_7NM.macs["fp16"]

    def of(times: float) -> Constant:
        how = f"{times:g} x the FP16 multiply-accumulate of {anchor.value:g} pJ / 2 B; {source}"
        return Constant(times * anchor.value / 2, "pJ/B", "relative", how, "assumed")

    return dataclasses.replace(
        JOUPPI_7NM, name="eyeriss", node="relative", sram={1 << 20: of(6)}, dram={"hbm2": of(200)}
    )


EYERISS = _eyeriss()
"""The 7 nm logic with memory at Eyeriss' relative costs (65 nm): a second opinion on memory's share."""

ENERGY_TABLES: Mapping[str, EnergyTable] = MappingProxyType(
    {table.name: table for table in (JOUPPI_7NM, HOROWITZ_45NM, EYERISS)}
)
"""The energy tables by name."""
