"""Texts: predicting the next word or character, and the sentiment of a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch.nn.functional as F
from torch import nn

from ..data import text
from ..data.source import Batch, Data
from ..models.language import GPT, LSTMModel
from ..models.sentence import SentenceCNN
from .contract import Carry, Outcome, Settings, Task
from .vision import classify, percent

__all__ = ["TASKS", "next_symbol"]


def next_symbol(network: nn.Module, batch: Batch, carry: Carry, _settings: Settings) -> Outcome:
    """Cross-entropy in nats of each next symbol; a recurrent network goes on from the state that it is given."""
    (symbols_NT,) = batch.inputs
    (targets_NT,) = batch.targets
    # A state of other readers is of no use: at the end of the text there may be fewer.
    known = carry if carry and carry[0].shape[1] == symbols_NT.shape[0] else ()
    output = network(symbols_NT, known) if known else network(symbols_NT)
    logits_NTV, state = output if isinstance(output, tuple) else (output, ())
    loss = F.cross_entropy(logits_NTV.flatten(0, 1), targets_NT.flatten())
    return Outcome(loss, float(loss.detach()) * batch.count, state)


def _perplexity(nats: float, count: int) -> float:
    """How many equally likely symbols would be as hard to tell apart."""
    return math.exp(min(nats / count, 700.0))


def _mean(nats: float, count: int) -> float:
    return nats / count


def _sentiment(network: nn.Module, batch: Batch, carry: Carry, settings: Settings) -> Outcome:
    """Like images: one class for a sentence."""
    classes_N1, _ = batch.targets
    return classify(network, replace(batch, targets=(classes_N1[:, 0],)), carry, settings)


def _vocabulary(data: Data) -> int:
    return cast(text.Text, data).vocabulary


def _lstm(data: Data, settings: Settings, *, width: int, initial: float) -> nn.Module:
    """Zaremba's network: all weights from a uniform distribution."""
    model = LSTMModel(_vocabulary(data), width=width, dropout=settings.dropout)
    for weight in model.parameters():
        nn.init.uniform_(weight, -initial, initial)
    return model


@dataclass(frozen=True, kw_only=True)
class _Windows(Settings):
    """Settings that also say how much of a text is seen at once.

    The other sizes have no such field: their records and checkpoints are from before it, and hold all that they name.

    Attributes:
        context: symbols.
    """

    context: int


_CONTEXT = 64
"""Characters that are seen at once where the settings name no number."""


def _context(settings: Settings) -> int:
    return settings.context if isinstance(settings, _Windows) else _CONTEXT


class _Characters(Task):
    """A task whose windows are as long as its settings say."""

    def load_for(self, folder: Path | None, settings: Settings) -> Data:
        """See `Task.load_for`."""
        return text.in_windows(cast(text.Text, super().load_for(folder, settings)), _context(settings))


def _gpt(data: Data, settings: Settings, *, width: int, layers: int, heads: int) -> nn.Module:
    sizes = {"width": width, "layers": layers, "heads": heads, "context": _context(settings)}
    return GPT(_vocabulary(data), dropout=settings.dropout, **sizes)


def _sentence_cnn(data: Data, settings: Settings, *, width: int, channels: int) -> nn.Module:
    return SentenceCNN(_vocabulary(data), pad=text.PAD, width=width, channels=channels, dropout=settings.dropout)


_ZAREMBA = Settings(
    epochs=13,
    batch_size=20,
    optimizer="sgd",
    learning_rate=20.0,
    learned_rate=0.1,
    schedule="decay",
    hold=4,
    decay=0.5,
    clip_norm=0.25,
    test_batch_size=20,
)
"""The small network's of Zaremba et al., arXiv 1409.2329, and of its released code, but for its windows of 20
words: all have 35 here. The 4 passes of ``cpu`` are ours.

``full`` is the medium network's: 39 passes; after the sixth each divides the rate by 1.2.

There the loss is the sum over the words of a reader (20 of the small network's, 35 of the medium's); here it is their
mean. So a learning rate of 1 is 20 here and a norm of 5 is 0.25; 35 and a seventh for the medium network. Clips learn
at a rate of their own: at 20 they leap beyond all that they could cut, where no gradient brings them back.
"""

_CHARACTERS = Settings(
    epochs=2,
    batch_size=12,
    optimizer="adamw",
    learning_rate=1e-3,
    model="gpt-4x128",
    betas=(0.9, 0.99),
    weight_decay=0.1,
    warmup=100,
    clip_norm=1.0,
    test_batch_size=64,
)
"""nanoGPT's for a processor: 4 layers, 128 wide, 64 characters, batch 12; 2,614 steps where it has 2,000."""

_CHARACTERS_FULL = _Windows(
    **vars(replace(_CHARACTERS, epochs=82, batch_size=64, model="gpt-6x384", dropout=0.2)), context=256
)
"""nanoGPT's config/train_shakespeare_char.py: 6 layers and heads, 384 wide, 256 characters, batch 64, 5,000 steps.

82 passes of 61 batches are 5,002 steps. Ours are: the rate falls to 0, there to 1e-4; weight decay is on all
parameters, there on matrices alone; the text to judge by is read from end to end, there 200 batches of it are drawn;
biases and a head of its own, see `GPT`. Its 1.4697 nats are the best of a run that is expected to overfit: here the
last epoch counts, and a record's curves have the best.
"""

_SENTENCES = Settings(
    epochs=4, batch_size=50, optimizer="adam", learning_rate=1e-3, dropout=0.5, clip_norm=3.0, test_batch_size=64
)
"""Batches of 50, dropout of 0.5 and, in ``full``, 25 passes over vectors of 300: Kim's, EMNLP 2014, and of his code.

The rest is ours: Adam in the place of Adadelta; a bound of 3 on the norm of all gradients together, where Kim bounds
the norm of the head's weight vectors by 3, which nothing does here; vectors from N(0, 1); the layer in front, see
`SentenceCNN`; the last epoch counts, there the best on a part held out. ``cpu`` has 4 passes and vectors of 128.
"""

TASKS = (
    Task(
        name="ptb",
        description="The next word of the Wall Street Journal, 10,000 words (Penn Treebank).",
        metric="perplexity",
        unit="",
        higher_is_better=False,
        load=partial(text.penn_treebank, context=35),
        models=MappingProxyType(
            {
                "lstm-32": partial(_lstm, width=32, initial=0.1),
                "lstm-200": partial(_lstm, width=200, initial=0.1),
                "lstm-650": partial(_lstm, width=650, initial=0.05),
            }
        ),
        default_model="lstm-200",
        sizes=MappingProxyType(
            {
                "smoke": replace(
                    _ZAREMBA, epochs=1, hold=1, model="lstm-32", batch_size=4, examples=320, test_examples=160
                ),
                "cpu": replace(_ZAREMBA, epochs=4, hold=2, decay=0.35),
                "full": replace(
                    _ZAREMBA,
                    epochs=39,
                    hold=6,
                    decay=1 / 1.2,
                    model="lstm-650",
                    dropout=0.5,
                    learning_rate=35.0,
                    clip_norm=5 / 35,
                ),
            }
        ),
        learn=next_symbol,
        summarize=_perplexity,
    ),
    _Characters(
        name="shakespeare",
        description="The next character of Shakespeare's plays, 65 characters.",
        metric="cross-entropy",
        unit="nats",
        higher_is_better=False,
        load=partial(text.tiny_shakespeare, context=_CONTEXT),
        models=MappingProxyType(
            {
                "gpt-2x32": partial(_gpt, width=32, layers=2, heads=2),
                "gpt-4x128": partial(_gpt, width=128, layers=4, heads=4),
                "gpt-6x384": partial(_gpt, width=384, layers=6, heads=6),
                "lstm-128": partial(_lstm, width=128, initial=0.08),
            }
        ),
        default_model="gpt-4x128",
        sizes=MappingProxyType(
            {
                "smoke": replace(
                    _CHARACTERS, epochs=1, model="gpt-2x32", warmup=1, batch_size=4, examples=800, test_examples=400
                ),
                "cpu": _CHARACTERS,
                "full": _CHARACTERS_FULL,
            }
        ),
        learn=next_symbol,
        summarize=_mean,
    ),
    Task(
        name="sst2",
        description="Whether a sentence of a film review likes the film (GLUE SST-2).",
        metric="accuracy",
        unit="%",
        higher_is_better=True,
        load=text.sst2,
        models=MappingProxyType(
            {
                "cnn-16": partial(_sentence_cnn, width=16, channels=8),
                "cnn-128": partial(_sentence_cnn, width=128, channels=100),
                "cnn-300": partial(_sentence_cnn, width=300, channels=100),
            }
        ),
        default_model="cnn-128",
        sizes=MappingProxyType(
            {
                "smoke": replace(_SENTENCES, epochs=1, model="cnn-16", batch_size=16, examples=48, test_examples=32),
                "cpu": _SENTENCES,
                "full": replace(_SENTENCES, epochs=25, model="cnn-300"),
            }
        ),
        learn=_sentiment,
        summarize=percent,
    ),
)
