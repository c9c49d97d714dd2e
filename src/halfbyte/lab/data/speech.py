"""Spoken words as log-mel spectra: AN4 (spelled names, numbers and commands) and the Free Spoken Digit Dataset.

Both are recordings of 8 kHz, as a telephone carries them.

Dimensions: T frames of an utterance, M mel bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ...errors import HalfbyteError
from . import speech_files
from .augment import mask_bands
from .source import Data, Sequences
from .speech_files import RATE

__all__ = ["BANDS", "BLANK", "CHARACTERS", "RATE", "Utterances", "an4", "fsdd", "log_mel"]

BANDS = 40
"""Mel bands, M."""

BLANK = 0
"""The symbol of CTC that is no character."""

CHARACTERS = "-ABCDEFGHIJKLMNOPQRSTUVWXYZ' "
"""The symbols of AN4 by their numbers; the first stands for `BLANK`."""

_WINDOW, _HOP, _FFT = 200, 80, 256  # 25 ms every 10 ms.


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
        HalfbyteError: if its files, see `halfbyte.lab.data.speech_files.an4`, are missing or damaged.
    """
    sides = {
        part: Sequences(
            examples=[(_stacked(log_mel(sound), stack), _spelled(said)) for sound, said in utterances],
            pads=(0.0, BLANK),
            augment=partial(mask_bands, stack=stack) if part == "train" else None,
        )
        for part, utterances in speech_files.an4(folder).items()
    }
    return Utterances(train=sides["train"], test=sides["test"], symbols=len(CHARACTERS), bands=BANDS * stack)


def fsdd(folder: Path | None, stack: int = 1) -> Utterances:
    """The Free Spoken Digit Dataset: 6 speakers, 50 times ten digits each; the first 5 of each 50 are to judge by.

    Args:
        folder: of the data sets.
        stack: how many frames, one after another, make one of the network's.

    Raises:
        HalfbyteError: if its files, see `halfbyte.lab.data.speech_files.fsdd`, are missing or damaged.
    """
    sides: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    for digit, take, sound in speech_files.fsdd(folder):
        sides[take < 5].append((_stacked(log_mel(sound), stack), torch.tensor([digit])))
    train, test = (Sequences(examples=sides[judged], pads=(0.0, 0)) for judged in (False, True))
    return Utterances(train=train, test=test, symbols=10, bands=BANDS * stack)


def _stacked(x_TM: Tensor, stack: int) -> Tensor:
    """Frames side by side, (ceil(T / stack), stack M); zeros fill up the last."""
    missing = -len(x_TM) % stack
    return torch.nn.functional.pad(x_TM, (0, 0, 0, missing)).reshape(-1, stack * x_TM.shape[1])


def _spelled(said: str) -> Tensor:
    """What was said, as numbers in `CHARACTERS`."""
    unknown = set(said) - set(CHARACTERS[1:])
    if unknown:
        raise HalfbyteError(f"{said!r} was said, but {sorted(unknown)} are no characters of this task.")
    return torch.tensor([CHARACTERS.index(character) for character in said])
