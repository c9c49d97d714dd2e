"""The command that takes a trained network out of the house: ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..errors import UnknownNameError
from .app import app, examples, typer

__all__ = ["FORMATS", "export"]

FORMATS = ("safetensors", "onnx", "torch")
"""Packed weights to come back to, a quantized graph for a runtime, plain weights for PyTorch."""


@app.command(
    epilog=examples(
        "halfbyte export runs/digits-cnn-cpu-ibm2020-seed0 --format safetensors -o digits.safetensors",
        "halfbyte export runs/digits-cnn-cpu-ibm2020-seed0 --format onnx -o digits.onnx",
        "halfbyte export runs/digits-cnn-cpu-ibm2020-seed0 --format torch -o digits.pt",
    )
)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="The folder of a run, or the last.ckpt in it.")],
    fmt: Annotated[str, typer.Option("--format", help="safetensors, onnx or torch.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    batch: Annotated[
        int | None, typer.Option(min=1, help="For onnx: a fixed batch of that many. Without it the batch is open.")
    ] = None,
) -> None:
    """Write a trained network for the world outside.

    safetensors: the weights' codes, two to a byte, with scales, clips and all else; halfbyte.load brings them back.
    onnx: a graph with INT4 weights and rounded activations, for ONNX Runtime. torch: a state dict of plain weights,
    each what its code stands for, for PyTorch without halfbyte.
    """
    from .. import export as leaving
    from ..errors import HalfbyteError
    from ..export import runs

    if fmt not in FORMATS:
        raise UnknownNameError("format", fmt, FORMATS)
    if batch is not None and fmt != "onnx":
        raise HalfbyteError(f"--batch {batch} was given with --format {fmt}, which has no batch. Leave it out.")
    trained = runs.open_checkpoint(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    if fmt == "safetensors":
        packed = leaving.save_safetensors(trained.network, out, recipe=trained.recipe, more=trained.about)
        if packed.packed_bytes:
            share = packed.packed_bytes / packed.float_bytes
            typer.echo(f"Packed weights: {packed.packed_bytes:,} bytes, {share:.3f} of {packed.float_bytes:,} in FP32")
    elif fmt == "onnx":
        inputs = runs.example_inputs(trained.about["task"], batch or 2)
        leaving.save_onnx(trained.network, inputs, out, open_batch=batch is None)
    else:
        leaving.save_torch(trained.network, out)
    what = f"{trained.about['task']}, {trained.about['network']}, {trained.recipe}"
    typer.echo(f"{what}: {out}, {out.stat().st_size:,} bytes")
