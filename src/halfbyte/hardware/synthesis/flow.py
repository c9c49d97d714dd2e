"""From a unit in Amaranth to gates: RTLIL, Yosys, and the smallest of several mappings.

No single script is the smallest for every circuit, so each unit is mapped in several ways (multipliers as plain or as
Booth-recoded arrays, the logic by two scripts for ABC), and the smallest one counts. Nothing is timed: this is the area
of the unit as small as it gets, one result a cycle at whatever clock that allows. Flip-flops have no reset.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import yosys
from .liberty import Library
from .netlist import Netlist

if TYPE_CHECKING:
    from amaranth.lib.wiring import Component

__all__ = ["ABC_SCRIPTS", "Synthesized", "rtlil", "synthesize", "synthesize_all"]

_RESUBSTITUTE = (
    "balance -l; resub -K 6 -l; rewrite -l; resub -K 8 -N 2 -l; refactor -l; resub -K 10 -N 2 -l; rewrite -z -l"
)

ABC_SCRIPTS: Mapping[str, str] = {
    "dch": "strash; ifraig; scorr; dc2; dc2; dch -f; amap -m; topo",
    "resub": f"strash; ifraig; scorr; dc2; {_RESUBSTITUTE}; {_RESUBSTITUTE}; balance -l; dch -f; amap -m; topo",
}
"""Both simplify the and-inverter graph, keep the structures seen on the way as choices, and cover it for area."""


@dataclass(frozen=True, kw_only=True)
class Synthesized:
    """A unit in gates.

    Attributes:
        component: what was synthesized.
        netlist: the smallest mapping.
        recipe: how it was made, such as ``"resub -booth"``.
        areas_ge: what each recipe came to, in gate equivalents.
    """

    component: Component
    netlist: Netlist
    recipe: str
    areas_ge: Mapping[str, float]


def rtlil(component: Component) -> str:
    """A component as RTLIL, the text that Yosys reads. Its domain ``sync`` has a clock and no reset.

    Raises:
        HalfbyteError: if Amaranth is not installed.
    """
    yosys.require("amaranth")
    from amaranth.back import rtlil as backend
    from amaranth.hdl import ClockDomain

    def domain(name: str) -> ClockDomain:
        return ClockDomain(name, reset_less=True)

    text: str = backend.convert(component, name="top", emit_src=False, missing_domain=domain)
    return text


def synthesize(component: Component, name: str, library: Library | None = None) -> Synthesized:
    """Maps a component to gates and keeps the smallest of the mappings.

    Args:
        component: what to synthesize; one clock, no reset.
        name: what to call the netlist.
        library: the cells; our own unit-gate library if None.

    Raises:
        HalfbyteError: if Amaranth or Yosys is not installed, or Yosys fails.
    """
    library = library or Library.load()
    text = rtlil(component)
    # Without a multiplication there is nothing to recode.
    booth = ["", " -booth"] if re.search(r"cell \$(mul|macc)", text) else [""]
    script = ["read_rtlil top.il", "setattr -unset init w:*", "design -save source"]
    for flag in booth:
        script += ["design -load source", f"synth -flatten -top top{flag}", "dfflibmap -liberty cells.lib"]
        script += ["design -save mapped"]
        for recipe in ABC_SCRIPTS:
            script += ["design -load mapped", f"abc -liberty cells.lib -script {recipe}.abc", "opt_clean"]
            script += [f"write_json {recipe}{flag.strip()}.json"]
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as temporary:
        folder = Path(temporary)
        shutil.copyfile(library.path, folder / "cells.lib")
        (folder / "top.il").write_text(text)
        for recipe, commands in ABC_SCRIPTS.items():
            (folder / f"{recipe}.abc").write_text(commands.replace("; ", "\n") + "\n")
        yosys.run("\n".join([*script, ""]), folder)
        mapped = {
            f"{recipe}{flag}": Netlist.from_json(
                json.loads((folder / f"{recipe}{flag.strip()}.json").read_text()), library, name
            )
            for flag in booth
            for recipe in ABC_SCRIPTS
        }
    smallest = min(mapped, key=lambda recipe: mapped[recipe].area)
    areas = {recipe: netlist.area_ge for recipe, netlist in mapped.items()}
    return Synthesized(component=component, netlist=mapped[smallest], recipe=smallest, areas_ge=areas)


def synthesize_all(
    builders: Mapping[str, Callable[[], Component]],
    library: Library | None = None,
    say: Callable[[str], object] = str,
) -> dict[str, Synthesized]:
    """Synthesizes several units, two at a time where there are two processors.

    Args:
        builders: for each name what makes the component.
        library: the cells; our own unit-gate library if None.
        say: takes the line that explains the wait when Yosys starts for the first time; the default drops it.

    Raises:
        HalfbyteError: as for `synthesize`.
    """
    library = library or Library.load()
    yosys.require()
    yosys.warm_up(say)
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        running = {name: pool.submit(synthesize, build(), name, library) for name, build in builders.items()}
        return {name: future.result() for name, future in running.items()}
