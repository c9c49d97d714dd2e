"""What a machine is: how much it computes, holds and moves in a cycle, every number with its source.

A `Machine` has cores; a core has one array of multipliers for each precision, of which one works at a time, lanes for
everything that is no matrix product, and on-chip memory. `halfbyte.hardware.presets` has some.

This module imports neither torch nor anything else of ours except the errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import SpecError, UnknownNameError
from .constants import JOUPPI_7NM, PRECISIONS, Constant, EnergyTable
from .cycles import DATAFLOWS, Array

__all__ = ["WIDER", "Machine"]

WIDER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fp4": ("fp4", "fp8", "fp16", "fp32"),
        "int4": ("int4", "int8", "fp8", "fp16", "fp32"),
        "int8": ("int8", "fp16", "fp32"),
        "fp8": ("fp8", "fp16", "fp32"),
        "fp16": ("fp16", "fp32"),
        "fp32": ("fp32",),
    }
)
"""For each precision those whose multipliers can do its work, narrowest first."""

_WHOLE: tuple[str, ...] = ("cores", "vector_lanes", "frequency_hz", "dram_bytes_per_second", "sram_bytes_per_cycle")
_WHOLE += ("accumulate_bytes", "result_bytes", "weight_gradient_bytes", "chunk_size")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """An accelerator. All counts are of one core unless they say otherwise.

    Attributes:
        name: what it is called.
        arrays: its multipliers by precision; one precision works at a time.
        cores: how many cores; a layer is split over them, and they read a shared operand together.
        dataflow: ``"ws"``, ``"os"`` or ``"is"``, or ``"best"``: for each product the one that takes least time.
        buffers: bytes of on-chip memory by name.
        vector_lanes: floating-point operations a cycle beside the array.
        frequency_hz: clock.
        dram_bytes_per_second: of the whole machine.
        sram_bytes_per_cycle: between buffers and array, and buffers and lanes.
        fused: whether vector work that can be done on the way out of or into a product reads and writes no memory.
        double_buffered: whether the next operands arrive while the array computes; it halves what a tile may take.
        accumulate_bytes: width of a partial sum.
        result_bytes: width of what fprop and dgrad write.
        weight_gradient_bytes: width of what wgrad writes.
        chunk_size: products in a sum before it is rounded, on integer units.
        memory: which memory of the energy table.
        energy: the energy table.
        sources: where numbers come from, by field, and by ``arrays.fp16`` or ``buffers.l1`` for parts of one.
    """

    name: str
    arrays: Mapping[str, Array]
    cores: int
    dataflow: str = "best"
    buffers: Mapping[str, int]
    vector_lanes: int
    frequency_hz: int
    dram_bytes_per_second: int
    sram_bytes_per_cycle: int
    fused: bool = True
    double_buffered: bool = True
    accumulate_bytes: int = 2
    result_bytes: int = 2
    weight_gradient_bytes: int = 4
    chunk_size: int = 64
    memory: str = "hbm2"
    energy: EnergyTable = JOUPPI_7NM
    sources: Mapping[str, Constant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        what = f"Machine {self.name!r}"
        for precision, array in self.arrays.items():
            if precision not in PRECISIONS:
                raise UnknownNameError("precision", str(precision), PRECISIONS)
            if not isinstance(array, Array):
                raise SpecError(f"{what}: arrays[{precision!r}]={array!r} was given; an Array is possible.")
        if not self.arrays or not self.buffers:
            raise SpecError(f"{what} has no arrays or no buffers; give it at least one of each.")
        if self.dataflow not in ("best", *DATAFLOWS):
            raise UnknownNameError("dataflow", str(self.dataflow), ("best", *DATAFLOWS))
        sizes = {name: getattr(self, name) for name in _WHOLE}
        for name, value in (sizes | {f"buffers[{k!r}]": v for k, v in self.buffers.items()}).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SpecError(f"{what}: {name}={value!r} was given; a whole number of at least 1 is possible.")
        for name in ("fused", "double_buffered"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{what}: {name}={getattr(self, name)!r} was given; True or False is possible.")
        self.energy.dram_pj_per_byte(self.memory)
        for name in ("arrays", "buffers", "sources"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for name in self.sources:
            self._number(name)

    def _number(self, name: str) -> float:
        """What a key of `sources` stands for."""
        part, _, key = name.partition(".")
        if part == "arrays" and key in self.arrays:
            return self.arrays[key].macs_per_cycle
        if part == "buffers" and key in self.buffers:
            return self.buffers[key]
        if name in _WHOLE:
            return float(getattr(self, name))
        raise UnknownNameError(f"number of machine {self.name}", name, self.numbers)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of all its numbers, as in `sources`. That of an array is its multiply-accumulates a cycle."""
        return (*_WHOLE, *(f"arrays.{p}" for p in self.arrays), *(f"buffers.{b}" for b in self.buffers))

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all buffers of all cores."""
        return self.cores * sum(self.buffers.values())

    def provenance(self) -> dict[str, Constant]:
        """Each number with its source: a number that was changed since, or never had one, is "given by the caller"."""
        found = {}
        for name in self.numbers:
            value, source = self._number(name), self.sources.get(name)
            if source is None or source.value != value:
                source = Constant(value, unit_of(name), self.energy.node, "given by the caller", "assumed")
            found[name] = source
        return found

    def precision_for(self, precision: str) -> str:
        """The narrowest of its precisions that can do the work of another.

        Raises:
            UnknownNameError: if there is no such precision.
            SpecError: if none of its multipliers is wide enough.
        """
        if precision not in WIDER:
            raise UnknownNameError("precision", precision, PRECISIONS)
        for wider in WIDER[precision]:
            if wider in self.arrays:
                return wider
        raise SpecError(
            f"Machine {self.name!r} was asked to multiply in {precision} and has arrays for {', '.join(self.arrays)}; "
            f"give it one of {', '.join(WIDER[precision])}, or trace the layers that are not converted in fp16."
        )

    def peak_macs_per_cycle(self, precision: str) -> int:
        """Multiply-accumulates a cycle of all cores, in the narrowest precision that can do the work.

        Raises:
            UnknownNameError: if there is no such precision.
            SpecError: if none of its multipliers is wide enough.
        """
        return self.cores * self.arrays[self.precision_for(precision)].macs_per_cycle

    def peak_ops_per_second(self, precision: str) -> int:
        """Two for each multiply-accumulate: what data sheets call FLOPS and OPS.

        Raises:
            UnknownNameError: if there is no such precision.
            SpecError: if none of its multipliers is wide enough.
        """
        return 2 * self.peak_macs_per_cycle(precision) * self.frequency_hz

    def to_json(self) -> dict[str, Any]:
        """All fields, with the provenance of the numbers and of the energies, for `json.dumps`."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in (*_WHOLE, *_OTHERS)}
        arrays = {precision: dataclasses.asdict(array) for precision, array in self.arrays.items()}
        sram = self.energy.sram_pj_per_byte(max(self.buffers.values()))
        prices = {f"mac.{p}": self.energy.macs[p] for p in self.arrays} | {"sram": sram}
        prices |= {"dram": self.energy.dram_pj_per_byte(self.memory), "vector_flop": self.energy.vector_flop}
        prices["rounding"] = self.energy.rounding
        return {
            **plain,
            "arrays": arrays,
            "buffers": dict(self.buffers),
            "energy": self.energy.name,
            "provenance": {name: dataclasses.asdict(c) for name, c in self.provenance().items()},
            "prices": {name: dataclasses.asdict(c) for name, c in prices.items()},
        }


_OTHERS = ("name", "dataflow", "fused", "double_buffered", "memory")
_UNITS = {"frequency_hz": "Hz", "dram_bytes_per_second": "B/s", "sram_bytes_per_cycle": "B/cycle"}


def unit_of(name: str) -> str:
    """The unit of a number of a machine, by its name in `Machine.sources`."""
    if name.startswith("arrays."):
        return "MAC/cycle"
    return _UNITS.get(name, "B" if name.startswith("buffers.") or name.endswith("_bytes") else "1")
