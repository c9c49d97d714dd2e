"""Two small sequence models under every recipe: what do four bits cost in nats per character?

    python experiments/sequence_models.py --data-dir DIR [--models lstm,gpt] [--recipes all] [--seed 0] [--out FOLDER]

DIR holds tiny Shakespeare's ``input.txt`` (1,115,394 characters, 65 distinct); the first nine tenths are for training.
The models are a 2-layer LSTM and a 2-layer GPT (`halfbyte.lab.models.language`), each of width 128. Both read text:
a loss on text falls smoothly, so that its gap to fp32 means something at any point, while a synthetic task (copying,
adding) is learned at a sudden moment that depends on the luck of the seed. Whether the LSTM uses its memory is seen by
the bigram line: no model that knows only the last character can be below it.

Every recipe gets the same initial weights, the same batches and the same settings, which were chosen on fp32 alone.
Every layer but the output is under the recipe, also where the recipe itself would leave the first one alone: the first
layer with a GEMM comes after the embedding here. Softmax, norms, the state of the LSTM and the two attention products
are in float32. ``ibm2020_1x1_fp8`` and ``ibm2020_bottom_1x1_fp8`` are left out: without a convolution they are ibm2020.

Expected before the first run: in fp32 about 2.04 (LSTM) and 2.24 (GPT). The wide controls (bf16, fp8, int8) within 0.02
of that. Four bits within 0.1, the LSTM farther off than the GPT, because its state passes through four-bit codes at
every step and an error is carried on. At the end of the field the ablations that are there to be worse: one_phase,
loss_scale, radix2_130 and radix2_121.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.lab import record
from halfbyte.lab.guard import reproducible, weighing
from halfbyte.lab.models.language import GPT, LSTMModel
from halfbyte.lab.phases import conventions
from halfbyte.lab.record import Record

SETTINGS = {
    "lstm": {"steps": 200, "batch_size": 32, "context": 32, "learning_rate": 2e-2, "clip_norm": 1.0},
    "gpt": {"steps": 250, "batch_size": 32, "context": 32, "learning_rate": 3e-3, "clip_norm": 1.0},
}
TEST_WINDOWS = 512
LEFT_OUT = ("ibm2020_1x1_fp8", "ibm2020_bottom_1x1_fp8")


@functools.cache
def commit() -> dict[str, object]:
    """The revision of the code that runs: asked once, at the start, because the folder may move on meanwhile."""
    return record.commit()


def load(folder: Path) -> tuple[Tensor, Tensor, int]:
    """The characters as numbers: those for training, those for testing, and how many different ones there are."""
    path = folder / "input.txt"
    if not path.is_file():
        raise SystemExit(f"There is no {path}. --data-dir is the folder that holds tiny Shakespeare's input.txt.")
    text = path.read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    symbols = torch.tensor([numbers[character] for character in text])
    cut = len(symbols) * 9 // 10
    return symbols[:cut], symbols[cut:], len(numbers)


def batches(symbols: Tensor, settings: dict[str, float], seed: int) -> Iterator[Tensor]:
    """Windows of context + 1 characters at random places: the same ones for every recipe."""
    generator = torch.Generator().manual_seed(seed)
    length = int(settings["context"]) + 1
    for _ in range(int(settings["steps"])):
        starts = torch.randint(len(symbols) - length, (int(settings["batch_size"]),), generator=generator)
        yield symbols[starts[:, None] + torch.arange(length)]


def loss_of(model: nn.Module, window_NT: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each character but the first, given those before it in its window."""
    logits = model(window_NT[:, :-1])
    logits_NTV = logits[0] if isinstance(logits, tuple) else logits
    return F.cross_entropy(logits_NTV.flatten(0, 1), window_NT[:, 1:].flatten())


def test_loss(model: nn.Module, symbols: Tensor, context: int) -> float:
    """The same on windows from the start of the test text that do not overlap."""
    windows = symbols[: TEST_WINDOWS * (context + 1)].view(TEST_WINDOWS, context + 1)
    model.eval()
    with torch.no_grad():
        parts = [float(loss_of(model, part)) for part in windows.split(64)]
    model.train()
    return sum(parts) / len(parts)


def bigram_loss(train: Tensor, test: Tensor, vocabulary: int) -> float:
    """What knowing the last character alone is worth: conditional entropy in nats, counts of the training text + 1."""
    counts = torch.ones(vocabulary, vocabulary).index_put_(
        (train[:-1], train[1:]), torch.ones(len(train) - 1), accumulate=True
    )
    return float(F.nll_loss((counts / counts.sum(1, keepdim=True)).log()[test[:-1]], test[1:]))


def build(kind: str, recipe: hb.Recipe, vocabulary: int, settings: dict[str, float], seed: int) -> nn.Module:
    """A fresh model, every layer but the output under the recipe."""
    model = LSTMModel(vocabulary) if kind == "lstm" else GPT(vocabulary, context=int(settings["context"]))
    rules = [
        hb.Rule(fqn="head", recipe="fp32", why="output layer"),
        hb.Rule(fqn="*", recipe=recipe, why="every layer but the output"),
    ]
    return hb.convert(model, recipe, rules, seed=seed if recipe.random else None)


def run(kind: str, recipe: hb.Recipe, seed: int, data: tuple[Tensor, Tensor, int], command: list[str]) -> Record:
    """Trains one model under one recipe."""
    train, test, vocabulary = data
    settings = SETTINGS[kind]
    steps, context = int(settings["steps"]), int(settings["context"])
    curve: list[float] = []
    with reproducible(seed, torch.device("cpu")):
        model = build(kind, recipe, vocabulary, settings, seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=settings["learning_rate"])
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: min(1.0, (k + 1) / 20) * 0.5 * (1 + math.cos(math.pi * k / steps))
        )
        start, saved_bytes, recent = time.perf_counter(), 0, 0.0
        for step, window in enumerate(batches(train, settings, seed), start=1):
            if step == 1:
                with weighing(model) as kept:
                    loss = loss_of(model, window)
                saved_bytes = sum(kept)
            else:
                loss = loss_of(model, window)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
            optimizer.step()
            schedule.step()
            recent += float(loss.detach())
            if step % (steps // 8) == 0:
                curve.append(recent / (steps // 8))
                recent = 0.0
        train_seconds = time.perf_counter() - start
        value = test_loss(model, test, context)
    return Record(
        task="tinyshakespeare",
        recipe=recipe.name,
        seed=seed,
        size="smallest",
        model=kind,
        metric="loss",
        value=value,
        higher_is_better=False,
        unit="nats per character",
        settings=dict(settings),
        recipe_text=str(recipe),
        command=command,
        curves={"train_loss": curve},
        seconds=time.perf_counter() - start,
        samples_per_s=steps * settings["batch_size"] / train_seconds,
        saved_bytes=saved_bytes,
        layers=str(hb.summary(model)).splitlines(),
        conventions=conventions(recipe, fine_tune=0),
        commit=commit(),
        sources_sha256=[record.source_sha256()],
        versions=record.versions(),
        machine=record.machine(),
    )


def print_table(kind: str, results: dict[str, Record], bigram: float) -> None:
    """One line a recipe."""
    base = results.get("fp32")
    print(f"\n{kind}: loss on the test text in nats per character; a bigram table has {bigram:.3f}")
    print(f"{'recipe':<24} {'loss':>7} {'gap to fp32':>12} {'kept':>6} {'time':>6}   (times and bytes as a multiple)")
    for name, result in results.items():
        gap = f"{result.value - base.value:+.3f}" if base else "-"
        kept = f"{result.saved_bytes / base.saved_bytes:.2f}" if base else "-"
        slower = f"{result.seconds / base.seconds:.1f}" if base else "-"
        print(f"{name:<24} {result.value:>7.3f} {gap:>12} {kept:>6} {slower:>6}")


def main() -> int:
    """Runs what is asked and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with input.txt")
    parser.add_argument("--models", default="lstm,gpt")
    parser.add_argument("--recipes", default="all", help="names with commas between them, or all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="folder for the records; those of the same code there are not repeated"
    )
    arguments = parser.parse_args()
    names = list(hb.RECIPES) if arguments.recipes == "all" else arguments.recipes.split(",")
    commit(), record.source_sha256()  # both remember
    data = load(arguments.data_dir)
    diverged = False
    for kind in arguments.models.split(","):
        results: dict[str, Record] = {}
        for name in names:
            if arguments.recipes == "all" and name in LEFT_OUT:
                continue
            command = ["python", "experiments/sequence_models.py", "--data-dir", "DIR"]
            command += ["--models", kind, "--recipes", name, "--seed", str(arguments.seed)]
            path = arguments.out / f"{kind}-{name}-seed{arguments.seed}.json" if arguments.out else None
            if path and path.exists() and record.read(path).sources_sha256 == [record.source_sha256()]:
                results[name] = record.read(path)
                continue
            result = run(kind, hb.RECIPES[name], arguments.seed, data, command)
            if not math.isfinite(result.value):
                print(f"{kind} {name} diverged: its loss is {result.value}", file=sys.stderr)
                diverged = True
                continue
            print(f"{kind} {name}: {result.value:.3f} in {result.seconds:.0f} s", file=sys.stderr)
            results[name] = result
            if path:
                record.write(result, path)
        print_table(kind, results, bigram_loss(*data))
    return int(diverged)


if __name__ == "__main__":
    logging.getLogger("halfbyte").setLevel(logging.ERROR)
    sys.exit(main())
