"""Runs the notebooks while the site is built, and puts what they print and draw behind their code.

A notebook is a page in docs/notebooks: Markdown with blocks of Python that share a namespace. Its source holds no
output, so none can go stale, and the test of the pages runs it like any other. Each comes with a copy for Jupyter.
See docs/decisions/0022-notebooks.md.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

FOLDER = "notebooks/"
FENCE = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


class NotebookError(Exception):
    """A block that raised: the site is not built with half a notebook."""


@dataclass(frozen=True)
class Cell:
    """A piece of a notebook: prose, or a block of code with the number of its first line."""

    text: str
    line: int = 0

    @property
    def is_code(self) -> bool:
        """Whether it is run."""
        return self.line > 0


def cells(markdown: str) -> Iterator[Cell]:
    """Prose and code in turn, without the fences; empty prose is left out."""
    at = 0
    for match in FENCE.finditer(markdown):
        if prose := markdown[at : match.start()].strip():
            yield Cell(prose)
        yield Cell(match[1], markdown.count("\n", 0, match.start(1)) + 1)
        at = match.end()
    if prose := markdown[at:].strip():
        yield Cell(prose)


def run(markdown: str, name: str) -> tuple[str, dict[str, str]]:
    """Runs a notebook from top to bottom in a folder of its own.

    Args:
        markdown: its source.
        name: what its figures and its copy are called.

    Returns:
        The page with outputs, and the files that belong to it: figures as SVG by name.

    Raises:
        NotebookError: if a block raises; the text names its line.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    parts: list[str] = []
    figures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for cell in cells(markdown):
            if not cell.is_code:
                parts.append(cell.text)
                continue
            printed, value = _execute(cell, name, namespace)
            parts.append(f"```python\n{cell.text}```")
            if hasattr(value, "savefig"):
                figure = f"{name}-{len(figures) + 1}.svg"
                figures[figure] = _svg(value)
                parts.append(f"![What the code above draws]({figure})")
            elif value is not None:
                printed += f"{value!r}\n"
            if printed.strip():
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", figures


def _execute(cell: Cell, name: str, namespace: dict[str, Any]) -> tuple[str, Any]:
    """What a block prints, and the value of its last line where that is an expression."""
    # The empty lines in front make a traceback name the line of the page.
    tree = ast.parse("\n" * (cell.line - 1) + cell.text, f"{name}.md")
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"{name}.md", "exec"), namespace)
            value = None if last is None else eval(compile(last, f"{name}.md", "eval"), namespace)
    except Exception as error:
        raise NotebookError(f"{FOLDER}{name}.md, the block at line {cell.line}: {error!r}") from error
    return printed.getvalue(), value


def _svg(figure: Any) -> str:
    """A figure of matplotlib; equal figures give equal files."""
    from matplotlib import rc_context

    drawn = io.StringIO()
    with rc_context({"svg.hashsalt": "halfbyte"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def jupyter(markdown: str) -> str:
    """The notebook in Jupyter's format (nbformat 4.5), without outputs."""
    written = [
        {
            "id": f"cell-{number}",
            "metadata": {},
            "source": cell.text.rstrip("\n"),
            **({"cell_type": "code", "execution_count": None, "outputs": []} if cell.is_code else {}),
            **({} if cell.is_code else {"cell_type": "markdown"}),
        }
        for number, cell in enumerate(cells(markdown))
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": written, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str | None:
    """MkDocs calls this with every page's source and takes what it returns instead."""
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    source = page.file.src_uri
    if not source.startswith(FOLDER):
        return None
    name = PurePosixPath(source).stem
    try:
        result, extra = run(markdown, name)
    except NotebookError as error:
        raise PluginError(str(error)) from error
    extra[f"{name}.ipynb"] = jupyter(markdown)
    for file, content in extra.items():
        files.append(File.generated(config, f"{FOLDER}{file}", content=content))
    title, _, rest = result.partition("\n")
    note = f"This page was run when the site was built; the same [as a Jupyter notebook]({name}.ipynb)."
    return f"{title}\n\n{note}\n{rest}"
