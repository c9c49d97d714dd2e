"""Records, found in folders and put together by what can be compared."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import recipes
from ..errors import HalfbyteError
from ..lab import tasks
from ..lab.compare import Comparison, summarize
from ..lab.record import Record, RecordError, read
from .provenance import machine, revision

__all__ = ["Further", "Group", "gather", "groups"]


@dataclass(frozen=True, kw_only=True)
class Further:
    """One of a recipe's measures besides its task's metric.

    Attributes:
        values: of the runs that have it.
        runs: how many runs there are; where some lack it there is no gap.
        gap: the mean minus the baseline's; None for the baseline, and where some of its runs lack it.
    """

    values: Sequence[float]
    runs: int
    gap: float | None

    @classmethod
    def of(cls, name: str, own: Sequence[Record], base: Sequence[Record]) -> Further:
        """That measure of a recipe's runs, compared with the baseline's."""
        values, compared = ([r.further[name] for r in part if name in r.further] for part in (own, base))
        whole = len(values) == len(own) and len(compared) == len(base)
        comparable = values and whole and own[0].recipe != base[0].recipe
        gap = statistics.fmean(values) - statistics.fmean(compared) if comparable else None
        return cls(values=values, runs=len(own), gap=gap)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The records of one task, network and size: what can be compared.

    Attributes:
        task: name of the task.
        model: name of the network.
        size: name of the preset.
        stash: how what autograd saved was kept.
        fine_tune: epochs of fine-tuning.
        records: in the order given.
    """

    task: str
    model: str
    size: str
    stash: str
    fine_tune: int
    records: Sequence[Record]

    @property
    def name(self) -> str:
        """A name for a file, as that of a run's folder without recipe and seed."""
        kept = f"-stash-{self.stash}" if self.stash else ""
        tuned = f"-ft{self.fine_tune}" if self.fine_tune else ""
        return f"{self.task.replace(':', '.')}-{self.model}-{self.size}{tuned}{kept}"

    @property
    def recipes(self) -> list[str]:
        """Names of the recipes, in the order of the table of recipes; others follow."""
        present = dict.fromkeys(r.recipe for r in self.records)
        return [*(n for n in recipes.RECIPES if n in present), *(n for n in present if n not in recipes.RECIPES)]

    @property
    def seeds(self) -> list[int]:
        """All seeds, each once."""
        return sorted({r.seed for r in self.records})

    @property
    def further(self) -> list[str]:
        """Names of what was measured besides the metric, in any run."""
        return list(dict.fromkeys(name for r in self.records for name in r.further))

    @property
    def command(self) -> str:
        """The command that makes all of it again."""
        first = self.records[0]
        recipes_run = ",".join(dict.fromkeys(r.recipe for r in self.records))
        words = ["halfbyte", "compare", first.task, "--recipes", recipes_run, "--seeds", str(1 + self.seeds[-1])]
        words += ["--size", first.size, "--model", first.model]
        words += ["--stash", self.stash] if self.stash else []
        words += ["--fine-tune", str(self.fine_tune)] if self.fine_tune else []
        return shlex.join(words)

    @property
    def commits(self) -> list[str]:
        """The revisions that ran, shortened, and whether the package differed from them."""
        return sorted({revision(r) for r in self.records})

    @property
    def machines(self) -> list[str]:
        """Processors, threads, torch and backend."""
        return sorted({machine(r) for r in self.records})

    @property
    def changed(self) -> list[str]:
        """Recipes, and the task, that were not the same in all their runs: another definition, or somebody's module."""
        found: dict[str, set[str]] = {}
        for r in self.records:
            modules = {name: r.conventions.get(f"module {name.partition(':')[0]}") for name in (r.task, r.recipe)}
            own = {name: text for name, text in r.conventions.items() if not name.startswith("module ")}
            found.setdefault(r.recipe, set()).add(str((r.recipe_text, own, modules[r.recipe])))
            found.setdefault(r.task, set()).add(str(modules[r.task]))
        return [name for name in (self.task, *self.recipes) if len(found[name]) > 1]

    @property
    def comparison(self) -> Comparison:
        """Means, deviations and gaps."""
        return summarize(self.task, self.recipes, self.records)


def gather(paths: Sequence[Path]) -> list[Record]:
    """The records in files and in folders; in a folder, those of all its folders too.

    Args:
        paths: what to read; JSON files in a folder that are no records are passed over.

    Raises:
        RecordError: if a file that is named is no record.
        HalfbyteError: if there is no record at all.
    """
    found: list[Record] = []
    for path in paths:
        if not path.is_dir():
            found.append(read(path))
            continue
        for file in sorted(path.rglob("*.json")):
            try:
                found.append(read(file))
            except RecordError:
                continue
    if not found:
        raise HalfbyteError(
            f"No record was found in {', '.join(map(str, paths))}. halfbyte train and compare write them (record.json)."
        )
    return found


def groups(records: Sequence[Record]) -> list[Group]:
    """Records by what can be compared, in the order of the tasks; tasks that this version does not know come last."""
    order = list(tasks.TASKS)

    def key(record: Record) -> tuple[int, str, str, str, str, int]:
        place = order.index(record.task) if record.task in order else len(order)
        return place, record.task, record.model, record.size, record.stash, record.fine_tune

    together = [[r for r in records if key(r) == wanted] for wanted in sorted({key(r) for r in records})]
    return [
        Group(
            task=alike[0].task,
            model=alike[0].model,
            size=alike[0].size,
            stash=alike[0].stash,
            fine_tune=alike[0].fine_tune,
            records=alike,
        )
        for alike in together
    ]
