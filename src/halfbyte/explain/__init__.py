"""The story of 4-bit training as a page to touch: one HTML file that needs nothing else.

The folder `page` holds the text (``page.html``), the looks (``page.css``) and the scripts, one for each chapter and
``core.js`` for what they share. The scripts look up, draw and move; every rounded number comes from `tables` and
`recorded`, which ask the library.
"""

from __future__ import annotations

import base64
import json
from importlib import resources
from pathlib import Path

from ..files import write_text
from . import painting, recorded, tables

__all__ = ["html", "painting", "recorded", "tables", "write"]

SCRIPTS = ("core", "picture", "unit", "ranges", "spread", "phases", "run")
"""The scripts in the order in which they run."""


def html() -> str:
    """The page."""
    folder = resources.files(__package__) / "page"
    text = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css")}
    scripts = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {"<!--style-->": text["page.css"], "<!--data-->": _data(), "<!--script-->": scripts}
    page = text["page.html"]
    for mark, part in parts.items():
        page = page.replace(mark, part)
    return page


def write(path: Path) -> None:
    """Writes the page.

    Args:
        path: the file; its folder is made if there is none.
    """
    write_text(path, html())


def _data() -> str:
    """All tables as JSON that can stand inside a script element."""
    from .. import __version__

    picture = painting.paint()
    data = {
        "version": __version__,
        "formats": tables.named_formats(),
        "painting": {
            "height": picture.shape[0],
            "width": picture.shape[1],
            "pixels": base64.b64encode(bytes(picture.reshape(-1).tolist())).decode(),
        },
        "pictures": tables.pictures(),
        "unit": tables.unit(),
        "ranges": tables.ranges(),
        "spread": tables.spread(),
        "phases": tables.phases(),
        "run": recorded.recorded(),
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
