"""Machines to put a workload on: what they compute, hold and move, every number with its source.

    rapid4      IBM's 7 nm chip of four cores (ISSCC 2021, JSSC 2022): FP16 : FP8 : INT4 lanes as 1 : 2 : 8
    rapid128    its simulated system of 4 x 32 such cores (RaPiD, ISCA 2021): 768 TFLOPS in FP8
    ibm14       IBM's 14 nm core (VLSI 2018): 512 FP16 multiply-accumulates a cycle
    tpu_like    one array of 128 x 128, weight stationary
    scalesim32  one array of 32 x 32 with 256 + 256 + 128 KB, SCALE-Sim's habits: nothing overlaps
    isoarea()   as many units of each kind as fit on the area of one FP16 array: areas from our own synthesis

No published chip multiplies by radix-4 FP4. Where a preset does, that is our assumption, as IBM's own (Sun et al.,
NeurIPS 2020, section 6) was that such a unit takes the place of the INT4 one.

This module imports neither torch nor anything else of ours except the errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import SpecError, UnknownNameError
from .constants import ENERGY_TABLES, HOROWITZ_45NM, Confidence, Constant
from .cycles import Array
from .machine import Machine, unit_of
from .units import UnitCost, load_units

__all__ = ["MIXED_ENGINE", "PAPER_ENGINE", "PRESETS", "isoarea", "preset"]


def _machine(
    name: str,
    node: str,
    said: Mapping[str, tuple[float, str, Confidence]],
    **fields: Any,
) -> Machine:
    """A machine whose numbers have the sources given as (value, source, confidence); the rest are our choice."""
    bare = Machine(name=name, **fields)
    sources = {key: Constant(value, unit_of(key), node, source, sure) for key, (value, source, sure) in said.items()}
    for number in bare.numbers:
        if number not in sources:
            sources[number] = dataclasses.replace(bare.provenance()[number], node=node, source="chosen for this preset")
    return dataclasses.replace(bare, sources=sources)


_JSSC = "IBM 7 nm 4-core chip, JSSC 57(1) 2022: 26.2 TFLOPS HFP8 and 104.9 TOPS INT4"
_ISSCC = "IBM 7 nm 4-core chip, ISSCC 2021, 9.1: 1.0 to 1.6 GHz"
_MEMORY = "from memory of RaPiD, ISCA 2021, not checked in the paper"
_HALF = "half of HFP8; the ratio is from memory of RaPiD, ISCA 2021"
_FP4 = "as INT4: Sun et al., NeurIPS 2020, section 6, put an FP4 unit in its place; no chip has one"
_RAPID = "RaPiD, ISCA 2021, abstract: 4 x 32 cores, 768 TFLOPS HFP8"
_VLSI = "IBM 14 nm core, VLSI 2018, abstract: 1.5 TFLOPS FP16 at 1.5 GHz"
_TPU = "from memory of TPU v3; a machine like it, not it"

_RAPID_CORE: dict[str, Any] = {
    "arrays": {
        "fp16": Array(32, 32),
        "fp8": Array(32, 32, 2),
        "int4": Array(32, 32, 8),
        "fp4": Array(32, 32, 8),
    },
    "buffers": {"l1": 2 << 20},
    "vector_lanes": 64,
    "sram_bytes_per_cycle": 512,
}


def _rapid_core(peak: str) -> dict[str, tuple[float, str, Confidence]]:
    """What is known of one core: its peak a cycle follows from the chip's peak, its cores and its clock."""
    return {
        "arrays.fp16": (1024, _HALF, "assumed"),
        "arrays.fp8": (2048, f"{peak}; / (2 x cores x clock)", "derived"),
        "arrays.int4": (8192, f"{_JSSC}; / (2 x 4 x 1.6 GHz)", "derived"),
        "arrays.fp4": (8192, _FP4, "assumed"),
        "buffers.l1": (2 << 20, _MEMORY, "assumed"),
        "accumulate_bytes": (2, "sums leave a unit in FP16: Sun et al., NeurIPS 2020, Fig. 4b", "verified"),
        "chunk_size": (64, "chunk of 64: Wang et al., NeurIPS 2018", "assumed"),
    }


def _presets() -> tuple[Machine, ...]:
    rapid4 = _machine(
        "rapid4",
        "7 nm",
        {
            **_rapid_core(_JSSC),
            "cores": (4, _JSSC, "verified"),
            "frequency_hz": (1_600_000_000, _ISSCC, "secondary"),
            "dram_bytes_per_second": (200_000_000_000, _MEMORY, "assumed"),
        },
        cores=4,
        frequency_hz=1_600_000_000,
        dram_bytes_per_second=200_000_000_000,
        **_RAPID_CORE,
    )
    rapid128 = _machine(
        "rapid128",
        "7 nm",
        {
            **_rapid_core(_RAPID),
            "cores": (128, _RAPID, "verified"),
            "frequency_hz": (1_464_843_750, f"{_RAPID}; / (2 x 128 x 2048)", "derived"),
            "dram_bytes_per_second": (6_400_000_000_000, f"32 x 200 GB/s for 4 cores; {_MEMORY}", "assumed"),
        },
        cores=128,
        frequency_hz=1_464_843_750,
        dram_bytes_per_second=6_400_000_000_000,
        **_RAPID_CORE,
    )
    ibm14 = _machine(
        "ibm14",
        "14 nm",
        {
            "arrays.fp16": (512, f"{_VLSI}; / (2 x 1.5 GHz)", "derived"),
            "cores": (1, _VLSI, "verified"),
            "frequency_hz": (1_500_000_000, _VLSI, "verified"),
        },
        arrays={"fp16": Array(16, 32)},
        cores=1,
        buffers={"l1": 2 << 20},
        vector_lanes=64,
        frequency_hz=1_500_000_000,
        dram_bytes_per_second=100_000_000_000,
        sram_bytes_per_cycle=256,
        memory="ddr3",
        energy=HOROWITZ_45NM,
    )
    tpu_like = _machine(
        "tpu_like",
        "any",
        {
            "arrays.fp16": (128 * 128, _TPU, "assumed"),
            "frequency_hz": (940_000_000, _TPU, "assumed"),
            "dram_bytes_per_second": (450_000_000_000, f"half of a chip's 900 GB/s; {_TPU}", "assumed"),
            "buffers.vmem": (16 << 20, _TPU, "assumed"),
        },
        arrays={"fp16": Array(128, 128)},
        cores=1,
        dataflow="ws",
        buffers={"vmem": 16 << 20},
        vector_lanes=1024,
        frequency_hz=940_000_000,
        dram_bytes_per_second=450_000_000_000,
        sram_bytes_per_cycle=2048,
        accumulate_bytes=4,
    )
    scalesim32 = _machine(
        "scalesim32",
        "any",
        {f"buffers.{name}": (size << 10, "SCALE-Sim 3.0.0, configs/scale.cfg", "assumed") for name, size in _SCALESIM},
        arrays={"fp16": Array(32, 32)},
        cores=1,
        dataflow="ws",
        buffers={name: size << 10 for name, size in _SCALESIM},
        vector_lanes=32,
        frequency_hz=1_000_000_000,
        dram_bytes_per_second=20_000_000_000,
        sram_bytes_per_cycle=1024,
        double_buffered=False,
    )
    return rapid4, rapid128, ibm14, tpu_like, scalesim32


_SCALESIM = (("ifmap", 256), ("filter", 256), ("ofmap", 128))

PRESETS: Mapping[str, Machine] = MappingProxyType({machine.name: machine for machine in _presets()})
"""The machines by name; `isoarea` makes one more."""


def preset(name: str, *, energy: str | None = None, **changes: Any) -> Machine:
    """A machine from `PRESETS`, changed as asked.

    Args:
        name: of the preset.
        energy: name of another energy table; None keeps the preset's. Its memory may need changing, too.
        changes: any other fields of `Machine`.

    Raises:
        UnknownNameError: if there is no such preset, energy table, memory or dataflow.
        SpecError: if a field has no such name or value.
    """
    if name not in PRESETS:
        raise UnknownNameError("machine", name, PRESETS)
    if energy is not None:
        if energy not in ENERGY_TABLES:
            raise UnknownNameError("energy table", energy, ENERGY_TABLES)
        changes["energy"] = ENERGY_TABLES[energy]
    names = {f.name for f in dataclasses.fields(Machine)}
    for change in changes:
        if change not in names:
            raise UnknownNameError("field of Machine", change, names)
    sources = changes.pop("sources", PRESETS[name].sources)
    changed = dataclasses.replace(PRESETS[name], sources={}, **changes)
    # Of arrays and buffers that are no longer there, no source is kept; one that does not fit is refused.
    kept = {k: v for k, v in sources.items() if k in changed.numbers or k not in PRESETS[name].numbers}
    return dataclasses.replace(changed, sources=kept)


PAPER_ENGINE: Mapping[str, str] = MappingProxyType(
    {"fp16": "fma_fp16", "fp8": "fma_fp8_dlf16", "int4": "dot4_fp4", "fp4": "dot4_fp4"}
)
"""Which unit does which precision, as Sun et al. count: the INT4 x FP4 unit is credited with INT4 x INT4, too."""

MIXED_ENGINE: Mapping[str, str] = MappingProxyType(
    {"fp16": "fma_fp16", "fp8": "fma_fp8_dlf16", "int4": "dot4_mixed", "fp4": "dot4_mixed"}
)
"""The same with one unit that really does both four-bit products."""


def isoarea(
    units: Mapping[str, UnitCost] | None = None,
    *,
    engine: Mapping[str, str] = PAPER_ENGINE,
    like: str = "rapid4",
) -> Machine:
    """A preset whose arrays have equal areas: as many whole rows of each unit as fit where its FP16 array was.

    No ratio of throughputs is assumed; the areas decide. The energies of a multiply-accumulate follow the same units'
    measured ratios to the FP16 unit: on forward data for INT4, on gradients for FP4, on both for FP8; where a unit was
    measured on one of them, on that. Everything else is the preset's, and so is the energy of what was not measured.

    Args:
        units: synthesized units by name; None reads the results that come with the package.
        engine: which unit does which precision; must name one for ``"fp16"``.
        like: the preset.

    Raises:
        HalfbyteError: if there are no results of the synthesis.
        SpecError: if no FP16 unit is named, a unit multiplies nothing, or not one row of it fits.
        UnknownNameError: if a unit or the preset does not exist.
    """
    base = preset(like)
    units = load_units() if units is None else units
    if "fp16" not in engine:
        raise SpecError(f"isoarea: engine={dict(engine)!r} was given; it must name a unit for 'fp16', the yardstick.")
    for name in engine.values():
        if name not in units:
            raise UnknownNameError("synthesized unit", name, units)
        if units[name].macs < 1:
            raise SpecError(f"isoarea: the unit {name!r} multiplies nothing; name one whose macs are at least 1.")
    was, yardstick = base.arrays["fp16"], units[engine["fp16"]]
    budget_ge = was.macs_per_cycle / yardstick.macs * yardstick.area_ge
    sources = {key: value for key, value in base.sources.items() if not key.startswith("arrays.")}
    arrays = {}
    for precision, name in engine.items():
        unit = units[name]
        # A hair above the quotient: the yardstick itself must fit in the area that it defines.
        rows = int(budget_ge / (unit.area_ge * was.columns) + 1e-9)
        if rows < 1:
            raise SpecError(
                f"isoarea: a row of {was.columns} units {name!r} takes {unit.area_ge * was.columns:.0f} gate "
                f"equivalents and {budget_ge:.0f} are there; take a preset with a larger FP16 array than {like!r}."
            )
        arrays[precision] = Array(rows, was.columns, unit.macs)
        how = f"{rows} x {was.columns} units {name} of {unit.area_ge:.0f} GE on {budget_ge:.0f} GE; own synthesis"
        sources[f"arrays.{precision}"] = Constant(
            arrays[precision].macs_per_cycle, unit_of("arrays."), "unit gates", how, "derived"
        )
    ratios = _energy_ratios(units, engine)
    energy = base.energy.with_ratios(ratios)
    return dataclasses.replace(base, name=f"isoarea({like})", arrays=arrays, sources=sources, energy=energy)


def _energy_ratios(units: Mapping[str, UnitCost], engine: Mapping[str, str]) -> dict[str, Constant]:
    """How many times less than the FP16 unit each unit takes, where both were measured."""
    found = {}
    for precision, name in engine.items():
        times = units[name].energy_times(units[engine["fp16"]], _DATA.get(precision))
        if precision != "fp16" and times is not None:
            how = f"{name} {times:.4g} times less than {engine['fp16']}; toggles, own synthesis"
            found[precision] = Constant(times, "1", "unit gates", how, "derived")
    return found


_DATA: Mapping[str, str] = {"int4": "fwd", "fp4": "bwd"}
