"""What the listing commands print: number formats, recipes, and what this installation computes with.

The commands themselves, with their arguments and help, are in `cli`.
"""

from __future__ import annotations

import json
import math
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from .formats import FORMATS, Format
from .formats import get as format_named

__all__ = ["list_formats", "list_recipes", "show_installation"]


def list_formats(name: str | None, *, as_json: bool) -> None:
    """Prints all formats, or every code of one."""
    chosen = list(FORMATS.values()) if name is None else [format_named(name)]
    if as_json:
        described = [_format_json(fmt) for fmt in chosen]
        typer.echo(json.dumps(described if name is None else described[0], indent=2, allow_nan=False))
        return
    from .lab.console import format_facts, format_table

    console = Console()
    if name is not None:
        console.print(format_facts(chosen[0]), markup=False, highlight=False)
        console.print(format_table(chosen[0]))
        return
    table = Table(
        title="Formats", caption="smallest: above zero. One in full: halfbyte formats NAME", caption_justify="left"
    )
    table.add_column("name", no_wrap=True)
    for title in ("bits", "radix", "smallest", "largest"):
        table.add_column(title, justify="right")
    table.add_column("what it is")
    for fmt in chosen:
        radix = "-" if fmt.kind == "int" else str(fmt.radix)
        table.add_row(fmt.name, str(fmt.bits), radix, f"{fmt.min_positive:.4g}", f"{fmt.max:.4g}", fmt.description)
    console.print(table)


def _format_json(fmt: Format) -> dict[str, Any]:
    """A format as plain values. JSON has no NaN and no infinity: they become the strings nan, inf and -inf."""
    low, high = fmt.saturate
    return {
        "name": fmt.name,
        "description": fmt.description,
        "kind": fmt.kind,
        "bits": fmt.bits,
        "signed": fmt.signed,
        "radix": fmt.radix,
        "phase": fmt.phase.value if fmt.kind == "log" else None,
        "exponent_bits": fmt.exponent_bits,
        "mantissa_bits": fmt.mantissa_bits,
        "saturate": [low, high],
        "min_positive": fmt.min_positive,
        "values": [value if math.isfinite(value) else str(value) for value in fmt.values],
    }


def list_recipes(name: str | None) -> None:
    """Prints all recipes, or one in full."""
    from .recipes import RECIPES, find

    console = Console(emoji=False)
    if name is not None:
        console.print(str(find(name)), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(title="Recipes", caption="One in full: halfbyte recipes NAME", caption_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("what it is")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.description)
    console.print(table)


def show_installation() -> None:
    """Prints versions, backends, instruction set and threads."""
    import torch

    from . import __version__
    from .kernels import native, resolve

    found = native.info()
    typer.echo(f"halfbyte {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    typer.echo("backend reference: emulation in plain PyTorch, on any device")
    if found.available:
        choice = ", ".join(found.isas)
        typer.echo(f"backend native: {found.isa} (possible here: {choice}), {found.threads} threads, {found.build}")
        if found.serial:
            typer.echo(f"  one thread: {found.serial}")
        for name, what in native.HANDED_OVER.items():
            typer.echo(f"  {name} goes to reference for {what}" if "always" not in what else f"  {name}: {what}")
        typer.echo(f"  gemm goes to reference for {'; '.join(native.REFERENCE_CASES)}")
    else:
        typer.echo(f"backend native: absent. {found.problem}")
    typer.echo(f"backend auto: {resolve('auto')}")
