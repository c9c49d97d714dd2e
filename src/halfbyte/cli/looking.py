"""Commands that show something: ``formats``, ``recipes``, ``quantize``, ``report``, ``info`` and ``explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..errors import HalfbyteError
from .app import app, examples, typer

__all__ = ["explain", "formats", "info", "quantize", "recipes", "report"]


@app.command(epilog=examples("halfbyte formats", "halfbyte formats fp4_e3m0_r4", "halfbyte formats int4 --json"))
def formats(
    name: Annotated[str | None, typer.Argument(help="A format; without it, a list of all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """List the number formats, or show every code of one and the number that it stands for."""
    from ..listing import list_formats

    list_formats(name, as_json=as_json)


@app.command(epilog=examples("halfbyte recipes", "halfbyte recipes ibm2020"))
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A recipe, or module:recipe of your own; without it, a list of all.")
    ] = None,
) -> None:
    """List the recipes, or show one in full: its six operand slots, its rules and where it comes from."""
    from ..listing import list_recipes

    list_recipes(name)


@app.command(
    epilog=examples(
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
    from ..picture import open_image, picture

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


@app.command(
    epilog=examples(
        "halfbyte report runs -o report.html",
        "halfbyte report runs --live",
        "halfbyte report experiments/records -o results.md",
    )
)
def report(
    records: Annotated[list[Path], typer.Argument(help="Records, or folders that hold some.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write: a page, FILE.html, or tables, FILE.md.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Serve the page on this machine while runs go on.")] = False,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="For --live; without it a free one.")] = None,
) -> None:
    """Show what came of runs: curves, layers, memory and time on one HTML page, or tables in Markdown.

    The page needs no network and no other file. In it are also runs that go on: with --live, a run's numbers appear at
    the end of each of its epochs. In Markdown the tables stand beside the paper's; text in a file remarks.md beside the
    records of a task, in a folder of its name, follows that task's tables, and figures go beside the file.
    """
    from ..lab.record import RecordError
    from ..report import markdown, page
    from ..report.groups import gather
    from ..report.page.live import serve

    if live == (out is not None):
        raise HalfbyteError(
            "Give one of the two: -o FILE.html (or FILE.md) to write a file, or --live to serve a page."
        )
    if port is not None and not live:
        raise HalfbyteError(f"--port {port} was given without --live, which serves the page. Give both or none.")
    if out is None:
        serve(records, port or 0, lambda address: typer.echo(f"Report: {address} (Ctrl-C ends it)"))
        return
    if out.suffix not in (".html", ".md"):
        raise HalfbyteError(f"-o {out} was given; name a file *.html for the page, or *.md for tables in Markdown.")
    if out.suffix == ".md":
        for path in markdown.write(gather(records), out, markdown.remarks(records)):
            typer.echo(path)
        return
    page.require_plotly()
    running = page.going_on(records)
    try:
        found = gather(records)
    except RecordError:
        raise
    except HalfbyteError:  # There is no record at all, but perhaps there will be.
        if not running:
            raise
        found = []
    page.write(found, out, running, with_model=True)
    typer.echo(f"Report: {out}")


@app.command()
def info() -> None:
    """Show what this installation computes with: versions, backends, instruction set, threads."""
    from ..listing import show_installation

    show_installation()


@app.command(epilog=examples("halfbyte explain -o explain.html"))
def explain(
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")],
) -> None:
    """Write the story of 4-bit training as one page to touch: six chapters, each with something to move.

    The page needs no network and no other file. Its numbers are computed by the library when it is written.
    """
    from ..explain import write

    if out.suffix.lower() not in (".html", ".htm"):
        raise HalfbyteError(f"-o {out} was given; the page is HTML. Name a file *.html.")
    write(out)
    typer.echo(f"{out}, {out.stat().st_size:,} bytes")
