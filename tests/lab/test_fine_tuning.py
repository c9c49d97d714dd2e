"""A run with a second phase: the same bits every time, stopped in either phase or between them."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from lightning_fabric import Fabric

from halfbyte.cli import main
from halfbyte.errors import HalfbyteError
from halfbyte.lab import checkpoint, guard, phases, record
from halfbyte.lab.compare import compare
from halfbyte.lab.console import comparison_table
from halfbyte.lab.loop import Loop
from halfbyte.lab.run import Interrupted, Run
from halfbyte.lab.trainer import train

RECIPES = ["fp32", "ibm2020", "luq"]
PER_EPOCH = 23  # ceil(1438 / 64) batches; smoke has two epochs.
BOUNDARY, BATCHES = 2 * PER_EPOCH, 3 * PER_EPOCH
TUNED = {"size": "smoke", "model": "mlp", "fine_tune": 1}


def end(folder):
    """Everything that a run ends with, as bytes and numbers that can be compared."""
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    model = {name: (t.dtype, t.contiguous().view(-1).view(torch.uint8).tolist()) for name, t in saved["model"].items()}
    steps = [{k: torch.as_tensor(v).tolist() for k, v in s.items()} for s in saved["optimizer"]["state"].values()]
    return model, steps, saved["schedule"]["last_epoch"], saved["position"]["curves"]


def stop_at(batch):
    def watch(step):
        if step.done == batch:
            os.kill(os.getpid(), signal.SIGINT)

    return watch


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run of each recipe: its folder and record."""
    root = tmp_path_factory.mktemp("tuned")
    return {name: (root / name, train("digits", name, 1, out_dir=root / name, **TUNED)) for name in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_phase_is_an_ordinary_run(recipe, unbroken):
    """The epochs before fine-tuning are those of a run without it, and one epoch follows."""
    plain = train("digits", recipe, 1, size="smoke", model="mlp")
    for name, curve in unbroken[recipe][1].curves.items():
        assert curve[:2] == plain.curves[name]
        assert len(curve) == 3


@pytest.mark.parametrize("batch", [10, BOUNDARY, BOUNDARY + 1, 60, BATCHES])
@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_run_ends_in_the_same_bits(recipe, batch, unbroken, tmp_path):
    """Ctrl-C in either phase, at the batch between them or after it, resumed, ends as if unbroken."""
    with pytest.raises(Interrupted) as stop:
        train("digits", recipe, 1, out_dir=tmp_path, progress=stop_at(batch), **TUNED)
    assert f"--model mlp --fine-tune 1 --resume {tmp_path}" in stop.value.command
    steps = []
    resumed = train("digits", recipe, 1, resume=tmp_path, progress=steps.append, **TUNED)
    assert [step.done for step in steps] == list(range(batch + 1, BATCHES + 1))
    folder, first = unbroken[recipe]
    assert end(tmp_path) == end(folder)
    assert (resumed.value, resumed.curves, resumed.layers) == (first.value, first.curves, first.layers)


def test_killed_run_ends_in_the_same_bits(unbroken, tmp_path):
    """kill -9 in the second phase, resumed from the end of the first, ends as if unbroken."""
    script = f"""
        import os, signal
        from pathlib import Path
        from halfbyte.lab.trainer import train

        def watch(step):
            if step.done == {BOUNDARY + 5}:
                os.kill(os.getpid(), signal.SIGKILL)

        train("digits", "ibm2020", 1, out_dir=Path({str(tmp_path)!r}), progress=watch, **{TUNED!r})
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    steps = []
    train("digits", "ibm2020", 1, resume=tmp_path, progress=steps.append, **TUNED)
    assert steps[0].done == BOUNDARY + 1
    assert end(tmp_path) == end(unbroken["ibm2020"][0])


def test_the_optimizer_starts_anew(tmp_path):
    """Between the phases the optimizer has no state, and the learned clip of the inputs is no parameter any more."""
    with pytest.raises(Interrupted):
        train("digits", "ibm2020", 1, out_dir=tmp_path, progress=stop_at(BOUNDARY), **TUNED)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["optimizer"]["state"] == {}
    assert not [name for name in saved["model"] if "plan.input" in name]


def loop_of(recipe, fine_tune):
    fabric = Fabric(accelerator="cpu", devices=1)
    run = Run(task="digits", recipe=recipe, seed=1, size="smoke", model="mlp", fine_tune=fine_tune)
    return Loop(run, fabric, None, None, "reference")


@pytest.mark.parametrize("recipe", ["fp32", "ibm2020"])
def test_learning_rates(recipe, monkeypatch):
    """Each batch is learned at its place on the cosine and then on the triangle, whatever the recipe."""
    rates = []
    original = Loop._train_on

    def watch(self, batch):
        rates.append(self.optimizer.param_groups[0]["lr"])
        original(self, batch)

    monkeypatch.setattr(Loop, "_train_on", watch)
    with guard.reproducible(1, torch.device("cpu")):
        for _ in loop_of(recipe, 1).steps():
            pass
    peak = 3e-3
    assert rates[:BOUNDARY] == [peak * phases.cosine(k, BOUNDARY) for k in range(BOUNDARY)]
    assert rates[BOUNDARY:] == [peak * phases.triangle(k, PER_EPOCH) for k in range(PER_EPOCH)]


def test_broken_tensors_of_both_phases_are_counted():
    """The record counts the tensors with NaN that a quantizer met before its state was dropped."""
    with guard.reproducible(1, torch.device("cpu")):
        loop = loop_of("ibm2020", 1)
        for step in loop.steps():
            if step.done in (10, BOUNDARY + 10):
                counts = dict(loop.plain.named_buffers())
                counts["body.plan.weight.nonfinite"] += 1
                if step.done == 10:
                    counts["body.plan.input.nonfinite"] += 1
        done = loop.record("cpu")
    # The weight's quantizer keeps its own count over the switch; the input's is gone with the quantizer.
    assert done.nonfinite == {"body.plan.weight": 2, "body.plan.input": 1}


def test_record_tells_both_phases(unbroken):
    """The record holds both tables, the number of epochs, the conventions of both recipes, and its command."""
    done = unbroken["luq"][1]
    assert done.fine_tune == 1
    assert done.command[-2:] == ["--fine-tune", "1"]
    middle = done.layers.index("fine-tuning:")
    body = [line for line in done.layers if line.startswith("body")]
    assert [line.split()[2] for line in body] == ["luq", "luq_fine_tuning"]
    assert done.layers.index(body[0]) < middle < done.layers.index(body[1])
    assert {"luq", "luq_fine_tuning"} <= done.conventions.keys()


def test_number_of_epochs_is_part_of_the_run(unbroken, tmp_path):
    """Resuming with another number of fine-tuning epochs is refused, unfinished or finished; so is a negative one."""
    folder = unbroken["fp32"][0]
    (tmp_path / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
    with pytest.raises(checkpoint.CheckpointError, match="fine_tune: asked 2, there 1"):
        train("digits", "fp32", 1, resume=tmp_path, **TUNED | {"fine_tune": 2})
    with pytest.raises(HalfbyteError, match=r"is the record of another run .*fine_tune: asked"):
        train("digits", "fp32", 1, resume=folder, **TUNED | {"fine_tune": 0})
    with pytest.raises(HalfbyteError, match="fine_tune=-1 was asked for"):
        train("digits", "fp32", 1, **TUNED | {"fine_tune": -1})


def test_comparison_fine_tunes_every_recipe(tmp_path):
    """Every run of a comparison gets the phase, in a folder of its own, and the table says so."""
    result = compare("digits", ["fp32", "ibm2020"], [0], out_dir=tmp_path, **TUNED)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "digits-mlp-smoke-fp32-ft1-seed0",
        "digits-mlp-smoke-ibm2020-ft1-seed0",
    ]
    assert [len(r.curves["train_loss"]) for r in result.records] == [3, 3]
    assert "1 epoch of fine-tuning" in str(comparison_table(result).caption)
    assert record.read(tmp_path / "digits-mlp-smoke-fp32-ft1-seed0" / "record.json").fine_tune == 1


def test_commands_fine_tune(tmp_path, monkeypatch, capsys):
    """`train` and `compare` pass the number of epochs on, and a negative one is refused with status 2."""
    monkeypatch.chdir(tmp_path)
    options = ["--size", "smoke", "--model", "mlp", "--fine-tune", "1"]
    assert main(["train", "digits", "--recipe", "ibm2020", *options]) == 0
    assert record.read(tmp_path / "runs" / "digits-mlp-smoke-ibm2020-ft1-seed0" / "record.json").fine_tune == 1
    assert main(["compare", "digits", "--recipes", "ibm2020", "--seeds", "1", *options]) == 0
    assert "digits-mlp-smoke-ibm2020-ft1-seed0 is done already" in capsys.readouterr().out
    assert main(["train", "digits", "--recipe", "ibm2020", *options[:-1], "-1"]) == 2
