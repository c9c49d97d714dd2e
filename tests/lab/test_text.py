"""Texts: what the files become, and what a network of text learns from."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from halfbyte.errors import HalfbyteError
from halfbyte.lab import tasks
from halfbyte.lab.data import text
from halfbyte.lab.data.source import Batch
from halfbyte.lab.models.language import LSTMModel
from halfbyte.lab.models.sentence import SentenceCNN
from halfbyte.lab.tasks.language import next_symbol
from lab import mini_language

REAL = os.environ.get("HALFBYTE_DATA")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    mini_language.write(tmp_path, monkeypatch)
    return tmp_path


def test_words_are_numbered_by_frequency(folder):
    """The treebank's most frequent word is 0, ties go by the text, and a line ends in a word of its own."""
    data = text.penn_treebank(folder, 35)
    names = [
        "the",
        "jumps",
        "over",
        "quick",
        "brown",
        "<unk>",
        "N",
        "lazy",
        "dogs",
        "and",
        "then",
        "dog",
        "fox",
        "<eos>",
    ]
    numbers = {word: number for number, word in enumerate(names)}
    line = [*mini_language.LINE.split(), "<eos>"]
    assert data.train.symbols[: len(line)].tolist() == [numbers[word] for word in line]
    assert (len(data.train.symbols), len(data.test.symbols), data.vocabulary) == (60 * 18, 20 * 18, 14)


def test_characters_are_numbered_in_order(folder):
    """Shakespeare's characters go by their code points; the last tenth is for testing."""
    data = text.tiny_shakespeare(folder, 64)
    content = (folder / "tinyshakespeare" / "input.txt").read_text()
    alphabet = sorted(set(content))
    both = torch.cat([data.train.symbols, data.test.symbols])
    assert "".join(alphabet[n] for n in both) == content
    assert len(data.train.symbols) == len(content) * 9 // 10
    assert data.vocabulary == len(alphabet)


def test_rare_words_are_one_symbol(folder):
    """SST-2's unseen words share the symbol 1, padding is 0, and labels stay with their sentences."""
    data = text.sst2(folder)
    words, label = data.test.examples[1]
    assert words.tolist() == [1, 1, 4 + 1, 1]  # "a", "film", "good", "bad" are 2 to 5
    assert label.tolist() == [0]
    assert data.vocabulary == 2 + 6


@pytest.mark.parametrize("load", [text.penn_treebank, text.tiny_shakespeare])
def test_a_damaged_file_is_refused(load, folder):
    """Another content of the same size is no text to learn from."""
    for path in folder.rglob("*.txt"):
        path.write_text(path.read_text().replace("r", "x"))
    with pytest.raises(HalfbyteError, match="another content"):
        load(folder, 35)


def test_no_folder_says_how_to_give_one():
    """Without a data folder the error names the option."""
    with pytest.raises(HalfbyteError, match="--data-dir"):
        tasks.get("ptb").load(None)


def test_the_state_is_carried_over(folder):
    """A text cut into batches gives the loss of the uncut text, because the state goes on."""
    model = LSTMModel(14, width=8)
    symbols = torch.randint(14, (2, 13))

    def outcome(a, b, carry=()):
        return next_symbol(model, Batch((symbols[:, a:b],), (symbols[:, a + 1 : b + 1],), 2 * (b - a)), carry, None)

    whole, first = outcome(0, 12), outcome(0, 4)
    second = outcome(4, 12, first.carry)
    torch.testing.assert_close(first.score + second.score, whole.score)
    assert outcome(4, 12).score != second.score


def test_perplexity_is_of_the_mean(folder):
    """A network that knows nothing of 14 words has a perplexity of 14, however long the text."""
    task = tasks.get("ptb")
    data = task.load(folder)

    class Ignorant(nn.Module):
        def forward(self, symbols):
            return torch.zeros(*symbols.shape, data.vocabulary)

    found = [task.learn(Ignorant(), batch, (), task.settings("cpu")) for batch in data.test.batches(2)]
    total, count = sum(f.score for f in found), sum(batch.count for batch in data.test.batches(2))
    assert task.summarize(total, count) == pytest.approx(14, rel=1e-6)


def test_sentence_network():
    """Its parameters are as many as the docstring says, and short sentences fit."""
    model = SentenceCNN(30, width=6, channels=4)
    expected = 30 * 6 + 6 * 4 + 4 + sum(k * 16 + 4 for k in (3, 4, 5)) + 3 * 4 * 2 + 2
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model(torch.randint(30, (5, 7)), torch.full((5,), 7)).shape == (5, 2)
    assert model(torch.randint(30, (5, 1)), torch.full((5,), 1)).shape == (5, 2)


@pytest.mark.parametrize(("name", "parameters"), [("lstm-200", 4_653_200), ("lstm-650", 19_780_400)])
def test_zarembas_networks(name, parameters, folder):
    """Two layers of 200 and 650, weights uniform in 0.1 and 0.05: 4.65 and 19.78 million parameters for 10,000 words.

    Twice V D, 2 (8 D^2 + 8 D), and V: torch's LSTM has two biases a gate where Zaremba's has one.
    """
    width = int(name.removeprefix("lstm-"))
    task = tasks.get("ptb")
    data = text.Text(train=None, test=None, vocabulary=10_000)
    model = task.models[name](data, task.settings("full"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert parameters == 20_000 * width + 2 * (8 * width**2 + 8 * width) + 10_000
    assert max(float(p.detach().abs().max()) for p in model.parameters()) <= (0.1 if width == 200 else 0.05)


@pytest.mark.skipif(REAL is None, reason="HALFBYTE_DATA is not set")
def test_the_real_texts():
    """The published sizes: words of the treebank, characters of Shakespeare, sentences of SST-2."""
    ptb = text.penn_treebank(Path(REAL), 35)
    assert (len(ptb.train.symbols), len(ptb.test.symbols), ptb.vocabulary) == (929_589, 82_430, 10_000)
    plays = text.tiny_shakespeare(Path(REAL), 64)
    assert (len(plays.train.symbols) + len(plays.test.symbols), plays.vocabulary) == (1_115_394, 65)
    reviews = text.sst2(Path(REAL))
    assert (len(reviews.train.examples), len(reviews.test.examples)) == (67_349, 872)
    assert sum(int(y) for _, y in reviews.train.examples) == 37_569
