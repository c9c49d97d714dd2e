"""The size ``full`` of every task: the published setting where there is one, and ours where there is none."""

import dataclasses

import pytest
import torch

from halfbyte.lab import phases, tasks
from halfbyte.lab.data import text
from halfbyte.lab.data.source import Stream
from halfbyte.lab.tasks import Settings
from lab import mini_language


def full(name: str) -> Settings:
    return tasks.get(name).settings("full")


def rates(settings: Settings, per_epoch: int, *steps: int) -> list[float]:
    """The learning rates of these steps, counted from 0; a negative one from the end."""
    shape, total = phases.ordinary(settings, per_epoch), settings.epochs * per_epoch
    return [settings.learning_rate * shape(step % total, total) for step in steps]


def stream(symbols: int, context: int) -> Stream:
    return Stream(symbols=torch.zeros(symbols, dtype=torch.int64), context=context)


def test_digits():
    """Ours: 60 passes of Adam, half a cosine from 0.003 to nearly 0, in batches of 64."""
    settings = full("digits")
    assert (settings.epochs, settings.batch_size, settings.optimizer) == (60, 64, "adam")
    assert rates(settings, 20, 0, 600, -1) == pytest.approx([3e-3, 1.5e-3, 0], abs=1e-6)


def test_fashion():
    """Ours: 60 passes of SGD with momentum, half a cosine from 0.1 to nearly 0."""
    settings = full("fashion")
    assert (settings.epochs, settings.batch_size, settings.momentum, settings.weight_decay) == (60, 128, 0.9, 1e-4)
    assert rates(settings, 469, 0, 30 * 469, -1) == pytest.approx([0.1, 0.05, 0], abs=1e-6)


def test_cifar10():
    """He et al. 4.2: 160 passes of 391 batches of 128, 0.1, a tenth from batch 31,280, a hundredth from 46,920."""
    settings = full("cifar10")
    assert (settings.epochs, settings.batch_size, settings.momentum, settings.weight_decay) == (160, 128, 0.9, 1e-4)
    found = rates(settings, 391, 0, 31_279, 31_280, 46_919, 46_920, -1)
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_ptb():
    """Zaremba et al. 4.1, medium: 650 units, 35 words, batch 20, keep a half; 39 passes, over 1.2 after the sixth.

    Their rate of 1 and norm of 5 are for a loss summed over 35 words. 929,588 words are 1,327 batches.
    """
    settings = full("ptb")
    assert (settings.model, settings.batch_size, settings.dropout) == ("lstm-650", 20, 0.5)
    assert (settings.epochs, settings.optimizer, settings.clip_norm) == (39, "sgd", 5 / 35)
    per_epoch = stream(929_589, 35).count_batches(20)
    assert per_epoch == 1327
    found = [rate / 35 for rate in rates(settings, per_epoch, 0, 6 * 1327 - 1, 6 * 1327, 7 * 1327, -1)]
    assert found == pytest.approx([1, 1, 1.2**-1, 1.2**-2, 1.2**-33])


def test_shakespeare():
    """nanoGPT's config/train_shakespeare_char.py: 5,000 steps of 64 windows of 256 characters, and all the rest."""
    settings = full("shakespeare")
    assert (settings.model, settings.context, settings.batch_size, settings.dropout) == ("gpt-6x384", 256, 64, 0.2)
    assert (settings.optimizer, settings.betas, settings.weight_decay) == ("adamw", (0.9, 0.99), 0.1)
    assert (settings.clip_norm, settings.warmup) == (1.0, 100)
    per_epoch = stream(1_115_394 * 9 // 10, 256).count_batches(64)
    assert per_epoch * settings.epochs == pytest.approx(5000, abs=per_epoch / 2)
    found = rates(settings, per_epoch, 0, 99, 100, -1)
    assert found == pytest.approx([1e-5, 1e-3, 1e-3, 0], abs=1e-7)


def test_sst2():
    """Kim 2014, 3.1 and his code: vectors of 300, 100 maps of widths 3, 4 and 5, dropout 0.5, batch 50, 25 passes."""
    settings = full("sst2")
    assert (settings.batch_size, settings.dropout, settings.epochs) == (50, 0.5, 25)
    model = tasks.get("sst2").models[settings.model](text.Text(train=None, test=None, vocabulary=7), settings)
    assert model.embedding.weight.shape == (7, 300)
    assert [(conv.out_channels, conv.kernel_size) for conv in model.convs] == [(100, (3,)), (100, (4,)), (100, (5,))]


def test_multi30k():
    """Vaswani et al.'s base: 5.3, step n has 512^-0.5 min(n^-0.5, n 4000^-1.5); 5.4, dropout, smoothing 0.1; beam 4."""
    settings = full("multi30k")
    assert (settings.model, settings.optimizer, settings.betas) == ("base", "adam", (0.9, 0.98))
    assert (settings.dropout, settings.smoothing, settings.beam, settings.clip_norm) == (0.1, 0.1, 4, None)
    assert (settings.epochs, settings.batch_size) == (30, 64)
    steps = (1, 100, 3999, 4000, 4001, 13_620)
    expected = [512**-0.5 * min(n**-0.5, n * 4000**-1.5) for n in steps]
    assert rates(settings, 454, *(n - 1 for n in steps)) == pytest.approx(expected)


def test_an4():
    """Ours: 120 passes of Adam in batches of 8, 200 steps up to 0.001 and half a cosine down, for four LSTMs of 320."""
    settings = full("an4")
    assert (settings.model, settings.epochs, settings.batch_size) == ("bilstm-4x320", 120, 8)
    assert (settings.optimizer, settings.clip_norm, settings.dropout) == ("adam", 5.0, 0.2)
    assert rates(settings, 119, 0, 199, -1) == pytest.approx([5e-6, 1e-3, 0], abs=1e-7)


def test_fsdd():
    """Ours: 30 passes of Adam in batches of 50, half a cosine from 0.003, for two LSTMs of 64."""
    task, settings = tasks.get("fsdd"), full("fsdd")
    assert (task.model_named(None, "full"), settings.epochs, settings.batch_size) == ("bilstm-2x64", 30, 50)
    assert rates(settings, 54, 0, 27 * 30, -1) == pytest.approx([3e-3, 1.5e-3, 0], abs=1e-6)


@pytest.mark.parametrize(("size", "context"), [("smoke", 64), ("cpu", 64), ("full", 256)])
def test_windows_of_shakespeare(tmp_path, monkeypatch, size, context):
    """A size's batches are as long as its settings say, on both sides, and every network takes them."""
    mini_language.write(tmp_path, monkeypatch)
    task = tasks.get("shakespeare")
    settings = task.settings(size)
    data = task.load_for(tmp_path, settings)
    for side in (data.train, data.test):
        (batch,) = next(side.batches(2)).inputs
        assert batch.shape[1] == context
    with torch.device("meta"):
        for name, build in task.models.items():
            network = build(data, settings)
            assert name.startswith("lstm") or network.context == context
            network(torch.empty(1, context, dtype=torch.int64))


def test_only_full_names_a_context():
    """Runs of the other sizes are what they were: their settings have the fields of all tasks and no other."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    for name, task in tasks.TASKS.items():
        for size, settings in task.sizes.items():
            more = set(dataclasses.asdict(settings)) - fields
            assert more == ({"context"} if (name, size) == ("shakespeare", "full") else set())
