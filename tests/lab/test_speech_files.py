"""The recordings of speech on disk: read in the form that is published or packed, and never another than the known."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import signal

from halfbyte.errors import HalfbyteError
from halfbyte.lab.data import speech, speech_files
from halfbyte.lab.data.speech_files import RATE
from lab import mini_speech

REAL = os.environ.get("HALFBYTE_DATA")
FORMS = ["packed", "published"]
REPOSITORIES = {"an4": "https://github.com/cmusphinx/an4", "fsdd": "https://github.com/Jakobovski/free-spoken-digit"}
LOAD = {"an4": speech.an4, "fsdd": speech.fsdd}


@pytest.mark.parametrize("form", FORMS)
def test_an4_is_read_in_both_forms(tmp_path, monkeypatch, form):
    """From 8 kHz packed or 16 kHz published come as many samples, and what was said without marks and names."""
    mini_speech.write(tmp_path, monkeypatch, form)
    parts = speech_files.an4(tmp_path)
    assert [said for _, said in parts["train"]] == mini_speech.SAID * 4
    assert [len(sound) for sound, _ in parts["test"]] == [4000, 4160, 4320, 4480]


def test_an4_sounds_the_same_in_both_forms(tmp_path, monkeypatch):
    """Tones of 300 to 740 Hz, halved from 16 kHz, are to a thousandth those made at 8 kHz, but for their ends."""
    found = []
    for form in FORMS:
        mini_speech.write(tmp_path / form, monkeypatch, form)
        found.append(speech_files.an4(tmp_path / form)["train"])
    for (packed, _), (published, _) in zip(*found, strict=True):
        torch.testing.assert_close(published[20:-20], packed[20:-20], atol=1e-3, rtol=0)


def test_fsdd_is_the_same_in_both_forms(tmp_path, monkeypatch):
    """Digit, take and samples of every recording, in the same order, bit for bit."""
    found = []
    for form in FORMS:
        mini_speech.write(tmp_path / form, monkeypatch, form)
        found.append(speech_files.fsdd(tmp_path / form))
    assert (
        [row[:2] for row in found[0]] == [row[:2] for row in found[1]] == [(d, k) for d in range(10) for k in range(8)]
    )
    assert all(torch.equal(a[2], b[2]) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("length", [1, 2, 41, 1000, 1001])
def test_halving_is_scipys(length):
    """Halved samples are those of scipy.signal.resample_poly, rounded and kept within 16 bits, each of them."""
    whole = np.random.default_rng(length).integers(-(2**15), 2**15, length, dtype=np.int16)
    expected = signal.resample_poly(whole, 1, 2).round().clip(-(2**15), 2**15 - 1)
    assert speech_files.halved(torch.from_numpy(whole)).tolist() == expected.tolist()


@pytest.mark.parametrize(("hertz", "kept"), [(1000, 1.0), (3000, 1.0), (5000, 0.0), (7000, 0.0)])
def test_halving_cuts_at_the_new_half(hertz, kept):
    """Of what 8 kHz cannot carry nothing is left, which would else come back as another tone; the rest is kept."""
    whole = (20_000 * torch.sin(2 * torch.pi * hertz * torch.arange(4000) / 16_000)).to(torch.int16)
    power = speech_files.halved(whole)[50:-50].double().square().mean() / 20_000**2 * 2
    assert float(power) == pytest.approx(kept, abs=0.01)


@pytest.mark.parametrize("name", LOAD)
def test_a_damaged_archive_is_not_the_end(tmp_path, monkeypatch, name):
    """An archive that is another names the repository to take; its folders are read then, beside the archive."""
    mini_speech.write(tmp_path, monkeypatch)
    (archive,) = (tmp_path / name).glob("*.tar.xz")
    archive.write_bytes(b"damaged")
    with pytest.raises(HalfbyteError, match=rf"tar\.xz has 7 bytes.*{REPOSITORIES[name]}.*repacking"):
        LOAD[name](tmp_path)
    mini_speech.write(tmp_path, monkeypatch, "published")
    archive.write_bytes(b"damaged")
    assert LOAD[name](tmp_path).train.examples


@pytest.mark.parametrize(("name", "missing"), [("an4", "etc/an4_train.fileids"), ("fsdd", "recordings/0_george_0.wav")])
def test_nothing_at_all_names_the_repository(tmp_path, name, missing):
    """Without any form the error names a missing file, how much its part holds, and the repository that has it."""
    part = r"is missing; expected: [\d,]+ recordings of .*SHA-256 [0-9a-f]{64} over"
    with pytest.raises(HalfbyteError, match=rf"{missing} {part}.*published at {REPOSITORIES[name]}"):
        LOAD[name](tmp_path)
    with pytest.raises(HalfbyteError, match=rf"--data-dir.*{REPOSITORIES[name]}"):
        LOAD[name](None)


def test_one_bit_of_fsdd_is_noticed(tmp_path, monkeypatch):
    """A recording that differs in its last bit is refused, with the name of the speaker."""
    mini_speech.write(tmp_path, monkeypatch, "published")
    path = tmp_path / "fsdd" / "recordings" / "3_theo_7.wav"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(HalfbyteError, match=r"other recordings of theo than the published ones, SHA-256 \w+; expected"):
        speech_files.fsdd(tmp_path)


def test_other_texts_of_an4_are_noticed(tmp_path, monkeypatch):
    """Another word, a line too few, and a recording cut off are refused, with what is there and what should be."""
    mini_speech.write(tmp_path, monkeypatch, "published")
    home = tmp_path / "an4"
    texts, sound = home / "etc" / "an4_test.transcription", home / "wav" / "an4test_clstk" / "who" / "an0-who-b.wav"
    for path, content, counts in (
        (texts, texts.read_bytes().replace(b"YES", b"NO", 1), r"4 recordings of 16,960 samples at 8 kHz and 4 texts"),
        (texts, texts.read_bytes().rsplit(b"\n", 1)[0], r"4 recordings of 16,960 .* and 3 texts"),
        (sound, mini_speech.tone(300, 0.4, rate=16000), r"4 recordings of 16,160 "),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(HalfbyteError, match=rf"part 'test' {counts}.*expected: 4 recordings of 16,960"):
            speech_files.an4(tmp_path)
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (mini_speech.tone(440, 0.1, rate=16000), "16000 Hz, 1 channels and 16 bits; 8000 Hz, one channel"),
        (mini_speech.tone(440, 0.1, channels=2), "8000 Hz, 2 channels and 16 bits"),
        (b"NIST_1A\n   1024\n", r"no recording in a RIFF file \(\.wav\)"),
        (b"", r"no recording in a RIFF file \(\.wav\): EOFError"),
        (mini_speech.tone(440, 0.1)[:-1], "cut off"),
    ],
    ids=["rate", "channels", "sphere", "empty", "cut off"],
)
def test_other_recordings_are_refused(content, text):
    """A recording of another rate, of two channels or of another format is an error with its name, not noise."""
    text = "ends within a sample, after 1,599 bytes" if text == "cut off" else f"is (a recording of )?{text}"
    with pytest.raises(HalfbyteError, match=rf"a\.wav {text}"):
        speech_files.samples("a.wav", content, RATE)


def test_an_empty_recording_has_no_samples():
    """No sample is no error, at either rate."""
    for rate in (8000, 16000):
        assert speech_files.samples("a.wav", mini_speech.tone(440, 0.0, rate=rate), 8000, 16000).shape == (0,)


@pytest.mark.skipif(REAL is None, reason="HALFBYTE_DATA is not set")
def test_the_real_fsdd_from_its_folder(tmp_path):
    """The recordings, laid out as their repository has them, pass every digest: 6 speakers, 10 digits, 50 times."""
    import tarfile

    with tarfile.open(Path(REAL) / "fsdd" / "fsdd-recordings.tar.xz") as archive:
        archive.extractall(tmp_path / "fsdd", filter="data")
    assert len(speech_files.fsdd(tmp_path)) == 3000
