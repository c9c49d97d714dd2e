"""The command ``halfbyte hw``: what it computes, prints and writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..errors import HalfbyteError, UnknownNameError
from ..files import write_text
from ..own import is_own
from ..recipes import find as find_recipe
from .density import PAPER_RATES, Fig6c, Rates, definitions, fig6c
from .machine import Machine
from .model import Estimate, Totals, estimate
from .networks import NETWORKS, Example, find
from .presets import MIXED_ENGINE, PAPER_ENGINE, PRESETS, isoarea
from .tracing import trace
from .units import load_units
from .waterfall import Sensitivity, Waterfall, sensitivity, waterfall
from .workload import Workload

__all__ = ["command", "model_step"]

_FILE_WIDTH = 140
"""Columns of the tables where their reader is a file, which would otherwise get 80 and cut names."""

_MOST = 8
"""Kinds of other work that get a line: those that take longest."""

_PHASES = ("fprop", "dgrad", "wgrad", "update")


def model_step(example: Example, recipe: str, batch: int | None = None, *, name: str) -> Workload:
    """One training step of a network, traced.

    Args:
        example: network and inputs.
        recipe: name of a recipe, ``"module:recipe"`` for one of your own, or ``"fp16"``.
        batch: samples; None for the example's own.
        name: of the workload.

    Raises:
        HalfbyteError: if the network does not take the inputs, or cannot be traced.
    """
    count = example.batch if batch is None else batch
    numerics = find_recipe(recipe) if is_own(recipe) else recipe  # trace() knows the table and fp16.
    with torch.device("meta"):
        network = example.network()
    try:
        return trace(network, example.inputs(count), numerics, name=name, batch=count)
    except RuntimeError as error:
        # Of its own networks it is ours; of another's, most often a shape that does not fit.
        if name in NETWORKS or isinstance(error, HalfbyteError):
            raise
        raise HalfbyteError(
            f"{name} does not take {count} inputs of the shape given with --input ({str(error).splitlines()[0]}). Give "
            "the shape of one input without the batch; the network must take one floating tensor."
        ) from error


def machine_of(name: str, *, fused: bool) -> Machine:
    """A preset by name; ``isoarea`` and ``isoarea_mixed`` are those of our own synthesis.

    Raises:
        UnknownNameError: if there is no such preset.
    """
    engines = {"isoarea": PAPER_ENGINE, "isoarea_mixed": MIXED_ENGINE}
    chosen = isoarea(engine=engines[name]) if name in engines else _preset(name, engines)
    return dataclasses.replace(chosen, fused=fused)


def _preset(name: str, more: Iterable[str]) -> Machine:
    if name not in PRESETS:
        raise UnknownNameError("machine", name, [*more, *PRESETS])
    return PRESETS[name]


def command(
    network: str,
    *,
    recipe: str,
    machine: str,
    compare: str | None,
    batch: int | None,
    shape: str | None,
    fused: bool,
    json_file: Path | None,
    scalesim: Path | None,
) -> int:
    """Models one training step and prints where its cycles and picojoules go.

    Args:
        network: a name in `NETWORKS`, or ``module:function``.
        recipe: of the step.
        machine: a preset, or ``isoarea``.
        compare: the recipe to compare with; None for none.
        batch: samples of the step; None for the network's usual ones.
        shape: of an input of ``module:function``, without the batch.
        fused: whether what can be fused into products moves nothing off the chip.
        json_file: where everything is written, too.
        scalesim: where the GEMMs are written as a topology for SCALE-Sim.

    Returns:
        The exit status, 0.

    Raises:
        HalfbyteError: if something cannot be modeled as asked.
    """
    example, chosen = find(network, shape), machine_of(machine, fused=fused)
    if compare == recipe:
        raise HalfbyteError(f"--compare {compare} was given with --recipe {recipe}; compare two different ones.")
    if json_file is not None and json_file.is_dir():
        raise HalfbyteError(f"--json {json_file} is a folder. Name a file.")
    step = model_step(example, recipe, batch, name=network)
    baseline = None if compare is None else model_step(example, compare, batch, name=network)
    found = estimate(step, chosen)
    console = Console(emoji=False)
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH, emoji=False)
    console.print(_heading(example, found))
    console.print(_layers(found))
    content: dict[str, Any] = {"estimate": found.to_json(), "layers": _layer_rows(found)}
    if baseline is not None:
        stages = waterfall(step, baseline, chosen)
        console.print(_stages(stages))
        needed = sensitivity(step, baseline, chosen)
        console.print(_needed(needed))
        content |= {"baseline": estimate(baseline, chosen).to_json(), "sensitivity": needed.to_json()}
        content["waterfall"] = [{"stage": stage.name} | stage.to_json() for stage in stages.stages]
    if network in ("resnet50", "resnet50-v1"):
        bars = figure_6c()
        console.print(_bars(bars))
        content["fig6c"] = bars[0].to_json()["fig6c"]
        content["fig6c_assumptions"] = list(bars[0].assumptions)
        content["fig6c_own_areas"] = bars[1].to_json()
        content["definitions"] = [density.to_json() for density in definitions(load_units())]
    if json_file is not None:
        write_text(json_file, json.dumps(content, indent=1, allow_nan=False) + "\n")
        console.print(f"Report: {json_file}")
    if scalesim is not None:
        step.to_scalesim(scalesim)
        console.print(f"Topology: {scalesim}")
    return 0


def figure_6c() -> tuple[Fig6c, Fig6c]:
    """Fig. 6(c) of the paper with its own rates, and with those of our areas.

    Always of the network that the bars fit, ResNet-50 in its first form.
    """
    step = model_step(NETWORKS["resnet50-v1"], "ibm2020", name="ResNet-50 v1")
    return fig6c(step, PAPER_RATES), fig6c(step, Rates.from_units(load_units()))


def _heading(example: Example, found: Estimate) -> str:
    machine, totals = found.machine, found.totals
    return (
        f"{found.workload}: {example.what}; one training step of {found.batch} samples under {found.recipe} on "
        f"{machine.name}{'' if machine.fused else ', nothing fused'}\n"
        f"{totals.macs / 1e9:.1f} GMAC, {totals.cycles / 1e6:.2f} million cycles "
        f"({1e3 * found.seconds:.2f} ms), utilization {totals.utilization:.0%}, "
        f"{totals.dram_bytes / 1e9:.2f} GB off the chip, {totals.energy_pj / 1e12:.3f} J\n"
    )


def _layer_rows(found: Estimate) -> list[dict[str, Any]]:
    """Each layer's products and vector work, phase by phase."""
    rows = []
    for layer in dict.fromkeys(row.layer for row in found.rows):
        for phase in _PHASES:
            own = [row for row in found.rows if row.layer == layer and row.phase == phase]
            if not own:
                continue
            longest = max(own, key=lambda row: row.cycles)
            rows.append(
                {
                    "layer": layer,
                    "phase": phase,
                    "precision": next((row.precision for row in own if row.precision), ""),
                    "macs": sum(row.macs for row in own),
                    "cycles": sum(row.cycles for row in own),
                    "gemm_cycles": sum(row.cycles for row in own if row.precision),
                    "utilization": max((row.utilization for row in own if row.precision), default=0.0),
                    "bound": longest.bound,
                    "dram_bytes": sum(row.dram_bytes for row in own),
                    "energy_pj": sum(row.energy_pj for row in own),
                }
            )
    return rows


def _table(title: str, columns: Sequence[str], *, left: int = 1, caption: str = "") -> Table:
    result = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for number, name in enumerate(columns):
        result.add_column(name, justify="left" if number < left else "right", no_wrap=number < left)
    return result


def _layers(found: Estimate) -> Table:
    """A line for each layer that multiplies, one for each kind of other work, and the sums."""
    names = ["", "precisions", "million MACs", "thousand cycles", "of them GEMMs", "utilization", "bound"]
    result = _table("Layer by layer, all phases", [*names, "MB off the chip", "µJ"], left=2)
    layers = {row.layer for row in found.rows if row.precision}
    for layer, totals in found.by("layer").items():
        if layer in layers:
            own = [row for row in found.rows if row.layer == layer]
            precisions = "/".join(dict.fromkeys(row.precision for row in own if row.precision))
            result.add_row(layer or "(model)", precisions, *_cells(totals, max(own, key=lambda row: row.cycles).bound))
    result.add_section()
    others = dataclasses.replace(found, rows=tuple(row for row in found.rows if row.layer not in layers))
    for name, totals in sorted(others.by("name").items(), key=lambda entry: -entry[1].cycles)[:_MOST]:
        own = [row for row in others.rows if row.name == name]
        result.add_row(f"other work: {name}", "", *_cells(totals, max(own, key=lambda row: row.cycles).bound))
    result.add_section()
    for phase, totals in found.by("phase").items():
        result.add_row(f"all, {phase}", "", *_cells(totals, ""))
    return result


def _cells(totals: Totals, bound: str) -> list[str]:
    return [
        f"{totals.macs / 1e6:,.0f}",
        f"{totals.cycles / 1e3:,.1f}",
        f"{totals.gemm_cycles / 1e3:,.1f}",
        f"{totals.utilization:.0%}" if totals.macs else "",
        bound,
        f"{totals.dram_bytes / 1e6:,.1f}",
        f"{totals.energy_pj / 1e6:,.1f}",
    ]


def _stages(found: Waterfall) -> Table:
    result = _table(
        f"{found.recipe} against {found.baseline} on {found.machine.name}: what is left of the speed, stage by stage",
        ["stage", "with", "times faster", "times less energy"],
        left=2,
    )
    for stage in found.stages:
        meaning = stage.to_json()["meaning"]
        result.add_row(stage.name, meaning, f"{stage.speedup:.2f}", f"{stage.energy_ratio:.2f}")
    return result


def _needed(found: Sensitivity) -> Table:
    widths = sorted({point.vector_lanes for point in found.points})
    result = _table(
        f"Times faster with other vector lanes (of a core) and bandwidth; {found.limit:.2f} if neither took time",
        ["GB/s", *(f"{width} lanes" for width in widths)],
        caption=f"Bold where it is {found.target:g} or more.",
    )
    for bandwidth in sorted({point.dram_bytes_per_second for point in found.points}):
        own = {p.vector_lanes: p.speedup for p in found.points if p.dram_bytes_per_second == bandwidth}
        cells = [f"[bold]{own[w]:.2f}[/bold]" if own[w] >= found.target else f"{own[w]:.2f}" for w in widths]
        result.add_row(f"{bandwidth / 1e9:g}", *cells)
    return result


def _bars(found: tuple[Fig6c, Fig6c]) -> Table:
    paper, own = found
    result = _table(
        "Fig. 6(c) of Sun et al. (2020): ResNet-50's products alone, times FP16",
        ["bar", "paper", "with its rates", "with our areas"],
        caption="\n".join(paper.assumptions),
    )
    for theirs, ours in zip(paper.bars, own.bars, strict=True):
        result.add_row(theirs.name, f"{theirs.paper:.1f}", f"{theirs.model:.2f}", f"{ours.model:.2f}")
    return result
