"""A task or a recipe of somebody's own: named by module and variable, and used like those that are there."""

import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from halfbyte import recipes
from halfbyte.cli import app
from halfbyte.errors import HalfbyteError, UnknownNameError
from halfbyte.export import runs
from halfbyte.export.packed import FileError
from halfbyte.lab import checkpoint, record, tasks
from halfbyte.lab.compare import compare
from halfbyte.lab.run import Run
from halfbyte.lab.tasks import Settings, classification
from halfbyte.own import fingerprint
from halfbyte.report import groups, markdown

MODULE = """
import dataclasses

import torch
import halfbyte as hb
from torch import nn
from halfbyte.lab.tasks import Settings, classification

x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] > 0).long()

def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

task = classification(network, train=(x[:32], y[:32]), test=(x[32:], y[32:]),
                      settings=Settings(epochs=2, batch_size=16, optimizer="sgd", learning_rate=0.1))
number = 4
recipe = dataclasses.replace(hb.RECIPES["ibm2020"], name="cut_off", grad_scale=hb.LayerGradScale(log2_first=30))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a module ``own_task`` in it that only this test has imported."""
    (tmp_path / "own_task.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("own_task", None)


def test_compare_and_report(folder):
    """Recipes are compared on it, its records name it, and the page of results has its table with the record's unit."""
    result = compare("own_task:task", ["fp32", "ibm2020"], [0], out_dir=folder / "runs")
    assert [(r.task, r.recipe, len(r.curves["test_loss"])) for r in result.records] == [
        ("own_task:task", "fp32", 2),
        ("own_task:task", "ibm2020", 2),
    ]
    assert (folder / "runs/own_task.task-own-cpu-ibm2020-seed0/record.json").is_file()
    del sys.modules["own_task"]
    markdown.write(groups.gather([folder / "runs"]), folder / "page.md")
    assert "own_task" not in sys.modules
    text = (folder / "page.md").read_text()
    assert "## own_task:task: own, size cpu" in text
    assert "accuracy (%)" in text
    assert "Higher is better." in text
    assert (folder / "results/own_task.task-own-cpu.svg").is_file()


def test_other_code_is_another_run(folder):
    """A run is not reused after its module has changed: its conventions hold the module's fingerprint."""
    before = Run(task="own_task:task", recipe="fp32", seed=0).identity
    (folder / "own_task.py").write_text(MODULE + "\n")
    after = Run(task="own_task:task", recipe="fp32", seed=0).identity
    assert before["conventions"].keys() == {"fp32", "own_task:task"}
    assert {key for key in before if before[key] != after[key]} == {"conventions"}
    assert fingerprint("digits", "fp32") == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere_at_all:task", "cannot be had"),
        ("own_task:tusk", "Name a module that Python finds from here and a Task .* in it"),
        ("own_task:number", "is a int; a Task .* is possible"),
    ],
)
def test_what_is_no_task(folder, name, text):
    """A module or variable that is not there, or is no task, is an error that says what is possible."""
    with pytest.raises(HalfbyteError, match=text):
        tasks.get(name)


def test_the_possibility_is_listed():
    """Whoever mistypes a task is told that one of their own is possible, too."""
    with pytest.raises(UnknownNameError, match="module:task"):
        tasks.get("digit")


def test_classes_are_whole_numbers():
    """Classes that are no int64 vector are refused with the cure."""
    x = torch.zeros(4, 2)
    for classes in (torch.zeros(4), torch.zeros(4, 1, dtype=torch.int64)):
        with pytest.raises(HalfbyteError, match=r"test=.*classes\.long\(\)"):
            classification(lambda: nn.Linear(2, 2), train=(x, torch.zeros(4).long()), test=(x, classes))


def test_settings_act():
    """The settings are those of the sizes cpu and full; smoke is one pass of them."""
    x, y = torch.zeros(4, 2), torch.zeros(4).long()
    asked = Settings(epochs=7, batch_size=2, optimizer="adam", learning_rate=0.5)
    task = classification(lambda: nn.Linear(2, 2), train=(x, y), test=(x, y), settings=asked, description="Mine.")
    assert task.settings("cpu") == task.settings("full") == asked
    assert (task.settings("smoke").epochs, task.settings("smoke").learning_rate) == (1, 0.5)
    assert task.description == "Mine."


@pytest.mark.parametrize(("task", "recipe"), [("own_task:task", "fp32"), ("digits", "own_task:recipe")])
def test_no_file_names_a_module(folder, task, recipe):
    """A checkpoint or file of somebody's own task or recipe is refused, and the module is not imported."""
    about = {"network": "cnn", "size": "cpu", "fine_tuned": False, "task": task, "recipe": recipe}
    with pytest.raises(FileError, match=r"halfbyte\.load\(path, model\)"):
        runs.build({**about, "sizes": {}})
    torch.save({"format": checkpoint._FORMAT, "identity": about, "model": {}}, folder / "last.ckpt")
    with pytest.raises(FileError, match="nothing that a file names is imported"):
        runs.open_checkpoint(folder / "last.ckpt")
    with pytest.raises(UnknownNameError):
        recipes.get("own_task:recipe")
    assert "own_task" not in sys.modules


def test_the_record_makes_the_run_again(folder):
    """The command in a record names the task as it was asked for."""
    compare("own_task:task", ["fp32"], [3], size="smoke", out_dir=folder / "runs")
    made = record.read(folder / "runs/own_task.task-own-smoke-fp32-seed3/record.json")
    assert made.command[:3] == ["halfbyte", "train", "own_task:task"]
    assert len(made.curves["test_loss"]) == 1


def test_a_recipe_of_ones_own_is_compared(folder):
    """It trains beside the others; folder, record and page name it as it was asked for, the record holds its text."""
    result = compare("own_task:task", ["ibm2020", "own_task:recipe"], [0], size="smoke", out_dir=folder / "runs")
    theirs, own = result.records
    assert own.recipe == "own_task:recipe"
    assert own.recipe_text == str(recipes.find("own_task:recipe"))
    assert "log2_first=30" in own.recipe_text
    assert own.command[3:5] == ["--recipe", "own_task:recipe"]
    assert own.curves != theirs.curves
    assert (folder / "runs/own_task.task-own-smoke-own_task.recipe-seed0/record.json").is_file()
    markdown.write(groups.gather([folder / "runs"]), folder / "page.md")
    assert "| `own_task:recipe` | 1 |" in (folder / "page.md").read_text()


def test_a_recipe_of_other_code_is_another_run(folder):
    """Its module's fingerprint is among the conventions of a run of the lab's own task."""
    before = Run(task="digits", recipe="own_task:recipe", seed=0).identity
    (folder / "own_task.py").write_text(MODULE + "\n")
    after = Run(task="digits", recipe="own_task:recipe", seed=0).identity
    assert {key for key in before if before[key] != after[key]} == {"conventions"}


def test_what_is_no_recipe(folder):
    """A variable that is no recipe, or a mistyped name, is an error that says what is possible."""
    with pytest.raises(HalfbyteError, match=r"is a int; a Recipe .* is possible"):
        recipes.find("own_task:number")
    with pytest.raises(UnknownNameError, match="module:recipe"):
        recipes.find("ibm2021")


def test_every_command_takes_a_recipe_of_ones_own(folder):
    """Showing, auditing and modeling hardware know it, too."""
    for words, text in (
        (["recipes", "own_task:recipe"], "cut_off"),
        (["audit", "digits", "--model", "mlp", "--recipe", "own_task:recipe"], "own_task:recipe"),
        (["hw", "digits", "--recipe", "own_task:recipe", "--compare", "fp16"], "cut_off"),
    ):
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert (result.exit_code, text in result.output) == (0, True), words
