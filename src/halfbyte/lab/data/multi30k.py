"""Multi30k: 29,000 captions of pictures in English and in German (Elliott et al., 2016), in pieces of words."""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import HalfbyteError
from .files import demand
from .source import Data, Sequences

__all__ = ["BOS", "EOS", "PAD", "Pairs", "load"]

PAD, BOS, EOS = 0, 1, 2
"""Symbols that are no pieces: what fills up a sentence, begins a translation, and ends every sentence."""

_FILES = {
    "train.en.gz": (568_929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
    "train.de.gz": (637_044, "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
    "test_2016_flickr.en.gz": (21_077, "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"),
    "test_2016_flickr.de.gz": (22_890, "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"),
}


@dataclass(frozen=True, kw_only=True)
class Pairs(Data):
    """Sentences and their translations, as numbers of pieces; each ends in `EOS`.

    Attributes:
        tokenizer: between text and pieces, of the package ``tokenizers``.
    """

    tokenizer: Any

    @property
    def vocabulary(self) -> int:
        """How many pieces there are, of both languages together."""
        return int(self.tokenizer.get_vocab_size())

    def text(self, pieces: Sequence[int]) -> str:
        """The sentence that pieces make."""
        return str(self.tokenizer.decode(list(pieces)))


def load(folder: Path | None, pieces: int) -> Pairs:
    """English to German: 29,000 pairs for training, judged by the 1,000 of the test of 2016.

    The pieces are those of byte-pair encoding (Sennrich et al., 2016), found in the training text of both languages
    together.

    Args:
        folder: of the data sets.
        pieces: how many different ones, at most.

    Raises:
        HalfbyteError: if the files are missing or damaged, or ``tokenizers`` is not installed.
    """
    home = demand(folder, "multi30k", _FILES, "https://github.com/multi30k/dataset (data/task1/raw)")
    sides = {name: _lines(home / name) for name in _FILES}
    tokenizer = _tokenizer([*sides["train.en.gz"], *sides["train.de.gz"]], pieces)
    train, test = (
        Sequences(
            examples=_pairs(tokenizer, sides[f"{part}.en.gz"], sides[f"{part}.de.gz"]), pads=(PAD, PAD), by_target=True
        )
        for part in ("train", "test_2016_flickr")
    )
    return Pairs(train=train, test=test, tokenizer=tokenizer)


def _lines(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()


def _pairs(tokenizer: Any, sources: list[str], targets: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Both sides as numbers."""
    both = [[torch.tensor([*one.ids, EOS]) for one in tokenizer.encode_batch(side)] for side in (sources, targets)]
    return list(zip(*both, strict=True))


def _tokenizer(lines: list[str], pieces: int) -> Any:
    """Byte-pair encoding of these lines: the same in every call."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # Its threads do not survive the fork of a data loader.
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise HalfbyteError(
            "Multi30k is cut into pieces by the package tokenizers, which is not installed. Install it with: "
            "pip install 'halfbyte[lab]'"
        ) from error
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer
