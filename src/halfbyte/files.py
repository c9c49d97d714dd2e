"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["begun", "whole", "write_text"]


def begun(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f"{path.name}.partial")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to, from which the file takes its place in one step at the end.

    Where writing fails, or is interrupted, what was there before stays and what was begun is cleared away.

    Args:
        path: the file; its folder is created where it is missing.

    Yields:
        A path beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = begun(path)
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
