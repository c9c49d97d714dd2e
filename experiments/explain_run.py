"""Records the run that the page of `halfbyte explain` replays: a small network learns the digits in four bits.

    python experiments/explain_run.py

The recipe is `article`: every layer's input and weight is stretched to -8...7 in every round, and gradients are
radix-4 FP4 in two phases. After some of the steps a copy of the network looks at ten digits, one of each class, and
learns from them; the codes that its layers make on the way are written down, and the copy is thrown away. So the run
ends in the same bits as if nobody had looked. The same network with the same seed also learns in float32.

Tensors are kept as one hexadecimal digit a code, in row-major order, a line for each look.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.lab import phases, record, tasks
from halfbyte.lab.data.source import Batch
from halfbyte.lab.guard import reproducible
from halfbyte.lab.models.digits import mlp
from halfbyte.lab.tasks import Settings
from halfbyte.ops import Plan
from halfbyte.watching import named_plans, watch

RECIPE, WIDTH, SEED = "article", 16, 0
TARGET = Path(__file__).resolve().parents[1] / "src" / "halfbyte" / "explain" / "run.json"
CLOSE = 16  # After so many steps the looks become rarer.
LOOKS = 56

Seen = dict[str, hb.QTensor]


class Recorder:
    """A watcher that keeps the last codes of every operand, by layer and slot: ``body.wgrad.grad_output``."""

    def __init__(self, network: nn.Module) -> None:
        self._names = {id(plan): name for name, plan in named_plans(network).items()}
        self.seen: Seen = {}

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Nothing is done around a layer's own work."""
        yield

    def operand(self, plan: Plan, slot: str, x: Tensor, parts: tuple[Any, ...]) -> None:
        """Keeps the codes."""
        (self.seen[f"{self._names[id(plan)]}.{slot}"],) = parts

    def product(self, *_: Any) -> None:
        """Products are not kept."""


@dataclass
class Run:
    """What a run leaves: the loss of every step, and at each look the accuracy, the answers and the codes."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    codes: list[Seen] = field(default_factory=list)


def looks(steps: int) -> list[int]:
    """After how many steps to look: all of the first, then at equal ratios, and after the last."""
    ratios = LOOKS - CLOSE - 1
    later = {round(CLOSE * (steps / CLOSE) ** (k / ratios)) for k in range(ratios + 1)} if steps > CLOSE else {steps}
    return sorted({*range(min(CLOSE, steps) + 1), *later})


def look(network: nn.Module, ten: Batch, batch_size: int) -> tuple[str, Seen]:
    """What the network answers for ten digits, and the codes with which it would learn from them."""
    tried = copy.deepcopy(network)
    recorder = Recorder(tried)
    with watch(tried, recorder) if named_plans(tried) else contextlib.nullcontext():
        logits = tried.train()(*ten.inputs)
        # The loss is a mean. Gradients are to be as large as in a batch of training, for which the scales are made.
        (torch.nn.functional.cross_entropy(logits, *ten.targets) * (ten.count / batch_size)).backward()
    return "".join(str(int(k)) for k in logits.argmax(dim=1)), recorder.seen


def accuracy(network: nn.Module, test: Batch) -> float:
    """The share of the test digits that are recognized, in percent."""
    with torch.no_grad():
        right = network.eval()(*test.inputs).argmax(dim=1) == test.targets[0]
    network.train()
    return 100 * float(right.double().mean())


def train(recipe: str, settings: Settings, ten: Batch, at: Sequence[int]) -> Run:
    """One run, looked at after the steps `at`."""
    task, run = tasks.get("digits"), Run()
    data = task.load_for(None, settings)
    (test,) = data.test.batches(len(data.test.inputs))

    def note(network: nn.Module) -> None:
        answers, seen = look(network, ten, settings.batch_size)
        run.answers.append(answers)
        run.codes.append(seen)
        run.accuracy.append(accuracy(network, test))

    with reproducible(SEED, torch.device("cpu")):
        network = phases.prepare(mlp(WIDTH), hb.RECIPES[recipe], SEED, "reference").train()
        optimizer = phases.optimizer(network, settings)
        each = data.train.count_batches(settings.batch_size)
        schedule = phases.schedule(optimizer, phases.ordinary(settings, each), each * settings.epochs)
        note(network)
        for epoch in range(settings.epochs):
            for batch in data.train.batches(settings.batch_size, seed=SEED, epoch=epoch):
                loss = task.learn(network, batch, (), settings).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                run.loss.append(float(loss.detach()))
                if len(run.loss) in at:
                    note(network)
    return run


def ten_digits(settings: Settings) -> Batch:
    """The first test digit of each class: the network never learns from them."""
    test = tasks.get("digits").load_for(None, settings).test
    rows = [int((test.targets == k).nonzero()[0]) for k in range(10)]
    return Batch((test.inputs[rows],), (test.targets[rows],), 10)


def tensor(codes: Sequence[hb.QTensor]) -> dict[str, Any]:
    """One operand over all looks: hexadecimal codes, and what is needed to read them."""
    first = codes[0]
    return {
        "format": first.format.name,
        "shape": list(first.shape),
        "scale": [nine(q.scale) for q in codes],
        "zero_point": None if first.zero_point is None else [nine(q.zero_point) for q in codes],
        "codes": ["".join(f"{code:x}" for code in q.codes().reshape(-1).tolist()) for q in codes],
    }


def nine(number: Any) -> float:
    """A number with the digits that tell one float32 from another."""
    return float(f"{float(number):.9g}")


def described(settings: Settings, at: Sequence[int], command: str) -> dict[str, Any]:
    """What was run."""
    return {
        "command": command,
        "commit": record.commit(),
        "seed": SEED,
        "recipe": RECIPE,
        "task": "digits",
        "network": f"mlp({WIDTH})",
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "steps": list(at),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Trains in four bits and in float32, and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=TARGET, help="the JSON file; without it the package's own")
    parser.add_argument("--epochs", type=int, help="passes over the data; without it those of the task")
    asked = parser.parse_args(argv)
    settings = tasks.get("digits").settings("cpu")
    epochs = settings.epochs if asked.epochs is None else asked.epochs
    settings = Settings(**(vars(settings) | {"epochs": epochs}))
    data = tasks.get("digits").load_for(None, settings)
    at, ten = looks(data.train.count_batches(settings.batch_size) * epochs), ten_digits(settings)
    run, plain = (train(recipe, settings, ten, at) for recipe in (RECIPE, "fp32"))
    command = "python experiments/explain_run.py" + ("" if asked.epochs is None else f" --epochs {asked.epochs}")
    written = {
        "about": described(settings, at, command),
        "classes": "".join(str(int(k)) for k in ten.targets[0]),
        "loss": [nine(x) for x in run.loss],
        "accuracy": [nine(x) for x in run.accuracy],
        "answers": run.answers,
        "fp32": {"loss": [nine(x) for x in plain.loss], "accuracy": [nine(x) for x in plain.accuracy]},
        "tensors": {name: tensor([seen[name] for seen in run.codes]) for name in run.codes[0]},
    }
    asked.out.write_text(json.dumps(written, indent=0, separators=(",", ":")) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
