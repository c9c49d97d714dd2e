"""The tasks fashion and cifar10: their networks and settings, and a run of each from files to result."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from halfbyte.errors import HalfbyteError
from halfbyte.lab import tasks, trainer
from halfbyte.lab.tasks import SIZES
from lab import mini_vision

NAMES = ["fashion", "cifar10"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    mini_vision.write(tmp_path / "data", monkeypatch)
    return tmp_path / "data"


@pytest.mark.parametrize("name", NAMES)
def test_smoke_from_files_to_a_result(folder, name):
    """A smoke run is one epoch of three batches and ends in an accuracy on all that it is judged by."""
    record = trainer.train(name, "fp32", 0, size="smoke", data_dir=folder)
    settings = tasks.get(name).settings("smoke")
    assert (settings.epochs, settings.examples // settings.batch_size) == (1, 3)
    assert (record.metric, record.unit) == ("accuracy", "%")
    assert (record.value * settings.test_examples / 100).is_integer()


@pytest.mark.parametrize("name", NAMES)
def test_without_files_there_is_no_run(tmp_path, name):
    """A run without the task's data ends in an error that says where the data is published."""
    with pytest.raises(HalfbyteError, match="published at https"):
        trainer.train(name, "fp32", 0, size="smoke", data_dir=tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_can_be_learned(folder, name):
    """What a task's own step teaches one linear layer from one side tells apart most pictures of the other side."""
    task = tasks.get(name)
    data, settings = task.load(folder), task.settings("smoke")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(data.train.inputs[0].numel(), 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for epoch in range(5):
        for batch in replace(data.train, augment=None).batches(20, seed=0, epoch=epoch):
            optimizer.zero_grad()
            task.learn(network, batch, (), settings).loss.backward()
            optimizer.step()
    (batch,) = data.test.batches(mini_vision.TEST)
    with torch.no_grad():
        assert task.summarize(task.learn(network.eval(), batch, (), settings).score, batch.count) > 80


def test_networks_of_cifar10():
    """Every network of the task turns a 32x32 color picture into ten logits; nothing of it needs the data."""
    task = tasks.get("cifar10")
    assert sorted(task.models) == [
        "alexnet",
        "densenet121",
        "googlenet",
        "mobilenetv2",
        "resnet101",
        "resnet18",
        "resnet20",
        "resnet32",
        "resnet50",
        "vgg16",
    ]
    for size, expected in (("smoke", "resnet20"), ("cpu", "resnet20"), ("full", "resnet18")):
        assert task.model_named(None, size) == expected
    with torch.device("meta"):
        for build in task.models.values():
            assert build(None, task.settings("cpu")).eval()(torch.empty(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", NAMES)
def test_all_pictures_but_in_smoke(name):
    """The sizes cpu and full learn from every picture and are judged by every picture."""
    for size in SIZES[1:]:
        settings = tasks.get(name).settings(size)
        assert (settings.examples, settings.test_examples) == (None, None)
