"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["whole", "write_text"]


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to, from which the file takes its place in one step at the end.

    Where writing fails, or is interrupted, what was there before stays and what was begun is cleared away. A link stays
    a link, to the new file. What is no file, such as a device or a pipe, is written to as it is. One writer at a time.

    Args:
        path: the file; its folder is created where it is missing.

    Yields:
        A path beside it.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes text in UTF-8; the file appears complete or not at all.

    Args:
        path: the file; its folder is created where it is missing.
        text: all of it.
    """
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
