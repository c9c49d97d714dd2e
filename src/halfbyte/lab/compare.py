"""Several recipes, several seeds, one table: is the difference larger than the luck of the seed?

For each recipe the mean over seeds, the sample standard deviation, and the gap to the baseline (``fp32`` where it takes
part, else the first recipe). Two recipes with the same seed share initial weights and order of data, so from three
seeds on the difference is also taken seed by seed, with Student's 95 % interval around its mean.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HalfbyteError
from ..files import write_text
from .jobs import Circumstances, finish, finish_all, threads_each
from .record import Record
from .run import DivergedError, Progress, Run

__all__ = ["Comparison", "Failure", "Paired", "Summary", "compare", "summarize", "timed_alike"]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The difference to the baseline, seed by seed: its mean and Student's 95 % interval, in the metric's unit."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One recipe over its seeds. A recipe of which every run diverged has None for every number.

    Attributes:
        mean: of the metric.
        std: sample standard deviation; 0.0 for a single seed.
        gap: the recipe's mean minus the baseline's.
        paired: the difference by seeds; None below three shared seeds, and for the baseline itself.
        time_ratio: seconds of a run over the baseline's; None where their times cannot be compared, see `timed_alike`.
        saved_bytes_ratio: bytes kept for backward over the baseline's.
    """

    mean: float | None = None
    std: float | None = None
    gap: float | None = None
    paired: Paired | None = None
    time_ratio: float | None = None
    saved_bytes_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that diverged."""

    recipe: str
    seed: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The finished runs and what they say together.

    Attributes:
        task: name of the task.
        metric: what is compared.
        unit: unit of the metric.
        baseline: the recipe to which gaps are measured.
        records: one a finished run.
        failures: the runs that diverged.
        summary: one entry a recipe, in the order asked.
    """

    task: str
    metric: str
    unit: str
    baseline: str
    records: tuple[Record, ...]
    failures: tuple[Failure, ...]
    summary: dict[str, Summary]

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain values: ``task``, ``metric``, ``runs`` and ``summary``."""
        return {
            "task": self.task,
            "metric": self.metric,
            "runs": [{"recipe": r.recipe, "seed": r.seed, "value": r.value} for r in self.records],
            "summary": {name: _summary_json(entry) for name, entry in self.summary.items()},
        }

    def write(self, path: Path) -> None:
        """Writes `to_json` to a file; its folder is created where it is missing."""
        write_text(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")


def compare(
    task: str,
    recipes: Sequence[str],
    seeds: Sequence[int],
    *,
    size: str = "cpu",
    model: str | None = None,
    fine_tune: int = 0,
    stash: str = "",
    data_dir: Path | None = None,
    out_dir: Path | None = None,
    accelerator: str = "cpu",
    backend: str = "auto",
    strategy: str | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Comparison:
    """Runs every recipe with every seed.

    A run whose record is already in ``out_dir`` and was made by the same code, torch, machine and settings is not
    repeated; an interrupted one goes on. A record or checkpoint of anything else is set aside in its folder until the
    new record is written, and ``note`` told where.

    Args:
        task: a name in `halfbyte.lab.tasks.TASKS`, or ``module:task`` for one of your own.
        recipes: names in `halfbyte.RECIPES`, or ``module:recipe`` for one of your own; each once.
        seeds: seeds, each once.
        size: a preset of the task.
        model: a network of the task; None for its default.
        fine_tune: epochs in high precision after the ordinary ones, for every recipe, see `halfbyte.lab.phases`.
        stash: how what autograd saves is kept, for every recipe, see `halfbyte.convert`; empty for as torch keeps it.
        data_dir: folder with a folder for each data set; None is enough for the digits.
        out_dir: each run gets a folder below it; None keeps nothing on the disk.
        accelerator: Lightning Fabric's name of the device.
        backend: who computes four bits, see `halfbyte.lab.trainer.train`.
        strategy: how several processes share the work of a run, see there.
        jobs: how many runs at a time, each in a process of its own with its share of the threads. The number of threads
            is part of what a record tells of the machine.
        progress: called after every batch of every run.
        note: called with a sentence where a run is not simply trained from its start.

    Returns:
        The comparison. A run that diverged is listed in its ``failures`` and counts in no mean.

    Raises:
        UnknownNameError: if there is no such task, recipe, size or network; nothing has run by then.
        HalfbyteError: if recipes or seeds are missing or named twice.
        Interrupted: on Ctrl-C or SIGTERM; the same call goes on from there.
    """
    for what, given in (("recipe", recipes), ("seed", seeds)):
        if not given or len(set(given)) != len(given):
            twice = sorted({str(one) for one in given if list(given).count(one) > 1})
            raise HalfbyteError(
                f"A comparison needs at least one {what} and each only once; got {list(given)}"
                + (f", {', '.join(twice)} more than once." if twice else ".")
            )
    runs = [
        Run(task=task, recipe=recipe, seed=seed, size=size, model=model or "", fine_tune=fine_tune, stash=stash)
        for seed in seeds
        for recipe in recipes
    ]
    how = Circumstances(data_dir=data_dir, accelerator=accelerator, backend=backend, strategy=strategy)

    def folder_of(run: Run) -> Path | None:
        return None if out_dir is None else out_dir / run.name

    tell = note or (lambda _: None)
    threads_each(jobs)
    if jobs > 1:
        found, diverged = finish_all(runs, folder_of, how, jobs, progress, tell)
    else:
        found, diverged = {}, {}
        for run in runs:
            try:
                found[run] = finish(run, folder_of(run), how, progress, tell)
            except DivergedError as error:
                diverged[run] = str(error)
    failures = [Failure(recipe=run.recipe, seed=run.seed, message=diverged[run]) for run in runs if run in diverged]
    return summarize(task, recipes, [found[run] for run in runs if run in found], failures)


def summarize(
    task: str, recipes: Iterable[str], records: Sequence[Record], failures: Sequence[Failure] = ()
) -> Comparison:
    """The means, deviations and gaps of finished runs.

    Args:
        task: name of the task.
        recipes: names, in the order of the table.
        records: the finished runs, of one task, size and model.
        failures: the runs that diverged.

    Raises:
        HalfbyteError: if no run finished.
    """
    names = list(recipes)
    if not records:
        raise HalfbyteError(f"Every run diverged, so there is nothing to compare. The first: {failures[0].message}")
    baseline = "fp32" if "fp32" in names else names[0]
    of = {name: [r for r in records if r.recipe == name] for name in names}
    return Comparison(
        task=task,
        metric=records[0].metric,
        unit=records[0].unit,
        baseline=baseline,
        records=tuple(records),
        failures=tuple(failures),
        summary={name: _summary(of[name], of[baseline]) for name in names},
    )


def _summary(own: Sequence[Record], base: Sequence[Record]) -> Summary:
    """One recipe against the baseline."""
    if not own:
        return Summary()
    values = [r.value for r in own]
    mean = statistics.fmean(values)
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    if not base:
        return Summary(mean=mean, std=std)
    return Summary(
        mean=mean,
        std=std,
        gap=mean - statistics.fmean(r.value for r in base),
        paired=None if own[0].recipe == base[0].recipe else _paired(own, base),
        time_ratio=_ratio([r.seconds for r in own], [r.seconds for r in base]) if timed_alike(own, base) else None,
        saved_bytes_ratio=_ratio([r.saved_bytes for r in own], [r.saved_bytes for r in base]),
    )


def timed_alike(own: Sequence[Record], base: Sequence[Record]) -> bool:
    """Whether times of runs can be compared: one machine ran the same sources under the same torch."""
    runs = [(r.machine, r.sources_sha256, r.versions.get("torch")) for r in (*own, *base)]
    return bool(own and base) and all(run == runs[0] for run in runs)


def _ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """Mean over mean."""
    return statistics.fmean(own) / statistics.fmean(base)


def _paired(own: Sequence[Record], base: Sequence[Record]) -> Paired | None:
    """Student's 95 % interval of the mean difference over shared seeds; None below three."""
    by_seed = {r.seed: r.value for r in base}
    differences = [r.value - by_seed[r.seed] for r in own if r.seed in by_seed]
    count = len(differences)
    if count < 3:
        return None
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # comes with scikit-learn; slow to import

    mean = statistics.fmean(differences)
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(count)
    return Paired(mean=mean, low=mean - half, high=mean + half)


def _summary_json(entry: Summary) -> dict[str, Any]:
    """The three promised numbers, and the others where there are any."""
    promised = {"mean": entry.mean, "std": entry.std, "gap": entry.gap}
    paired = None if entry.paired is None else dataclasses.asdict(entry.paired)
    others = {"paired": paired, "time_ratio": entry.time_ratio, "saved_bytes_ratio": entry.saved_bytes_ratio}
    return promised | {key: value for key, value in others.items() if value is not None}
