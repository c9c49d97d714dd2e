"""The results page: our records beside the paper's table, gap beside gap, as Markdown with its figures.

Nothing is typed in by hand: every number of ours comes from a record, and a record brings its command, commit, seeds,
size and machine along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..errors import HalfbyteError
from ..files import whole, write_text
from ..lab import tasks
from ..lab.compare import Comparison, Summary
from ..lab.record import Record
from ..own import is_own
from .groups import Group, groups

__all__ = ["PAPER", "Published", "remarks", "write"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of the paper's tables: what it trained, and what came of it by our recipes' names.

    Attributes:
        what: network and data.
        values: the metric by recipe.
    """

    what: str
    values: Mapping[str, float]

    def gap(self, recipe: str) -> float | None:
        """The recipe's value minus that of fp32; None where the paper has none."""
        return self.values[recipe] - self.values["fp32"] if recipe in self.values and recipe != "fp32" else None


def _published(what: str, fp32: float, forward: float | None, ibm: float, dw_fp8: float) -> Published:
    values = {"fp32": fp32, "ibm2020": ibm, "ibm2020_dw_fp8": dw_fp8}
    return Published(what=what, values=values if forward is None else values | {"int4_forward_only": forward})


PAPER: Mapping[str, Published] = MappingProxyType(
    {
        "cifar10": _published("ResNet-18, CIFAR-10", 93.01, 92.97, 92.74, 92.76),
        "ptb": _published("2-layer LSTM, Penn Treebank", 83.3, None, 85.3, 83.8),
        "multi30k": _published("Transformer-base, WMT En-De", 27.5, None, 25.4, 25.9),
        "an4": _published("4-layer bidirectional LSTM, SWB300", 9.9, None, 11.3, 10.4),
    }
)
"""Sun et al., NeurIPS 2020, tables 1 and 3: the row that comes nearest to each task of ours."""


def remarks(paths: Sequence[Path]) -> dict[str, str]:
    """What people found out about results: the text of ``TASK/remarks.md`` in any of the folders, by task.

    Args:
        paths: files and folders, as for `gather`; files have no remarks.
    """
    found = [file for path in paths if path.is_dir() for file in sorted(path.rglob("remarks.md"))]
    return {file.resolve().parent.name: file.read_text(encoding="utf-8").strip() for file in found}


def write(records: Sequence[Record], path: Path, said: Mapping[str, str] = MappingProxyType({})) -> list[Path]:
    """Writes the page, and a figure for each group of records beside it.

    Args:
        records: of any tasks, networks and sizes; those of tasks that this version does not know are left out, those
            of ``module:task`` stand last.
        path: the Markdown file; figures go to the folder ``results`` beside it.
        said: by task, Markdown that follows the task's last table, see `remarks`.

    Returns:
        The files written.

    Raises:
        HalfbyteError: if none of the records is of a task of this version, or matplotlib is not installed.
    """
    found = groups([r for r in records if r.task in tasks.TASKS or is_own(r.task)])
    if not found:
        raise HalfbyteError(f"None of the {len(records)} records is of a task that this version has.")
    figures = path.parent / "results"
    written = [path]
    parts = [_HEAD]
    for group in found:
        figure = figures / f"{group.name}.svg"
        _draw(group, figure)
        written.append(figure)
        parts.append(_section(group, f"results/{figure.name}"))
        if group.task in said and group is [g for g in found if g.task == group.task][-1]:
            parts.append(f"{said[group.task]}\n")
    write_text(path, "\n".join(parts))
    return written


_HEAD = """# Results

Every number here is from a record; `halfbyte report` makes this page of them. A gap is a recipe's mean minus that of
`fp32`, trained from the same initial weights on the same batches. The paper is Sun et al., NeurIPS 2020, tables 1 and
3; where our network or data is not its own, compare gaps and not values. No epoch is chosen by its result: the last
one counts.
"""


def _section(group: Group, figure: str) -> str:
    """One group: its table, its curves, and how it was made."""
    # A record says how its task is judged: one of somebody's own is not imported to look at its results.
    first, result, paper = group.records[0], group.comparison, PAPER.get(group.task)
    known = tasks.TASKS.get(group.task)
    unit = f" ({first.unit})" if first.unit else ""
    better = "higher" if first.higher_is_better else "lower"
    head = ["recipe", "seeds", f"{first.metric}{unit}", "gap", "95 % interval", "paper's gap", "time", "kept"]
    lines = [
        f"## {group.task}: {group.model}, size {group.size}"
        + (f", stash {group.stash}" if group.stash else "")
        + (f", {group.fine_tune} epochs of fine-tuning" if group.fine_tune else "")
        + "\n",
        f"{known.description if known else 'A task of its own, not one of halfbyte.'} {better.capitalize()} is better."
        + (f" The paper's row: {paper.what}, {paper.values['fp32']:g} in FP32." if paper else "")
        + "\n",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(_row(name, entry, result, paper) for name, entry in result.summary.items()),
        "",
        f"![Curves of {group.name}]({figure})\n",
        _worse(result, paper, higher=first.higher_is_better),
        _made(group),
        "",
    ]
    return "\n".join(line for line in lines if line is not None)


def _row(name: str, entry: Summary, result: Comparison, paper: Published | None) -> str:
    """One recipe's row."""
    seeds = sum(r.recipe == name for r in result.records)
    if entry.mean is None:
        return f"| `{name}` | 0 | diverged | | | | | |"
    gap = "" if entry.gap is None or name == result.baseline else f"{entry.gap:+.2f}"
    interval = f"{entry.paired.low:+.2f} to {entry.paired.high:+.2f}" if entry.paired else ""
    published = None if paper is None else paper.gap(name)
    cells = [
        f"`{name}`",
        str(seeds),
        f"{entry.mean:.2f}" + (f" ± {entry.std:.2f}" if seeds > 1 else ""),
        gap,
        interval,
        "" if published is None else f"{published:+.2f}",
        "" if entry.time_ratio is None else f"{entry.time_ratio:.2f}×",
        "" if entry.saved_bytes_ratio is None else f"{entry.saved_bytes_ratio:.2f}×",
    ]
    return f"| {' | '.join(cells)} |"


def _worse(result: Comparison, paper: Published | None, *, higher: bool) -> str | None:
    """Which recipes lose more here than in the paper."""
    if paper is None or result.baseline != "fp32":
        return None
    sign = -1 if higher else 1
    behind = [
        f"`{name}` ({entry.gap:+.2f} here, {published:+.2f} there)"
        for name, entry in result.summary.items()
        if (published := paper.gap(name)) is not None and entry.gap is not None
        if sign * entry.gap > sign * published
    ]
    return f"Worse than the paper's gap: {', '.join(behind)}.\n" if behind else None


def _made(group: Group) -> str:
    """Commands, commits and machines, each once."""
    return (
        f"`{group.command}` at {', '.join(group.commits)}; seeds {', '.join(map(str, group.seeds))}; "
        f"{'; '.join(group.machines)}. Time and what is kept for the backward pass are "
        "multiples of the baseline's; times only where one machine ran both, of the same sources."
        + "".join(f" The runs of `{name}` are of different definitions of it." for name in group.changed)
    )


def _draw(group: Group, path: Path) -> None:
    """The test loss by epoch: a line for each recipe, a band over its seeds."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise HalfbyteError(
            "The figures are drawn by matplotlib, which is not installed. Install it with: pip install 'halfbyte[lab]'"
        ) from error
    rcParams["svg.hashsalt"] = "halfbyte"  # The same records give the same file.
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(r.recipe for r in group.records):
        curves = [r.curves["test_loss"] for r in group.records if r.recipe == name]
        columns = list(zip(*curves, strict=False))
        epochs = range(1, len(columns) + 1)
        (line,) = axes.plot(epochs, [sum(c) / len(c) for c in columns], label=name, marker=".", linewidth=1.2)
        if len(curves) > 1:
            axes.fill_between(
                epochs, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, color=line.get_color()
            )
    axes.set(xlabel="epoch", ylabel="loss on the test data")
    axes.legend(fontsize="small", ncols=2)
    axes.grid(visible=True, alpha=0.3)
    with whole(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None, "Creator": None})
