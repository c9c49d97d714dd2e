"""Speech: spectra, recordings, networks that listen, and errors counted."""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.lab import tasks
from halfbyte.lab.data import speech
from halfbyte.lab.data.augment import mask_bands
from halfbyte.lab.data.source import Batch
from halfbyte.lab.data.speech import BANDS, BLANK, CHARACTERS, log_mel
from halfbyte.lab.models.speech import Listener, Recognizer
from halfbyte.lab.tasks import Judgment
from halfbyte.lab.tasks.speech import character_errors, read_off, word_errors
from lab import mini_speech

REAL = os.environ.get("HALFBYTE_DATA")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    mini_speech.write(tmp_path, monkeypatch)
    return tmp_path


def mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


@pytest.mark.parametrize("hertz", [500, 1000, 2000, 3500])
def test_a_tone_is_loudest_in_its_band(hertz):
    """Of two tones one after the other each is in the band whose middle is nearest to it on the mel scale."""
    seconds = torch.arange(4000) / speech.RATE
    x = log_mel(torch.cat([torch.sin(2 * torch.pi * hertz * seconds), torch.sin(2 * torch.pi * 250 * seconds)]))
    assert x.shape == (1 + 8000 // 80, BANDS)
    expected = mel(hertz) / (mel(4000) / (BANDS + 1)) - 1
    louder = x[:45].mean(0) - x[-45:].mean(0)
    assert abs(int(louder.argmax()) - expected) <= 1


def test_bands_are_normalized():
    """Every band of an utterance has mean 0 and deviation 1; loudness makes no difference; silence is no NaN."""
    noise = torch.randn(8000, generator=torch.Generator().manual_seed(0)) * 0.1
    x = log_mel(noise)
    torch.testing.assert_close(x.mean(0), torch.zeros(BANDS), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(BANDS), atol=1e-2, rtol=0)
    torch.testing.assert_close(log_mel(0.5 * noise), x, atol=1e-2, rtol=0)
    assert torch.isfinite(log_mel(torch.zeros(100))).all()


def test_an4_gives_what_was_said(folder):
    """Marks and names of utterances are taken off, and every four frames are one of the network's."""
    data = speech.an4(folder, stack=4)
    said = ["".join(CHARACTERS[c] for c in target) for _, target in data.train.examples]
    assert said == mini_speech.SAID * 4
    assert [len(data.train.examples), len(data.test.examples)] == [12, 4]
    plain = speech.an4(folder).train.examples[0][0]
    assert plain.shape == (1 + 4000 // 80, BANDS)
    assert data.train.examples[0][0].shape == (13, 4 * BANDS) == (13, data.bands)
    assert torch.equal(data.train.examples[0][0].view(-1, BANDS)[: len(plain)], plain)
    assert data.test.augment is None


def test_fsdd_is_split_by_its_own_rule(folder):
    """Recordings 0 to 4 of each digit are to judge by, the others to learn from, each with its digit."""
    data = speech.fsdd(folder, stack=2)
    assert sorted(int(t) for _, t in data.test.examples) == sorted(list(range(10)) * 5)
    assert sorted(int(t) for _, t in data.train.examples) == sorted(list(range(10)) * 3)


def test_unknown_characters_are_refused():
    """What the task has no symbol for is named."""
    with pytest.raises(HalfbyteError, match=r"\['7'\] are no characters"):
        speech._spelled("ROOM 7")


def test_masks_are_stretches():
    """Masks are whole frames and whole bands, no longer than asked for; everything else is untouched."""
    x = torch.ones(50, 60, BANDS)
    masked = mask_bands(x, torch.Generator().manual_seed(0), time=10, bands=8)
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    whole_frames, whole_bands = (masked.sum(2) == 0), (masked.sum(1) == 0)
    assert torch.equal(masked == 0, whole_frames[:, :, None] | whole_bands[:, None, :])
    assert 0 < whole_frames.sum(1).max() <= 20
    assert 0 < whole_bands.sum(1).max() <= 14


def test_masks_cover_stacked_frames():
    """Of frames that are stacked a mask takes whole stacks of time, or the same bands of all that are stacked."""
    x_NTSM = torch.ones(50, 60, 4, BANDS)
    masked = mask_bands(x_NTSM.flatten(2), torch.Generator().manual_seed(0), stack=4, time=20, bands=8)
    masked_NTSM = masked.view_as(x_NTSM)
    whole_frames, whole_bands = (masked.sum(2) == 0), (masked_NTSM.sum((1, 2)) == 0)
    expected = whole_frames[:, :, None, None] | whole_bands[:, None, None, :]
    assert torch.equal(masked_NTSM == 0, expected.expand_as(masked_NTSM))
    assert 0 < whole_frames.sum(1).max() <= 10
    assert 0 < whole_bands.sum(1).max() <= 14


def test_a_stack_divides_a_frame():
    """A stack that frames cannot be made of is refused."""
    with pytest.raises(HalfbyteError, match="stack=3 must divide"):
        mask_bands(torch.ones(1, 5, 10), torch.Generator(), stack=3)


@pytest.mark.parametrize(("name", "count"), [("bilstm-4x128", 1_572_125), ("bilstm-4x320", 8_845_469)])
def test_networks_have_the_parameters_they_say(name, count):
    """The recognizers for AN4 by the docstring's formula: nothing published to compare them with.

    Sun et al. name four bidirectional layers and no size. The formula is torch's LSTM, which has two biases a gate.
    Frames have 6 times 40 bands, and there are 29 symbols.
    """
    task, width = tasks.get("an4"), int(name.removeprefix("bilstm-4x"))
    data = speech.Utterances(train=None, test=None, bands=240, symbols=29)
    with torch.device("meta"):
        model = task.models[name](data, task.settings("full"))
    first, other = 4 * width * 240 + 4 * width**2 + 8 * width, 12 * width**2 + 8 * width
    expected = 2 * first + 3 * 2 * other + 2 * width * 29 + 29
    assert sum(p.numel() for p in model.parameters()) == expected == count


def listening(kind: type[nn.Module], recipe: str | None = None) -> nn.Module:
    """A small network whose layers have two directions and which a recipe may have converted."""
    torch.manual_seed(0)
    model = kind(6, 5, width=4, layers=2, dropout=0.0)
    return model if recipe is None else halfbyte.convert(model, recipe)


def filled(frames_NTF: Tensor, lengths_N: Tensor, steps: int) -> Tensor:
    """The same utterances in a batch whose longest has so many frames, with nines behind them."""
    found_NTF = frames_NTF.new_full((len(frames_NTF), steps, frames_NTF.shape[2]), 9.0)
    for n, length in enumerate(lengths_N):
        found_NTF[n, :length] = frames_NTF[n, :length]
    return found_NTF


@pytest.mark.parametrize("recipe", [None, "ibm2020"])
def test_a_recognizer_does_not_hear_padding(recipe):
    """However much fills up the utterances of a batch, their logits and all gradients are the same, bit for bit."""
    lengths_N, found = torch.tensor([3, 7, 5]), []
    for steps in (7, 12):
        model = listening(Recognizer, recipe)
        logits_NTK = model(filled(torch.randn(3, 7, 6), lengths_N, steps), lengths_N)
        assert logits_NTK.shape == (3, steps, 5)
        logits = torch.cat([row[:length] for row, length in zip(logits_NTK, lengths_N, strict=True)])
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [Recognizer, Listener])
def test_an_utterance_is_heard_as_if_alone(kind):
    """In a batch with longer ones an utterance has the logits that it has by itself, without lengths.

    In double precision and but for the last bits: the products have other numbers of rows, the mean other zeros.
    """
    lengths_N, model = torch.tensor([3, 7, 5]), listening(kind).double()
    frames_NTF = filled(torch.randn(3, 7, 6, dtype=torch.float64), lengths_N, 12)
    together = model(frames_NTF, lengths_N)
    for n, length in enumerate(lengths_N):
        alone = model(frames_NTF[n : n + 1, :length])
        torch.testing.assert_close(together[n, :length] if kind is Recognizer else together[n], alone[0])


def test_a_class_is_by_the_mean_over_an_utterance():
    """What decides is the mean of the utterance's own frames."""
    model, x_NTF = listening(Listener), torch.randn(2, 5, 6)
    found = model(x_NTF, torch.tensor([5, 2]))
    alone = model.head(model.lstm(x_NTF[1, :2])[0].mean(0))
    torch.testing.assert_close(found[1], alone)


def path(symbols: str) -> torch.Tensor:
    """Logits of which the likeliest are these, "-" for the blank."""
    return nn.functional.one_hot(torch.tensor([CHARACTERS.index(s) for s in symbols]), len(CHARACTERS)).float()


def test_reading_off():
    """Repeats are one, blanks part true repeats, spaces at the ends go, frames beyond the length do not count."""
    logits = torch.stack([path("--FFI-VVE-"), path("A-A- --  B")])
    assert read_off(logits, torch.tensor([10, 10])) == ["FIVE", "AA B"]
    assert read_off(logits, torch.tensor([6, 1])) == ["FI", "A"]


class Echo(nn.Module):
    """Says what it hears: its input is its logits."""

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))

    def forward(self, frames, lengths):
        return frames


def test_a_path_of_what_was_said_has_no_loss():
    """The score is the share of characters right, and the loss vanishes as the right path becomes certain."""
    task = tasks.get("an4")
    said = torch.tensor([[CHARACTERS.index(c) for c in "FIVE"]])
    batch = Batch((path("-F-I-V-E").unsqueeze(0) * 50, torch.tensor([8])), (said, torch.tensor([4])), 1)
    found = task.learn(Echo(), batch, (), task.settings("smoke"))
    assert found.loss < 1e-6
    assert found.score == 1
    wrong = Batch((path("-F-I-V-A").unsqueeze(0) * 50, torch.tensor([8])), (said, torch.tensor([4])), 1)
    assert task.learn(Echo(), wrong, (), task.settings("smoke")).score == 0.75


def test_silence_has_no_character_right():
    """A path of nothing but blanks, as CTC writes at first, has a score of 0."""
    task = tasks.get("an4")
    said = torch.tensor([[CHARACTERS.index(c) for c in "FIVE"]])
    batch = Batch((path("--------").unsqueeze(0) * 50, torch.tensor([8])), (said, torch.tensor([4])), 1)
    assert task.learn(Echo(), batch, (), task.settings("smoke")).score == 0


def test_character_errors_by_hand():
    """SIX for SEVEN: S stays, two are replaced, two are missing; 4 of 3 + 10 characters, the spaces included."""
    assert character_errors(["A B", "FIVE SIX"], ["A B", "FIVE SEVEN"]) == pytest.approx(100 * 4 / 13, abs=1e-12)


def test_an4_is_judged_by_words_and_by_characters(folder):
    """Of YES, A B C, ENTER FIVE and YES, heard with FIVE as FIX: 1 of 7 words, 2 of 21 characters."""
    task = tasks.get("an4")
    heard = ["Y-E-S", "A-- --B-- --C", "E-N-T-E-R-- --F-I-X", "Y-E-S"]
    rows = [
        (path(line) * 50, torch.tensor([CHARACTERS.index(c) for c in said]))
        for line, said in zip(heard, [*mini_speech.SAID, "YES"], strict=True)
    ]
    data = speech.an4(folder)
    test = replace(data.test, examples=rows)
    found = task.judged(Echo(), replace(data, test=test), task.settings("smoke"))
    assert found == Judgment(100 * (1 / 7), {"character error rate": 100 * (2 / 21)})


def test_without_jiwer_the_cure_is_named(monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(HalfbyteError, match=r"pip install 'halfbyte\[lab\]'"):
        word_errors(["A"], ["A"])


@pytest.mark.skipif(REAL is None, reason="HALFBYTE_DATA is not set")
def test_the_real_recordings():
    """AN4: 948 and 130 utterances, 773 words and 2,565 characters to judge by; FSDD: 2,700 and 300 recordings."""
    data = speech.an4(Path(REAL), stack=4)
    assert (len(data.train.examples), len(data.test.examples)) == (948, 130)
    said = ["".join(CHARACTERS[c] for c in target) for _, target in data.test.examples]
    assert sum(len(line.split()) for line in said) == 773
    assert all(BLANK not in target for _, target in data.train.examples)
    digits = speech.fsdd(Path(REAL))
    assert (len(digits.train.examples), len(digits.test.examples)) == (2700, 300)
