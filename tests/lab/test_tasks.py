"""Tasks and their networks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from halfbyte.errors import HalfbyteError, UnknownNameError
from halfbyte.lab import tasks
from halfbyte.lab.data.source import Batch
from halfbyte.lab.tasks import Judgment, Settings
from halfbyte.lab.trainer import train


def network(name):
    digits = tasks.get("digits")
    return digits.models[name](digits.load(None), digits.settings("smoke"))


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_networks_classify(name):
    """Both networks turn images (N, 1, 8, 8) into ten logits each."""
    assert network(name)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(("name", "between"), [("cnn", 3), ("mlp", 1)])
def test_layers_remain_between_first_and_last(name, between):
    """With the first and last layer in high precision, the CNN keeps three layers for four bits and the MLP one."""
    modules = network(name).modules()
    assert len([m for m in modules if isinstance(m, nn.Linear | nn.Conv2d)]) - 2 == between


def test_unknown_names_suggest():
    """A misspelt task, model or size is an error that names the nearest right one."""
    with pytest.raises(UnknownNameError, match="Did you mean 'digits'"):
        tasks.get("digit")
    with pytest.raises(UnknownNameError, match="Did you mean 'cnn'"):
        tasks.get("digits").model_named("cn")
    with pytest.raises(UnknownNameError, match="Did you mean 'smoke'"):
        tasks.get("digits").settings("smok")


def test_default_model():
    """No name means the task's default network."""
    assert tasks.get("digits").model_named(None) == "cnn"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epochs": 0}, "must be above zero"),
        ({"batch_size": 0}, "must be above zero"),
        ({"learning_rate": 0.0}, "must be above zero"),
        ({"optimizer": "adan"}, "Did you mean 'adam'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"momentum": 0.9}, "momentum=0.9, under Adam would do nothing"),
        ({"optimizer": "sgd", "betas": (0.9, 0.98)}, "under SGD would do nothing"),
        ({"drops": (0.5,)}, "without schedule='drops' would do nothing"),
        ({"hold": 3}, "without schedule='decay' would do nothing"),
        ({"decay": 0.5}, "without schedule='decay' would do nothing"),
        ({"schedule": "inverse_sqrt"}, "without a warmup, would do nothing"),
    ],
)
def test_settings_are_checked_at_birth(change, text):
    """Settings that cannot learn, or a knob that would do nothing, are refused."""
    with pytest.raises(HalfbyteError, match=text):
        Settings(**{"epochs": 1, "batch_size": 1, "optimizer": "adam", "learning_rate": 0.1} | change)


def test_accuracy_counts():
    """The score counts right answers and the metric is their percentage: 2 of 4 is 50."""
    task = tasks.get("digits")
    batch = Batch((torch.eye(10)[[1, 2, 3, 4]],), (torch.tensor([1, 2, 0, 0]),), 4)
    assert task.learn(nn.Identity(), batch, (), task.settings("smoke")).score == 2
    assert task.summarize(2, 4) == 50


@pytest.mark.parametrize(
    ("said", "further"), [(12, {}), (Judgment(12, {"of another kind": 0.5}), {"of another kind": 0.5})]
)
def test_a_judge_has_the_last_word(said, further, monkeypatch):
    """A record holds the number that a judge gives, and its further measures where it gives a Judgment."""
    digits = replace(tasks.get("digits"), judge=lambda *_: said)
    monkeypatch.setattr(tasks, "TASKS", {"digits": digits})
    done = train("digits", "fp32", 0, size="smoke", model="mlp")
    assert (done.value, done.further) == (12, further)


def test_packages_are_a_tuple():
    """A text in the place of a tuple, where a comma was lost, is refused: each of its letters would be a package."""
    with pytest.raises(HalfbyteError, match="packages='jiwer' is a text"):
        replace(tasks.get("digits"), packages="jiwer")


@pytest.mark.parametrize("said", [(12, {}), {"accuracy": 12.0}, torch.tensor(12.0), Judgment(12, {"x": "high"})])
def test_a_judge_gives_numbers(said):
    """What is no number, and no Judgment of numbers, is refused, and the text says what is possible."""
    digits = replace(tasks.get("digits"), judge=lambda *_: said)
    with pytest.raises(
        HalfbyteError, match=r"judge of task 'digits' gave .*a float, or a halfbyte\.lab\.tasks\.Judgment"
    ):
        digits.judged(nn.Identity(), None, digits.settings("smoke"))
