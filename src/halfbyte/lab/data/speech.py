"""Spoken words as log-mel spectra: AN4 (spelled names, numbers and commands) and the Free Spoken Digit Dataset.

Both are recordings of 8 kHz, as a telephone carries them.

Dimensions: T frames of an utterance, M mel bands.
"""

from __future__ import annotations

import io
import math
import re
import tarfile
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ...errors import HalfbyteError
from .augment import mask_bands
from .files import demand
from .source import Data, Sequences

__all__ = ["BANDS", "BLANK", "CHARACTERS", "RATE", "Utterances", "an4", "fsdd", "log_mel"]

RATE = 8_000
"""Samples a second."""

BANDS = 40
"""Mel bands, M."""

BLANK = 0
"""The symbol of CTC that is no character."""

CHARACTERS = "-ABCDEFGHIJKLMNOPQRSTUVWXYZ' "
"""The symbols of AN4 by their numbers; the first stands for `BLANK`."""

_WINDOW, _HOP, _FFT = 200, 80, 256  # 25 ms every 10 ms.

_AN4 = {"an4-8k-wav.tar.xz": (29_828_928, "d6d2024ea672914eb481d3a646768226b897753c2e68f130fe0ac891f5cc5206")}
_FSDD = {"fsdd-recordings.tar.xz": (13_500_748, "6d897a604b8046dd2ef128ed833fda5d91fe180f2d3ed82d20598c29264f2f70")}


@dataclass(frozen=True, kw_only=True)
class Utterances(Data):
    """Data of log-mel frames.

    Attributes:
        bands: numbers in a frame.
        symbols: how many different targets there are, a blank included.
    """

    bands: int = BANDS
    symbols: int


def log_mel(samples: Tensor) -> Tensor:
    """The log-energy in each mel band: Hann windows of 25 ms every 10 ms, each band of mean 0 and deviation 1.

    Args:
        samples: float32 of shape (samples,), at `RATE`, in [-1, 1].

    Returns:
        (T, M), float32.
    """
    if len(samples) < _FFT:
        samples = torch.nn.functional.pad(samples, (0, _FFT - len(samples)))
    spectrum = torch.stft(samples, _FFT, _HOP, _WINDOW, torch.hann_window(_WINDOW), return_complex=True)
    x_TM = (_filters() @ spectrum.abs().square() + 1e-6).log().mT
    return (x_TM - x_TM.mean(0)) / (x_TM.std(0, correction=0) + 1e-3)


@cache
def _filters() -> Tensor:
    """Triangles over the frequencies of the transform, evenly spaced on O'Shaughnessy's mel scale: (M, frequencies)."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    mels = torch.linspace(0, top, BANDS + 2, dtype=torch.float64)
    corners = 700 * (10 ** (mels / 2595) - 1)
    frequencies = torch.linspace(0, RATE / 2, _FFT // 2 + 1, dtype=torch.float64)
    left, middle, right = (corners[k : k + BANDS, None] for k in range(3))
    rising, falling = (frequencies - left) / (middle - left), (right - frequencies) / (right - middle)
    return torch.minimum(rising, falling).clamp_min(0).float()


def an4(folder: Path | None, stack: int = 1) -> Utterances:
    """AN4 (Carnegie Mellon, 1991): 948 utterances of 74 speakers to learn from, 130 of 10 others to judge by.

    Targets are the characters of what was said, as numbers in `CHARACTERS`.

    Args:
        folder: of the data sets.
        stack: how many frames, one after another, make one of the network's.

    Raises:
        HalfbyteError: if the file is missing or damaged.
    """
    home = demand(folder, "an4", _AN4, "github.com/cmusphinx/an4, resampled to 8 kHz")
    files = dict(_members(home / "an4-8k-wav.tar.xz"))
    sides = {}
    for part in ("train", "test"):
        names = files[f"etc/an4_{part}.fileids"].decode().split()
        lines = files[f"etc/an4_{part}.transcription"].decode().splitlines()
        sides[part] = Sequences(
            examples=[
                (_stacked(log_mel(_samples(files[f"wav/{name}.wav"])), stack), _spelled(line))
                for name, line in zip(names, lines, strict=True)
            ],
            pads=(0.0, BLANK),
            augment=partial(mask_bands, stack=stack) if part == "train" else None,
        )
    return Utterances(train=sides["train"], test=sides["test"], symbols=len(CHARACTERS), bands=BANDS * stack)


def fsdd(folder: Path | None, stack: int = 1) -> Utterances:
    """The Free Spoken Digit Dataset: 6 speakers, 50 times ten digits each; the first 5 of each 50 are to judge by.

    Args:
        folder: of the data sets.
        stack: how many frames, one after another, make one of the network's.

    Raises:
        HalfbyteError: if the file is missing or damaged.
    """
    home = demand(folder, "fsdd", _FSDD, "github.com/Jakobovski/free-spoken-digit-dataset")
    sides: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    for name, content in sorted(_members(home / "fsdd-recordings.tar.xz")):
        found = re.fullmatch(r"recordings/(\d)_\w+?_(\d+)\.wav", name)
        if found is not None:
            digit, index = int(found[1]), int(found[2])
            example = (_stacked(log_mel(_samples(content)), stack), torch.tensor([digit]))
            sides[index < 5].append(example)
    train, test = (Sequences(examples=sides[judged], pads=(0.0, 0)) for judged in (False, True))
    return Utterances(train=train, test=test, symbols=10, bands=BANDS * stack)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of an archive, read in their order and never written anywhere."""
    with tarfile.open(path, "r:xz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield member.name.removeprefix("./"), file.read()


def _samples(content: bytes) -> Tensor:
    """A recording of 16 bits and one channel, as numbers in [-1, 1].

    Raises:
        HalfbyteError: if it is another kind of recording.
    """
    with wave.open(io.BytesIO(content)) as recording:
        kind = recording.getframerate(), recording.getnchannels(), recording.getsampwidth()
        if kind != (RATE, 1, 2):
            raise HalfbyteError(
                f"A recording of {kind[0]} Hz, {kind[1]} channels and {8 * kind[2]} bits was found; {RATE} Hz, one "
                "channel and 16 bits are possible."
            )
        frames = bytearray(recording.readframes(recording.getnframes()))
    return torch.frombuffer(frames, dtype=torch.int16).float() / 32768


def _stacked(x_TM: Tensor, stack: int) -> Tensor:
    """Frames side by side, (ceil(T / stack), stack M); zeros fill up the last."""
    missing = -len(x_TM) % stack
    return torch.nn.functional.pad(x_TM, (0, 0, 0, missing)).reshape(-1, stack * x_TM.shape[1])


def _spelled(line: str) -> Tensor:
    """What was said, without the marks of its beginning and end and without the utterance's name."""
    said = " ".join(re.sub(r"<[^>]*>|\([^)]*\)", " ", line).split())
    unknown = set(said) - set(CHARACTERS[1:])
    if unknown:
        raise HalfbyteError(f"{said!r} was said, but {sorted(unknown)} are no characters of this task.")
    return torch.tensor([CHARACTERS.index(character) for character in said])
