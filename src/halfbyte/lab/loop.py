"""A run while it goes on: network, optimizer, data, and how far it is.

Several processes may share a run (`ranks`). Each holds all of what is here; a number in it is that of the whole batch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import nn

from .. import distributed, kernels, recipes
from ..convert import summary
from ..errors import HalfbyteError
from ..watching import named_plans
from . import checkpoint, phases, ranks, record, tasks
from .callbacks import measured
from .data.source import Batch
from .guard import weighing
from .history import moments
from .position import Position
from .record import Record
from .run import PROGRESS_NAME, DivergedError, Run, Step
from .tasks import Carry, Judgment, Outcome

__all__ = ["Loop"]


class Loop:
    """Network, optimizer, data and position of one run."""

    def __init__(
        self,
        run: Run,
        fabric: Fabric,
        folder: Path | None,
        data_dir: Path | None,
        backend: str,
        strategy: str | None = None,
    ) -> None:
        self.run, self.fabric, self.folder, self.backend, self.strategy = run, fabric, folder, backend, strategy
        if run.stash and strategy == "fsdp2":
            raise HalfbyteError(
                f"stash={run.stash!r} was asked for with fsdp2, under which it would round the weights that are lent "
                "to a layer. Leave one of the two out: ddp takes a stash."
            )
        self.commit = record.commit()  # asked at the start: the folder may move on meanwhile
        self.task = tasks.get(run.task)
        self.settings = self.task.settings(run.size)
        versions = record.versions(self.task.packages)  # Before the work: a package may be missing.
        self.data = self.task.load_for(data_dir, self.settings)
        # The seed was set just before: the weights depend on it alone, because conversion keeps them.
        self.plain = self._built()
        self.tuned = False
        self.batches_per_epoch = self.data.train.count_batches(self.settings.batch_size)
        self.epochs = self.settings.epochs + run.fine_tune
        self.shown = self.task.progress_metric or self.task.metric
        self.carry: Carry = ()
        self.rows = 0  # of the last batch
        names = ("train_loss", f"train_{self.shown}", "test_loss", f"test_{self.shown}")
        curves: dict[str, list[float]] = {name: [] for name in names}
        self.position = Position(
            curves=curves,
            threads=torch.get_num_threads(),
            world_size=distributed.ranks(),
            sources=[record.source_sha256()],
            versions=versions,
        )
        if strategy is not None:
            self._settle()
        self._equip(phases.ordinary(self.settings, self.batches_per_epoch), self.settings.epochs)

    def _built(self) -> nn.Module:
        """A fresh network under the run's recipe."""
        network = self.task.models[self.run.model](self.data, self.settings)
        return phases.prepare(network, recipes.find(self.run.recipe), self.run.seed, self.backend, self.run.stash)

    def _settle(self) -> None:
        """Lets every rank make the first step on the whole first batch, for what it decides and what it keeps."""
        batch = next(self.data.train.batches(self.settings.batch_size, seed=self.run.seed))
        self.plain.to(self.fabric.device)
        tried = copy.deepcopy(self.plain).train()
        # The same numbers for dropout as in a run of one process, and again in the step that counts.
        with torch.random.fork_rng(devices=[]):
            with weighing(tried) as kept_bytes:
                loss = self.task.learn(tried, batch.to(self.fabric.device), (), self.settings).loss
            loss.backward()
        self.position.saved_bytes = sum(kept_bytes)
        ranks.settle(self.plain, tried)
        self._part_ways()

    def _part_ways(self) -> None:
        """Gives each rank a generator of its own, so that dropout differs from rank to rank."""
        if distributed.ranks() > 1:
            at, place = self.position, 7_368_787 * (1 + distributed.rank())
            torch.manual_seed((self.run.seed * 1_000_003 + place + 15_485_863 * at.epoch + at.batch) % 2**63)

    def _equip(self, shape: Callable[[int, int], float], epochs: int) -> None:
        """A phase's optimizer and learning rates."""
        network = ranks.wrapped(self.plain, self.strategy, self.fabric.device)
        optimizer = phases.optimizer(self.plain, self.settings)  # of the parameters that sharding left
        self.schedule = phases.schedule(optimizer, shape, epochs * self.batches_per_epoch)
        self.network, self.optimizer = self.fabric.setup(network, optimizer)
        # Ordinary training is looked at; in fine-tuning little is quantized.
        self.moments = moments(self.settings.epochs * self.batches_per_epoch, len(named_plans(self.plain)))

    def _copy(self) -> nn.Module:
        """A network of this process alone, with whole weights and the state of this one."""
        with torch.random.fork_rng(devices=[]):
            network = self._built()
        if self.tuned:
            network = self._switched(network)
        network.load_state_dict(ranks.whole(self.plain.state_dict()))
        return network.to(self.fabric.device)

    def _whole(self) -> nn.Module:
        """The network, to be looked at or judged by this process alone."""
        return self._copy() if self.strategy == "fsdp2" else self.plain

    def _switched(self, network: nn.Module) -> nn.Module:
        recipe = recipes.find(self.run.recipe)
        return phases.switch(network, recipe, self.run.seed, self.backend, self.run.stash)

    def _fine_tune(self) -> None:
        """Goes over from ordinary training to fine-tuning."""
        # What the ranks share is part of a wrapped network and cannot be converted; a copy of it can.
        self.plain = self._switched(self.plain if self.strategy is None else self._copy())
        self.tuned = True
        self._equip(phases.triangle, self.run.fine_tune)

    def steps(self) -> Iterator[Step]:
        """Trains to the end; yields after every batch, and closes each epoch with an evaluation and a checkpoint."""
        at = self.position
        while at.epoch < self.epochs:
            size, seed = self.settings.batch_size, self.run.seed
            for batch in self.data.train.batches(size, seed=seed, epoch=at.epoch, start=at.batch):
                done = at.epoch * self.batches_per_epoch + at.batch
                with measured(self.plain, at.measured, step=done, wanted=done in self.moments) as probe:
                    self._train_on(batch)
                at.train_seconds -= probe.seconds if probe else 0.0  # What looking took is not training.
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
        own, self.rows = ranks.share(batch), len(batch.inputs[0])
        with contextlib.ExitStack() as scales:
            known = at.samples or self.strategy is not None
            kept_bytes = [] if known else scales.enter_context(weighing(self.plain))
            loss, score, self.carry = self._learn(own, self.carry)
        at.saved_bytes += sum(kept_bytes)
        if own is not batch:
            loss = loss * (own.count / batch.count)
        loss_value, score = ranks.total(float(loss.detach()), score if own.count else 0.0)
        self._demand_finite(loss_value, "training")
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        ranks.summed(self.plain)
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
        found = self.task.learn(self.network, batch.to(self.fabric.device), carry, self.settings)
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
            network=self.plain,
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
            at.layers, broken = str(summary(self._whole())).splitlines(), Counter(_nonfinite(self.plain))
            self._fine_tune()
            at.nonfinite = dict(broken - Counter(_nonfinite(self.plain)))  # The weights' quantizers count on.
        if self.folder is not None:
            self.save()
            self._tell(self.folder / PROGRESS_NAME)

    def _tell(self, path: Path) -> None:
        """Writes what is known of the run so far, for whoever looks on: a small file, the first process's."""
        if distributed.rank() != 0:
            return
        at = self.position
        layers = at.layers or ([] if self.strategy == "fsdp2" else str(summary(self.plain)).splitlines())
        so_far = self._record(Judgment(at.curves[f"test_{self.shown}"][-1]), layers, self.fabric.device.type)
        with checkpoint.writing(path), contextlib.suppress(record.RecordError):  # A score may not be a number yet.
            record.write_partial(dataclasses.replace(so_far, metric=self.shown), path, at.epoch, self.epochs)

    def _evaluate(self) -> tuple[float, float]:
        """Mean loss and score on the test data."""
        self.network.eval()
        ranks.agree(self.plain)
        loss_sum = score_sum = 0.0
        count = 0
        carry: Carry = ()
        with torch.no_grad():
            for batch in self.data.test.batches(self.settings.test_batch_size):
                own = ranks.share(batch)
                loss, score, carry = self._learn(own, carry)
                if own.count:
                    loss_sum += float(loss) * own.count
                    score_sum += score
                count += batch.count
        loss_sum, score_sum = ranks.total(loss_sum, score_sum)
        # Logits that are NaN would still have a largest entry, and so a plausible accuracy: the loss tells.
        self._demand_finite(loss_sum, "test")
        return loss_sum / count, self.task.summarize(score_sum, count)

    def _judge(self, network: nn.Module) -> Judgment:
        """The run's result. Every rank finds it for itself, so that none waits for longer than the others can."""
        at, started = self.position, time.perf_counter()
        network.eval()
        with torch.no_grad():
            found = self.task.judged(network, self.data, self.settings)
        at.test_seconds += time.perf_counter() - started
        return found or Judgment(at.curves[f"test_{self.task.metric}"][-1])

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
        """Writes the checkpoint: all ranks bring what it takes, and rank 0 writes it."""
        assert self.folder is not None
        on_gpu = self.fabric.device.type == "cuda"
        ranks.fold_counts(self.plain)
        whole = ranks.whole if self.strategy == "fsdp2" else _as_it_is
        state = {
            "model": whole(self.plain.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "position": dataclasses.asdict(self.position),
            "carry": ranks.gathered(self.carry, self.rows),
            "generators": ranks.stacked(torch.get_rng_state()),
            "generators_cuda": ranks.stacked(torch.cuda.get_rng_state(self.fabric.device)) if on_gpu else None,
        }
        if distributed.rank() == 0:
            checkpoint.save(self.fabric, self.folder, self.run.identity, state)

    def restore(self, other_code: Literal["warn", "refuse"]) -> None:
        """Goes to where the checkpoint is."""
        assert self.folder is not None
        state = checkpoint.load(self.fabric, self.folder, self.run.identity)
        try:
            at = Position(**state["position"])
            # Where nothing is done yet this network has all that is saved, and the first clips, which may not be.
            if at.samples or self.strategy is None:
                self.position = at
                self._take(state)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{checkpoint.path_in(self.folder)} does not fit this version of halfbyte ({error}). Start over."
            ) from error
        changes = self._changes()
        if changes and other_code == "refuse":
            raise checkpoint.CheckpointError(f"The checkpoint in {self.folder} is of another state: {changes}.")
        if changes and distributed.rank() == 0:
            warnings.warn(f"{self.run.name} goes on, but may end in other bits: {changes}.", stacklevel=3)

    def _take(self, state: dict[str, Any]) -> None:
        """Takes over what a checkpoint holds, however many ranks it is of."""
        device = self.fabric.device
        if self.run.fine_tune and self.position.epoch >= self.settings.epochs:
            self._fine_tune()
        ranks.load(self.plain, self.optimizer, state["model"], state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.carry = ranks.dealt([t.to(device) for t in state["carry"]])
        if len(state["generators"]) != distributed.ranks():
            self._part_ways()
            return
        # A copy: torch 2.13 crashes on a state that lies in the middle of another tensor's storage.
        torch.set_rng_state(state["generators"][distributed.rank()].clone())
        if state["generators_cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["generators_cuda"][distributed.rank()].clone(), device)

    def _changes(self) -> str:
        """Why the rest of a resumed run may differ from an unbroken run; empty where nothing has changed."""
        at, changes, threads = self.position, [], torch.get_num_threads()
        if record.source_sha256() not in at.sources:
            at.sources.append(record.source_sha256())
            changes.append("halfbyte's code has changed")
        versions = record.versions(self.task.packages)
        if at.versions and at.versions != versions:
            changes.append(f"versions have changed ({checkpoint.differences(versions, at.versions)})")
        at.versions = versions
        if at.threads != threads:
            changes.append(f"torch uses {threads} threads, not {at.threads}")
        if at.world_size != distributed.ranks():
            changes.append(f"the processes are {distributed.ranks()}, not {at.world_size}")
        return " and ".join(changes)

    def record(self, accelerator: str) -> Record:
        """The result, once every epoch is done."""
        network = self._whole()
        layers = str(summary(network)).splitlines()
        found = self._judge(network)
        ranks.fold_counts(self.plain)
        earlier = self.position.layers
        return self._record(found, [*earlier, "fine-tuning:", *layers] if earlier else layers, accelerator)

    def _record(self, found: Judgment, layers: list[str], accelerator: str) -> Record:
        """What there is to write of the run as it stands."""
        at, task, run = self.position, self.task, self.run
        return Record(
            task=run.task,
            recipe=run.recipe,
            seed=run.seed,
            size=run.size,
            model=run.model,
            metric=task.metric,
            value=found.value,
            further=dict(found.further),
            higher_is_better=task.higher_is_better,
            unit=task.unit,
            settings=run.identity["settings"],
            recipe_text=run.identity["recipe_text"],
            command=ranks.command(run.command(), self.strategy),
            curves=at.curves,
            seconds=at.train_seconds + at.test_seconds,
            samples_per_s=at.samples / at.train_seconds,
            saved_bytes=at.saved_bytes,
            **at.measured,
            layers=layers,
            nonfinite=dict(Counter(at.nonfinite) + Counter(_nonfinite(self.plain))),
            fine_tune=run.fine_tune,
            stash=run.stash,
            conventions=run.identity["conventions"],
            commit=self.commit,
            sources_sha256=at.sources,
            versions=at.versions,
            machine=record.machine(accelerator, kernels.describe(self.backend)) | ranks.described(self.strategy),
        )


def _as_it_is(state: Any) -> Any:
    return state


def _nonfinite(network: nn.Module) -> dict[str, int]:
    """How many tensors with NaN or infinity each quantizer met; only those that met any."""
    counts = {name: int(count) for name, count in network.named_buffers() if name.endswith("nonfinite")}
    return {name.removesuffix(".nonfinite"): count for name, count in counts.items() if count}
