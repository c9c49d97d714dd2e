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
    name: Annotated[str | None, typer.Argument(help="A recipe; without it, a list of all.")] = None,
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


@app.command(epilog=examples("halfbyte report runs -o results.md"))
def report(
    records: Annotated[list[Path], typer.Argument(help="Records, or folders that hold some.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The Markdown file to write; its figures go beside it.")],
) -> None:
    """Write a page of results: tables with gaps beside the paper's, curves, and how each number was made.

    Text in a file remarks.md beside the records of a task, in a folder of its name, follows that task's tables.
    """
    from ..lab.results import gather, remarks, write_page

    if out.suffix != ".md":
        raise HalfbyteError(f"-o {out} was given; the page is Markdown. Name a file *.md.")
    for path in write_page(gather(records), out, remarks(records)):
        typer.echo(path)


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
