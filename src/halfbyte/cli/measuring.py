"""Commands that measure: ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .app import app, examples, typer

__all__ = ["bench"]


@app.command(
    epilog=examples(
        "halfbyte bench --quick",
        "halfbyte bench --json bench.json",
        "halfbyte bench --only step/resnet18 --threads 2",
    )
)
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes and few rounds, in about three minutes.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    only: Annotated[str, typer.Option(help="Only rows with this in their name; * stands for anything.")] = "",
    threads: Annotated[
        str | None, typer.Option(help="How many threads, with commas between. Without it 1,2; if quick, 2.")
    ] = None,
) -> None:
    """Measure the native backend against PyTorch's FP32 and BF16, side by side: speed, and what is kept in memory.

    First the native backend is compared with the reference, bit for bit. If they differ, nothing is measured, and the
    exit status is 1. The full run takes up to twenty minutes on two cores; let nothing else run meanwhile.
    """
    from ..bench.command import command

    raise typer.Exit(command(quick=quick, json_file=json_file, only=only, threads=threads))
