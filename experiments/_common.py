"""What the studies share: where a network learns, one run, the table, the verdict and the file that keeps them.

A study makes one claim. What is expected stands in its docstring, written before its first run; `Check` then says of
each expectation whether it was shown, whether the seeds do not tell, or whether the opposite was shown. Every recipe
of a study gets the same initial weights, the same batches and the same settings.

The grounds are small, because a study has dozens of runs:

* ``digits``: the task's own network, 8x8 pixels. It is near its ceiling after a few passes.
* ``fashion``: 6,000 pictures of clothes, halved to 14x14 pixels, and nine narrow convolutions (30,690 parameters),
  which leave no slack: in float32 four passes end some ten points below what the whole data set gives.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import halfbyte as hb
from halfbyte import kernels
from halfbyte.files import write_text
from halfbyte.lab import phases, record, tasks
from halfbyte.lab.compare import Comparison, Failure, summarize
from halfbyte.lab.data.source import Data, Examples
from halfbyte.lab.guard import reproducible, weighing
from halfbyte.lab.record import Record
from halfbyte.lab.run import DivergedError
from halfbyte.lab.tasks import Settings, Task

__all__ = ["Check", "Ground", "Study", "differs", "grounds", "plain", "run", "variant"]

CPU = torch.device("cpu")
_MISSES = ("the opposite", "not told apart")
FASHION = {"epochs": 4, "batch_size": 64, "learning_rate": 0.05, "examples": 6000, "model": "plain"}
DIGITS_EPOCHS = 6
SMALLEST = {"epochs": 1, "batch_size": 32, "examples": 64, "test_examples": 32}

Watch = Callable[[nn.Module, int], None]
"""Called with the network and the number of passes done: 0 before the first."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Where networks learn: a task cut to size, and a network."""

    task: Task
    settings: Settings
    data: Data
    network: Callable[[], nn.Module]

    @property
    def name(self) -> str:
        return self.task.name

    def with_inputs(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Ground:
        """The same with other inputs, for learning and for judging."""

        def changed(source: Any) -> Examples:
            prepare = source.prepare
            return replace(source, prepare=change if prepare is None else lambda x: prepare(change(x)))

        return replace(self, data=replace(self.data, train=changed(self.data.train), test=changed(self.data.test)))


def plain(width: int = 8, depth: int = 3, *, halved: bool = True) -> nn.Sequential:
    """Convolutions of 3x3 with batch norm and ReLU, `depth` at each of three resolutions, mean, linear head.

    Args:
        width: channels of the first resolution; each has twice as many as the one before.
        depth: convolutions at a resolution.
        halved: whether the picture is halved first.
    """
    layers: list[nn.Module] = [nn.AvgPool2d(2)] if halved else []
    inputs = 1
    for stage in range(3):
        outputs = width << stage
        layers += [nn.MaxPool2d(2)] if stage else []
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def grounds(asked: argparse.Namespace) -> list[Ground]:
    """The digits, and the clothes where a data folder is given."""
    found = []
    for name in ("digits", "fashion") if asked.data_dir else ("digits",):
        task = tasks.get(name)
        cut: dict[str, Any] = {"epochs": DIGITS_EPOCHS, "model": "cnn"} if name == "digits" else dict(FASHION)
        cut |= {} if asked.epochs is None else {"epochs": asked.epochs}
        settings = replace(task.settings("cpu"), **(cut | (SMALLEST if asked.smallest else {})))
        data = task.load_for(asked.data_dir, settings)
        network = plain
        if name == "digits":
            network = lambda task=task, data=data, settings=settings: task.models["cnn"](data, settings)  # noqa: E731
        found.append(Ground(task=task, settings=settings, data=data, network=network))
    return found


def variant(recipe: str, name: str, **changes: Any) -> hb.Recipe:
    """A recipe of the package with some fields changed, under a name of its own."""
    shown = ", ".join(f"{key}={value}" for key, value in changes.items())
    return replace(hb.RECIPES[recipe], name=name, description=f"{recipe} with {shown}", **changes)


def run(ground: Ground, recipe: hb.Recipe, seed: int, watch: Watch | None = None) -> Record:
    """One network under one recipe.

    Raises:
        DivergedError: if the loss stops being a finite number.
    """
    task, settings, train, test = ground.task, ground.settings, ground.data.train, ground.data.test
    curve: list[float] = []
    kept: list[int] = []
    backend = kernels.resolve("auto")
    started = time.perf_counter()
    with reproducible(seed, CPU):
        network = phases.prepare(ground.network(), recipe, seed, backend)
        stepped = phases.optimizer(network, settings)
        per_epoch = train.count_batches(settings.batch_size)
        schedule = phases.schedule(stepped, phases.ordinary(settings, per_epoch), per_epoch * settings.epochs)
        for epoch in range(settings.epochs):
            if watch is not None and epoch == 0:
                watch(network, 0)
            network.train()
            total, count = 0.0, 0
            carry: tuple[torch.Tensor, ...] = ()
            for batch in train.batches(settings.batch_size, seed=seed, epoch=epoch):
                if kept:
                    found = task.learn(network, batch, carry, settings)
                else:
                    with weighing(network) as kept:
                        found = task.learn(network, batch, carry, settings)
                loss, carry = found.loss, tuple(t.detach() for t in found.carry)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise DivergedError(f"{recipe.name}, seed {seed}: the loss became {value} in epoch {epoch + 1}.")
                stepped.zero_grad()
                loss.backward()
                if settings.clip_norm is not None:
                    nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
                stepped.step()
                schedule.step()
                total += value * batch.count
                count += batch.count
            curve.append(total / count)
            if watch is not None:
                watch(network, epoch + 1)
        seconds = time.perf_counter() - started
        network.eval()
        score, count_tested, carry = 0.0, 0, ()
        with torch.no_grad():
            for batch in test.batches(settings.test_batch_size):
                found = task.learn(network, batch, carry, settings)
                score, count_tested, carry = score + found.score, count_tested + batch.count, found.carry
    return Record(
        task=task.name,
        recipe=recipe.name,
        seed=seed,
        size="study",
        model="study",
        metric=task.metric,
        value=task.summarize(score, count_tested),
        higher_is_better=task.higher_is_better,
        unit=task.unit,
        settings=dataclasses.asdict(settings),
        recipe_text=str(recipe),
        command=[],
        curves={"train_loss": curve},
        seconds=seconds,
        samples_per_s=len(curve) * count / seconds,
        saved_bytes=sum(kept),
        layers=str(hb.summary(network)).splitlines(),
        conventions=phases.conventions(recipe, fine_tune=0),
        commit=record.commit(),
        sources_sha256=[record.source_sha256()],
        versions=record.versions(),
        machine=record.machine("cpu", kernels.describe(backend)),
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """One expectation and what came of it.

    Attributes:
        expected: one sentence, as the study's docstring has it.
        found: what was measured, with its numbers.
        outcome: ``"shown"``, ``"not told apart"`` (the seeds do not decide) or ``"the opposite"``.
    """

    expected: str
    found: str
    outcome: str

    @classmethod
    def of(cls, expected: str, found: str, holds: bool) -> Check:
        """An expectation about numbers that carry no luck of a seed."""
        return cls(expected=expected, found=found, outcome="shown" if holds else "the opposite")


def differs(
    expected: str, values: Mapping[str, Mapping[int, float]], low: str, high: str, *, by: float = 0.0, unit: str = ""
) -> Check:
    """Whether one arm lies below another by more than some amount, seed by seed.

    Shown where Student's 95 % interval of the paired difference lies above ``by``, the opposite where it lies below.

    Args:
        expected: one sentence.
        values: for each arm its values by seed; an arm without a seed diverged there.
        low: the arm that is expected to lie lower.
        high: the arm that is expected to lie higher.
        by: how much higher, at least.
        unit: of the values.
    """
    if not values.get(low) or not values.get(high):
        gone = [name for name in (low, high) if not values.get(name)]
        return Check(expected=expected, found=f"every run diverged: {', '.join(gone)}", outcome="not told apart")
    shared = sorted(values[low].keys() & values[high].keys())
    differences = [values[high][seed] - values[low][seed] for seed in shared]
    mean, half = statistics.fmean(differences), half_width(differences)
    outcome = "shown" if mean - half > by else "the opposite" if mean + half < by else "not told apart"
    interval = f"95 % interval {mean - half:+.3g} to {mean + half:+.3g}"
    found = f"{high} minus {low}: {mean:+.3g}{unit}, {len(shared)} seeds, {interval}"
    return Check(expected=expected, found=found, outcome=outcome)


def half_width(values: Sequence[float]) -> float:
    """Half of Student's 95 % interval of the mean; infinite below three values."""
    if len(values) < 3:
        return math.inf
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))


@dataclass
class Study:
    """A study while it runs: collects tables, measures and checks, prints them, and writes its file.

    Attributes:
        script: its file.
        doc: its docstring: the first sentence is the claim; what follows "Expected before the first run:" is expected.
    """

    script: Path
    doc: str
    checks: list[Check] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    summaries: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    recipes: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def arguments(self, given: Sequence[str] | None = None) -> argparse.Namespace:
        """The command line, the same for every study."""
        parser = argparse.ArgumentParser(description=self.doc.splitlines()[0])
        parser.add_argument("--data-dir", type=Path, help="folder of data sets; without it the digits alone are used")
        parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
        parser.add_argument("--epochs", type=int, help="passes over the data, other than the study's own")
        parser.add_argument("--smallest", action="store_true", help="two steps a run: shows that it runs, nothing else")
        parser.add_argument("--out", type=Path, help="the JSON file to write")
        self.asked = parser.parse_args(given)
        self.commit = record.commit()  # asked once: the folder may move on meanwhile
        record.source_sha256()  # remembers
        return self.asked

    def compare(
        self,
        ground: Ground,
        recipes: Iterable[hb.Recipe],
        watch: Callable[[str, int], Watch] | None = None,
        title: str = "",
    ) -> dict[str, dict[int, float]]:
        """Trains every recipe on every seed and prints the table.

        Args:
            ground: where.
            recipes: the arms; the first is the baseline.
            watch: from the recipe's name and the seed to what looks on.
            title: of the table, where it is not the ground's name.

        Returns:
            For each recipe the metric by seed; runs that diverged are missing.
        """
        title = title or ground.name
        self.settings[title] = dataclasses.asdict(ground.settings)
        self.metrics[title] = f"{ground.task.metric} in {ground.task.unit}" if ground.task.unit else ground.task.metric
        done: list[Record] = []
        failed: list[Failure] = []
        arms = list(recipes)
        for seed in range(self.asked.seeds):
            for recipe in arms:
                try:
                    found = run(ground, recipe, seed, watch(recipe.name, seed) if watch else None)
                except DivergedError as error:
                    failed.append(Failure(recipe=recipe.name, seed=seed, message=str(error)))
                    print(f"{title} {recipe.name} seed {seed}: diverged", file=sys.stderr)
                    continue
                done.append(found)
                self.recipes[recipe.name] = found.recipe_text
                print(f"{title} {recipe.name} seed {seed}: {found.value:.2f} in {found.seconds:.0f} s", file=sys.stderr)
        comparison = summarize(ground.name, [recipe.name for recipe in arms], done, failed)
        self.runs += [
            {
                "where": title,
                "recipe": one.recipe,
                "seed": one.seed,
                "value": one.value,
                "train_loss": one.curves["train_loss"],
                "seconds": round(one.seconds, 2),
            }
            for one in done
        ] + [{"where": title, "recipe": f.recipe, "seed": f.seed, "diverged": f.message} for f in failed]
        summary = comparison.to_json()["summary"]
        # Times are those of a machine that others use, too: a ratio of them would say nothing.
        self.summaries[title] = {
            name: {key: value for key, value in entry.items() if key != "time_ratio"} for name, entry in summary.items()
        }
        print_comparison(title, comparison)
        return {arm.name: {one.seed: one.value for one in done if one.recipe == arm.name} for arm in arms}

    def finish(self) -> int:
        """Prints the verdict and writes the file."""
        print()
        for check in self.checks:
            print(f"[{check.outcome}] {check.expected}\n    {check.found}")
        print(f"\nVerdict: {self.verdict}")
        if self.asked.out is not None:
            self._write(self.asked.out)
        return 0

    @property
    def verdict(self) -> str:
        """In words: as expected, or which expectations were not met; their numbers stand in the checks."""
        missed = [check for check in self.checks if check.outcome != "shown"]
        if not missed:
            return "as expected"
        part = "not" if len(missed) == len(self.checks) else "partly"
        outcomes = {outcome: [c.expected for c in missed if c.outcome == outcome] for outcome in _MISSES}
        reasons = [f"{outcome}: {', '.join(names)}" for outcome, names in outcomes.items() if names]
        return f"{part} as expected, because {'; '.join(reasons)}"

    def _write(self, path: Path) -> None:
        claim, _, expected = self.doc.partition("Expected before the first run:")
        command = ["python", f"experiments/{self.script.name}", "--seeds", str(self.asked.seeds)]
        command += ["--data-dir", "DIR"] if self.asked.data_dir else []
        command += ["--epochs", str(self.asked.epochs)] if self.asked.epochs is not None else []
        command += ["--smallest"] if self.asked.smallest else []
        content = {
            "study": self.script.stem,
            "claim": claim.split("\n\n")[0].replace("\n", " "),
            "expected": " ".join(expected.split()),
            "verdict": self.verdict,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "command": command,
            "seeds": list(range(self.asked.seeds)),
            "settings": self.settings,
            "metrics": self.metrics,
            "summary": self.summaries,
            "runs": self.runs,
            "measures": self.measures,
            "recipes": self.recipes,
            "seconds": round(time.perf_counter() - self.started, 1),
            "commit": self.commit,
            "sources_sha256": record.source_sha256(),
            "versions": record.versions(),
            "machine": record.machine("cpu", kernels.describe(kernels.resolve("auto"))),
        }
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def print_comparison(title: str, found: Comparison) -> None:
    """One line an arm."""
    unit = f" in {found.unit}" if found.unit else ""
    print(f"\n{title}: {found.metric}{unit}, gap to {found.baseline}, loss of the last pass in training")
    print(f"{'arm':<24} {'mean':>7} {'std':>6} {'gap':>7}  {'95 % interval':<18} {'loss':>7}")
    for name, entry in found.summary.items():
        if entry.mean is None:
            print(f"{name:<24} diverged")
            continue
        paired = "" if entry.paired is None else f"{entry.paired.low:+.2f} to {entry.paired.high:+.2f}"
        loss = statistics.fmean(one.curves["train_loss"][-1] for one in found.records if one.recipe == name)
        gap = "" if entry.gap is None else f"{entry.gap:+.2f}"
        print(f"{name:<24} {entry.mean:>7.2f} {entry.std or 0.0:>6.2f} {gap:>7}  {paired:<18} {loss:>7.4f}")
