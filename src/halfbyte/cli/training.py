"""Commands that train: ``compare``, ``train``, and ``audit``, which trains one step."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import HalfbyteError
from .app import (
    ACCELERATOR,
    BACKEND,
    DATA,
    FINE_TUNE,
    JOBS,
    MODEL,
    NO_REPORT,
    RECIPE,
    RUNS,
    SIZE,
    STASH,
    STRATEGY,
    TASK,
    TENSORBOARD,
    Console,
    app,
    examples,
    typer,
)

if TYPE_CHECKING:  # Records need torch, and --help does not.
    from ..lab.record import Record

__all__ = ["audit", "compare", "train"]


@app.command(
    epilog=examples(
        "halfbyte compare digits --recipes fp32,bf16,ibm2020 --seeds 3",
        "halfbyte compare digits --recipes all --model mlp --json mlp.json --jobs 2",
        "halfbyte compare digits --recipes fp32,ibm2020,mine:recipe --seeds 3",
    )
)
def compare(
    task: Annotated[str, typer.Argument(help=TASK)],
    recipes: Annotated[
        str, typer.Option(help="Names with commas between them, module:recipe of your own too; or all.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 3 means the seeds 0, 1 and 2.")] = 3,
    size: Annotated[str, typer.Option(help=SIZE)] = "cpu",
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    fine_tune: Annotated[int, typer.Option(min=0, help=FINE_TUNE)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the runs; finished ones there are not repeated.")] = RUNS,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write runs and summary to this file.")] = None,
    stash: Annotated[str, typer.Option(help=STASH)] = "",
    data_dir: Annotated[Path | None, typer.Option(envvar="HALFBYTE_DATA", help=DATA)] = None,
    accelerator: Annotated[str, typer.Option(help=ACCELERATOR)] = "cpu",
    backend: Annotated[str, typer.Option(help=BACKEND)] = "auto",
    strategy: Annotated[str | None, typer.Option(help=STRATEGY)] = None,
    jobs: Annotated[int, typer.Option(min=1, help=JOBS)] = 1,
    no_report: Annotated[bool, typer.Option("--no-report", help=NO_REPORT)] = False,
) -> None:
    """Train one network under several recipes and seeds, and print what each recipe cost.

    Every recipe gets the same initial weights, the same order of examples and the same settings. From three seeds on
    the table shows Student's 95 % interval of the difference. After Ctrl-C the same command goes on.
    """
    from ..lab import tasks
    from ..lab.compare import compare as run_all
    from ..lab.console import Watcher, comparison_table
    from ..lab.ranks import chosen, command, company
    from ..lab.run import Interrupted
    from ..recipes import RECIPES

    words = [word.strip() for word in recipes.split(",")]
    names = [name for word in words for name in (RECIPES if word == "all" else [word])]
    definition = tasks.get(task)
    with company(os.environ, accelerator) as leads:
        console = Console(quiet=not leads, emoji=False)
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
    _show(result.records, None if no_report else out, console)
    if result.failures:
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "halfbyte train digits --recipe ibm2020 --seed 1",
        "halfbyte train digits --recipe luq --fine-tune 3",
        "halfbyte train digits --recipe ibm2020 --seed 1 --resume runs/digits-cnn-cpu-ibm2020-seed1",
        "torchrun --nproc-per-node=2 -m halfbyte train digits --recipe ibm2020 --strategy fsdp2",
    )
)
def train(
    task: Annotated[str, typer.Argument(help=TASK)],
    recipe: Annotated[str, typer.Option(help=RECIPE)],
    seed: Annotated[int, typer.Option(min=0, help="Of the initial weights and of the order of the examples.")] = 0,
    size: Annotated[str, typer.Option(help=SIZE)] = "cpu",
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    fine_tune: Annotated[int, typer.Option(min=0, help=FINE_TUNE)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. Without it: runs/TASK-MODEL-SIZE-RECIPE-seedN.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of an interrupted run that is to go on.")] = None,
    stash: Annotated[str, typer.Option(help=STASH)] = "",
    tensorboard: Annotated[Path | None, typer.Option(help=TENSORBOARD)] = None,
    data_dir: Annotated[Path | None, typer.Option(envvar="HALFBYTE_DATA", help=DATA)] = None,
    accelerator: Annotated[str, typer.Option(help=ACCELERATOR)] = "cpu",
    backend: Annotated[str, typer.Option(help=BACKEND)] = "auto",
    strategy: Annotated[str | None, typer.Option(help=STRATEGY)] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help=NO_REPORT)] = False,
) -> None:
    """Train one network under one recipe, and write its record.

    Same seed, same bits. Ctrl-C leaves a checkpoint and prints the command that goes on; the end is the same as if
    nothing had happened.
    """
    from ..lab import tasks
    from ..lab.callbacks import with_probes
    from ..lab.console import Watcher
    from ..lab.ranks import company
    from ..lab.run import RECORD_NAME, Interrupted, Run
    from ..lab.trainer import train as run_one

    run = Run(task=task, recipe=recipe, seed=seed, size=size, model=model or "", fine_tune=fine_tune, stash=stash)
    folder = resume or out or RUNS / run.name
    definition = tasks.get(task)
    with company(os.environ, accelerator) as leads:
        console = Console(quiet=not leads, emoji=False)
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
    measured = {result.metric: result.value, **result.further}
    told = ", ".join(f"{name} {value:.2f} {result.unit}".rstrip() for name, value in measured.items())
    console.print(f"{run.name}: {told} in {result.seconds:.1f} s")
    for layer, count in result.nonfinite.items():
        console.print(f"{layer}: {count} tensors held NaN or infinity.", style="red")
    console.print(f"Record: {folder / RECORD_NAME}")
    _show([result], None if no_report else folder, console)


@app.command(
    epilog=examples(
        "halfbyte audit digits --recipe ibm2020",
        "halfbyte audit digits --recipe luq --model mlp --json audit.json",
    )
)
def audit(
    task: Annotated[str, typer.Argument(help=TASK)],
    recipe: Annotated[str, typer.Option(help=RECIPE)],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    data_dir: Annotated[Path | None, typer.Option(envvar="HALFBYTE_DATA", help=DATA)] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, or cuda or mps where there is one.")] = "cpu",
) -> None:
    """Prove what a network computes in four bits: run one training step and recompute all of it.

    The report says for every layer and GEMM on which codes it ran, and which share of the arithmetic that was. Every
    quantizer in use is tested on the device. The exit status is 1 when a promised layer was skipped, a product or a
    bias is wrong, or a quantizer does not do what it says.
    """
    import torch

    from ..auditing import audit as run_audit
    from ..convert import convert
    from ..lab import tasks
    from ..lab.guard import reproducible
    from ..recipes import find

    definition, chosen, place = tasks.get(task), find(recipe), _device(device)
    name, data, settings = definition.model_named(model), definition.load(data_dir), definition.settings("cpu")
    with reproducible(0, torch.device("cpu")):
        network = convert(definition.models[name](data, settings), chosen).to(place)
        batch = next(data.train.batches(settings.batch_size)).to(place)
        report = run_audit(network, lambda model: definition.learn(model, batch, (), settings).loss)
    console = Console(emoji=False)
    title = f"{task}, {name}, {recipe}: one training step on {batch.count} examples\n"
    console.print(title, markup=False, highlight=False)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        report.write(json_file)
        console.print(f"Report: {json_file}")
    if not report.ok:
        raise typer.Exit(1)


def _show(records: Sequence[Record], folder: Path | None, console: Console) -> None:
    """Writes the report page beside the records, which are on the disk already; None for no page."""
    if folder is None or console.quiet:
        return
    from ..report import page

    try:
        page.write(records, folder / page.NAME)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a page, the runs are done and their status is 0
        console.print(f"No report page: {error}", style="dim", markup=False)
    else:
        console.print(f"Report: {folder / page.NAME}")


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
