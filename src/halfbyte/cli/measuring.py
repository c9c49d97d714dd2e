"""Commands that measure this machine or model another: ``bench`` and ``hw``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .app import RECIPE, app, examples, typer

__all__ = ["bench", "hw"]


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


@app.command(
    epilog=examples(
        "halfbyte hw resnet50 --recipe ibm2020 --compare fp16",
        "halfbyte hw ptb --recipe ibm2020_dw_fp8 --preset tpu_like --json ptb.json",
        "halfbyte hw mynetworks:make --input 3,224,224 --batch 32 --recipe luq",
    )
)
def hw(
    network: Annotated[
        str, typer.Argument(help="A network (resnet50, lstm-650, ...), a task, or module:function of your own.")
    ],
    recipe: Annotated[str, typer.Option(help=f"{RECIPE[:-1]}; fp16 as well.")],
    preset: Annotated[
        str,
        typer.Option(help="The machine: isoarea, isoarea_mixed (by our areas), rapid4, tpu_like, ..."),
    ] = "isoarea",
    compare: Annotated[str | None, typer.Option(help="A recipe to compare with; usually fp16.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in the step.")] = None,
    shape: Annotated[
        str | None, typer.Option("--input", help="Shape of an input of module:function, without the batch.")
    ] = None,
    unfused: Annotated[bool, typer.Option("--unfused", help="All that is no product reads and writes memory.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    scalesim: Annotated[
        Path | None, typer.Option(help="Write the GEMMs to this file, as a topology for SCALE-Sim.")
    ] = None,
) -> None:
    """Model one training step on an accelerator: cycles, bytes and energy, layer by layer.

    Nothing is trained and no data are read. With --compare it shows what is left of the multipliers' speed once layers
    in high precision, the array's shape, vector work and memory have had their share.
    """
    from ..hardware.command import command

    raise typer.Exit(
        command(
            network,
            recipe=recipe,
            machine=preset,
            compare=compare,
            batch=batch,
            shape=shape,
            fused=not unfused,
            json_file=json_file,
            scalesim=scalesim,
        )
    )
