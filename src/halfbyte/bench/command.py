"""The command ``halfbyte bench``: what it prints, what it writes, how it says no."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from ..errors import HalfbyteError
from ..files import write_text
from .settings import FULL, QUICK
from .suite import run
from .table import table

__all__ = ["command"]

_FILE_WIDTH = 160
"""Columns of the table where its reader is a file, which would otherwise get 80 and cut names."""


def command(*, quick: bool, json_file: Path | None, only: str, threads: str | None) -> int:
    """Runs the benchmark.

    Args:
        quick: whether the quick size is meant.
        json_file: where the report is written, too.
        only: a part of the names of the rows that are wanted.
        threads: numbers with commas between; None for 1 and 2, or for a quick run 2, as far as there are cores.

    Returns:
        The exit status: 0, or 1 if the native backend is not exact here; then nothing is measured or written.

    Raises:
        HalfbyteError: if something cannot be measured as asked.
    """
    counts = [count for count in (1, 2) if count <= (os.cpu_count() or 1)]
    if threads is None:
        counts = counts[-1:] if quick else counts
    else:
        try:
            counts = [int(part) for part in threads.split(",")]
        except ValueError:
            raise HalfbyteError(
                f"--threads {threads!r} was asked for; numbers with commas between are possible, for example 1,2."
            ) from None
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("") as status:
        report = run(
            size=QUICK if quick else FULL,
            threads=counts,
            only=only,
            clock=time.perf_counter,
            progress=lambda what: status.update(f"Measuring {what}"),
        )
    if isinstance(report, str):
        sys.stderr.write(
            f"halfbyte: the exactness check failed: native differs from reference in {report}. Nothing is measured.\n"
        )
        return 1
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(table(report))
    if json_file is not None:
        write_text(json_file, json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n")
        console.print(f"Report: {json_file}")
    return 0
