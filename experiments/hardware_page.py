"""Fills in the tables of docs/hardware.md and draws its figures.

    python experiments/hardware_page.py [--check]

The page's words are written by hand; what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is made here, from
`halfbyte.hardware` and the committed results of ``./dev synth``. Nothing is drawn by chance, so the same code gives the
same page. With ``--check`` nothing is written, and the exit status is 1 if the page is not what would be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from halfbyte.hardware.command import figure_6c, machine_of, model_step
from halfbyte.hardware.density import definitions
from halfbyte.hardware.networks import NETWORKS
from halfbyte.hardware.units import UNITS_PATH, load_units
from halfbyte.hardware.waterfall import STAGES, Waterfall, sensitivity, waterfall
from halfbyte.hardware.workload import Workload

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hardware.md"
FIGURES = PAGE.with_suffix("")
STEPS = ("resnet50", "resnet18", "transformer-base", "lstm-650")
MACHINES = ("isoarea", "isoarea_mixed", "rapid4")


@cache
def step(network: str, recipe: str) -> Workload:
    """A traced training step."""
    return model_step(NETWORKS[network], recipe, name=network)


@cache
def stages(network: str, machine: str, recipe: str = "ibm2020") -> Waterfall:
    """The waterfall of a network against FP16."""
    return waterfall(step(network, recipe), step(network, "fp16"), machine_of(machine, fused=True))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    rule = "|" + "---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def definition_table() -> str:
    """What "times FP16" comes to, reading by reading."""
    rows = []
    for found in definitions(load_units()):
        chosen, energy = found.definition, found.energy_times
        paper = "" if chosen.paper is None else f"{chosen.paper:.1f}"
        energy_text = "" if energy is None else f"{energy:.1f}"
        rows.append([chosen.name, f"`{chosen.unit}`", f"`{chosen.baseline}`", paper, f"{found.times:.2f}", energy_text])
    return table(["reading", "unit", "against", "paper", "times by area", "times by energy"], rows)


def unit_table() -> str:
    """Every unit of the synthesis."""
    units = json.loads(UNITS_PATH.read_text(encoding="utf-8"))["units"]
    fp16 = units["fma_fp16"]["area_ge"]
    rows = [
        [
            f"`{name}`",
            str(unit["macs"] or ""),
            f"{unit['area_ge']:,.0f}",
            f"{unit['area_ge'] / fp16:.3f}",
            f"{unit['depth']}",
            f"{unit['cells']:,}",
        ]
        for name, unit in units.items()
    ]
    return table(["unit", "MACs a cycle", "gate equivalents", "of `fma_fp16`", "depth", "cells"], rows)


def fig6c_table() -> str:
    """The eight bars, and what was assumed."""
    paper, own = figure_6c()
    rows = [
        [theirs.name, f"{theirs.paper:.1f}", f"{theirs.model:.2f}", f"{ours.model:.2f}"]
        for theirs, ours in zip(paper.bars, own.bars, strict=True)
    ]
    assumed = "\n".join(f"- {text}" for text in paper.assumptions)
    head = ["forward and backward", "paper", "with the paper's rates", "with our areas"]
    return f"{table(head, rows)}\n\nAssumed:\n\n{assumed}"


def waterfall_table() -> str:
    """What is left of the speed, stage by stage."""
    parts = []
    for machine in MACHINES:
        head = [f"`{machine}`", *STEPS]
        found = [stages(network, machine) for network in STEPS]
        rows = [
            [f"{name}: {what}", *(f"{one[name].speedup:.2f} ({one[name].energy_ratio:.2f})" for one in found)]
            for name, what in STAGES.items()
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def recipe_table() -> str:
    """The step of ResNet-50 under other recipes."""
    names = ("ibm2020", "ibm2020_dw_fp8", "ibm2020_1x1_fp8", "int4_forward_only", "fp8")
    found = [stages("resnet50", "isoarea", name) for name in names]
    rows = [
        [f"`{name}`", *(f"{one[stage].speedup:.2f}" for stage in STAGES), f"{one['dram'].energy_ratio:.2f}"]
        for name, one in zip(names, found, strict=True)
    ]
    return table(["recipe", *STAGES, "energy, dram"], rows)


def sensitivity_table() -> str:
    """Lanes and bandwidth."""
    machine = machine_of("isoarea", fused=True)
    found = sensitivity(step("resnet50", "ibm2020"), step("resnet50", "fp16"), machine)
    lanes = sorted({point.vector_lanes for point in found.points})
    rows = []
    for bandwidth in sorted({point.dram_bytes_per_second for point in found.points}):
        own = {p.vector_lanes: p.speedup for p in found.points if p.dram_bytes_per_second == bandwidth}
        cells = [f"**{own[n]:.2f}**" if own[n] >= found.target else f"{own[n]:.2f}" for n in lanes]
        rows.append([f"{bandwidth / 1e9:g} GB/s", *cells])
    return table(["ResNet-50", *(f"{n} lanes" for n in lanes)], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "definitions": definition_table,
    "units": unit_table,
    "fig6c": fig6c_table,
    "waterfall": waterfall_table,
    "recipes": recipe_table,
    "sensitivity": sensitivity_table,
}


def filled(text: str) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: if a table has no place.
    """
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, block=block: f"{found[1]}\n{block()}\n\n{found[2]}", text)
        if count != 1:
            raise ValueError(f"docs/hardware.md has {count} places for the table {name!r}; one is possible.")
    return text


def draw(folder: Path) -> None:
    """The figures: a waterfall of speed and energy, and the readings of "times FP16"."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "halfbyte"
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    kinds = (("speedup", "times faster"), ("energy_ratio", "times less energy"))
    for axes, (what, title) in zip(figure.subplots(1, 2, sharey=True), kinds, strict=True):
        for number, network in enumerate(STEPS):
            values = [getattr(stage, what) for stage in stages(network, "isoarea").stages]
            places = [place + 0.2 * (number - 1.5) for place in range(len(values))]
            axes.bar(places, values, width=0.2, label=network)
        axes.set_xticks(range(len(STAGES)), STAGES)
        axes.set_title(f"ibm2020 against fp16: {title}", fontsize="medium")
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(folder / "waterfall.svg", metadata={"Date": None, "Creator": None})

    found = definitions(load_units())[::-1]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.barh([density.definition.name for density in found], [density.times for density in found])
    axes.axvline(7.3, color="black", linestyle="--", linewidth=0.8, label="Sun et al. 2020: 7.3")
    axes.set_xlabel("multiply-accumulates a cycle and area, times the baseline's")
    axes.legend(fontsize="small")
    axes.grid(visible=True, axis="x", alpha=0.3)
    figure.savefig(folder / "definitions.svg", metadata={"Date": None, "Creator": None})


def main(given: Sequence[str] | None = None) -> int:
    """Fills in the page, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    asked = parser.parse_args(given)
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if asked.check:
        if before != after:
            print("docs/hardware.md is stale: run python experiments/hardware_page.py", file=sys.stderr)
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    draw(FIGURES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
