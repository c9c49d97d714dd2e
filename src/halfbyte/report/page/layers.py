"""What a page shows of layers: which rule gave each its recipe, and what its probes saw, averaged and thinned."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...formats import FORMATS
from ...lab.history import CODES, MEASURES
from ...lab.record import Record

__all__ = ["bins", "formats_used", "layer_table", "layer_view", "mean_of"]

_ROW = ("name", "type", "recipe", "fprop", "dgrad", "wgrad", "why", "state")


def layer_table(lines: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a converted model's table, from its text (`halfbyte.summary`), as a record holds it.

    Args:
        lines: header, a line of dashes that tells how wide the columns are, rows. What follows them is left out.

    Returns:
        Of each layer ``name``, ``type``, ``recipe``, ``fprop``, ``dgrad``, ``wgrad``, ``why`` and ``state``.
    """
    if len(lines) < 2 or not re.fullmatch(r"-+(  -+)*", lines[1]):
        return []
    starts = [match.start() for match in re.finditer(r"-+", lines[1])]
    if len(starts) != len(_ROW):
        return []
    rows = []
    for line in lines[2:]:
        # A sentence below the table has letters where the table has gaps.
        if len(line) <= starts[1] or any(line[start - 2 : start].strip() for start in starts[1:]):
            break
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        rows.append(dict(zip(_ROW, cells, strict=True)))
    return rows


def bins(count: int, most: int) -> list[range]:
    """Consecutive places, put together so that at most so many groups remain; the last place has a group of its own.

    The last value of a curve is the one that is read, so it is not averaged away.
    """
    if count <= most:
        return [range(place, place + 1) for place in range(count)]
    edges = [round(place * (count - 1) / (most - 1)) for place in range(most)]
    return [*(range(a, b) for a, b in itertools.pairwise(edges)), range(count - 1, count)]


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of what is there, to four digits; None where nothing is."""
    there = [value for value in values if value is not None]
    return float(f"{statistics.fmean(there):.4g}") if there else None


def layer_view(records: Sequence[Record], points: int, pictures: int) -> dict[str, Any] | None:
    """All layers of a recipe: the table, and for each operand its measures over the run, a mean over the seeds.

    Args:
        records: of one recipe; those whose probes looked at other batches than the first one's are left out.
        points: most points of a curve; more are averaged.
        pictures: most steps of which the codes are shown.

    Returns:
        ``seeds``, ``steps``, ``pictured`` (the steps with codes), and ``rows``; None where nothing is known of layers.
    """
    table = next((found for record in records if (found := layer_table(record.layers))), [])
    seen = [record for record in records if record.history.get("steps") or record.probes]
    # Records of before have one moment; where others have more, these are the ones to show.
    seen = [record for record in seen if record.history.get("steps")] or seen
    histories = [record.history if record.history.get("steps") else _moment(record) for record in seen]
    histories = [history for history in histories if history["steps"] == histories[0]["steps"]]
    if not table and not histories:
        return None
    steps = histories[0]["steps"] if histories else []
    groups = bins(len(steps), points)
    # Evenly spread among the steps, first and last included.
    shown = sorted({round(i * (len(steps) - 1) / max(1, pictures - 1)) for i in range(pictures)}) if steps else []
    names = dict.fromkeys([row["name"] for row in table])
    names |= dict.fromkeys(name or "(model)" for history in histories for name in history["layers"])
    rows = {row["name"]: row for row in table}
    return {
        "seeds": len(histories),
        "steps": [steps[group[-1]] for group in groups],
        "pictured": [steps[place] for place in shown],
        "rows": [
            {**rows.get(name, {"name": name}), "slots": _slots(_of(histories, name), groups, shown)} for name in names
        ],
    }


def formats_used(views: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every format with a histogram the codes in the order of what they stand for, and that."""
    names = {
        name for view in views for row in view["rows"] for slot in row["slots"].values() for name in slot["formats"]
    }
    found = {}
    for name in sorted(names & FORMATS.keys()):
        values = FORMATS[name].values
        if len(values) <= CODES:
            order = sorted(
                (code for code in range(len(values)) if not math.isnan(values[code])), key=values.__getitem__
            )
            found[name] = {"order": order, "values": [float(values[code]) for code in order]}
    return found


def _moment(record: Record) -> dict[str, Any]:
    """The last batch alone, in the form of a history: what records held before they had one."""
    layers = {
        layer: {
            slot: {"formats": [], **{name: [value] for name, value in values.items()}} for slot, values in slots.items()
        }
        for layer, slots in record.probes.items()
    }
    return {"steps": [None], "layers": layers}


def _of(histories: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    key = "" if name == "(model)" else name
    return [found["layers"][key] for found in histories if key in found["layers"]]


def _slots(own: Sequence[Mapping[str, Any]], groups: Sequence[range], shown: Sequence[int]) -> dict[str, Any]:
    """Of a layer by operand: its formats, measures by step, and codes."""
    slots = {}
    for slot in own[0] if own else ():
        parts = [layer[slot] for layer in own if slot in layer]
        entry: dict[str, Any] = {"formats": parts[0].get("formats", [])}
        for name in MEASURES:
            series = [part[name] for part in parts if name in part]
            if series:
                entry[name] = [mean_of(one[place] for one in series for place in group) for group in groups]
        if codes := _codes([part["codes"] for part in parts if part.get("codes")], shown):
            entry["codes"] = codes
        slots[slot] = entry
    return slots


def _codes(series: Sequence[Sequence[Any]], shown: Sequence[int]) -> list[list[list[int] | None]]:
    """For each part of a number, for each step that is shown, the share of each code; nothing where none was kept."""
    pictures = []
    for place in shown:
        there = [one[place] for one in series if one[place] is not None]
        same = [picture for picture in there if [len(p) for p in picture] == [len(p) for p in there[0]]]
        mean = [[round(statistics.fmean(c)) for c in zip(*part, strict=True)] for part in zip(*same, strict=True)]
        pictures.append(mean or None)
    count = max((len(picture) for picture in pictures if picture), default=0)
    return [
        [picture[part] if picture and part < len(picture) else None for picture in pictures] for part in range(count)
    ]
