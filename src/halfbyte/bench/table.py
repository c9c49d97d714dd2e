"""The report as people see it in a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .settings import Row
from .suite import Report
from .timing import Ratio

__all__ = ["caption", "table"]

_OTHERS = {
    "vs_copy": "{:.2f} of a copy's bandwidth",
    "vs_int16": "{:.2f} of the int16 method",
    "outside_window": "{:.1%} outside the window",
    "ratio": "{:.3f} of fp32's bytes",
    "bf16_ratio": "bf16 {:.3f}",
}


def table(report: Report) -> Table:
    """One line a row, in the order in which they were measured."""
    result = Table(title="How many times faster than PyTorch's own step", title_justify="left", caption_justify="left")
    result.caption = caption(report)
    result.add_column("what", no_wrap=True)
    result.add_column("size", no_wrap=True)
    result.add_column("threads", justify="right")
    result.add_column("vs fp32", justify="right", no_wrap=True)
    result.add_column("vs bf16", justify="right", no_wrap=True)
    result.add_column("more")
    section = None
    for threads, row in report.rows:
        part = row.name.partition("/")[0], threads
        if section not in (None, part):
            result.add_section()
        section = part
        result.add_row(row.name, row.detail, str(threads), _ratio(row.vs_fp32), _ratio(row.vs_bf16), _more(row))
    return result


def _ratio(found: Ratio | None) -> str:
    return "" if found is None else f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})"


def _more(row: Row) -> str:
    shown: list[str] = []
    for name, text in _OTHERS.items():
        value: Any = row.others.get(name)
        if value is not None:
            shown.append(text.format(value.value if isinstance(value, Ratio) else value))
    return ", ".join(shown)


def caption(report: Report) -> str:
    """How to read the table, and on what it was made."""
    machine, versions = report.circumstances["machine"], report.circumstances["versions"]
    settings = report.circumstances["settings"]
    environment = ", ".join(f"{k}={v}" for k, v in settings["environment"].items()) or "none set"
    ran = ", ".join(f"{name} {version}" for name, version in report.peers.items()) or "none"
    return "\n".join(
        [
            "Medians of rounds in turn; the middle half of the rounds' own ratios in brackets. Above 1 means faster.",
            "fp32 is in torch's default layout, bf16 is autocast in the faster of both layouts. Recipe ibm2020.",
            f"Exactness check: native equals reference bit for bit. Size {settings['size']}. Peers: {ran}.",
            f"{report.isa}, {machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}.",
            f"Allocator and thread variables: {environment}.",
        ]
    )
