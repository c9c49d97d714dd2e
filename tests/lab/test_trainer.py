"""One run: the same bits every time, stopped or not."""

import contextlib
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from halfbyte import kernels
from halfbyte.errors import HalfbyteError, UnknownNameError, UnsupportedError
from halfbyte.kernels import native
from halfbyte.lab import checkpoint, guard, record, tasks, trainer
from halfbyte.lab.loop import Loop
from halfbyte.lab.run import DivergedError, Interrupted, Run
from halfbyte.lab.trainer import train

RECIPES = ["fp32", "ibm2020"]
BATCHES = 46  # smoke: 2 epochs of ceil(1438 / 64) batches.


def end(folder: Path) -> dict:
    """Everything that a run ends with: weights and quantizer state, optimizer, curves."""
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    return {"model": saved["model"], "optimizer": saved["optimizer"], "curves": saved["position"]["curves"]}


def assert_same_bits(a, b):
    """Equal structure, equal numbers, every tensor equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run of each recipe: its folder and record."""
    root = tmp_path_factory.mktemp("unbroken")
    return {name: (root / name, train("digits", name, 1, size="smoke", out_dir=root / name)) for name in RECIPES}


def stop_at(batch: int, number: signal.Signals):
    def watch(step):
        if step.done == batch:
            os.kill(os.getpid(), number)

    return watch


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_seed_same_bits(recipe, unbroken, tmp_path):
    """Two runs with one seed end in the same weights, optimizer state and curves."""
    again = train("digits", recipe, 1, size="smoke", out_dir=tmp_path)
    folder, first = unbroken[recipe]
    assert_same_bits(end(tmp_path), end(folder))
    assert again.value == first.value


@pytest.mark.skipif(not native.available(), reason="no compiled library")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_backends_end_in_the_same_bits(backend, unbroken, tmp_path):
    """Whoever computes, the run ends in the same bits, and the record says who it was."""
    result = train("digits", "ibm2020", 1, size="smoke", out_dir=tmp_path, backend=backend)
    assert_same_bits(end(tmp_path), end(unbroken["ibm2020"][0]))
    assert result.machine["backend"] == kernels.describe(backend)


def test_the_fastest_backend_is_the_default(unbroken):
    """Without a choice a run on the CPU uses the native backend where there is one."""
    assert unbroken["ibm2020"][1].machine["backend"] == kernels.describe(kernels.resolve("auto"))
    assert trainer.chosen_backend("auto", "cuda") == "reference"


@pytest.mark.parametrize(("gpu", "expected"), [(True, "reference"), (False, kernels.resolve("auto"))])
def test_an_accelerator_that_is_not_there_is_the_cpu(gpu, expected, monkeypatch):
    """Where Fabric would find no accelerator by itself the run is on the CPU, and its backend too."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    assert trainer.chosen_backend("auto", "auto") == expected


def test_an_absent_backend_is_an_error(monkeypatch):
    """A backend that is asked for by name is not replaced by another."""
    monkeypatch.setattr(native.library, "_load", lambda: "not built")
    with pytest.raises(UnsupportedError, match="native backend is absent: not built"):
        train("digits", "ibm2020", 1, size="smoke", backend="native")


def test_a_stash_acts_and_is_recorded(unbroken, tmp_path):
    """With a stash less is kept, the record says so, and a run that is stopped and goes on ends in the same bits."""
    how = {"size": "smoke", "stash": "int4"}
    done = train("digits", "ibm2020", 1, out_dir=tmp_path / "whole", **how)
    assert done.stash == "int4"
    assert done.command[-2:] == ["--stash", "int4"]
    assert done.saved_bytes < 0.3 * unbroken["ibm2020"][1].saved_bytes
    with pytest.raises(Interrupted):
        train("digits", "ibm2020", 1, out_dir=tmp_path / "cut", progress=stop_at(30, signal.SIGINT), **how)
    train("digits", "ibm2020", 1, resume=tmp_path / "cut", **how)
    assert_same_bits(end(tmp_path / "cut"), end(tmp_path / "whole"))
    with pytest.raises(UnknownNameError, match="Possible: int4, int8"):
        train("digits", "ibm2020", 1, stash="int5")


def test_another_seed_another_run(unbroken):
    """The seed acts: another one ends with other curves."""
    assert train("digits", "fp32", 2, size="smoke").curves != unbroken["fp32"][1].curves


def test_recipe_acts(unbroken):
    """The recipe acts: four bits leave other curves than 32, and keep fewer bytes for backward."""
    four, wide = unbroken["ibm2020"][1], unbroken["fp32"][1]
    assert four.curves != wide.curves
    assert four.saved_bytes < wide.saved_bytes
    assert four.layers != wide.layers


@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_recipes_share_initial_weights(model):
    """Before the first step every recipe has the same weights, bit for bit."""
    states = []
    for recipe in RECIPES:
        fabric = Fabric(accelerator="cpu", devices=1)
        with guard.reproducible(3, fabric.device):
            loop = Loop(
                Run(task="digits", recipe=recipe, seed=3, size="smoke", model=model), fabric, None, None, "reference"
            )
        states.append(loop.plain.state_dict())
    shared = states[0].keys()
    assert shared <= states[1].keys()
    assert_same_bits({k: states[0][k] for k in shared}, {k: states[1][k] for k in shared})


@pytest.mark.parametrize("batch", [1, 10, 23, 30, BATCHES])
@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_run_ends_in_the_same_bits(recipe, batch, unbroken, tmp_path):
    """Ctrl-C at any batch (the first, mid-epoch, an epoch's last, the very last), resumed, ends as if unbroken."""
    with pytest.raises(Interrupted) as stop:
        train("digits", recipe, 1, size="smoke", out_dir=tmp_path, progress=stop_at(batch, signal.SIGINT))
    assert not (tmp_path / "record.json").exists()
    arguments = f"train digits --recipe {recipe} --seed 1 --size smoke --model cnn --resume {tmp_path}"
    assert stop.value.command == f"halfbyte {arguments}"
    steps = []
    resumed = train("digits", recipe, 1, size="smoke", resume=tmp_path, progress=steps.append)
    assert [step.done for step in steps] == list(range(batch + 1, BATCHES + 1))
    folder, first = unbroken[recipe]
    assert_same_bits(end(tmp_path), end(folder))
    assert (resumed.value, resumed.curves) == (first.value, first.curves)
    assert resumed.saved_bytes == first.saved_bytes
    assert record.read(tmp_path / "record.json") == resumed


def test_generator_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A network that draws random numbers itself (dropout) also ends in the same bits after an interruption."""
    digits = tasks.get("digits")

    def with_dropout(data, settings):
        return nn.Sequential(digits.models["mlp"](data, settings), nn.Dropout(0.5))

    task = dataclasses.replace(digits, models=MappingProxyType({"cnn": with_dropout}))
    monkeypatch.setattr(tasks, "TASKS", {"digits": task})
    train("digits", "fp32", 1, size="smoke", out_dir=tmp_path / "unbroken")
    broken = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train("digits", "fp32", 1, size="smoke", out_dir=broken, progress=stop_at(9, signal.SIGINT))
    train("digits", "fp32", 1, size="smoke", resume=broken)
    assert_same_bits(end(broken), end(tmp_path / "unbroken"))


def test_interrupted_twice(unbroken, tmp_path):
    """A resumed run can be interrupted again, by SIGTERM too, in the same epoch."""
    with pytest.raises(Interrupted):
        train("digits", "fp32", 1, size="smoke", out_dir=tmp_path, progress=stop_at(5, signal.SIGINT))
    with pytest.raises(Interrupted) as stop:
        train("digits", "fp32", 1, size="smoke", resume=tmp_path, progress=stop_at(9, signal.SIGTERM))
    assert stop.value.signal_number == signal.SIGTERM
    train("digits", "fp32", 1, size="smoke", resume=tmp_path)
    assert_same_bits(end(tmp_path), end(unbroken["fp32"][0]))


@pytest.mark.parametrize(("recipe", "batch"), [("fp32", 7), ("ibm2020", 30)])
def test_killed_run_ends_in_the_same_bits(recipe, batch, unbroken, tmp_path):
    """kill -9 in the first or second epoch, resumed from the last checkpoint, ends as if unbroken."""
    script = f"""
        import os, signal
        from pathlib import Path
        from halfbyte.lab.trainer import train

        def watch(step):
            if step.done == {batch}:
                os.kill(os.getpid(), signal.SIGKILL)

        train("digits", {recipe!r}, 1, size="smoke", out_dir=Path({str(tmp_path)!r}), progress=watch)
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    steps = []
    train("digits", recipe, 1, size="smoke", resume=tmp_path, progress=steps.append)
    assert steps[0].done == (batch // 23) * 23 + 1
    assert_same_bits(end(tmp_path), end(unbroken[recipe][0]))


def test_interrupted_save_keeps_the_previous_checkpoint(unbroken, tmp_path, monkeypatch):
    """A save that dies in the middle leaves the checkpoint before it whole."""
    folder = unbroken["fp32"][0]
    good = (folder / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(good)

    def half(self, path, state):
        path.write_bytes(good[:1000])
        raise OSError("disk full")

    monkeypatch.setattr(Fabric, "save", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(Fabric(accelerator="cpu", devices=1), tmp_path, {}, {})
    assert (tmp_path / "last.ckpt").read_bytes() == good


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """One bit of a weight: the middle of the file is tensor storage."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b"", lambda _: pickle.dumps({"a": 1})])
def test_damaged_checkpoint_is_refused(damage, unbroken, tmp_path):
    """A checkpoint that is cut, empty, foreign or has one bit flipped is refused with the cure."""
    data = (unbroken["fp32"][0] / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(damage(data))
    with pytest.raises(checkpoint.CheckpointError, match=r"is damaged or no checkpoint.*To start over, delete"):
        train("digits", "fp32", 1, size="smoke", resume=tmp_path)


def test_foreign_torch_file_is_refused(tmp_path):
    """A PyTorch file that is no checkpoint of ours is refused as such."""
    torch.save({"weight": torch.zeros(2)}, tmp_path / "last.ckpt")
    with pytest.raises(checkpoint.CheckpointError, match="not a 'halfbyte checkpoint 1'"):
        train("digits", "fp32", 1, size="smoke", resume=tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"recipe": "bf16"}, "recipe: asked 'bf16', there 'fp32'"),
        ({"seed": 2}, "seed: asked 2, there 1"),
        ({"size": "cpu"}, "size: asked 'cpu', there 'smoke'"),
        ({"model": "mlp"}, "model: asked 'mlp', there 'cnn'"),
    ],
)
def test_checkpoint_of_another_run_is_refused(change, text, unbroken, tmp_path):
    """Resuming with another recipe, seed, size or model is refused, and the text says what differs."""
    (tmp_path / "last.ckpt").write_bytes((unbroken["fp32"][0] / "last.ckpt").read_bytes())
    asked = {"task": "digits", "recipe": "fp32", "seed": 1, "size": "smoke", "resume": tmp_path} | change
    with pytest.raises(checkpoint.CheckpointError, match=text):
        train(**asked)
    with pytest.raises(HalfbyteError, match="is the record of another run"):
        train(**asked | {"resume": unbroken["fp32"][0]})


def test_a_refusal_tells_both_values_of_the_setting_that_differs():
    """Of settings, only those that differ are named, each with what was asked and what is there."""
    asked, there = ({"settings": {"epochs": epochs, "batch_size": 64}} for epochs in (2, 3))
    assert checkpoint.differences(asked, there) == "settings: not the same epochs (asked 2, there 3)"


def test_nothing_to_resume(tmp_path):
    """An empty folder cannot be resumed."""
    with pytest.raises(checkpoint.CheckpointError, match="There is no checkpoint to resume"):
        train("digits", "fp32", 1, size="smoke", resume=tmp_path)


def test_finished_run_is_not_repeated(unbroken):
    """Resuming a finished run returns its record without a single step."""
    folder, first = unbroken["fp32"]
    steps = []
    assert train("digits", "fp32", 1, size="smoke", resume=folder, progress=steps.append) == first
    assert steps == []


def test_folder_with_a_run_is_not_overwritten(unbroken):
    """A new run refuses a folder that holds one."""
    with pytest.raises(HalfbyteError, match=r"already holds a run\. Go on with it"):
        train("digits", "fp32", 1, size="smoke", out_dir=unbroken["fp32"][0])


def test_out_dir_and_resume_exclude_each_other(tmp_path):
    """Two folders for one run are refused."""
    with pytest.raises(HalfbyteError, match="a resumed run stays in its folder"):
        train("digits", "fp32", 1, out_dir=tmp_path, resume=tmp_path)


@pytest.mark.parametrize("other_code", ["warn", "refuse"])
def test_other_code_is_noticed(other_code, tmp_path, monkeypatch):
    """A checkpoint of other code is resumed with a warning and both fingerprints in the record, or refused."""
    with pytest.raises(Interrupted):
        train("digits", "fp32", 1, size="smoke", out_dir=tmp_path, progress=stop_at(40, signal.SIGINT))
    before = record.source_sha256()
    monkeypatch.setattr(record, "source_sha256", lambda: "other")
    if other_code == "refuse":
        with pytest.raises(checkpoint.CheckpointError, match="halfbyte's code has changed"):
            train("digits", "fp32", 1, size="smoke", resume=tmp_path, other_code="refuse")
        return
    with pytest.warns(UserWarning, match="may end in other bits: halfbyte's code has changed"):
        result = train("digits", "fp32", 1, size="smoke", resume=tmp_path)
    assert result.sources_sha256 == [before, "other"]


def test_other_versions_are_noticed(tmp_path, monkeypatch):
    """A checkpoint made with another version of a package is refused where other bits are, and says both versions."""
    with pytest.raises(Interrupted):
        train("digits", "fp32", 1, size="smoke", out_dir=tmp_path, progress=stop_at(40, signal.SIGINT))
    before = record.versions()
    monkeypatch.setattr(record, "versions", lambda _packages=(): before | {"torch": "9.0"})
    with pytest.raises(checkpoint.CheckpointError, match=r"versions have changed \(torch: asked '9\.0', there '2\."):
        train("digits", "fp32", 1, size="smoke", resume=tmp_path, other_code="refuse")


def test_unknown_names_suggest():
    """A misspelt recipe is refused before anything runs, with the nearest right one."""
    with pytest.raises(UnknownNameError, match="Did you mean 'ibm2020'"):
        train("digits", "ibm202", 0)
    with pytest.raises(HalfbyteError, match="seed=-1 was asked for"):
        train("digits", "fp32", -1)


def test_diverged_run_leaves_no_record(tmp_path, monkeypatch):
    """A loss that is not finite stops the run, says where, and writes no record."""
    digits = tasks.get("digits")
    wild = dataclasses.replace(digits.settings("smoke"), optimizer="sgd", learning_rate=1e30)
    task = dataclasses.replace(digits, sizes=MappingProxyType({"smoke": wild}))
    monkeypatch.setattr(tasks, "TASKS", {"digits": task})
    with pytest.raises(DivergedError, match=r"training loss became (nan|inf) in epoch 1, batch [23]\b"):
        train("digits", "fp32", 0, size="smoke", model="mlp", out_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_test_loss_must_be_finite_too(monkeypatch):
    """Logits that are NaN on the test data are no accuracy of ten percent but a diverged run."""
    digits = tasks.get("digits")

    def load(folder):
        data = digits.load(folder)
        broken = dataclasses.replace(data.test, inputs=data.test.inputs * float("nan"))
        return dataclasses.replace(data, test=broken)

    monkeypatch.setattr(tasks, "TASKS", {"digits": dataclasses.replace(digits, load=load)})
    with pytest.raises(DivergedError, match="test loss became nan in epoch 1"):
        train("digits", "fp32", 0, size="smoke", model="mlp")


def test_caller_keeps_generator_handlers_and_choices(tmp_path):
    """A run, finished or interrupted, leaves torch's generator and determinism and the signal handlers as they were."""
    torch.manual_seed(9)
    before = torch.get_rng_state(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for batch in (5, 10**9):
        with contextlib.suppress(Interrupted):
            progress = stop_at(batch, signal.SIGINT)
            train("digits", "fp32", 0, size="smoke", model="mlp", out_dir=tmp_path / str(batch), progress=progress)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before[1:]
        assert not torch.are_deterministic_algorithms_enabled()


def test_run_without_folder_writes_nothing(tmp_path, monkeypatch):
    """Without a folder nothing is kept, and Ctrl-C is an ordinary KeyboardInterrupt."""
    monkeypatch.chdir(tmp_path)
    train("digits", "fp32", 0, size="smoke", model="mlp")
    # A shell that starts the tests in the background has told them to ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            train("digits", "fp32", 0, size="smoke", model="mlp", progress=stop_at(3, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(stop.value, Interrupted)
    assert list(tmp_path.iterdir()) == []


def test_record_tells_the_whole_run(unbroken):
    """The record holds a curve entry for each epoch, the settings, and the command that repeats the run."""
    done = unbroken["ibm2020"][1]
    assert {len(curve) for curve in done.curves.values()} == {2}
    assert done.value == done.curves["test_accuracy"][-1]
    assert done.settings["epochs"] == 2
    assert " ".join(done.command) == "halfbyte train digits --recipe ibm2020 --seed 1 --size smoke --model cnn"
    assert done.nonfinite == {}
    assert done.samples_per_s > 0


def test_saved_bytes_of_fp32_by_hand():
    """In FP32 the MLP keeps for a batch of 64 its three inputs and nothing else: what the loss keeps is its own."""
    done = train("digits", "fp32", 0, size="smoke", model="mlp")
    # Each ReLU's output is the next layer's input: one storage. Linear 1 keeps (64, 64), the other two (64, 256).
    assert done.saved_bytes == 4 * 64 * (64 + 256 + 256)


def test_the_commit_is_that_of_the_start(monkeypatch, tmp_path):
    """A record names the commit that the run began at, though the folder has moved on when it ends."""
    asked = iter(range(100))
    monkeypatch.setattr(record, "commit", lambda: {"revision": f"commit {next(asked)}", "dirty": False})
    found = train("digits", "fp32", 0, size="smoke", model="mlp", out_dir=tmp_path / "run")
    assert found.commit["revision"] == "commit 0"
    assert next(asked) == 1
