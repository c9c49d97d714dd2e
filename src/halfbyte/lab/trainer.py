"""One run: a task, a recipe, a seed; the same bits every time.

The loop is an ordinary PyTorch loop through Lightning Fabric, which brings the device and the checkpoint. Nothing in it
depends on the recipe: weights, order of the data, optimizer and learning rate are those of the seed and the task. Where
fine-tuning is asked for, it follows as a second phase with its own formats, optimizer and learning rate (`phases`).

Same seed, same bits holds on one machine with one number of threads. It holds across interruptions too: Ctrl-C (or
SIGTERM) writes a checkpoint at the batch that it met, a kill loses what came after the last epoch, and the resumed run
ends with the weights that an unbroken run would have had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shlex
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
from ..errors import HalfbyteError
from . import checkpoint, phases, record, tasks
from .data.split import Split, batches, count_batches
from .guard import reproducible, signals, weighing
from .record import Record
from .run import RECORD_NAME, DivergedError, Interrupted, Progress, Run, Step
from .tasks import Task

__all__ = ["chosen_backend", "train"]

_EVALUATION_BATCH = 512


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


def train(
    task: str,
    recipe: str,
    seed: int,
    *,
    size: str = "cpu",
    model: str | None = None,
    fine_tune: int = 0,
    out_dir: Path | None = None,
    resume: Path | None = None,
    accelerator: str = "cpu",
    backend: str = "auto",
    progress: Progress | None = None,
    other_code: Literal["warn", "refuse"] = "warn",
) -> Record:
    """Trains one network under one recipe.

    Args:
        task: a name in `halfbyte.lab.tasks.TASKS`.
        recipe: a name in `halfbyte.RECIPES`.
        seed: of the initial weights and of the order of the data; the same for every recipe.
        size: a preset of the task: ``smoke``, ``cpu`` or ``full``.
        model: a network of the task; None for its default.
        fine_tune: epochs in high precision after the ordinary ones, see `halfbyte.lab.phases`.
        out_dir: folder for the checkpoint and ``record.json``; None keeps nothing on the disk.
        resume: folder of an interrupted run that goes on there. A finished one is returned as it is.
        accelerator: Lightning Fabric's name of the device: ``cpu``, ``cuda``, ``mps`` or ``auto``.
        backend: who computes four bits, see `halfbyte.convert`; the bits are the same. ``auto`` is ``native`` where its
            library is there and the accelerator is ``cpu``.
        progress: called after every batch.
        other_code: what to do with a checkpoint of other code or another number of threads, from which the run may
            end in other bits.

    Returns:
        The record of the run, which is also in the folder.

    Raises:
        UnknownNameError: if there is no such task, recipe, size or network.
        UnsupportedError: if the backend is ``native`` and its library is absent.
        HalfbyteError: if ``out_dir`` already holds a run, or there is no such accelerator.
        CheckpointError: if ``resume`` holds no checkpoint, a damaged one, or that of another run.
        DivergedError: if the loss stops being a finite number.
        Interrupted: on Ctrl-C or SIGTERM, after the checkpoint is written.
    """
    run = Run(task=task, recipe=recipe, seed=seed, size=size, model=model or "", fine_tune=fine_tune)
    if out_dir is not None and resume is not None:
        raise HalfbyteError(
            f"Both out_dir={out_dir} and resume={resume} were given; a resumed run stays in its folder."
        )
    folder = resume or out_dir
    if out_dir is not None and (checkpoint.path_in(out_dir).exists() or (out_dir / RECORD_NAME).exists()):
        raise HalfbyteError(
            f"{out_dir} already holds a run. Go on with it (--resume {out_dir}) or choose another folder."
        )
    if resume is not None and (resume / RECORD_NAME).exists():
        return _finished(run, resume / RECORD_NAME)
    if accelerator != "cpu":
        # CUDA's matrix library is reproducible only with a fixed workspace, and reads this when it first starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        fabric = Fabric(accelerator=accelerator, devices=1, precision="32-true")
    except (ValueError, RuntimeError, ImportError) as error:
        raise HalfbyteError(
            f"The accelerator {accelerator!r} cannot be used here ({error}). Possible: cpu, auto, and cuda or mps "
            "where there is one."
        ) from error
    with reproducible(seed, fabric.device), signals(heard=folder is not None) as received:
        loop = _Loop(run, fabric, folder, chosen_backend(backend, accelerator))
        if resume is not None:
            loop.restore(other_code)
        elif folder is not None:
            loop.save()
        for step in loop.steps():
            if progress is not None:
                progress(step)
            if received and folder is not None:
                loop.save()
                extra = () if accelerator == "cpu" else ("--accelerator", accelerator)
                command = shlex.join(run.command(*extra, "--resume", str(folder)))
                raise Interrupted(command, received[0])
    result = loop.record(accelerator)
    if folder is not None:
        record.write(result, folder / RECORD_NAME)
    return result


def chosen_backend(name: str, accelerator: str) -> str:
    """The backend's own name: for ``auto`` the fastest one there is for tensors on that accelerator."""
    return "reference" if name == "auto" and accelerator != "cpu" else kernels.resolve(name)


def _finished(run: Run, path: Path) -> Record:
    """The record of a run that is to be resumed although it is done, if it is that run's."""
    done = record.read(path)
    identity = run.identity
    different = [key for key in identity if getattr(done, key) != identity[key]]
    if different:
        raise HalfbyteError(f"{path} is the record of another run; different: {', '.join(different)}.")
    return done


class _Loop:
    """Network, optimizer, data and position of one run."""

    def __init__(self, run: Run, fabric: Fabric, folder: Path | None, backend: str) -> None:
        self.run, self.fabric, self.folder, self.backend = run, fabric, folder, backend
        self.task: Task = tasks.get(run.task)
        self.settings = self.task.settings(run.size)
        self.data: Split = self.task.load().to(fabric.device)
        # The seed was set just before: the weights depend on it alone, because conversion keeps them.
        recipe = recipes.get(run.recipe)
        self.plain: nn.Module = phases.prepare(self.task.models[run.model](), recipe, run.seed, backend)
        self.batches_per_epoch = count_batches(len(self.data.train_inputs), self.settings.batch_size)
        self.epochs = self.settings.epochs + run.fine_tune
        self._equip(phases.cosine, self.settings.epochs)
        curves: dict[str, list[float]] = {"train_loss": [], f"train_{self.task.metric}": [], "test_loss": []}
        curves[f"test_{self.task.metric}"] = []
        self.position = _Position(curves=curves, threads=torch.get_num_threads(), sources=[record.source_sha256()])

    def _equip(self, shape: Callable[[int, int], float], epochs: int) -> None:
        """A phase's optimizer and learning rates."""
        optimizer = phases.optimizer(self.plain, self.settings)
        self.schedule = phases.schedule(optimizer, shape, epochs * self.batches_per_epoch)
        self.network, self.optimizer = self.fabric.setup(self.plain, optimizer)

    def _fine_tune(self) -> None:
        """Goes over from ordinary training to fine-tuning."""
        self.plain = phases.switch(self.plain, recipes.get(self.run.recipe), self.run.seed, self.backend)
        self._equip(phases.triangle, self.run.fine_tune)

    def steps(self) -> Iterator[Step]:
        """Trains to the end; yields after every batch, and closes each epoch with an evaluation and a checkpoint."""
        at = self.position
        while at.epoch < self.epochs:
            data = batches(
                self.data.train_inputs,
                self.data.train_targets,
                batch_size=self.settings.batch_size,
                seed=self.run.seed,
                epoch=at.epoch,
                start=at.batch,
            )
            for inputs, targets in data:
                self._train_on(inputs, targets)
                # The last batch of an epoch is reported after the epoch is closed, so that what is saved is its end.
                step = self._step()
                if at.batch == self.batches_per_epoch:
                    self._close_epoch()
                yield step

    def _train_on(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """One step of the optimizer."""
        started = time.perf_counter()
        at = self.position
        self.network.train()
        with contextlib.ExitStack() as scales:
            kept_bytes = [] if at.samples else scales.enter_context(weighing(self.plain))
            output = self.network(inputs)
        at.saved_bytes += sum(kept_bytes)
        loss = self.task.loss(output, targets)
        loss_value = float(loss.detach())
        self._demand_finite(loss_value, "training")
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        at.loss_sum += loss_value * len(targets)
        at.score_sum += self.task.score(output.detach(), targets)
        at.count += len(targets)
        at.samples += len(targets)
        at.batch += 1
        at.train_seconds += time.perf_counter() - started

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
        at, metric = self.position, self.task.metric
        started = time.perf_counter()
        test_loss, test_score = self._evaluate()
        at.test_seconds += time.perf_counter() - started
        at.curves["train_loss"].append(at.loss_sum / at.count)
        at.curves[f"train_{metric}"].append(self.task.summarize(at.score_sum, at.count))
        at.curves["test_loss"].append(test_loss)
        at.curves[f"test_{metric}"].append(test_score)
        at.epoch += 1
        at.batch = at.count = 0
        at.loss_sum = at.score_sum = 0.0
        if self.run.fine_tune and at.epoch == self.settings.epochs:
            at.layers, broken = str(summary(self.plain)).splitlines(), Counter(_nonfinite(self.plain))
            self._fine_tune()
            at.nonfinite = dict(broken - Counter(_nonfinite(self.plain)))  # The weights' quantizers count on.
        if self.folder is not None:
            self.save()

    def _evaluate(self) -> tuple[float, float]:
        """Mean loss and metric on the test data."""
        self.network.eval()
        loss_sum = score_sum = 0.0
        count = len(self.data.test_targets)
        inputs = self.data.test_inputs.split(_EVALUATION_BATCH)
        targets = self.data.test_targets.split(_EVALUATION_BATCH)
        with torch.no_grad():
            for x, y in zip(inputs, targets, strict=True):
                output = self.network(x)
                loss_sum += float(self.task.loss(output, y)) * len(y)
                score_sum += self.task.score(output, y)
        # Logits that are NaN would still have a largest entry, and so a plausible accuracy: the loss tells.
        self._demand_finite(loss_sum, "test")
        return loss_sum / count, self.task.summarize(score_sum, count)

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
        return Record(
            task=run.task,
            recipe=run.recipe,
            seed=run.seed,
            size=run.size,
            model=run.model,
            metric=task.metric,
            value=at.curves[f"test_{task.metric}"][-1],
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
