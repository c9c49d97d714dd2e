"""From a training step and a machine to cycles, bytes and picojoules, layer by layer.

    time    of each piece of work the longest of: computing, moving on the chip, moving off the chip
    energy  multiply-accumulates + roundings + vector operations + bytes on the chip + bytes off the chip

Pieces follow one another: a step takes the sum of their times. What one piece leaves idle, no other uses; so the sum is
an upper bound for a machine that overlaps vector work with products, and the stages of
`halfbyte.hardware.waterfall` show how much that is. Clock gating, leakage, refresh and links between chips are not
modeled.

Vector work that is fusible moves nothing off the chip on a fused machine, except that a quantizer still writes its
codes: the products read them back, in more than one GEMM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UnknownNameError
from .cycles import ceil_div
from .machine import Machine
from .mapping import Placement, gemm_dram_bytes, place
from .workload import Gemm, VectorOp, Workload

__all__ = ["Bound", "Estimate", "Row", "Totals", "estimate"]

Bound = Literal["compute", "sram", "dram", "vector"]
"""What a piece of work waits for: the array, the buffers, the memory, or the vector lanes."""

_ROUNDED = ("fp4", "int4", "int8")
"""Precisions whose units sum integers, and so round to FP16 once a chunk."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One piece of work on a machine.

    Attributes:
        layer: the layer.
        phase: fprop, dgrad, wgrad or update.
        name: ``"gemm"``, or the vector operation's.
        precision: which multipliers; empty for vector work.
        dataflow: how they were used.
        split: along which size the cores shared it; empty where they did not.
        macs: multiply-accumulates.
        flops: operations of the vector lanes.
        ideal_cycles: what it would take if every multiplier, or lane, of the machine worked in every cycle.
        compute_cycles: what the arrays or lanes take.
        sram_cycles: what the buffers take.
        dram_cycles: what the memory takes.
        sram_bytes: bytes between buffers and arrays or lanes.
        dram_bytes: bytes on and off the chip.
        mac_pj: energy of the multipliers and rounders.
        vector_pj: energy of the lanes.
        sram_pj: energy of the buffers.
        dram_pj: energy of the memory.
    """

    layer: str
    phase: str
    name: str
    precision: str = ""
    dataflow: str = ""
    split: str = ""
    macs: int = 0
    flops: int = 0
    ideal_cycles: float
    compute_cycles: int
    sram_cycles: int
    dram_cycles: int
    sram_bytes: int
    dram_bytes: int
    mac_pj: float = 0.0
    vector_pj: float
    sram_pj: float
    dram_pj: float

    @property
    def cycles(self) -> int:
        """How long it takes."""
        return max(self.compute_cycles, self.sram_cycles, self.dram_cycles)

    @property
    def utilization(self) -> float:
        """Which part of the multipliers', or lanes', cycles does work; 0 for work that takes no time."""
        return self.ideal_cycles / self.cycles if self.cycles else 0.0

    @property
    def bound(self) -> Bound:
        """What it waits for."""
        if self.cycles == self.compute_cycles:
            return "compute" if self.precision else "vector"
        return "dram" if self.cycles == self.dram_cycles else "sram"

    @property
    def energy_pj(self) -> float:
        """All of its energy."""
        return self.mac_pj + self.vector_pj + self.sram_pj + self.dram_pj

    def to_json(self) -> dict[str, Any]:
        """All of the above, for `json.dumps`."""
        more = {name: getattr(self, name) for name in ("cycles", "utilization", "bound", "energy_pj")}
        return {**dataclasses.asdict(self), **more}


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over some pieces of work.

    Attributes:
        cycles: how long they take, one after the other.
        gemm_cycles: of that, the matrix products.
        macs: multiply-accumulates.
        utilization: which part of the multipliers' cycles does work, vector work's time included.
        sram_bytes: bytes between buffers and arrays or lanes.
        dram_bytes: bytes on and off the chip.
        mac_pj: energy of the multipliers and rounders.
        vector_pj: energy of the lanes.
        sram_pj: energy of the buffers.
        dram_pj: energy of the memory.
        energy_pj: all of it.
    """

    cycles: int
    gemm_cycles: int
    macs: int
    utilization: float
    sram_bytes: int
    dram_bytes: int
    mac_pj: float
    vector_pj: float
    sram_pj: float
    dram_pj: float
    energy_pj: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training step takes on a machine.

    Attributes:
        workload: name of the workload.
        recipe: its recipe.
        batch: samples in the step.
        machine: the machine.
        rows: the products, then the vector work, each in the order of the workload.
    """

    workload: str
    recipe: str
    batch: int
    machine: Machine
    rows: tuple[Row, ...]

    @property
    def totals(self) -> Totals:
        """Sums over the step."""
        return _sum(self.rows)

    @property
    def cycles(self) -> int:
        """How long the step takes."""
        return sum(row.cycles for row in self.rows)

    @property
    def seconds(self) -> float:
        """The same at the machine's clock."""
        return self.cycles / self.machine.frequency_hz

    @property
    def energy_pj(self) -> float:
        """Energy of the step."""
        return sum(row.energy_pj for row in self.rows)

    @property
    def sustained_ops_per_second(self) -> float:
        """Two for each multiply-accumulate of the step, by its time: what papers call sustained TFLOPS."""
        return 2 * sum(row.macs for row in self.rows) / self.seconds

    def by(self, key: str) -> dict[str, Totals]:
        """Sums by layer, phase, name, precision, dataflow, split or bound, in the order of first appearance.

        Raises:
            UnknownNameError: if the rows have no such key.
        """
        possible = ("layer", "phase", "name", "precision", "dataflow", "split", "bound")
        if key not in possible:
            raise UnknownNameError("key of an estimate", str(key), possible)
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(getattr(row, key), []).append(row)
        return {name: _sum(rows) for name, rows in groups.items()}

    def to_json(self) -> dict[str, Any]:
        """Machine, totals and rows, for `json.dumps`."""
        totals = dataclasses.asdict(self.totals)
        return {
            "workload": self.workload,
            "recipe": self.recipe,
            "batch": self.batch,
            "machine": self.machine.to_json(),
            "seconds": self.seconds,
            "sustained_ops_per_second": self.sustained_ops_per_second,
            "totals": totals,
            "phases": {phase: dataclasses.asdict(total) for phase, total in self.by("phase").items()},
            "rows": [row.to_json() for row in self.rows],
        }


def _sum(rows: Iterable[Row]) -> Totals:
    rows = tuple(rows)
    products = [row for row in rows if row.precision]
    cycles = sum(row.cycles for row in rows)

    def total(value: Callable[[Row], float]) -> float:
        return sum(map(value, rows), 0.0)

    return Totals(
        cycles=cycles,
        gemm_cycles=sum(row.cycles for row in products),
        macs=sum(row.macs for row in rows),
        utilization=sum(row.ideal_cycles for row in products) / cycles if cycles else 0.0,
        sram_bytes=sum(row.sram_bytes for row in rows),
        dram_bytes=sum(row.dram_bytes for row in rows),
        mac_pj=total(lambda row: row.mac_pj),
        vector_pj=total(lambda row: row.vector_pj),
        sram_pj=total(lambda row: row.sram_pj),
        dram_pj=total(lambda row: row.dram_pj),
        energy_pj=total(lambda row: row.energy_pj),
    )


def _movement(machine: Machine, flops: int, sram_bytes: int, dram_bytes: int) -> dict[str, Any]:
    """What lanes, buffers and memory take: the fields that products and vector work have in common."""
    sram_pj = machine.energy.sram_pj_per_byte(max(machine.buffers.values())).value
    return {
        "flops": flops,
        "sram_bytes": sram_bytes,
        "dram_bytes": dram_bytes,
        "dram_cycles": ceil_div(dram_bytes * machine.frequency_hz, machine.dram_bytes_per_second),
        "vector_pj": flops * machine.energy.vector_flop.value,
        "sram_pj": sram_bytes * sram_pj,
        "dram_pj": dram_bytes * machine.energy.dram_pj_per_byte(machine.memory).value,
    }


def _gemm_row(gemm: Gemm, machine: Machine, best: Placement) -> Row:
    energy = gemm.macs * machine.energy.macs[best.precision].value
    if best.precision in _ROUNDED:
        roundings = gemm.m * gemm.n * gemm.groups * ceil_div(gemm.k, machine.chunk_size)
        energy += roundings * machine.energy.rounding.value
    return Row(
        layer=gemm.layer,
        phase=gemm.phase,
        name="gemm",
        precision=best.precision,
        dataflow=best.dataflow,
        split=best.split,
        macs=gemm.macs,
        ideal_cycles=gemm.macs / machine.peak_macs_per_cycle(best.precision),
        compute_cycles=best.compute_cycles,
        sram_cycles=best.sram_cycles,
        mac_pj=energy,
        **_movement(machine, best.flops, best.sram_bytes, gemm_dram_bytes(gemm, machine)),
    )


def _vector_row(op: VectorOp, machine: Machine) -> Row:
    moved = op.read_bytes + op.written_bytes
    off_chip = moved
    if machine.fused and op.fusible:
        off_chip = op.written_bytes if op.name.startswith("quantize") else 0
    lanes = machine.vector_lanes * machine.cores
    return Row(
        layer=op.layer,
        phase=op.phase,
        name=op.name,
        ideal_cycles=op.flops / lanes,
        compute_cycles=ceil_div(op.flops, lanes),
        sram_cycles=ceil_div(moved, machine.sram_bytes_per_cycle * machine.cores),
        **_movement(machine, op.flops, moved, off_chip),
    )


def estimate(workload: Workload, machine: Machine) -> Estimate:
    """What a training step takes on a machine.

    Args:
        workload: the step: `halfbyte.hardware.tracing` makes it from a model.
        machine: the machine: one of `halfbyte.hardware.presets`, or your own.

    Raises:
        SpecError: if a product needs wider multipliers than the machine has.
    """
    placed: dict[tuple[int, int, int, int, str, str], Placement] = {}
    rows = []
    for gemm in workload.gemms:
        # Networks repeat their layers, and nothing else of a product decides where it runs.
        key = (gemm.m, gemm.n, gemm.k, gemm.groups, gemm.a_format, gemm.b_format)
        if key not in placed:
            placed[key] = place(gemm, machine)
        rows.append(_gemm_row(gemm, machine, placed[key]))
    rows += [_vector_row(op, machine) for op in workload.vector_ops]
    return Estimate(
        workload=workload.name, recipe=workload.recipe, batch=workload.batch, machine=machine, rows=tuple(rows)
    )
