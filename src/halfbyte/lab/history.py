"""What probes saw over a run, small enough for its record: a few dozen batches, each operand's measures and codes.

    {"steps": [2, 3, 6, ...],
     "layers": {"conv2": {"dgrad.grad_output": {"formats": ["fp4_e3m0_r4"], "sqnr_db": [9.1, 8.8, ...], ...,
                                               "codes": [[[312, 40, ...]], [[305, 41, ...]], ...]}}}}

A number of a step counts batches from 0. A measure has one entry a step, None where it is not finite or nothing was
quantized. ``codes`` has for each step and each part of a number the share of every code in 1/10,000.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..probes import ProbeRow

__all__ = ["CODES", "MEASURES", "MOST_STEPS", "add", "moments"]

MEASURES = ("sqnr_db", "underflow_rate", "saturation_rate", "cosine", "log2_scale", "gradient_to_noise")
"""Of a `halfbyte.probes.ProbeRow`; ``gradient_to_noise`` for gradients alone."""

MOST_STEPS = 40
"""Batches that a run is looked at. A record of 100 layers stays below 2 MB."""

CODES = 16
"""Formats of more codes than that have no histogram: 256 numbers a step would be most of a record."""

_MOST_LAYER_STEPS = 4000
_ONE_IN = 8
_DIGITS = 4


def moments(steps: int, layers: int) -> frozenset[int]:
    """The batches to look at: the last, and others before it that lie closer together near the beginning.

    Scales move most at the beginning, so the distances grow evenly. The first two batches are left out, because what
    a process holds settles in them. At most one batch in eight is looked at, since looking takes time.

    Args:
        steps: batches of ordinary training.
        layers: converted layers; the more there are, the fewer batches are looked at.

    Returns:
        Numbers from 0 to ``steps - 1``, at most `MOST_STEPS` of them.
    """
    if steps < 1:
        return frozenset()
    count = min(MOST_STEPS, steps // _ONE_IN, max(2, _MOST_LAYER_STEPS // max(1, layers)))
    first, last = min(2, steps - 1), steps - 1
    grown = [first + round((last - first) * (place / (count - 1)) ** 2) for place in range(count)] if count > 1 else []
    return frozenset([*grown, last])


def add(history: dict[str, Any], step: int, rows: Iterable[ProbeRow]) -> None:
    """Adds what was seen in one batch.

    Args:
        history: of the batches before; empty at first. Changed in place.
        step: number of the batch.
        rows: what a probe saw in it; of a layer that was passed several times the last row counts.
    """
    latest = {(row.layer, row.slot): row for row in rows}
    if not latest:
        return  # Nothing is quantized, in bf16 for example.
    steps: list[int] = history.setdefault("steps", [])
    layers: dict[str, dict[str, Any]] = history.setdefault("layers", {})
    for layer, slot in latest:
        layers.setdefault(layer, {}).setdefault(slot, _empty(slot, len(steps)))
    for layer, slots in layers.items():
        for slot, kept in slots.items():
            _append(kept, latest.get((layer, slot)))
    steps.append(step)


def _empty(slot: str, steps: int) -> dict[str, Any]:
    """A slot that was not seen in so many steps."""
    names = [*MEASURES[:-1], *MEASURES[-1:] * slot.endswith("grad_output"), "codes"]
    return {"formats": [], **{name: [None] * steps for name in names}}


def _append(kept: dict[str, Any], row: ProbeRow | None) -> None:
    """One step more of a slot."""
    for name in kept.keys() & set(MEASURES):
        kept[name].append(None if row is None else _short(getattr(row, name)))
    kept["codes"].append(None if row is None else _shares(row))
    if row is not None:
        kept["formats"] = list(row.formats)


def _short(value: float) -> float | None:
    """Four digits are more than a curve shows."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _shares(row: ProbeRow) -> list[list[int]] | None:
    """For each part the share of every code in 1/10,000; None for a format of many codes."""
    if any(len(counts) > CODES for counts in row.histogram):
        return None
    return [[round(10_000 * count / max(1, sum(counts))) for count in counts] for counts in row.histogram]
