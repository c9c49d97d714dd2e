"""Which run: its names, checked at birth, what it says while it goes on, and how it can end early."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import recipes
from ..errors import HalfbyteError, UnknownNameError
from ..own import fingerprint
from ..stash import BITS
from . import phases, tasks

__all__ = ["PROGRESS_NAME", "RECORD_NAME", "DivergedError", "Interrupted", "Progress", "Run", "Step"]

RECORD_NAME = "record.json"  # In the folder of a finished run.
PROGRESS_NAME = "progress.json"  # In the folder of one that goes on, from its first epoch's end to its record.


class DivergedError(HalfbyteError, RuntimeError):
    """The loss became NaN or infinite. The run has no result and writes no record."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the checkpoint is on the disk.

    It is no `HalfbyteError`, because nothing went wrong, and no ``except Exception`` should swallow it.

    Attributes:
        command: the command that goes on from here.
        signal_number: which signal it was.
    """

    def __init__(self, command: str, signal_number: int) -> None:
        self.command = command
        self.signal_number = signal_number
        super().__init__(f"Interrupted; a checkpoint is saved. Go on with: {command}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Which run: every name is checked at birth.

    Attributes:
        task: name of the task; ``module:task`` for one of your own.
        recipe: name of the recipe; ``module:recipe`` for one of your own.
        seed: of the initial weights and of the order of the data.
        size: name of the preset.
        model: name of the network; empty for the task's default.
        fine_tune: epochs in high precision after the ordinary ones, see `halfbyte.lab.phases`.
        stash: how what autograd saves is kept, see `halfbyte.convert`; empty for as torch keeps it.
    """

    task: str
    recipe: str
    seed: int
    size: str = "cpu"
    model: str = ""
    fine_tune: int = 0
    stash: str = ""

    def __post_init__(self) -> None:
        task = tasks.get(self.task)
        task.settings(self.size)
        recipes.find(self.recipe)
        object.__setattr__(self, "model", task.model_named(self.model or None, self.size))
        if self.stash and self.stash not in BITS:
            raise UnknownNameError("stash", self.stash, BITS)
        if self.seed < 0:
            raise HalfbyteError(f"seed={self.seed} was asked for; a seed is 0 or more.")
        if self.fine_tune < 0:
            raise HalfbyteError(
                f"fine_tune={self.fine_tune} was asked for; it is a number of epochs that follow, 0 or more."
            )

    @property
    def name(self) -> str:
        """A name for its folder: ``digits-cnn-cpu-luq-seed0``, or ``digits-cnn-cpu-luq-ft2-seed0`` with fine-tuning."""
        tuned = f"-ft{self.fine_tune}" if self.fine_tune else ""
        kept = f"-stash-{self.stash}" if self.stash else ""
        return f"{self.task}-{self.model}-{self.size}-{self.recipe}{tuned}{kept}-seed{self.seed}".replace(":", ".")

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be this run's: names, settings, conventions, your own code."""
        recipe = recipes.find(self.recipe)
        return {
            **dataclasses.asdict(self),
            # As a record or a checkpoint gives it back: JSON knows no tuples.
            "settings": json.loads(json.dumps(dataclasses.asdict(tasks.get(self.task).settings(self.size)))),
            "recipe_text": str(recipe),
            "conventions": phases.conventions(recipe, fine_tune=self.fine_tune) | fingerprint(self.task, self.recipe),
        }

    def command(self, *extra: str) -> list[str]:
        """The command line that makes this run, argument by argument."""
        words = ["halfbyte", "train", self.task, "--recipe", self.recipe, "--seed", str(self.seed)]
        tuned = ["--fine-tune", str(self.fine_tune)] if self.fine_tune else []
        kept = ["--stash", self.stash] if self.stash else []
        return [*words, "--size", self.size, "--model", self.model, *tuned, *kept, *extra]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a run tells whoever watches it, once a batch.

    Attributes:
        run: which run.
        done: batches done since the start of the run, those before a resume included.
        total: batches in the whole run.
        epoch: number of the current pass, from 1.
        epochs: passes in the whole run.
        loss: mean training loss of this epoch so far.
        score: the task's metric on this epoch's training data so far.
        samples_per_s: training examples in a second, over the whole run.
        network: as it is now, to look at and not to change; None in another process than the run's.
    """

    run: Run
    done: int
    total: int
    epoch: int
    epochs: int
    loss: float
    score: float
    samples_per_s: float
    network: nn.Module | None = field(default=None, repr=False)


Progress = Callable[[Step], None]
