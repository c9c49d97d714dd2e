"""The results page: our records beside the paper's table, gap beside gap, as Markdown with its figures.

Nothing is typed in by hand: every number of ours comes from a record, and a record brings its command, commit, seeds,
size and machine along.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType

from ..errors import HalfbyteError
from ..files import whole, write_text
from ..lab import tasks
from ..lab.compare import Comparison
from ..lab.record import Record
from ..own import is_own
from .groups import Further, Group, groups
from .paper import PAPER, Published, beside
from .provenance import command, machine, runs, shared

__all__ = ["remarks", "text", "write"]


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
    content = text(records, said)
    figures = {path.parent / _figure(group): group for group in _shown(records)}
    for figure, group in figures.items():
        _draw(group, figure)
    write_text(path, content)
    return [path, *figures]


def text(records: Sequence[Record], said: Mapping[str, str] = MappingProxyType({})) -> str:
    """The page alone, as `write` writes it.

    Args:
        records: as for `write`.
        said: as for `write`.

    Raises:
        HalfbyteError: if none of the records is of a task of this version.
    """
    found = _shown(records)
    if not found:
        raise HalfbyteError(f"None of the {len(records)} records is of a task that this version has.")
    last = {group.task: group for group in found}
    parts = [_HEAD]
    for group in found:
        parts.append(_section(group))
        if group.task in said and group is last[group.task]:
            parts.append(f"{said[group.task]}\n")
    if any(beside(group.task, group.model) for group in found):
        parts.append(_papers_tables({(group.task, group.model) for group in found}))
    return "\n".join(parts)


def _shown(records: Sequence[Record]) -> list[Group]:
    return groups([r for r in records if r.task in tasks.TASKS or is_own(r.task)])


def _figure(group: Group) -> str:
    return f"results/{group.name}.svg"


_HEAD = """# Results

Every number here is from a record; `halfbyte report` makes this page of them. A gap is a recipe's mean minus that of
`fp32`, trained from the same initial weights on the same batches. No epoch is chosen by its result: the last one
counts. The paper is Sun et al., NeurIPS 2020, tables 1 and 3: its value stands beside ours, the gap to its own FP32 in
brackets. Where our network or data is not its own, compare gaps and not values. Behind a second measure its gap stands
in brackets, too.

What is kept for the backward pass is a multiple of the baseline's. The last column names the runs of a row, by their
seeds and the commit of the code. Rows of different commits may differ in more than their recipes. To run one again,
check out its commit and give the command below its table, with `--data-dir DIR` for all but the digits; one thread is
`OMP_NUM_THREADS=1`.

How long a run took is not here: it says above all what else the machine did meanwhile. Speed is measured side by side,
in one process (docs/performance.md).
"""


def _section(group: Group) -> str:
    """One group: its table, its curves, and how it was made."""
    # A record says how its task is judged: one of somebody's own is not imported to look at its results.
    first, result, paper = group.records[0], group.comparison, beside(group.task, group.model)
    known = tasks.TASKS.get(group.task)
    better = "higher" if first.higher_is_better else "lower"
    lines = [
        f"## {group.task}: {group.model}, size {group.size}"
        + (f", stash {group.stash}" if group.stash else "")
        + (f", {group.fine_tune} epochs of fine-tuning" if group.fine_tune else "")
        + "\n",
        f"{known.description if known else 'A task of its own, not one of halfbyte.'} {better.capitalize()} is better."
        + (f" The paper's {'' if paper.model == group.model else 'nearest '}row: {paper.what}." if paper else "")
        + "\n",
        *_table(group, result, paper),
        "",
        f"![Curves of {group.name}]({_figure(group)})\n",
        _worse(result, paper, higher=first.higher_is_better),
        _made(group),
        "",
    ]
    return "\n".join(line for line in lines if line is not None)


def _table(group: Group, result: Comparison, paper: Published | None) -> list[str]:
    """The lines of a table: a row for each recipe. A column that would be empty in every row is left out."""
    of = {name: [r for r in result.records if r.recipe == name] for name in result.summary}
    first, base = group.records[0], of[result.baseline]
    unit = f" ({first.unit})" if first.unit else ""
    columns: dict[str, list[str]] = {
        "recipe": [f"`{name}`" for name in of],
        f"{first.metric}{unit}": [_mean([r.value for r in own]) for own in of.values()],
        "gap": [
            "" if entry.gap is None or name == result.baseline else f"{entry.gap:+.2f}"
            for name, entry in result.summary.items()
        ],
        "95 % interval": [
            f"{entry.paired.low:+.2f} to {entry.paired.high:+.2f}" if entry.paired else ""
            for entry in result.summary.values()
        ],
        **{f"{name}{unit}": [_other(Further.of(name, own, base)) for own in of.values()] for name in group.further},
        "paper (gap)": ["" if paper is None else paper.cell(name) for name in of],
        "kept": [
            "" if entry.saved_bytes_ratio is None else f"{entry.saved_bytes_ratio:.2f}×"
            for entry in result.summary.values()
        ],
        "runs": [runs(own) for own in of.values()],
    }
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    rows = zip(*columns.values(), strict=True)
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _mean(values: Sequence[float]) -> str:
    """The mean, and from two values on the sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _other(found: Further) -> str:
    """A recipe's second metric, its gap to the baseline in brackets; where some runs lack it that is said instead."""
    if not found.values:
        return ""
    if len(found.values) < found.runs:
        return f"{_mean(found.values)} ({len(found.values)} of {found.runs} runs)"
    return _mean(found.values) + ("" if found.gap is None else f" ({found.gap:+.2f})")


def _worse(result: Comparison, paper: Published | None, *, higher: bool) -> str | None:
    """Which recipes lose more here than in the paper."""
    if paper is None or result.baseline != "fp32":
        return None
    sign = -1 if higher else 1
    behind = [
        f"`{name}` ({entry.gap:+.2f} here, {published:+.{paper.digits}f} there)"
        for name, entry in result.summary.items()
        if (published := paper.gap(name)) is not None and entry.gap is not None
        if sign * entry.gap > sign * published
    ]
    return f"Worse than the paper's gap: {', '.join(behind)}.\n" if behind else None


def _made(group: Group) -> str:
    """The command of a run and its machine, once where they are the same for every row."""
    again = shared(group.records, lambda r: f"`{told}`" if (told := command(r)) else "")
    return (
        (f"A run again, at its commit: {again}. " if again else "")
        + f"Machine: {shared(group.records, machine)}."
        + "".join(f" The runs of `{name}` are of different definitions of it." for name in group.changed)
    )


_COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "fp32": "FP32",
        "int4_forward_only": "INT4 forward alone",
        "ibm2020": "FP4 gradients",
        "ibm2020_dw_fp8": "FP8 in wgrad",
        "ibm2020_bottom_1x1_fp8": "FP8 in the bottom 1x1",
        "ibm2020_1x1_fp8": "FP8 in all 1x1",
    }
)
"""What a recipe is called where its name would make the table too wide."""


def _papers_tables(ours: Set[tuple[str, str]]) -> str:
    """All rows of the paper's tables, and which of their networks are ours."""
    run = [row.what for row in PAPER if (row.task, row.model) in ours]
    own = f"Of these networks we ran {'; '.join(run)}, and not the others." if run else "We ran none of these networks:"
    nearest = "" if run else " the row beside a table above is the nearest."
    lines = [
        "## The paper's tables\n",
        f"Sun et al., NeurIPS 2020, tables 1 and 3. {own}{nearest} Table 2 is of ImageNet, for which there is no task "
        f"here. The columns are, as recipes, {', '.join(f'`{name}`' for name in _COLUMNS)}; gaps in brackets.\n",
        f"| network, data | metric | {' | '.join(_COLUMNS.values())} |",
        f"|{'---|' * (2 + len(_COLUMNS))}",
    ]
    for row in PAPER:
        judged = tasks.TASKS[row.task]
        metric = judged.metric + (f" ({judged.unit})" if judged.unit else "")
        cells = [row.what, metric, *(row.cell(name) for name in _COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


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
