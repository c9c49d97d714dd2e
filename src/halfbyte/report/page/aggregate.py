"""Everything that a page shows, as plain values for JSON: aggregated here, so that the page only draws."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...lab import tasks
from ...lab.compare import Summary, summarize, timed_alike
from ...lab.record import Record
from ..groups import Further, Group, groups
from ..provenance import runs
from .layers import bins, formats_used, layer_view, mean_of
from .modeled import modeled

__all__ = ["DATA_BYTES", "POINTS", "Running", "content"]

DATA_BYTES = 1_000_000
"""Room for a page's data: with Plotly and the page's own text the file stays below 6 MB."""

POINTS = 120
"""Most points of a loss curve; of more, neighbors are averaged."""

_LAYER_POINTS = ((48, 16), (40, 12), (32, 10), (24, 8), (16, 6), (10, 4), (6, 2), (4, 0), (2, 0))
"""Points of a layer's curve and pictures of its codes, from generous to frugal: the first that has room is taken."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A run that has no record yet: it goes on, or was interrupted.

    Attributes:
        record: what there would be if it ended now; its ``value`` is that of its latest epoch.
        epoch: how many are done.
        epochs: how many there will be.
    """

    record: Record
    epoch: int
    epochs: int


def content(records: Sequence[Record], running: Sequence[Running] = (), *, with_model: bool = False) -> dict[str, Any]:
    """What a page shows of records.

    Args:
        records: of finished runs, of any tasks, networks and sizes.
        running: runs without a record. Their curves and layers are shown; no mean counts them.
        with_model: also trace networks that are cheap to trace, and model their cycles and energy: seconds each.

    Returns:
        ``groups``, of which each can be compared within itself, and ``formats``; as JSON at most `DATA_BYTES`, for
        which the curves of layers lose points, and in the end the last recipes their layers.
    """
    going = {id(r.record): r for r in running}
    parts = groups([*records, *(r.record for r in running)])
    shown = [_group(group, going, with_model=with_model) for group in parts]
    without, expected = _size(_together(shown)), 0.0
    for points, pictures in _LAYER_POINTS:
        # Curves take room by their points: what is far too large needs not be made to know it.
        if without + expected * points > 1.2 * DATA_BYTES and (points, pictures) != _LAYER_POINTS[-1]:
            continue
        for group, part in zip(shown, parts, strict=True):
            group["layers"] = _layers(part, points, pictures)
        result = _together(shown)
        if _size(result) <= DATA_BYTES:
            return result
        expected = (_size(result) - without) / points
    for group in shown:  # Even two points a curve are too many: what comes last is left out.
        while group["layers"] and _size(result := _together(shown)) > DATA_BYTES:
            name, _ = group["layers"].popitem()
            group["notes"].append(f"The layers of {name} are left out, since the page would be too large.")
    return result


def _together(shown: list[dict[str, Any]]) -> dict[str, Any]:
    views = [view for group in shown for view in group["layers"].values()]
    return {"groups": shown, "formats": formats_used(views)}


def _size(found: dict[str, Any]) -> int:
    return len(json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode())


def _group(group: Group, going: dict[int, Running], *, with_model: bool) -> dict[str, Any]:
    """What can be compared, without its layers."""
    first = group.records[0]
    known = tasks.TASKS.get(group.task)
    finished = [r for r in group.records if id(r) not in going]
    summary: dict[str, Summary] = {}
    baseline = "fp32" if "fp32" in group.recipes else group.recipes[0]
    if finished:
        result = summarize(group.task, [n for n in group.recipes if any(r.recipe == n for r in finished)], finished)
        summary, baseline = result.summary, result.baseline
    base = [r for r in finished if r.recipe == baseline]
    return {
        "task": group.task,
        "model": group.model,
        "size": group.size,
        "stash": group.stash,
        "fine_tune": group.fine_tune,
        "description": known.description if known else "",
        "metric": known.metric if known else first.metric,
        "unit": first.unit,
        "higher": first.higher_is_better,
        "baseline": baseline,
        "seeds": group.seeds,
        "further": group.further,
        "recipes": [
            _recipe(name, [r for r in finished if r.recipe == name], summary.get(name, Summary()), base)
            | {
                "about": _about(group, name),
                "running": _running(group, name, going),
                "further": _further(group, [r for r in finished if r.recipe == name], base),
                "runs": runs([r for r in group.records if r.recipe == name]),
            }
            for name in group.recipes
        ],
        "curves": _curves(group),
        "layers": {},
        "modeled": modeled(group.task, group.model, group.recipes) if with_model else None,
        "made": {
            "command": group.command,
            "commits": group.commits,
            "machines": group.machines,
            "versions": sorted({f"halfbyte {r.versions.get('halfbyte', '?')}" for r in group.records}),
            "settings": first.settings,
        },
        "notes": _notes(group),
    }


def _recipe(name: str, own: list[Record], entry: Summary, base: list[Record]) -> dict[str, Any]:
    """One recipe over its finished runs; its mean, deviation, gap and interval are those of `compare`."""
    paired = None if entry.paired is None else [entry.paired.mean, entry.paired.low, entry.paired.high]
    return {
        "name": name,
        "seeds": [r.seed for r in own],
        "values": [r.value for r in own],
        "mean": entry.mean,
        "std": entry.std if len(own) > 1 else None,
        "gap": entry.gap if own and base and own[0].recipe != base[0].recipe else None,
        "paired": paired,
        "kept": mean_of(r.saved_bytes for r in own),
        "kept_ratio": entry.saved_bytes_ratio,
        "peak": mean_of(r.peak_bytes or None for r in own),
        "step_ratio": _slower(own, base) if timed_alike(own, base) else None,
        "time_ratio": entry.time_ratio,
        "nonfinite": sum(sum(r.nonfinite.values()) for r in own),
    }


def _further(group: Group, own: list[Record], base: list[Record]) -> list[dict[str, Any]]:
    """What was measured besides the metric, an entry for each name in the group."""
    found = [Further.of(name, own, base) for name in group.further]
    return [
        {
            "mean": mean_of(one.values),
            "std": statistics.stdev(one.values) if len(one.values) > 1 else None,
            "gap": one.gap,
            "lacking": one.runs - len(one.values),
        }
        for one in found
    ]


def _slower(own: list[Record], base: list[Record]) -> float:
    """Seconds an example over the baseline's."""
    return statistics.fmean(1 / r.samples_per_s for r in own) / statistics.fmean(1 / r.samples_per_s for r in base)


def _about(group: Group, name: str) -> str:
    """The sentence that describes a recipe: the first line of its text."""
    text = next(r.recipe_text for r in group.records if r.recipe == name)
    return text.partition("\n")[0].partition(": ")[2]


def _running(group: Group, name: str, going: dict[int, Running]) -> list[dict[str, Any]]:
    own = [going[id(r)] for r in group.records if r.recipe == name and id(r) in going]
    return [
        {
            "seed": r.record.seed,
            "epoch": r.epoch,
            "epochs": r.epochs,
            "value": r.record.value,
            "metric": r.record.metric,
        }
        for r in own
    ]


def _curves(group: Group) -> list[dict[str, Any]]:
    """Loss and metric by epoch: of each recipe the mean of its seeds, and between which values they lie."""
    names = dict.fromkeys(name for r in group.records for name in r.curves)
    measures = dict.fromkeys(name.removeprefix("train_").removeprefix("test_") for name in names)
    return [
        {
            "label": measure.replace("_", " "),
            "data": {
                data: found
                for data in ("test", "train")
                if (found := {n: line for n in group.recipes if (line := _line(group, n, f"{data}_{measure}"))})
            },
        }
        for measure in measures
    ]


def _line(group: Group, recipe: str, curve: str) -> dict[str, Any] | None:
    """A curve of a recipe. Runs that are further than others count where they are."""
    own = [r.curves[curve] for r in group.records if r.recipe == recipe and r.curves.get(curve)]
    if not own:
        return None
    columns = [[v for v in column if v is not None] for column in itertools.zip_longest(*own)]
    thinned = [[v for place in places for v in columns[place]] for places in bins(len(columns), POINTS)]
    line: dict[str, Any] = {
        "epochs": [places[-1] + 1 for places in bins(len(columns), POINTS)],
        "mean": [_short(statistics.fmean(values)) for values in thinned],
    }
    if len(own) > 1:
        line |= {"low": [_short(min(v)) for v in thinned], "high": [_short(max(v)) for v in thinned]}
    return line


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _layers(group: Group, points: int, pictures: int) -> dict[str, Any]:
    """By recipe the view of its layers, where the recipe quantizes something."""
    found = {}
    for name in group.recipes:
        own = [r for r in group.records if r.recipe == name]
        view = layer_view(own, points, pictures)
        if view is not None and any(row["slots"] or row.get("recipe") == name for row in view["rows"]):
            found[name] = view
    return found


def _notes(group: Group) -> list[str]:
    """What is not there, in plain lines."""
    notes = []
    quantized = [r for r in group.records if r.probes or any(" x " in line for line in r.layers)]
    if any(not r.history.get("steps") for r in quantized):
        some = "Some records" if any(r.history.get("steps") for r in quantized) else "These records"
        if any(r.probes for r in quantized):
            notes.append(f"{some} hold what probes saw at the last batch only: they are older than schema 4.")
        else:
            notes.append(f"{some} hold nothing that probes saw: they are older than schema 3.")
    if not all(r.peak_bytes for r in group.records):
        notes.append("Peak memory is missing where records are older than schema 3.")
    if len({json.dumps(r.settings, sort_keys=True) for r in group.records}) > 1:
        notes.append("The runs differ in their settings; those of the first are shown.")
    notes.extend(f"The runs of {name} are of different definitions of it." for name in group.changed)
    return notes
