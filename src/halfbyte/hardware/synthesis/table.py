"""Measuring the units: areas, depths and energies in one table, and the file that the performance model reads.

The energies are scaled so that one multiply-accumulate in FP16 takes `ANCHOR_FJ`, the mean over both directions of
training. Only their ratios are measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_text
from .flow import Synthesized
from .liberty import Library
from .operands import CHUNK, DIRECTIONS, Direction, Values, directions, streams
from .toggles import Energy, toggle_energy
from .yosys import versions

if TYPE_CHECKING:
    from ..rtl.catalog import Unit
    from .proofs import Proof

__all__ = ["ANCHOR_FJ", "REFERENCE", "UNITS_PATH", "Row", "measure", "render", "write"]

ANCHOR_FJ = 500.0
"""An FP16 multiplication and addition at 7 nm, 0.34 pJ + 0.16 pJ (Jouppi et al., ISCA 2021, Table 2)."""

REFERENCE = "fma_fp16"
"""The unit to which all are compared."""

UNITS_PATH = Path(__file__).with_name("units.json")
"""The results that come with the package."""

_STREAMS = 1024
_SUMS = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """A unit as measured.

    Attributes:
        name: in the catalog.
        macs: multiply-accumulates a cycle.
        area_ge: in gate equivalents.
        depth: cells in the longest path.
        cells: how many there are.
        recipe: of the mapping.
        energy: a cycle's, by direction, in the library's unit; empty for what accumulates nothing.
    """

    name: str
    macs: int
    area_ge: float
    depth: int
    cells: int
    recipe: str
    energy: Mapping[Direction, Energy]

    def per_mac(self, direction: Direction) -> float:
        """Energy of a multiply-accumulate, in the library's unit."""
        return self.energy[direction].total / self.macs


def measure(units: Mapping[str, Unit], synthesized: Mapping[str, Synthesized], values: Values) -> dict[str, Row]:
    """Measures synthesized units.

    Args:
        units: by name.
        synthesized: the same units in gates.
        values: the numbers on which they work.
    """
    rows = {}
    for name, unit in units.items():
        netlist = synthesized[name].netlist
        energy: dict[Direction, Energy] = {}
        if unit.macs:
            component = synthesized[name].component
            cycles = _SUMS * max(1, CHUNK // unit.macs) + 4
            for direction in directions(component):
                given = streams(component, direction, values, cycles=cycles, count=_STREAMS)
                energy[direction] = toggle_energy(netlist, given)
        rows[name] = Row(
            name=name,
            macs=unit.macs,
            area_ge=netlist.area_ge,
            depth=netlist.depth,
            cells=netlist.cells.total(),
            recipe=synthesized[name].recipe,
            energy=energy,
        )
    return rows


def _cells(row: Row, reference: Row | None) -> tuple[str, ...]:
    """A line of the table."""
    area = density = ""
    times = ["", ""]
    if reference:
        area = f"{row.area_ge / reference.area_ge:.3f}"
        density = f"{row.macs * reference.area_ge / row.area_ge:.2f}x" if row.macs else ""
        times = [
            f"{reference.per_mac(d) / row.per_mac(d):.2f}x" if d in row.energy and d in reference.energy else ""
            for d in DIRECTIONS
        ]
    return (row.name, f"{row.cells}", f"{row.area_ge:.1f}", f"{row.depth}", area, density, *times, row.recipe)


def render(rows: Mapping[str, Row]) -> str:
    """The table for people.

    Area, density (multiply-accumulates on an area) and energy (of a multiply-accumulate: how many times less) are
    relative to the FP16 unit, and empty where it was not measured.
    """
    head = ("unit", "cells", "GE", "depth", "area", "density", "energy fwd", "energy bwd", "mapping")
    lines = [head, *(_cells(row, rows.get(REFERENCE)) for row in rows.values())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, len(head) - 1)

    def text(line: tuple[str, ...]) -> str:
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(map(text, lines))


def write(
    rows: Mapping[str, Row],
    library: Library,
    command: str,
    path: Path = UNITS_PATH,
    proofs: Mapping[str, tuple[Proof, tuple[int, int]]] | None = None,
) -> None:
    """Writes the measurements.

    Args:
        rows: of all units of the catalog.
        library: the cells.
        command: what makes the file anew.
        path: where to.
        proofs: for each unit that was proven what came of it, and of `mutants` the wrong gates found out and tried;
            a unit's entry says so only where it is here.
    """
    reference = rows[REFERENCE]
    unit = ANCHOR_FJ * 2 / (reference.per_mac("fwd") + reference.per_mac("bwd"))

    def proven(name: str) -> dict[str, Any]:
        if not proofs or name not in proofs:
            return {}
        proof, (found, tried) = proofs[name]
        told = {"exhaustive": proof.exhaustive, "vectors": proof.vectors, "mismatches": proof.mismatches}
        return {"proof": {"claim": proof.claim, **told, "mutants": tried, "mutants_found": found}}

    def cost(row: Row) -> dict[str, Any]:
        return {
            "area_ge": round(row.area_ge, 2),
            "macs": row.macs,
            "energy_fj_per_mac": {d: round(unit * row.per_mac(d), 2) for d in row.energy},
            "depth": row.depth,
            "cells": row.cells,
            "recipe": row.recipe,
            **proven(row.name),
        }

    document = {
        "units": {row.name: cost(row) for row in rows.values()},
        "anchor": f"{REFERENCE} takes {ANCHOR_FJ:g} fJ a multiply-accumulate, the mean of fwd and bwd: "
        "0.34 pJ + 0.16 pJ at 7 nm (Jouppi et al., ISCA 2021, Table 2); the ratios are measured toggle energies",
        "library": library.name,
        "command": command,
        "versions": versions(),
    }
    write_text(path, json.dumps(document, indent=2) + "\n")
