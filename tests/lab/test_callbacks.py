"""Probes in a loop of one's own, the lab's, Lightning's and Hugging Face's, for TensorBoard and for the record."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import probes
from halfbyte.errors import ConversionError, HalfbyteError, SpecError, UnsupportedError
from halfbyte.lab.callbacks import MEASURES, ProbeLogger, measured, statistics
from halfbyte.lab.run import Interrupted, Run, Step
from halfbyte.lab.trainer import train

pytest.importorskip("tensorboard", reason="what is written for TensorBoard is read by it")

SLOTS = {"fprop.input", "fprop.weight", "dgrad.grad_output", "wgrad.grad_output"}


def network(recipe: str = "ibm2020") -> nn.Sequential:
    """Three linear layers; the recipes convert the middle one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return hb.convert(model, recipe)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(count)]


def loop(model: nn.Module, logger: ProbeLogger | None, steps: int, each: int = 1) -> None:
    """A loop of one's own; `each` batches make a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, (x, y) in enumerate(batches(steps * each)):
        if logger is not None:
            logger.before_step(model, number // each)
        F.cross_entropy(model(x), y).backward()
        if (number + 1) % each == 0:
            optimizer.step()
            optimizer.zero_grad()
        if logger is not None:
            logger.after_step((number + 1) // each, loss=float(number))


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Everything in a folder of TensorBoard's: for each name its steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def steps_of(folder: Path) -> list[int]:
    """The steps at which probes were written, the same for every name."""
    (steps,) = {tuple(step for step, _ in points) for points in written(folder).values()}
    return list(steps)


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7]), (50, [1])])
def test_every_nth_step(every, steps, tmp_path):
    """The first step is looked at and then each N-th, and nothing watches the model in between or afterwards."""
    model, logger = network(), ProbeLogger(tmp_path, every=every)
    loop(model, logger, 7)
    assert model[2].plan.watcher is None
    logger.close()
    assert steps_of(tmp_path) == steps


def test_what_is_written_is_what_a_probe_sees(tmp_path):
    """Every measure of every slot is there under the layer's name, with the probe's own numbers, and the loss."""
    model, logger = network(), ProbeLogger(tmp_path, every=2)
    with probes.attach(model) as probe:
        loop(model, logger, 3)
    logger.close()
    rows = {(row.step, f"{row.layer}/{row.slot}"): row for row in probe.rows}
    found = written(tmp_path)
    names = {name for name in found if name.startswith("sqnr_db")}
    assert names == {f"sqnr_db/2/{slot}" for slot in SLOTS}
    for tag, points in found.items():
        if tag == "loss":
            assert points == [(1, 0.0), (3, 2.0)]
            continue
        measure, _, slot = tag.partition("/")
        expected = [getattr(rows[step, slot], measure) for step in (1, 3)]
        assert [value for _, value in points] == pytest.approx(expected, rel=1e-6)  # TensorBoard keeps float32.
    assert {tag.partition("/")[0] for tag in found} == {*MEASURES, "bias", "gradient_to_noise", "loss"}


def test_of_an_accumulated_step_the_last_batch_is_written(tmp_path):
    """With three batches a step, two steps show the probe's rows of the third and the sixth batch and no more."""
    model, logger = network(), ProbeLogger(tmp_path, every=1)
    with probes.attach(model) as probe:
        loop(model, logger, 2, each=3)
    logger.close()
    third, sixth = (row.cosine for row in probe.rows if row.slot == "fprop.input" and row.step in (3, 6))
    points = written(tmp_path)["cosine/2/fprop.input"]
    assert points == [(1, pytest.approx(third, rel=1e-6)), (2, pytest.approx(sixth, rel=1e-6))]


def test_logging_changes_no_bit(tmp_path):
    """A run that is looked at ends in the same weights and quantizer state as one that is not."""
    plain, seen = network(), network()
    loop(plain, None, 5)
    loop(seen, ProbeLogger(tmp_path, every=2), 5)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), seen.state_dict().values(), strict=True))


def test_a_step_after_closing_is_written(tmp_path):
    """A logger that was closed in the middle of a step watches nothing, and writes on when training goes on."""
    model, logger = network(), ProbeLogger(tmp_path, every=1)
    loop(model, logger, 1)
    logger.before_step(model, 1)
    logger.close()
    assert model[2].plan.watcher is None
    loop(model, logger, 2)
    logger.close()
    assert {step for step, _ in written(tmp_path)["sqnr_db/2/fprop.input"]} == {1, 2}


def with_lightning(logger: ProbeLogger, folder: Path) -> nn.Module:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[logger.for_lightning()],
    ).fit(module, torch.utils.data.DataLoader(batches(10), batch_size=None))
    return module.net


class Loss(nn.Module):
    """What Hugging Face's Trainer trains: a module that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(x), labels)}


def with_transformers(logger: ProbeLogger, folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="Trainer needs it")
    model = Loss()
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"x": x, "labels": y} for x, y in zip(*map(torch.cat, zip(*batches(10), strict=True)), strict=True)]
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[logger.for_transformers()]).train()
    return model.net


@pytest.mark.filterwarnings("ignore:::lightning")
@pytest.mark.parametrize("trainer", [with_lightning, with_transformers], ids=["lightning", "transformers"])
def test_in_the_loops_of_others(trainer: Callable[[ProbeLogger, Path], nn.Module], tmp_path):
    """Of five steps with two batches each the optimizer's first, third and fifth are written; then nobody watches."""
    logger = ProbeLogger(tmp_path / "tensorboard", every=2)
    model = trainer(logger, tmp_path)
    assert int(model[2].plan.step) == 10
    assert model[2].plan.watcher is None
    assert steps_of(tmp_path / "tensorboard") == [1, 3, 5]
    assert "sqnr_db/net.2/dgrad.grad_output" in written(tmp_path / "tensorboard")


def test_in_the_labs_loop(tmp_path):
    """As the lab's progress it writes from the second batch on, with the loss, through fine-tuning and to the end."""
    train("digits", "ibm2020", 0, size="smoke", fine_tune=1, progress=ProbeLogger(tmp_path, every=11).on_step)
    found = written(tmp_path)
    assert [step for step, _ in found["loss"]] == [2, 13, 24, 35, 46, 57, 68]  # 2 + 1 epochs of 23 batches.
    weights = next(tag for tag in found if tag.startswith("sqnr_db") and tag.endswith("/fprop.weight"))
    gradients = weights.replace("fprop.weight", "wgrad.grad_output")
    assert [step for step, _ in found[weights]] == [2, 13, 24, 35, 46, 57, 68]
    assert [step for step, _ in found[gradients]] == [2, 13, 24, 35, 46]  # Fine-tuning's gradients are floats.


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_a_run_in_floating_point_shows_its_loss(recipe, tmp_path):
    """Under a recipe that quantizes nothing the lab's progress writes loss and score alone."""
    train("digits", recipe, 0, size="smoke", model="mlp", progress=ProbeLogger(tmp_path, every=20).on_step)
    found = written(tmp_path)
    assert found.keys() == {"loss", "score"}
    assert [step for step, _ in found["loss"]] == [2, 22, 42]


def test_a_run_of_another_process_is_refused(tmp_path):
    """The news of a run in another process bring no network to look at, and the error says so."""
    run = Run(task="digits", recipe="ibm2020", seed=0)
    step = Step(run=run, done=1, total=2, epoch=1, epochs=1, loss=1.0, score=0.0, samples_per_s=1.0)
    with pytest.raises(HalfbyteError, match=r"runs in another process\. Run it in this one"):
        ProbeLogger(tmp_path).on_step(step)


def test_the_commands_option_writes(tmp_path, monkeypatch):
    """``--tensorboard`` writes the probes of a run beside its record."""
    from halfbyte.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--recipe", "ibm2020", "--size", "smoke", "--tensorboard", "board"]) == 0
    assert {step for step, _ in written(tmp_path / "board")["loss"]} == {2}


def test_the_record_holds_the_last_batch_of_ordinary_training():
    """A record's probes are those of a probe at the last batch, by layer and slot; its peak is that of the process."""
    seen = []

    def watch(step):
        if step.done == 45:  # Of 46.
            seen.append(probes.attach(step.network))

    result = train("digits", "ibm2020", 0, size="smoke", progress=watch)
    assert result.probes == statistics(seen[0].rows)
    assert all(slots.keys() == SLOTS for slots in result.probes.values())
    assert json.loads(json.dumps(result.probes, allow_nan=False)) == result.probes
    assert result.peak_bytes > 50 << 20


def test_fine_tuning_does_not_overwrite_the_probes(tmp_path):
    """With fine-tuning the record tells of ordinary training, also where the run was interrupted after that."""

    def stop(step: Step) -> None:
        if step.done == 50:  # Ordinary training has 46 batches.
            os.kill(os.getpid(), signal.SIGINT)

    plain = train("digits", "ibm2020", 0, size="smoke")
    with pytest.raises(Interrupted):
        train("digits", "ibm2020", 0, size="smoke", fine_tune=1, out_dir=tmp_path, progress=stop)
    tuned = train("digits", "ibm2020", 0, size="smoke", fine_tune=1, resume=tmp_path)
    assert tuned.probes == plain.probes != {}
    assert tuned.history == plain.history != {}
    assert tuned.peak_bytes > 0


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_a_run_without_quantization_has_no_probes(recipe):
    """Where nothing is quantized the record's probes are empty."""
    assert train("digits", recipe, 0, size="smoke", model="mlp").probes == {}


def test_measured_is_empty_for_a_plain_network():
    """A network that was never converted is no error: its peak is known, and it has no probes."""
    found = {}
    with measured(nn.Linear(2, 2), found):
        pass
    assert found.keys() == {"peak_bytes", "probes", "history"}
    assert found["probes"] == found["history"] == {}


def test_measured_leaves_alone_what_is_not_wanted():
    """Where it is not wanted nobody watches and nothing is found."""
    model, found = network(), {}
    with measured(model, found, wanted=False):
        loop(model, None, 1)
        assert model[2].plan.watcher is None
    assert found == {}


def test_statistics_take_the_last_row_and_what_is_finite():
    """Of several steps the last one counts; an infinite SQNR is None, since JSON has no infinity."""
    recipe = hb.Recipe(name="hand", fprop=hb.Fprop(input=hb.Pact(clip=15.0), weight=hb.Sawb()))
    model = hb.convert(nn.Sequential(nn.Linear(2, 2)), recipe, [hb.Rule(recipe=recipe)])
    with probes.attach(model) as probe:
        for x in ([0.25, 20.0], [3.0, 4.0]):
            model(torch.tensor([x])).sum().backward()
    assert statistics(probe.rows)["0"]["fprop.input"] == {
        "sqnr_db": None,
        "underflow_rate": 0.0,
        "saturation_rate": 0.0,
        "cosine": 1.0,
        "log2_scale": 0.0,
    }
    assert statistics(probe.rows[:1])["0"]["fprop.input"]["saturation_rate"] == 0.5
    assert math.isfinite(statistics(probe.rows[:1])["0"]["fprop.input"]["sqnr_db"])


def test_importing_brings_no_other_library():
    """The module loads neither Lightning's trainer nor transformers nor TensorBoard."""
    code = (
        "import sys, halfbyte.lab.callbacks\n"
        "print(sorted({'lightning', 'pytorch_lightning', 'transformers', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "package", "use"),
    [
        ("torch.utils.tensorboard", "tensorboard", ProbeLogger),
        ("lightning.pytorch", "lightning", lambda folder: ProbeLogger(folder).for_lightning()),
        ("transformers", "transformers", lambda folder: ProbeLogger(folder).for_transformers()),
    ],
)
def test_what_is_missing_is_named(module, package, use, tmp_path, monkeypatch):
    """Without a package that it needs, it says at once which one to install, and leaves no folder behind."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError, match=f"needs the package '{package}'.*pip install {package}"):
        use(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_every_below_one_is_refused(tmp_path):
    """`every=0` would look at no step."""
    with pytest.raises(SpecError, match=r"ProbeLogger\(every=0\) was asked for; 1 or more is possible"):
        ProbeLogger(tmp_path, every=0)


def test_a_plain_model_is_refused_with_the_cure(tmp_path):
    """A model in which nothing is quantized is an error at the first step, not an empty folder."""
    with pytest.raises(ConversionError, match=r"Call halfbyte.convert\(model, recipe=...\) first"):
        ProbeLogger(tmp_path).before_step(nn.Linear(2, 2), 0)
