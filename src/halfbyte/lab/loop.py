"""A run while it goes on: network, optimizer, data, and how far it is."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from lightning_fabric import Fabric
from torch import nn

from .. import kernels, recipes
from ..convert import summary
from . import checkpoint, phases, record, tasks
from .data.source import Batch
from .guard import weighing
from .record import Record
from .run import DivergedError, Run, Step
from .tasks import Carry, Outcome

__all__ = ["Loop"]


@dataclass
class _Position:
    """How far a run is; with the weights and the generators, all that a checkpoint holds."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    score_sum: float = 0.0
    count: int = 0
    samples: int = 0
    train_seconds: float = 0.0
    test_seconds: float = 0.0
    threads: int = 0
    saved_bytes: int = 0
    sources: list[str] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)  # Of ordinary training, once fine-tuning has begun.
    nonfinite: dict[str, int] = field(default_factory=dict)


class Loop:
    """Network, optimizer, data and position of one run."""

    def __init__(self, run: Run, fabric: Fabric, folder: Path | None, data_dir: Path | None, backend: str) -> None:
        self.run, self.fabric, self.folder, self.backend = run, fabric, folder, backend
        self.task = tasks.get(run.task)
        self.settings = self.task.settings(run.size)
        self.data = self.task.load_for(data_dir, self.settings)
        # The seed was set just before: the weights depend on it alone, because conversion keeps them.
        recipe = recipes.get(run.recipe)
        self.plain: nn.Module = phases.prepare(
            self.task.models[run.model](self.data, self.settings), recipe, run.seed, backend, run.stash
        )
        self.batches_per_epoch = self.data.train.count_batches(self.settings.batch_size)
        self.epochs = self.settings.epochs + run.fine_tune
        self._equip(phases.ordinary(self.settings, self.batches_per_epoch), self.settings.epochs)
        self.shown = self.task.progress_metric or self.task.metric
        self.carry: Carry = ()
        names = ("train_loss", f"train_{self.shown}", "test_loss", f"test_{self.shown}")
        curves: dict[str, list[float]] = {name: [] for name in names}
        self.position = _Position(curves=curves, threads=torch.get_num_threads(), sources=[record.source_sha256()])

    def _equip(self, shape: Callable[[int, int], float], epochs: int) -> None:
        """A phase's optimizer and learning rates."""
        optimizer = phases.optimizer(self.plain, self.settings)
        self.schedule = phases.schedule(optimizer, shape, epochs * self.batches_per_epoch)
        self.network, self.optimizer = self.fabric.setup(self.plain, optimizer)

    def _fine_tune(self) -> None:
        """Goes over from ordinary training to fine-tuning."""
        self.plain = phases.switch(
            self.plain, recipes.get(self.run.recipe), self.run.seed, self.backend, self.run.stash
        )
        self._equip(phases.triangle, self.run.fine_tune)

    def steps(self) -> Iterator[Step]:
        """Trains to the end; yields after every batch, and closes each epoch with an evaluation and a checkpoint."""
        at = self.position
        while at.epoch < self.epochs:
            size, seed = self.settings.batch_size, self.run.seed
            for batch in self.data.train.batches(size, seed=seed, epoch=at.epoch, start=at.batch):
                self._train_on(batch.to(self.fabric.device))
                # The last batch of an epoch is reported after the epoch is closed, so that what is saved is its end.
                step = self._step()
                if at.batch == self.batches_per_epoch:
                    self._close_epoch()
                yield step

    def _train_on(self, batch: Batch) -> None:
        """One step of the optimizer."""
        started = time.perf_counter()
        at = self.position
        self.network.train()
        with contextlib.ExitStack() as scales:
            kept_bytes = [] if at.samples else scales.enter_context(weighing(self.plain))
            loss, score, self.carry = self._learn(batch, self.carry)
        at.saved_bytes += sum(kept_bytes)
        loss_value = float(loss.detach())
        self._demand_finite(loss_value, "training")
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        at.loss_sum += loss_value * batch.count
        at.score_sum += score
        at.count += batch.count
        at.samples += batch.count
        at.batch += 1
        at.train_seconds += time.perf_counter() - started

    def _learn(self, batch: Batch, carry: Carry) -> Outcome:
        """The network's outcome on a batch; what it carries on has no gradient."""
        found = self.task.learn(self.network, batch, carry, self.settings)
        return found._replace(carry=tuple(t.detach() for t in found.carry))

    def _step(self) -> Step:
        """The news after a batch."""
        at = self.position
        return Step(
            run=self.run,
            done=at.epoch * self.batches_per_epoch + at.batch,
            total=self.epochs * self.batches_per_epoch,
            epoch=at.epoch + 1,
            epochs=self.epochs,
            loss=at.loss_sum / at.count,
            score=self.task.summarize(at.score_sum, at.count),
            samples_per_s=at.samples / at.train_seconds,
        )

    def _close_epoch(self) -> None:
        """Evaluates, adds a point to every curve, moves to the next epoch, perhaps to the next phase, and saves."""
        at = self.position
        started = time.perf_counter()
        test_loss, test_score = self._evaluate()
        at.test_seconds += time.perf_counter() - started
        at.curves["train_loss"].append(at.loss_sum / at.count)
        at.curves[f"train_{self.shown}"].append(self.task.summarize(at.score_sum, at.count))
        at.curves["test_loss"].append(test_loss)
        at.curves[f"test_{self.shown}"].append(test_score)
        at.epoch += 1
        at.batch = at.count = 0
        self.carry = ()
        at.loss_sum = at.score_sum = 0.0
        if self.run.fine_tune and at.epoch == self.settings.epochs:
            at.layers, broken = str(summary(self.plain)).splitlines(), Counter(_nonfinite(self.plain))
            self._fine_tune()
            at.nonfinite = dict(broken - Counter(_nonfinite(self.plain)))  # The weights' quantizers count on.
        if self.folder is not None:
            self.save()

    def _evaluate(self) -> tuple[float, float]:
        """Mean loss and score on the test data."""
        self.network.eval()
        loss_sum = score_sum = 0.0
        count = 0
        carry: Carry = ()
        with torch.no_grad():
            for batch in self.data.test.batches(self.settings.test_batch_size):
                loss, score, carry = self._learn(batch.to(self.fabric.device), carry)
                loss_sum += float(loss) * batch.count
                score_sum += score
                count += batch.count
        # Logits that are NaN would still have a largest entry, and so a plausible accuracy: the loss tells.
        self._demand_finite(loss_sum, "test")
        return loss_sum / count, self.task.summarize(score_sum, count)

    def _judge(self) -> float:
        """The run's result."""
        at, judge = self.position, self.task.judge
        if judge is None:
            return at.curves[f"test_{self.task.metric}"][-1]
        started = time.perf_counter()
        self.network.eval()
        with torch.no_grad():
            value = judge(self.plain, self.data, self.settings)
        at.test_seconds += time.perf_counter() - started
        return value

    def _demand_finite(self, loss: float, part: str) -> None:
        """Stops a run that has diverged."""
        if math.isfinite(loss):
            return
        raise DivergedError(
            f"{self.run.name}: the {part} loss became {loss} in epoch {self.position.epoch + 1}, "
            f"batch {self.position.batch + 1}. The run has no result and no record. A smaller learning rate, or "
            f"a recipe with wider gradients (fp32, bf16), tells whether the format is to blame."
        )

    def save(self) -> None:
        """Writes the checkpoint."""
        assert self.folder is not None
        on_gpu = self.fabric.device.type == "cuda"
        state = {
            "model": self.network,
            "optimizer": self.optimizer,
            "schedule": self.schedule.state_dict(),
            "position": dataclasses.asdict(self.position),
            "carry": list(self.carry),
            "generator": torch.get_rng_state(),
            "generator_cuda": torch.cuda.get_rng_state(self.fabric.device) if on_gpu else None,
        }
        checkpoint.save(self.fabric, self.folder, self.run.identity, state)

    def restore(self, other_code: Literal["warn", "refuse"]) -> None:
        """Goes to where the checkpoint is."""
        assert self.folder is not None
        state = checkpoint.load(self.fabric, self.folder, self.run.identity)
        try:
            self.position = _Position(**state["position"])
            if self.run.fine_tune and self.position.epoch >= self.settings.epochs:
                self._fine_tune()
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.carry = tuple(t.to(self.fabric.device) for t in state["carry"])
            torch.set_rng_state(state["generator"])
            if state["generator_cuda"] is not None and self.fabric.device.type == "cuda":
                torch.cuda.set_rng_state(state["generator_cuda"], self.fabric.device)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{checkpoint.path_in(self.folder)} does not fit this version of halfbyte ({error}). Start over."
            ) from error
        changes = self._changes()
        if changes and other_code == "refuse":
            raise checkpoint.CheckpointError(f"The checkpoint in {self.folder} is of another state: {changes}.")
        if changes:
            warnings.warn(f"{self.run.name} goes on, but may end in other bits: {changes}.", stacklevel=3)

    def _changes(self) -> str:
        """Why the rest of a resumed run may differ from an unbroken run; empty where nothing has changed."""
        at, changes, threads = self.position, [], torch.get_num_threads()
        if record.source_sha256() not in at.sources:
            at.sources.append(record.source_sha256())
            changes.append("halfbyte's code has changed")
        if at.threads != threads:
            changes.append(f"torch uses {threads} threads, not {at.threads}")
        return " and ".join(changes)

    def record(self, accelerator: str) -> Record:
        """The result, once every epoch is done."""
        at, task, run = self.position, self.task, self.run
        layers = str(summary(self.plain)).splitlines()
        value = self._judge()
        return Record(
            task=run.task,
            recipe=run.recipe,
            seed=run.seed,
            size=run.size,
            model=run.model,
            metric=task.metric,
            value=value,
            higher_is_better=task.higher_is_better,
            unit=task.unit,
            settings=run.identity["settings"],
            recipe_text=run.identity["recipe_text"],
            command=run.command(),
            curves=at.curves,
            seconds=at.train_seconds + at.test_seconds,
            samples_per_s=at.samples / at.train_seconds,
            saved_bytes=at.saved_bytes,
            layers=[*at.layers, "fine-tuning:", *layers] if at.layers else layers,
            nonfinite=dict(Counter(at.nonfinite) + Counter(_nonfinite(self.plain))),
            fine_tune=run.fine_tune,
            stash=run.stash,
            conventions=run.identity["conventions"],
            commit=record.commit(),
            sources_sha256=at.sources,
            versions=record.versions(),
            machine=record.machine(accelerator, kernels.describe(self.backend)),
        )


def _nonfinite(network: nn.Module) -> dict[str, int]:
    """How many tensors with NaN or infinity each quantizer met; only those that met any."""
    counts = {name: int(count) for name, count in network.named_buffers() if name.endswith("nonfinite")}
    return {name.removesuffix(".nonfinite"): count for name, count in counts.items() if count}
