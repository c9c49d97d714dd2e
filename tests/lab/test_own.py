"""A task or a recipe of somebody's own: named by module and variable, and used like those that are there."""

import importlib
import pickle
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import halfbyte as hb
from halfbyte import recipes
from halfbyte.cli import app
from halfbyte.errors import HalfbyteError, UnknownNameError
from halfbyte.export import runs
from halfbyte.export.packed import FileError
from halfbyte.hardware.tracing import trace
from halfbyte.lab import checkpoint, record, tasks
from halfbyte.lab.compare import compare
from halfbyte.lab.run import Run
from halfbyte.lab.tasks import Settings, classification
from halfbyte.lab.trainer import train
from halfbyte.own import fingerprint
from halfbyte.report import groups, markdown, page

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


def changed(folder, run):
    """A run's identity, to a new process, after a blank line more in the module."""
    (folder / "own_task.py").write_text(MODULE + "\n")
    del sys.modules["own_task"]
    return Run(task=run.task, recipe=run.recipe, seed=run.seed).identity


def test_other_code_is_another_run(folder):
    """A run is not reused after its module has changed: its conventions hold the module's fingerprint."""
    before = Run(task="own_task:task", recipe="fp32", seed=0).identity
    after = changed(folder, Run(task="own_task:task", recipe="fp32", seed=0))
    assert before["conventions"].keys() == {"fp32", "module own_task"}
    assert {key for key in before if before[key] != after[key]} == {"conventions"}
    assert fingerprint("digits", "fp32") == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere_at_all:task", "There is no module 'nowhere_at_all'"),
        ("own_task:tusk", "Did you mean 'task'"),
        ("own_task:number", "is of type int; a Task .* is possible"),
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
    assert "\n| `own_task:recipe` | " in (folder / "page.md").read_text()


def test_a_recipe_of_other_code_is_another_run(folder):
    """Its module's fingerprint is among the conventions of a run of the lab's own task."""
    before = Run(task="digits", recipe="own_task:recipe", seed=0).identity
    after = changed(folder, Run(task="digits", recipe="own_task:recipe", seed=0))
    assert {key for key in before if before[key] != after[key]} == {"conventions"}


def test_the_fingerprint_is_of_the_code_that_runs(folder):
    """A file that is edited after its import does not change what the run says of itself, until it is reloaded."""
    run = Run(task="own_task:task", recipe="own_task:recipe", seed=0)
    before = run.identity
    (folder / "own_task.py").write_text(MODULE + "\n")
    assert run.identity == before
    importlib.reload(sys.modules["own_task"])
    assert Run(task="own_task:task", recipe="own_task:recipe", seed=0).identity != before


def test_a_report_says_that_it_averages_over_two_recipes(folder):
    """A recipe that changed between the seeds of a group is named under its table, one that did not is not."""
    for seed, text in ((0, MODULE), (1, MODULE.replace("log2_first=30", "log2_first=31"))):
        (folder / "own_task.py").write_text(text)
        sys.modules.pop("own_task", None)
        compare("digits", ["fp32", "own_task:recipe"], [seed], size="smoke", model="mlp", out_dir=folder / "runs")
    (group,) = groups.groups(groups.gather([folder / "runs"]))
    assert group.changed == ["own_task:recipe"]
    markdown.write(group.records, folder / "page.md")
    assert "The runs of `own_task:recipe` are of different definitions of it." in (folder / "page.md").read_text()


def test_a_report_tells_a_task_that_changed_from_recipes_that_did_not(folder):
    """A task's module that changed between the seeds is named once, and no recipe is."""
    for seed, text in ((0, MODULE), (1, MODULE + "\n")):
        (folder / "own_task.py").write_text(text)
        sys.modules.pop("own_task", None)
        compare("own_task:task", ["fp32", "ibm2020"], [seed], size="smoke", out_dir=folder / "runs")
    (group,) = groups.groups(groups.gather([folder / "runs"]))
    assert group.changed == ["own_task:task"]
    assert page.content(group.records)["groups"][0]["notes"] == [
        "The runs of own_task:task are of different definitions of it."
    ]


def test_a_resumed_run_of_other_code_says_which_module(folder):
    """The error names the module that is not the same."""
    out = folder / "run"
    train("own_task:task", "own_task:recipe", 0, size="smoke", out_dir=out)
    (out / "record.json").unlink()
    changed(folder, Run(task="own_task:task", recipe="own_task:recipe", seed=0))
    with pytest.raises(checkpoint.CheckpointError, match="conventions: not the same module own_task"):
        train("own_task:task", "own_task:recipe", 0, size="smoke", resume=out)


def test_child_processes_know_it_and_a_second_call_reuses_its_records(folder):
    """With two jobs each child imports the module from the working folder, and nothing runs twice."""
    told = []
    for _ in range(2):
        compare(
            *("digits", ["fp32", "own_task:recipe"], [0]),
            size="smoke",
            model="mlp",
            out_dir=folder / "runs",
            jobs=2,
            note=told.append,
        )
    assert sorted(told) == [
        f"digits-mlp-smoke-{name}-seed0 is done already; its record is used." for name in ("fp32", "own_task.recipe")
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own_task.py:recipe", r"no module 'own_task\.py'.*without \.py"),
        ("../own_task:recipe", "A module and a variable in it are possible"),
        ("own_task:", "A module and a variable in it are possible"),
        ("own_task:recip", "Did you mean 'recipe'.*; a Recipe"),
        ("leaves:recipe", "'leaves' raised SystemExit at line 1: 0"),
        ("a_package.part:recipe", "'a_package.part' raised ZeroDivisionError at line 1"),
        ("json:recipe", r"json\.py in the working folder cannot be had as 'json'.*json/__init__\.py"),
        ("time:recipe", r"time\.py in the working folder cannot be had as 'time'.*built into Python"),
        ("raises:recipe", r"'raises' raised KeyError at line 2: 'nix'"),
        ("lacks:recipe", "'lacks' raised ModuleNotFoundError at line 1: No module named 'not_installed'"),
    ],
)
def test_a_name_that_leads_nowhere(folder, name, text):
    """No module, no variable, or a module that raises: each is told apart, with the line where there is one."""
    (folder / "raises.py").write_text("table = {}\ntable['nix']\n")
    (folder / "lacks.py").write_text("import not_installed\n")
    (folder / "leaves.py").write_text("raise SystemExit(0)\n")
    for name_of_python in ("json", "time"):
        (folder / f"{name_of_python}.py").write_text("recipe = None\n")
    (folder / "a_package").mkdir()
    (folder / "a_package/part.py").write_text("1 / 0\n")
    with pytest.raises(HalfbyteError, match=text):
        recipes.find(name)


def test_a_module_in_a_package(folder):
    """A dotted name leads into a package, and its file has a fingerprint."""
    (folder / "a_package").mkdir()
    (folder / "a_package/good.py").write_text(MODULE)
    assert recipes.find("a_package.good:recipe").name == "a_package.good:recipe"
    assert fingerprint("a_package.good:recipe").keys() == {"module a_package.good"}


def test_no_record_names_a_module_to_a_report(folder):
    """A record of somebody's own recipe is shown, but not in the model of a chip, and its module is not imported."""
    for name in ("ibm2020", "own_task:recipe"):
        train("digits", name, 0, size="smoke", out_dir=folder / "runs" / name.replace(":", "."))
    del sys.modules["own_task"]
    result = CliRunner().invoke(app, ["report", str(folder / "runs"), "-o", str(folder / "page.html")])
    assert result.exit_code == 0, result.output
    assert "own_task:recipe" in (folder / "page.html").read_text()
    modeled = page.content(groups.gather([folder / "runs"]), with_model=True)["groups"][0]["modeled"]
    assert [row["recipe"] for row in modeled["rows"]] == ["fp16", "ibm2020"]
    with pytest.raises(UnknownNameError):
        trace(nn.Linear(2, 2), torch.zeros(1, 2), "own_task:recipe")
    with pytest.raises(UnknownNameError):
        hb.convert(nn.Linear(2, 2), "own_task:recipe")
    assert "own_task" not in sys.modules


def test_what_is_no_recipe(folder):
    """A variable that is no recipe, a mistyped name or no name is an error that says what is possible."""
    with pytest.raises(HalfbyteError, match=r"is of type int; a Recipe .* is possible"):
        recipes.find("own_task:number")
    with pytest.raises(UnknownNameError, match="module:recipe") as raised:
        recipes.find("ibm2021")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    for given, text in ((hb.RECIPES["luq"], "got the Recipe 'luq'"), ({}, "got a dict")):
        with pytest.raises(HalfbyteError, match=text):
            Run(task="digits", recipe=given, seed=0)


def test_a_colon_and_an_x_are_no_picture(folder):
    """What stands between colons is printed as it is: `own_task:x:` has no cross in it."""
    (folder / "own_task.py").write_text(MODULE + "x = recipe\n")
    for words in (
        ["recipes", "own_task:x"],
        ["hw", "own_task:network", "--input", "6", "--recipe", "own_task:x"],
        ["audit", "digits", "--model", "mlp", "--recipe", "own_task:x"],
    ):
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert "own_task:x" in result.output
        assert "❌" not in result.output


def test_every_command_takes_a_recipe_of_ones_own(folder):
    """Showing, auditing and modeling hardware know it by the name that was typed, whatever it calls itself."""
    for words, text in (
        (["recipes", "own_task:recipe"], "own_task:recipe: INT4"),
        (["audit", "digits", "--model", "mlp", "--recipe", "own_task:recipe"], "own_task:recipe"),
        (["hw", "digits", "--recipe", "own_task:recipe", "--compare", "ibm2020"], "own_task:recipe against ibm2020"),
        (["hw", "digits", "--recipe", "ibm2020", "--compare", "own_task:recipe"], "ibm2020 against own_task:recipe"),
        (
            ["train", "own_task:task", "--recipe", "own_task:recipe", "--size", "smoke"],
            "-own_task.recipe-",
        ),
    ):
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert (result.exit_code, text in result.output) == (0, True), (words, result.output)
