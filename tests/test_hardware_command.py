"""``halfbyte hw``: what it prints and writes, and how it says no."""

import json

import pytest
import torch

from halfbyte.cli import main
from halfbyte.errors import HalfbyteError
from halfbyte.hardware import command, networks
from halfbyte.hardware.networks import NETWORKS
from halfbyte.hardware.waterfall import STAGES
from halfbyte.lab import tasks


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """An empty working folder, and a terminal wide enough for the tables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


def test_report_has_layers_and_waterfall(tmp_path, capsys):
    """The report holds every layer's phases, which sum to the step, and the stages in order with both ratios."""
    asked = ["hw", "digits", "--recipe", "ibm2020", "--preset", "rapid4", "--compare", "fp16", "--json", "new/a.json"]
    assert main(asked) == 0
    content = json.loads((tmp_path / "new" / "a.json").read_text())
    assert [stage["stage"] for stage in content["waterfall"]] == list(STAGES)
    assert {"stage", "speedup", "energy_ratio"} <= content["waterfall"][0].keys()
    assert sum(row["cycles"] for row in content["layers"]) == content["estimate"]["totals"]["cycles"]
    assert sum(row["macs"] for row in content["layers"]) == content["estimate"]["totals"]["macs"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in STAGES)
    assert "int4/fp4" in shown


def test_unfused_moves_more(tmp_path):
    """Without fusion the same step moves more bytes off the chip."""
    moved = []
    for more in ([], ["--unfused"]):
        assert main(["hw", "digits", "--recipe", "ibm2020", "--preset", "rapid4", "--json", "a.json", *more]) == 0
        moved.append(json.loads((tmp_path / "a.json").read_text())["estimate"]["totals"]["dram_bytes"])
    assert moved[0] < moved[1]


def test_batch_acts(tmp_path):
    """Twice the samples are twice the multiply-accumulates."""
    macs = []
    for batch in ("8", "16"):
        assert (
            main(["hw", "digits", "--recipe", "fp16", "--preset", "ibm14", "--batch", batch, "--json", "a.json"]) == 0
        )
        macs.append(json.loads((tmp_path / "a.json").read_text())["estimate"]["totals"]["macs"])
    assert macs[1] == 2 * macs[0]


def test_topology_is_written(tmp_path):
    """The GEMMs go to a file that SCALE-Sim reads: a header and a line for each."""
    assert main(["hw", "digits", "--recipe", "ibm2020", "--preset", "scalesim32", "--scalesim", "t.csv"]) == 0
    step = command.model_step(NETWORKS["digits"], "ibm2020", name="digits")
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + len(step.gemms)


def test_a_network_of_your_own(tmp_path):
    """A function in a module of the working folder is found, and its network is traced at the shape given."""
    (tmp_path / "mine_for_hw.py").write_text(
        "from torch import nn\n\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 2))\n"
    )
    asked = ["hw", "mine_for_hw:make", "--input", "3,4", "--batch", "2", "--recipe", "fp16", "--preset", "ibm14"]
    assert main([*asked, "--json", "a.json"]) == 0
    # fprop and wgrad of both layers, dgrad of the second: 2 samples x (2 x 60 + 3 x 10).
    assert json.loads((tmp_path / "a.json").read_text())["estimate"]["totals"]["macs"] == 2 * (2 * 60 + 3 * 10)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["resnet51"], "resnet51"),
        (["nowhere:make", "--input", "3"], "There is no module 'nowhere'"),
        (["math:pi", "--input", "3"], "a function that returns a network"),
        (["math:sqrt", "--input", "3"], "called without arguments"),
        (["time:time", "--input", "3"], "returned a float"),
        (["halfbyte.lab.models.resnet:resnet20", "--input", "5,32,32"], "of the shape given with --input"),
        (["math:sqrt"], "without --input"),
        (["digits", "--preset", "ibm14", "--json", "."], "is a folder"),
        (["math:sqrt", "--input", "3,x"], "whole numbers"),
        (["digits", "--input", "3"], "inputs are known"),
        (["digits", "--preset", "rapid5"], "rapid5"),
        (["digits", "--compare", "ibm2020", "--preset", "ibm14"], "compare two different ones"),
    ],
)
def test_what_cannot_be_done_is_said(asked, message, capsys):
    """Each is refused with a message and exit status 2."""
    assert main(["hw", *asked, "--recipe", "ibm2020"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_every_task_has_its_network(name):
    """A task's name stands for a network of the task's that takes the inputs written down for it."""
    with torch.device("meta"):
        assert NETWORKS[name].network()(*NETWORKS[name].inputs(2)) is not None


def test_a_working_folder_is_not_a_network():
    """A name without a colon is looked up and nowhere else."""
    with pytest.raises(HalfbyteError, match="module:function"):
        networks.find("os")
