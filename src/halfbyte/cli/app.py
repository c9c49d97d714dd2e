"""The application that commands join, and the words that several of them share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.stderr.write(f"halfbyte: the command needs {error.name}. Install it with: pip install 'halfbyte[lab]'\n")
    raise SystemExit(2) from None

__all__ = [
    "ACCELERATOR",
    "BACKEND",
    "DATA",
    "FINE_TUNE",
    "JOBS",
    "MODEL",
    "NO_REPORT",
    "RECIPE",
    "RUNS",
    "SIZE",
    "STASH",
    "STRATEGY",
    "TASK",
    "TENSORBOARD",
    "Console",
    "app",
    "examples",
    "typer",
]

app = typer.Typer(
    name="halfbyte",
    help="Train neural networks in four bits: INT4 weights and activations, radix-4 FP4 gradients.",
    epilog="Start with: halfbyte compare digits --recipes fp32,bf16,ibm2020 --seeds 3",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

TASK = "The task: digits, for example, or module:task for one of your own, in the working folder."
RECIPE = "How numbers are rounded: a recipe (halfbyte recipes), or module:recipe for one of your own."
SIZE = "How long: smoke (seconds, for tests), cpu (up to an hour or two on a desk) or full (the published setting)."
MODEL = "Which network of the task; for digits cnn or mlp."
FINE_TUNE = "Epochs in high precision after the ordinary ones; the weights stay in their format. 0 for none."
ACCELERATOR = "Where to compute: cpu, cuda, mps or auto."
STASH = "Keep what autograd saves as codes of this kind: int4 or int8."
DATA = "Folder with a folder for each data set; the digits need none."
BACKEND = "Who computes four bits, to the same bits: native (compiled), reference (emulation) or auto."
STRATEGY = "How the processes that torchrun started share a run: ddp or fsdp2. Without it: ddp."
TENSORBOARD = "Folder for TensorBoard: what each operand of each layer loses, and the loss, every 100 batches."
JOBS = "How many runs at a time, each in a process with its share of the threads."
NO_REPORT = "Write no report.html, the page that shows the runs."
RUNS = Path("runs")


def examples(*lines: str) -> str:
    """An epilog: Typer joins lines unless a blank one parts them."""
    return "\n\n".join(["Examples:", *lines])


def _show_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"halfbyte {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass
