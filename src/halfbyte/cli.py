"""The command ``halfbyte``: compare recipes, train, audit, look at formats and recipes, see what a picture loses.

Exit status: 0 done, 1 a run diverged or an audit failed, 2 something was asked that cannot be done, 130 Ctrl-C, 143
SIGTERM.
Nothing heavy is imported before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from .errors import HalfbyteError

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.stderr.write(f"halfbyte: the command needs {error.name}. Install it with: pip install 'halfbyte[lab]'\n")
    raise SystemExit(2) from None

__all__ = ["app", "main"]

app = typer.Typer(
    name="halfbyte",
    help="Train neural networks in four bits: INT4 weights and activations, radix-4 FP4 gradients.",
    epilog="Start with: halfbyte compare digits --recipes fp32,bf16,ibm2020 --seeds 3",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

_SIZE = "How long: smoke (seconds, for tests), cpu (minutes on a desk machine, at most 40) or full (the published setting)."
_MODEL = "Which network of the task; for digits cnn or mlp."
_FINE_TUNE = "Epochs in high precision after the ordinary ones; the weights stay in their format. 0 for none."
_ACCELERATOR = "Where to compute: cpu, cuda, mps or auto."
_STASH = "Keep what autograd saves as codes of this kind: int4 or int8."
_DATA = "Folder with a folder for each data set; the digits need none."
_BACKEND = "Who computes four bits, to the same bits: native (compiled), reference (emulation) or auto."
_STRATEGY = "How the processes that torchrun started share a run: ddp or fsdp2. Without it: ddp."
_TENSORBOARD = "Folder for TensorBoard: what each operand of each layer loses, and the loss, every 100 batches."
_JOBS = "How many runs at a time, each in a process with its share of the threads."
_RUNS = Path("runs")


def _examples(*lines: str) -> str:
    """An epilog: Typer joins lines unless a blank one parts them."""
    return "\n\n".join(["Examples:", *lines])


def _show_version(asked: bool) -> None:
    if asked:
        from . import __version__

        typer.echo(f"halfbyte {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog=_examples(
        "halfbyte compare digits --recipes fp32,bf16,ibm2020 --seeds 3",
        "halfbyte compare digits --recipes all --model mlp --json mlp.json --jobs 2",
    )
)
def compare(
    task: Annotated[str, typer.Argument(help="The task, for example digits.")],
    recipes: Annotated[str, typer.Option(help="Names with commas between them, or all. See: halfbyte recipes")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 3 means the seeds 0, 1 and 2.")] = 3,
    size: Annotated[str, typer.Option(help=_SIZE)] = "cpu",
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    fine_tune: Annotated[int, typer.Option(min=0, help=_FINE_TUNE)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the runs; finished ones there are not repeated.")] = _RUNS,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write runs and summary to this file.")] = None,
    stash: Annotated[str, typer.Option(help=_STASH)] = "",
    data_dir: Annotated[Path | None, typer.Option(envvar="HALFBYTE_DATA", help=_DATA)] = None,
    accelerator: Annotated[str, typer.Option(help=_ACCELERATOR)] = "cpu",
    backend: Annotated[str, typer.Option(help=_BACKEND)] = "auto",
    strategy: Annotated[str | None, typer.Option(help=_STRATEGY)] = None,
    jobs: Annotated[int, typer.Option(min=1, help=_JOBS)] = 1,
) -> None:
    """Train one network under several recipes and seeds, and print what each recipe cost.

    Every recipe gets the same initial weights, the same order of examples and the same settings. From three seeds on
    the table shows Student's 95 % interval of the difference. After Ctrl-C the same command goes on.
    """
    from .lab import tasks
    from .lab.compare import compare as run_all
    from .lab.console import Watcher, comparison_table
    from .lab.ranks import chosen, command, company
    from .lab.run import Interrupted
    from .recipes import RECIPES

    names = list(RECIPES) if recipes.strip() == "all" else [name.strip() for name in recipes.split(",")]
    definition = tasks.get(task)
    with company(os.environ, accelerator) as leads:
        console = Console(quiet=not leads)
        try:
            with Watcher(console, definition.metric, definition.unit) as watcher:
                result = run_all(
                    task,
                    names,
                    range(seeds),
                    size=size,
                    model=model,
                    fine_tune=fine_tune,
                    out_dir=out,
                    stash=stash,
                    data_dir=data_dir,
                    accelerator=accelerator,
                    backend=backend,
                    strategy=strategy,
                    jobs=jobs,
                    progress=watcher,
                    note=lambda text: console.print(text, style="dim", markup=False),
                )
        except Interrupted as stop:
            again = command(["halfbyte", *sys.argv[1:]], chosen(strategy))
            raise _stopped(stop, shlex.join(again), console) from None
    console.print(comparison_table(result))
    if json_file is not None and not console.quiet:
        result.write(json_file)
        console.print(f"Runs and summary: {json_file}")
    if result.failures:
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "halfbyte train digits --recipe ibm2020 --seed 1",
        "halfbyte train digits --recipe luq --fine-tune 3",
        "halfbyte train digits --recipe ibm2020 --seed 1 --resume runs/digits-cnn-cpu-ibm2020-seed1",
        "torchrun --nproc-per-node=2 -m halfbyte train digits --recipe ibm2020 --strategy fsdp2",
    )
)
def train(
    task: Annotated[str, typer.Argument(help="The task, for example digits.")],
    recipe: Annotated[str, typer.Option(help="How numbers are rounded. See: halfbyte recipes")],
    seed: Annotated[int, typer.Option(min=0, help="Of the initial weights and of the order of the examples.")] = 0,
    size: Annotated[str, typer.Option(help=_SIZE)] = "cpu",
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    fine_tune: Annotated[int, typer.Option(min=0, help=_FINE_TUNE)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. Without it: runs/TASK-MODEL-SIZE-RECIPE-seedN.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of an interrupted run that is to go on.")] = None,
    stash: Annotated[str, typer.Option(help=_STASH)] = "",
    tensorboard: Annotated[Path | None, typer.Option(help=_TENSORBOARD)] = None,
    data_dir: Annotated[Path | None, typer.Option(envvar="HALFBYTE_DATA", help=_DATA)] = None,
    accelerator: Annotated[str, typer.Option(help=_ACCELERATOR)] = "cpu",
    backend: Annotated[str, typer.Option(help=_BACKEND)] = "auto",
    strategy: Annotated[str | None, typer.Option(help=_STRATEGY)] = None,
) -> None:
    """Train one network under one recipe, and write its record.

    Same seed, same bits. Ctrl-C leaves a checkpoint and prints the command that goes on; the end is the same as if
    nothing had happened.
    """
    from .lab import tasks
    from .lab.callbacks import with_probes
    from .lab.console import Watcher
    from .lab.ranks import company
    from .lab.run import RECORD_NAME, Interrupted, Run
    from .lab.trainer import train as run_one

    run = Run(task=task, recipe=recipe, seed=seed, size=size, model=model or "", fine_tune=fine_tune, stash=stash)
    folder = resume or out or _RUNS / run.name
    definition = tasks.get(task)
    with company(os.environ, accelerator) as leads:
        console = Console(quiet=not leads)
        try:
            with Watcher(console, definition.metric, definition.unit) as watcher:
                result = run_one(
                    task,
                    recipe,
                    seed,
                    size=size,
                    model=model,
                    fine_tune=fine_tune,
                    out_dir=out if resume else folder,
                    resume=resume,
                    stash=stash,
                    data_dir=data_dir,
                    accelerator=accelerator,
                    backend=backend,
                    strategy=strategy,
                    progress=with_probes(watcher, tensorboard),
                )
        except Interrupted as stop:
            board = "" if tensorboard is None else f" --tensorboard {shlex.quote(str(tensorboard))}"
            raise _stopped(stop, stop.command + board, console) from None
    console.print(f"{run.name}: {result.metric} {result.value:.2f} {result.unit} in {result.seconds:.1f} s")
    for layer, count in result.nonfinite.items():
        console.print(f"{layer}: {count} tensors held NaN or infinity.", style="red")
    console.print(f"Record: {folder / RECORD_NAME}")


@app.command(
    epilog=_examples(
        "halfbyte audit digits --recipe ibm2020",
        "halfbyte audit digits --recipe luq --model mlp --json audit.json",
    )
)
def audit(
    task: Annotated[str, typer.Argument(help="The task, for example digits.")],
    recipe: Annotated[str, typer.Option(help="How numbers are rounded. See: halfbyte recipes")],
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    data_dir: Annotated[Path | None, typer.Option(envvar="HALFBYTE_DATA", help=_DATA)] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, or cuda or mps where there is one.")] = "cpu",
) -> None:
    """Prove what a network computes in four bits: run one training step and recompute all of it.

    The report says for every layer and GEMM on which codes it ran, and which share of the arithmetic that was. Every
    quantizer in use is tested on the device. The exit status is 1 when a promised layer was skipped, a product or a
    bias is wrong, or a quantizer does not do what it says.
    """
    import torch

    from .auditing import audit as run_audit
    from .convert import convert
    from .lab import tasks
    from .lab.guard import reproducible
    from .recipes import get

    chosen, definition, place = get(recipe), tasks.get(task), _device(device)
    name, data, settings = definition.model_named(model), definition.load(data_dir), definition.settings("cpu")
    with reproducible(0, torch.device("cpu")):
        network = convert(definition.models[name](data, settings), chosen).to(place)
        batch = next(data.train.batches(settings.batch_size)).to(place)
        report = run_audit(network, lambda model: definition.learn(model, batch, (), settings).loss)
    console = Console()
    console.print(f"{task}, {name}, {recipe}: one training step on {batch.count} examples\n", highlight=False)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        report.write(json_file)
        console.print(f"Report: {json_file}")
    if not report.ok:
        raise typer.Exit(1)


def _device(name: str) -> Any:
    """A device of that name that can be used."""
    import torch

    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise HalfbyteError(
            f"The device {name!r} cannot be used here ({reason}). Possible: cpu, and cuda or mps where there is one."
        ) from error


def _stopped(stop: Any, command: str, console: Console) -> typer.Exit:
    """Says how to go on after a signal, and leaves with the status that shells use for it."""
    name = signal.Signals(stop.signal_number).name
    if not console.quiet:
        typer.echo(f"\nStopped by {name}; a checkpoint is saved. Go on with:\n  {command}", err=True)
    return typer.Exit(128 + stop.signal_number)


@app.command(epilog=_examples("halfbyte formats", "halfbyte formats fp4_e3m0_r4", "halfbyte formats int4 --json"))
def formats(
    name: Annotated[str | None, typer.Argument(help="A format; without it, a list of all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """List the number formats, or show every code of one and the number that it stands for."""
    from .listing import list_formats

    list_formats(name, as_json=as_json)


@app.command(epilog=_examples("halfbyte recipes", "halfbyte recipes ibm2020"))
def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe; without it, a list of all.")] = None,
) -> None:
    """List the recipes, or show one in full: its six operand slots, its rules and where it comes from."""
    from .listing import list_recipes

    list_recipes(name)


@app.command(
    epilog=_examples(
        "halfbyte quantize cat.jpg --format int4 --out cat-int4.png",
        "halfbyte quantize cat.jpg --format int4 --bits 2 --out cat-2bit.png",
        "halfbyte quantize cat.jpg --format fp4_e3m0_r4 --out cat-radix4.png",
    )
)
def quantize(
    image: Annotated[Path, typer.Argument(help="Any image: gray or color, with or without alpha.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    fmt: Annotated[str, typer.Option("--format", help="A format. See: halfbyte formats")] = "int4",
    bits: Annotated[int | None, typer.Option(help="Another width for an integer format, 1 to 8.")] = None,
) -> None:
    """Show what a format does to a picture: original, quantized and error side by side.

    Integer formats map the darkest and lightest pixel to the lowest and highest code, -8 and 7 in four bits, and back.
    Others get a power-of-two scale that brings the largest pixel into range. In the error panel white is the largest
    error.
    """
    from .picture import open_image, picture

    if out.suffix.lower() != ".png":
        raise HalfbyteError(f"--out {out} is no PNG, and other formats add losses of their own. Name a file *.png.")
    result = picture(open_image(image), fmt, bits=bits)
    out.parent.mkdir(parents=True, exist_ok=True)
    result.image.save(out, format="PNG")
    typer.echo(
        f"{result.format_name}: {result.levels_used} of {result.levels} levels used, scale {result.scale:.6g}, "
        f"SQNR {result.sqnr_db:.1f} dB, largest error {result.largest_error:.1f} of 255 gray values"
    )
    typer.echo(f"Original, quantized, error: {out}")


@app.command(epilog=_examples("halfbyte report runs -o results.md"))
def report(
    records: Annotated[list[Path], typer.Argument(help="Records, or folders that hold some.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The Markdown file to write; its figures go beside it.")],
) -> None:
    """Write a page of results: tables with gaps beside the paper's, curves, and how each number was made."""
    from .lab.results import gather, write_page

    if out.suffix != ".md":
        raise HalfbyteError(f"-o {out} was given; the page is Markdown. Name a file *.md.")
    for path in write_page(gather(records), out):
        typer.echo(path)


@app.command()
def info() -> None:
    """Show what this installation computes with: versions, backends, instruction set, threads."""
    from .listing import show_installation

    show_installation()


@app.command(
    epilog=_examples(
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
    from .bench.command import command

    raise typer.Exit(command(quick=quick, json_file=json_file, only=only, threads=threads))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit status, see the module's docstring.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="halfbyte")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except HalfbyteError as error:
        sys.stderr.write(f"halfbyte: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"halfbyte: {error.strerror or error}: {error.filename}\n")
        return 2
    return 0
