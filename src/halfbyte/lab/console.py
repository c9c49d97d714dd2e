"""What a person sees in the terminal: a moving bar while runs go on, and tables at their end."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ..formats import Format

if TYPE_CHECKING:  # The trainer imports Lightning, which takes seconds; a table of formats does not need it.
    from .compare import Comparison, Summary
    from .run import Run, Step

__all__ = ["Watcher", "comparison_table", "format_facts", "format_table"]


class Watcher:
    """A progress bar for each run: batches, loss, score and samples per second. Call it with every `Step`."""

    def __init__(self, console: Console, metric: str, unit: str) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f},"),
            TextColumn(f"{metric} {{task.fields[score]:.1f}} {unit},"),
            TextColumn("{task.fields[rate]:,.0f} samples/s"),
            console=console,
        )
        self._rows: dict[Run, TaskID] = {}

    def __enter__(self) -> Watcher:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, step: Step) -> None:
        """Moves the bar of the step's run."""
        if step.run not in self._rows:
            label = f"{step.run.recipe} seed {step.run.seed}"
            self._rows[step.run] = self._bars.add_task(label, total=step.total, loss=0.0, score=0.0, rate=0.0)
        self._bars.update(
            self._rows[step.run], completed=step.done, loss=step.loss, score=step.score, rate=step.samples_per_s
        )


def comparison_table(result: Comparison) -> Table:
    """Mean, deviation and gap of every recipe, and its time next to the baseline's."""
    paired = any(entry.paired for entry in result.summary.values())
    table = Table(
        title=f"{result.task}: {result.metric} on the test data",
        title_justify="left",
        caption=_caption(result, paired=paired),
        caption_justify="left",
    )
    table.add_column("recipe")
    table.add_column(f"{result.metric} ({result.unit})", justify="right", no_wrap=True)
    table.add_column(f"gap to {result.baseline}", justify="right")
    if paired:
        table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("time", justify="right")
    table.add_column("kept", justify="right")
    for name, entry in result.summary.items():
        table.add_row(name, *_cells(entry, paired=paired))
    return table


def _cells(entry: Summary, *, paired: bool) -> list[str]:
    """One recipe's cells, without its name."""
    if entry.mean is None:
        return ["diverged", *["-"] * (4 if paired else 3)]
    gap = "-" if entry.gap is None else f"{entry.gap:+.2f}"
    interval = (
        [] if not paired else ["-" if not entry.paired else f"{entry.paired.low:+.2f} to {entry.paired.high:+.2f}"]
    )
    time = "-" if entry.time_ratio is None else f"{entry.time_ratio:.2f}×"
    kept = "-" if entry.saved_bytes_ratio is None else f"{entry.saved_bytes_ratio:.2f}×"
    return [f"{entry.mean:.2f} ± {entry.std:.2f}", gap, *interval, time, kept]


def _caption(result: Comparison, *, paired: bool) -> str:
    """How to read the table."""
    seeds = len({r.seed for r in result.records} | {f.seed for f in result.failures})
    lines = [
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}; mean ± sample standard deviation; the last epoch counts.",
        f"Time is a multiple of {result.baseline}'s. {_computed(result)}",
    ]
    fine_tune = result.records[0].fine_tune
    if fine_tune:
        counted = f"{fine_tune} {'epoch' if fine_tune == 1 else 'epochs'}"
        lines.append(f"At the end {counted} of fine-tuning: the weights keep their format, the rest is in float.")
    if paired:
        lines.append("95 % interval: Student's t on the differences seed by seed.")
    lines += [f"Diverged: {failure.recipe}, seed {failure.seed}." for failure in result.failures]
    return "\n".join(lines)


def _computed(result: Comparison) -> str:
    """Who computed four bits, and what the time says of it."""
    backends = sorted({str(r.machine.get("backend", "reference")) for r in result.records})
    if backends == ["reference"]:
        return "Four bits are emulated (backend reference): it says nothing about hardware."
    return f"Four bits are computed in integers where there is a kernel: backend {', '.join(backends)}."


def format_facts(fmt: Format) -> str:
    """What a format is, in two lines."""
    low, high = fmt.saturate
    facts = [f"{fmt.bits} bits", "signed" if fmt.signed else "unsigned", f"saturates at {low:g} and {high:g}"]
    if fmt.kind != "int":
        facts += [f"radix {fmt.radix}", f"{fmt.exponent_bits} exponent and {fmt.mantissa_bits} mantissa bits"]
    if fmt.kind == "log":
        facts.append(f"{fmt.phase.value} phase")
    return f"{fmt.name}: {fmt.description}\n{', '.join(facts)}"


def format_table(fmt: Format) -> Table:
    """Every code of a format in binary, and its value."""
    cells = [(str(code), f"{code:0{fmt.bits}b}", f"{value:.17g}") for code, value in enumerate(fmt.values)]
    pairs = 2 if fmt.bits > 4 and max(len(value) for _, _, value in cells) < 20 else 1
    table = Table()
    for _ in range(pairs):
        table.add_column("code", justify="right")
        table.add_column("bits")
        table.add_column("value", justify="right")
    height = len(cells) // pairs
    for row in range(height):
        table.add_row(*(cell for column in range(pairs) for cell in cells[column * height + row]))
    return table
