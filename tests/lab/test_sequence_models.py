"""The experiment on text: it runs, repeats itself, and writes records that can be read."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from halfbyte import RECIPES
from halfbyte.lab import record

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "sequence_models.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module, eight steps long."""
    spec = importlib.util.spec_from_file_location("sequence_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    short = {"steps": 8, "batch_size": 4, "context": 8, "learning_rate": 1e-2, "clip_norm": 1.0}
    monkeypatch.setattr(module, "SETTINGS", {"lstm": short, "gpt": short})
    monkeypatch.setattr(module, "TEST_WINDOWS", 8)
    return module


@pytest.fixture
def folder(tmp_path):
    """A text of two hundred lines that count."""
    (tmp_path / "input.txt").write_text("".join(f"line {number}\n" for number in range(200)))
    return tmp_path


def test_it_runs(script, folder, monkeypatch, capsys):
    """Both models train under a recipe that draws random numbers, are compared with fp32, and leave their records."""
    arguments = ["sequence_models.py", "--data-dir", str(folder), "--recipes", "fp32,luq", "--out", str(folder / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert script.main() == 0
    table = capsys.readouterr().out
    for kind in ("lstm", "gpt"):
        done = record.read(folder / "out" / f"{kind}-luq-seed0.json")
        assert (done.recipe, done.unit, done.higher_is_better) == ("luq", "nats per character", False)
        assert done.conventions["luq"] == RECIPES["luq"].conventions
        assert str(folder) not in " ".join(done.command)
        assert any(line.split()[:2] == ["luq", f"{done.value:.3f}"] for line in table.splitlines())


@pytest.mark.parametrize("kind", ["lstm", "gpt"])
def test_same_seed_same_bits(kind, script, folder):
    """Two runs with one seed have the same loss, and another seed has another."""
    data = script.load(folder)
    values = [script.run(kind, RECIPES["luq"], seed, data, []).value for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_recipes_see_the_same_text(script, folder):
    """The batches depend on the seed alone, and no test window overlaps the training text or another window."""
    train, test, _ = script.load(folder)
    settings = script.SETTINGS["gpt"]
    first, again, other = (list(script.batches(train, settings, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert len(train) + len(test) == len((folder / "input.txt").read_text())


def test_loss_of_a_bigram_by_hand(script):
    """Of "ababa" with one added to each count P(b|a) = P(a|b) = 3/4, so each step costs -log 3/4."""
    symbols = torch.tensor([0, 1, 0, 1, 0])
    assert script.bigram_loss(symbols, symbols, 2) == pytest.approx(-math.log(3 / 4))


def test_missing_text_is_named(script, tmp_path):
    """A folder without the text is refused with the name of the file."""
    with pytest.raises(SystemExit, match=r"There is no .*input\.txt"):
        script.load(tmp_path)
