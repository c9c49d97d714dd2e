"""Texts: predicting the next word or character, and the sentiment of a sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
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


def _gpt(data: Data, settings: Settings, *, width: int, layers: int, heads: int, context: int) -> nn.Module:
    sizes = {"width": width, "layers": layers, "heads": heads, "context": context}
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
"""The small network's of Zaremba et al., arXiv 1409.2329, and of its released code.

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
"""nanoGPT's for a processor: 4 layers, 128 wide, 64 characters, batch 12, about 2,000 steps."""

_SENTENCES = Settings(
    epochs=4, batch_size=50, optimizer="adam", learning_rate=1e-3, dropout=0.5, clip_norm=3.0, test_batch_size=64
)
"""Batch, dropout and bound of Kim, EMNLP 2014; Adam in the place of Adadelta."""

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
    Task(
        name="shakespeare",
        description="The next character of Shakespeare's plays, 65 characters.",
        metric="cross-entropy",
        unit="nats",
        higher_is_better=False,
        load=partial(text.tiny_shakespeare, context=64),
        models=MappingProxyType(
            {
                "gpt-2x32": partial(_gpt, width=32, layers=2, heads=2, context=64),
                "gpt-4x128": partial(_gpt, width=128, layers=4, heads=4, context=64),
                "gpt-6x384": partial(_gpt, width=384, layers=6, heads=6, context=64),
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
                "full": replace(_CHARACTERS, epochs=20, batch_size=64, model="gpt-6x384", dropout=0.2),
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
            }
        ),
        default_model="cnn-128",
        sizes=MappingProxyType(
            {
                "smoke": replace(_SENTENCES, epochs=1, model="cnn-16", batch_size=16, examples=48, test_examples=32),
                "cpu": _SENTENCES,
                "full": replace(_SENTENCES, epochs=25),
            }
        ),
        learn=_sentiment,
        summarize=percent,
    ),
)
