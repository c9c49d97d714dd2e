"""The report page: one HTML file that holds its data, its style and its scripts, and asks nobody for anything.

    records -> `content`: plain values, aggregated -> JSON in the page -> page.js draws it

`render` puts the page together. ``page.html``, ``page.css`` and the scripts stand beside this file.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import HalfbyteError
from ...files import write_text
from ...lab.record import Record, RecordError, read_partial
from ...lab.run import PROGRESS_NAME, RECORD_NAME
from .aggregate import Running, content

__all__ = ["NAME", "Running", "as_json", "content", "going_on", "render", "require_plotly", "write"]

NAME = "report.html"
"""What the page is called that `halfbyte train` and `halfbyte compare` write beside records."""

_HERE = Path(__file__).parent
_SCRIPTS = ("words.js", "charts.js", "sections.js", "layers.js", "page.js")


def going_on(paths: Sequence[Path]) -> list[Running]:
    """The runs in folders that have told of an epoch and have no record: they go on, or were interrupted.

    Args:
        paths: files and folders; in a folder, those of all its folders too.
    """
    found = []
    for path in paths:
        for file in sorted(path.rglob(PROGRESS_NAME)) if path.is_dir() else ():
            if (file.parent / RECORD_NAME).exists():
                continue
            try:
                record, epoch, epochs = read_partial(file)
            except RecordError:
                continue
            found.append(Running(record=record, epoch=epoch, epochs=epochs))
    return found


def require_plotly() -> Path:
    """Where Plotly's script lies.

    Raises:
        HalfbyteError: if Plotly is not installed.
    """
    spec = importlib.util.find_spec("plotly")
    script = None if spec is None or spec.origin is None else Path(spec.origin).parent / "package_data/plotly.min.js"
    if script is None or not script.is_file():
        raise HalfbyteError(
            "The charts of the report page are drawn by Plotly, which is not installed. "
            "Install it with: pip install 'halfbyte[report]'"
        )
    return script


def as_json(values: Any) -> str:
    """Values as JSON that may stand inside a script element: nothing in it can end the element or begin a comment.

    Raises:
        ValueError: if they hold a NaN or an infinity.
    """
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def render(found: dict[str, Any], *, live: bool = False) -> str:
    """The page.

    Args:
        found: what `content` returns.
        live: whether it is served by `halfbyte.report.page.live`, and asks there for news.

    Raises:
        HalfbyteError: if Plotly is not installed.
    """
    names = dict.fromkeys(group["task"] for group in found["groups"])
    parts = {
        "title": html.escape(" · ".join(["halfbyte report", *names])),
        "style": _file("page.css"),
        "data": as_json(found),
        "script": "\n".join(_file(name) for name in _SCRIPTS),
        "plotly": _plotly(require_plotly()),
        "live": "live" if live else "",
        # A page from the disk may ask for nothing at all.
        "connect": "'self'" if live else "'none'",
    }
    # In one pass: what is put in is not looked at again, whatever it holds.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("page.html"))


def write(records: Sequence[Record], path: Path, running: Sequence[Running] = (), *, with_model: bool = False) -> None:
    """Writes the page; the file appears complete or not at all.

    Args:
        records: of finished runs.
        path: the file; its folder is created where it is missing.
        running: runs without a record.
        with_model: see `content`.

    Raises:
        HalfbyteError: if Plotly is not installed.
    """
    write_text(path, render(content(records, running, with_model=with_model)))


@cache
def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@cache
def _plotly(path: Path) -> str:
    return path.read_text(encoding="utf-8")
