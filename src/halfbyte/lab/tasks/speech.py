"""Speech: what was said in AN4, and which digit in FSDD."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import MappingProxyType, ModuleType
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import HalfbyteError
from ..data import speech
from ..data.source import Batch, Data
from ..data.speech import BLANK, CHARACTERS, Utterances
from ..models.speech import Listener, Recognizer
from .contract import Carry, Judgment, Outcome, Settings, Task
from .vision import classify, percent

__all__ = ["TASKS", "character_errors", "read_off", "word_errors"]


def _learn(network: nn.Module, batch: Batch, _carry: Carry, _settings: Settings) -> Outcome:
    """CTC (Graves et al., ICML 2006), a mean over utterances, each by its characters; the score: characters right."""
    frames_NTF, frames_N = batch.inputs
    said_NS, said_N = batch.targets
    logits_NTK = network(frames_NTF, frames_N)
    # An utterance too short for its characters has an infinite loss, and no say.
    loss = F.ctc_loss(
        logits_NTK.log_softmax(2).transpose(0, 1), said_NS, frames_N, said_N, blank=BLANK, zero_infinity=True
    )
    share = 1 - _jiwer().cer(_texts(batch), read_off(logits_NTK, frames_N))
    return Outcome(loss, share * batch.count)


def read_off(logits_NTK: Tensor, lengths_N: Tensor) -> list[str]:
    """What CTC's likeliest path says: repeated symbols are one, blanks part them."""
    found = []
    for path, length in zip(logits_NTK.detach().argmax(dim=2).tolist(), lengths_N.tolist(), strict=True):
        kept = [now for now, before in zip(path[:length], [BLANK, *path], strict=False) if now not in (before, BLANK)]
        found.append(" ".join("".join(CHARACTERS[symbol] for symbol in kept).split()))
    return found


def _texts(batch: Batch) -> list[str]:
    """What was said."""
    said_NS, said_N = batch.targets
    return ["".join(CHARACTERS[c] for c in row[:n]) for row, n in zip(said_NS.tolist(), said_N.tolist(), strict=True)]


def word_errors(found: list[str], said: list[str]) -> float:
    """The word error rate by jiwer, in percent.

    Raises:
        HalfbyteError: if it is not installed.
    """
    return 100 * float(_jiwer().wer(said, found))


def character_errors(found: list[str], said: list[str]) -> float:
    """The character error rate by jiwer, in percent; a space between words is a character.

    Raises:
        HalfbyteError: if it is not installed.
    """
    return 100 * float(_jiwer().cer(said, found))


def _jiwer() -> ModuleType:
    """What counts errors.

    Raises:
        HalfbyteError: if it is not installed.
    """
    try:
        import jiwer
    except ModuleNotFoundError as error:
        raise HalfbyteError(
            "Errors in words and characters are counted by the package jiwer, which is not installed. Install it with: "
            "pip install 'halfbyte[lab]'"
        ) from error
    return jiwer


def _judge(network: nn.Module, data: Data, settings: Settings) -> Judgment:
    """The word error rate of the likeliest paths, and their character error rate."""
    device = next(network.parameters()).device
    found: list[str] = []
    said: list[str] = []
    for batch in data.test.batches(settings.test_batch_size):
        frames_NTF, frames_N = (t.to(device) for t in batch.inputs)
        found += read_off(network(frames_NTF, frames_N), frames_N)
        said += _texts(batch)
    return Judgment(word_errors(found, said), {"character error rate": character_errors(found, said)})


def _classify(network: nn.Module, batch: Batch, carry: Carry, settings: Settings) -> Outcome:
    """One class for an utterance."""
    classes_N1, _ = batch.targets
    return classify(network, replace(batch, targets=(classes_N1[:, 0],)), carry, settings)


def _network(
    data: Data, settings: Settings, *, kind: type[Recognizer | Listener], width: int, layers: int
) -> nn.Module:
    utterances = cast(Utterances, data)
    return kind(utterances.bands, utterances.symbols, width=width, layers=layers, dropout=settings.dropout)


# Settings of both tasks are ours, in every size: Sun et al. name four bidirectional layers for speech and no setting.
# ``full`` is a wider network, and longer training at a lower rate.
# Small batches: CTC says nothing but blanks for some 500 steps or more, however many utterances are in one.
_AN4 = Settings(
    epochs=50,
    batch_size=8,
    optimizer="adam",
    learning_rate=3e-3,
    warmup=200,
    clip_norm=5.0,
    dropout=0.2,
    test_batch_size=130,
)
_FSDD = Settings(
    epochs=6, batch_size=50, optimizer="adam", learning_rate=3e-3, clip_norm=5.0, dropout=0.2, test_batch_size=300
)

TASKS = (
    Task(
        name="an4",
        description="Spelled names, numbers and commands, over the telephone (AN4 at 8 kHz).",
        metric="word error rate",
        unit="%",
        higher_is_better=False,
        load=partial(speech.an4, stack=6),
        models=MappingProxyType(
            {
                "bilstm-2x16": partial(_network, kind=Recognizer, width=16, layers=2),
                "bilstm-4x128": partial(_network, kind=Recognizer, width=128, layers=4),
                "bilstm-4x320": partial(_network, kind=Recognizer, width=320, layers=4),
            }
        ),
        default_model="bilstm-4x128",
        sizes=MappingProxyType(
            {
                "smoke": replace(
                    _AN4, epochs=1, model="bilstm-2x16", batch_size=4, examples=12, test_examples=4, warmup=1
                ),
                "cpu": _AN4,
                "full": replace(_AN4, epochs=120, model="bilstm-4x320", learning_rate=1e-3),
            }
        ),
        learn=_learn,
        summarize=percent,
        judge=_judge,
        progress_metric="character accuracy",
        packages=("jiwer",),
    ),
    Task(
        name="fsdd",
        description="Which of ten digits was spoken (Free Spoken Digit Dataset).",
        metric="accuracy",
        unit="%",
        higher_is_better=True,
        load=partial(speech.fsdd, stack=2),
        models=MappingProxyType(
            {
                "bilstm-1x16": partial(_network, kind=Listener, width=16, layers=1),
                "bilstm-2x64": partial(_network, kind=Listener, width=64, layers=2),
            }
        ),
        default_model="bilstm-2x64",
        sizes=MappingProxyType(
            {
                "smoke": replace(_FSDD, epochs=1, model="bilstm-1x16", batch_size=10, examples=30, test_examples=20),
                "cpu": _FSDD,
                "full": replace(_FSDD, epochs=30),
            }
        ),
        learn=_classify,
        summarize=percent,
    ),
)
