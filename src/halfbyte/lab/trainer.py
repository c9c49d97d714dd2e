"""One run: a task, a recipe, a seed; the same bits every time.

The loop is an ordinary PyTorch loop through Lightning Fabric, which brings the device and the checkpoint. Nothing in it
depends on the recipe: weights, order of the data, optimizer and learning rate are those of the seed and the task. Where
fine-tuning is asked for, it follows as a second phase with its own formats, optimizer and learning rate (`phases`).

Same seed, same bits holds on one machine with one number of threads. It holds across interruptions too: Ctrl-C (or
SIGTERM) writes a checkpoint at the batch that it met, a kill loses what came after the last epoch, and the resumed run
ends with the weights that an unbroken run would have had.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Literal

import torch
from lightning_fabric import Fabric

from .. import distributed, kernels
from ..errors import HalfbyteError
from . import checkpoint, ranks, record
from .guard import reproducible, signals
from .loop import Loop
from .record import Record
from .run import PROGRESS_NAME, RECORD_NAME, Interrupted, Progress, Run

__all__ = ["chosen_backend", "train"]


def train(
    task: str,
    recipe: str,
    seed: int,
    *,
    size: str = "cpu",
    model: str | None = None,
    fine_tune: int = 0,
    stash: str = "",
    data_dir: Path | None = None,
    out_dir: Path | None = None,
    resume: Path | None = None,
    accelerator: str = "cpu",
    backend: str = "auto",
    strategy: str | None = None,
    progress: Progress | None = None,
    other_code: Literal["warn", "refuse"] = "warn",
) -> Record:
    """Trains one network under one recipe.

    Inside `halfbyte.lab.ranks.joined` all processes call this with the same arguments and train it together.

    Args:
        task: a name in `halfbyte.lab.tasks.TASKS`, or ``module:task`` for one of your own.
        recipe: a name in `halfbyte.RECIPES`, or ``module:recipe`` for one of your own.
        seed: of the initial weights and of the order of the data; the same for every recipe.
        size: a preset of the task: ``smoke``, ``cpu`` or ``full``.
        model: a network of the task; None for its default.
        fine_tune: epochs in high precision after the ordinary ones, see `halfbyte.lab.phases`.
        stash: how what autograd saves is kept, see `halfbyte.convert`; empty for as torch keeps it.
        data_dir: folder with a folder for each data set; None is enough for the digits.
        out_dir: folder for the checkpoint and ``record.json``; None keeps nothing on the disk.
        resume: folder of an interrupted run that goes on there. A finished one is returned as it is.
        accelerator: Lightning Fabric's name of the device: ``cpu``, ``cuda``, ``mps`` or ``auto``.
        backend: who computes four bits, see `halfbyte.convert`; the bits are the same. ``auto`` is ``native`` where its
            library is there and the run is on the CPU.
        strategy: how several processes share the work, ``ddp`` or ``fsdp2`` (`halfbyte.lab.ranks.STRATEGIES`); None is
            ``ddp`` where there are several.
        progress: called after every batch.
        other_code: what to do with a checkpoint of other code or another number of threads, from which the run may
            end in other bits.

    Returns:
        The record of the run, which is also in the folder: of several processes the first one's, on each.

    Raises:
        UnknownNameError: if there is no such task, recipe, size or network.
        UnsupportedError: if the backend is ``native`` and its library is absent.
        HalfbyteError: if ``out_dir`` already holds a run, there is no such accelerator, data is missing or damaged, or
            a strategy is given to one process alone.
        WriteError: if the disk is full; what was saved before is whole.
        LostRankError: if another process of the run has ended or does not answer.
        CheckpointError: if ``resume`` holds no checkpoint, a damaged one, or that of another run.
        DivergedError: if the loss stops being a finite number.
        Interrupted: on Ctrl-C or SIGTERM, after the checkpoint is written.
    """
    run = Run(task=task, recipe=recipe, seed=seed, size=size, model=model or "", fine_tune=fine_tune, stash=stash)
    if out_dir is not None and resume is not None:
        raise HalfbyteError(
            f"Both out_dir={out_dir} and resume={resume} were given; a resumed run stays in its folder."
        )
    folder, strategy = resume or out_dir, ranks.chosen(strategy)
    # Rank 0 looks, and the others follow: at once it may write what they would find.
    if ranks.first(out_dir is not None and (checkpoint.path_in(out_dir).exists() or (out_dir / RECORD_NAME).exists())):
        raise HalfbyteError(
            f"{out_dir} already holds a run. Go on with it (--resume {out_dir}) or choose another folder."
        )
    if resume is not None and ranks.first((resume / RECORD_NAME).exists()):
        return _finished(run, resume / RECORD_NAME)
    if accelerator != "cpu":
        # CUDA's matrix library is reproducible only with a fixed workspace, and reads this when it first starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        fabric = Fabric(accelerator=accelerator, devices=_devices(accelerator, strategy), precision="32-true")
    except (ValueError, RuntimeError, ImportError) as error:
        raise HalfbyteError(
            f"The accelerator {accelerator!r} cannot be used here ({error}). Possible: cpu, auto, and cuda or mps "
            "where there is one."
        ) from error
    extra = [] if accelerator == "cpu" else ["--accelerator", accelerator]
    extra += [] if backend == "auto" else ["--backend", backend]
    extra += [] if data_dir is None else ["--data-dir", str(data_dir)]
    extra += [] if folder is None else ["--resume", str(folder)]
    command = shlex.join(ranks.command(run.command(*extra), strategy))
    go_on = f"Its checkpoint is whole. Go on, with any number of processes, by: {command}"
    with (
        ranks.noticing("It kept no checkpoint; start it again." if folder is None else go_on),
        reproducible(seed, fabric.device),
        signals(heard=folder is not None) as received,
    ):
        loop = Loop(run, fabric, folder, data_dir, chosen_backend(backend, accelerator), strategy)
        if resume is not None:
            loop.restore(other_code)
        elif folder is not None:
            loop.save()
        for step in loop.steps():
            if progress is not None:
                progress(step)
            if folder is None:
                continue
            number = ranks.most(received[0] if received else 0)
            if number:
                loop.save()
                raise Interrupted(command, number)
        result = ranks.first(loop.record(accelerator))
        if folder is not None and distributed.rank() == 0:
            with checkpoint.writing(folder / RECORD_NAME):
                record.write(result, folder / RECORD_NAME)
                (folder / PROGRESS_NAME).unlink(missing_ok=True)
        ranks.first(None)  # The others go on when the record is there.
    return result


def _devices(accelerator: str, strategy: str | None) -> int | list[int]:
    """What Fabric takes: one device, on CUDA each rank its own."""
    several = strategy is not None and accelerator != "cpu" and torch.cuda.is_available()
    return [torch.cuda.current_device()] if several else 1


def chosen_backend(name: str, accelerator: str) -> str:
    """The backend's own name: for ``auto`` the fastest one there is for tensors on that accelerator."""
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    return kernels.resolve(name) if on_cpu or name != "auto" else "reference"


def _finished(run: Run, path: Path) -> Record:
    """The record of a run that is to be resumed although it is done, if it is that run's."""
    done = record.read(path)
    identity = run.identity
    different = checkpoint.differences(identity, {key: getattr(done, key) for key in identity})
    if different:
        raise HalfbyteError(f"{path} is the record of another run ({different}). Name that run, or another folder.")
    return done
