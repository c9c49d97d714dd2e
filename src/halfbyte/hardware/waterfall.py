"""From the peak of the multipliers to a whole training step: where the speed of four bits goes, stage by stage.

    peak     every product at the rate of the recipe's narrowest multipliers
    edges    the first and last layers, and whatever else the recipe keeps wider, at theirs
    tiling   the array's shape: pieces that do not fill it, pipelines that fill and drain, buffers that cannot keep up
    vector   norms, activations, quantizers and the optimizer on the vector lanes
    dram     the memory off the chip; what can be fused into products moves nothing
    unfused  the same if nothing is fused

Each stage adds its effect to those before it, for the four-bit step and for the FP16 step alike, on one machine. The
speedup of a stage is the ratio of the two: an effect that slows both sides by as many cycles lowers it.

`sensitivity` asks the other way around: how wide would the lanes and the memory have to be to keep a speedup.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import HalfbyteError, SpecError
from .cycles import ceil_div
from .machine import Machine
from .model import Estimate, Row, estimate
from .workload import Gemm, Workload, format_bits

__all__ = ["STAGES", "Point", "Sensitivity", "Stage", "Waterfall", "sensitivity", "waterfall"]

STAGES: dict[str, str] = {
    "peak": "every product at the peak of the recipe's narrowest multipliers",
    "edges": "layers that the recipe keeps wider at the peak of theirs",
    "tiling": "the array's shape and the buffers",
    "vector": "norms, activations, quantizers and optimizer on the vector lanes",
    "dram": "memory off the chip, vector work fused",
    "unfused": "memory off the chip, nothing fused",
}
"""The stages in order, in words."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What both steps take with the effects of all stages up to this one.

    Attributes:
        name: one of `STAGES`.
        cycles: of the four-bit step.
        fp16_cycles: of the FP16 step.
        energy_pj: of the four-bit step.
        fp16_energy_pj: of the FP16 step.
    """

    name: str
    cycles: float
    fp16_cycles: float
    energy_pj: float
    fp16_energy_pj: float

    @property
    def speedup(self) -> float:
        """How many times faster the four-bit step is."""
        return self.fp16_cycles / self.cycles

    @property
    def energy_ratio(self) -> float:
        """How many times less energy it takes."""
        return self.fp16_energy_pj / self.energy_pj

    def to_json(self) -> dict[str, Any]:
        """All of the above, for `json.dumps`."""
        more = {"speedup": self.speedup, "energy_ratio": self.energy_ratio, "meaning": STAGES[self.name]}
        return {**dataclasses.asdict(self), **more}


@dataclass(frozen=True, kw_only=True)
class Waterfall:
    """The stages of a workload on a machine.

    Attributes:
        workload: name of the workload.
        recipe: the four-bit recipe.
        baseline: the FP16 one.
        machine: the machine.
        stages: in the order of `STAGES`.
    """

    workload: str
    recipe: str
    baseline: str
    machine: Machine
    stages: tuple[Stage, ...]

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def to_json(self) -> dict[str, Any]:
        """The stages and the machine, for `json.dumps`."""
        return {
            "workload": self.workload,
            "recipe": self.recipe,
            "baseline": self.baseline,
            "machine": self.machine.to_json(),
            "waterfall": [stage.to_json() for stage in self.stages],
        }


def _check(workload: Workload, baseline: Workload) -> None:
    """That both are one network on one batch."""
    for what, ours, theirs in (
        ("samples", workload.batch, baseline.batch),
        ("multiply-accumulates in fprop", workload.macs("fprop"), baseline.macs("fprop")),
    ):
        if ours != theirs:
            raise HalfbyteError(
                f"A waterfall compares one network with itself: {workload.name!r} has {ours} {what} and the baseline "
                f"{baseline.name!r} has {theirs}. Trace the same model on the same inputs with both recipes."
            )
    if not workload.gemms:
        raise HalfbyteError(f"Workload {workload.name!r} has no products; a waterfall begins with them.")


def _all_alike(workload: Workload) -> Workload:
    """The workload with every product in the narrowest formats of its phase; of equals, where most of the work is."""
    counts: dict[str, Counter[tuple[str, str]]] = {}
    for gemm in workload.gemms:
        counts.setdefault(gemm.phase, Counter())[gemm.a_format, gemm.b_format] += gemm.macs

    def narrowest(count: Counter[tuple[str, str]]) -> tuple[str, str]:
        return min(count, key=lambda formats: (sum(map(format_bits, formats)), -count[formats]))

    chosen = {phase: narrowest(count) for phase, count in counts.items()}

    def alike(gemm: Gemm) -> Gemm:
        a_format, b_format = chosen[gemm.phase]
        return dataclasses.replace(gemm, a_format=a_format, b_format=b_format)

    return dataclasses.replace(workload, gemms=tuple(map(alike, workload.gemms)), vector_ops=())


def _on_chip(row: Row) -> int:
    return max(row.compute_cycles, row.sram_cycles)


def _takes(workload: Workload, machine: Machine) -> list[tuple[float, float]]:
    """(cycles, pJ) at each stage."""
    alike = estimate(_all_alike(workload), machine).rows
    products = estimate(dataclasses.replace(workload, vector_ops=()), machine).rows
    others = dataclasses.replace(workload, gemms=())
    fused, unfused = (
        (*products, *estimate(others, dataclasses.replace(machine, fused=fused)).rows) for fused in (True, False)
    )

    def on_chip(rows: Iterable[Row]) -> tuple[float, float]:
        rows = tuple(rows)
        return sum(map(_on_chip, rows)), sum(row.energy_pj - row.dram_pj for row in rows)

    return [
        *((sum(row.ideal_cycles for row in rows), sum(row.mac_pj for row in rows)) for rows in (alike, products)),
        *(on_chip(rows) for rows in (products, fused)),
        *((sum(row.cycles for row in rows), sum(row.energy_pj for row in rows)) for rows in (fused, unfused)),
    ]


def waterfall(workload: Workload, baseline: Workload, machine: Machine) -> Waterfall:
    """Where the speed of four bits goes.

    Args:
        workload: a step in four bits.
        baseline: the same step in FP16.
        machine: the machine; its `fused` does not matter, both are shown.

    Raises:
        HalfbyteError: if the two are not one network on one batch.
        SpecError: if a product needs wider multipliers than the machine has.
    """
    _check(workload, baseline)
    rows = zip(STAGES, _takes(workload, machine), _takes(baseline, machine), strict=True)
    stages = tuple(
        Stage(name=name, cycles=ours[0], fp16_cycles=theirs[0], energy_pj=ours[1], fp16_energy_pj=theirs[1])
        for name, ours, theirs in rows
    )
    return Waterfall(
        workload=workload.name, recipe=workload.recipe, baseline=baseline.recipe, machine=machine, stages=stages
    )


@dataclass(frozen=True, kw_only=True)
class Point:
    """A machine's speedup with so many lanes and so much bandwidth."""

    vector_lanes: int
    dram_bytes_per_second: int
    speedup: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What lanes and bandwidth do to a speedup.

    Attributes:
        target: the speedup to keep.
        limit: the stage "tiling" of the machine as it is: what would be left if vector work and memory took no time.
        points: one for each pair, by bandwidth, then lanes.
    """

    target: float
    limit: float
    points: tuple[Point, ...]

    @property
    def needed(self) -> dict[int, int | None]:
        """For each bandwidth in bytes a second the fewest lanes a core that reach the target; None if none do."""
        found: dict[int, int | None] = {}
        for point in self.points:
            best = found.setdefault(point.dram_bytes_per_second, None)
            if point.speedup >= self.target and (best is None or point.vector_lanes < best):
                found[point.dram_bytes_per_second] = point.vector_lanes
        return found

    def to_json(self) -> dict[str, Any]:
        """The points and what is needed, for `json.dumps`."""
        return {
            "target": self.target,
            "limit": self.limit,
            "points": [dataclasses.asdict(point) for point in self.points],
            "needed": [{"dram_bytes_per_second": b, "vector_lanes": lanes} for b, lanes in self.needed.items()],
        }


def _cycles_with(estimated: Estimate, dram_bytes_per_second: int) -> int:
    """A step's cycles with another memory; nothing else of an estimate depends on it."""
    clock = estimated.machine.frequency_hz
    return sum(max(_on_chip(row), ceil_div(row.dram_bytes * clock, dram_bytes_per_second)) for row in estimated.rows)


def sensitivity(
    workload: Workload,
    baseline: Workload,
    machine: Machine,
    *,
    vector_lanes: Sequence[int] = (),
    dram_bytes_per_second: Sequence[int] = (),
    target: float = 5.0,
) -> Sensitivity:
    """What vector width and memory bandwidth would keep a speedup.

    Both steps run on the changed machine. Buffers grow as wide as the lanes that they feed: their bytes a cycle are
    multiplied by as much as the lanes are.

    Args:
        workload: a step in four bits.
        baseline: the same step in FP16.
        machine: the machine, fused or not.
        vector_lanes: of a core; empty takes 1 to 32 times the machine's, in doublings.
        dram_bytes_per_second: empty takes 1 to 32 times the machine's, in doublings.
        target: the speedup to keep.

    Raises:
        HalfbyteError: if the two are not one network on one batch.
        SpecError: if a width, a bandwidth or the target is not above zero.
    """
    _check(workload, baseline)
    doublings = [1 << power for power in range(6)]
    widths = list(vector_lanes) or [machine.vector_lanes * times for times in doublings]
    bandwidths = list(dram_bytes_per_second) or [machine.dram_bytes_per_second * times for times in doublings]
    if target <= 0 or min(bandwidths) < 1:
        raise SpecError(f"sensitivity: target={target!r}, bandwidths {bandwidths} were given; all are above zero.")
    speedups: dict[tuple[int, int], float] = {}
    for lanes in widths:
        buffers = max(1, ceil_div(machine.sram_bytes_per_cycle * lanes, machine.vector_lanes))
        changed = dataclasses.replace(machine, vector_lanes=lanes, sram_bytes_per_cycle=buffers)
        ours, theirs = estimate(workload, changed), estimate(baseline, changed)
        for bandwidth in bandwidths:
            speedups[bandwidth, lanes] = _cycles_with(theirs, bandwidth) / _cycles_with(ours, bandwidth)
    return Sensitivity(
        target=target,
        limit=waterfall(workload, baseline, machine)["tiling"].speedup,
        points=tuple(
            Point(vector_lanes=lanes, dram_bytes_per_second=bandwidth, speedup=speedups[bandwidth, lanes])
            for bandwidth in sorted(bandwidths)
            for lanes in sorted(widths)
        ),
    )
