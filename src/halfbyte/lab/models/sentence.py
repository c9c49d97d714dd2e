"""A network of convolutions over the words of a sentence (Kim, EMNLP 2014), one layer deeper.

Dimensions: N batch, T words of the longest sentence, D width of a word, C channels, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SentenceCNN"]

_WIDTHS = (3, 4, 5)


class SentenceCNN(nn.Module):
    """Words to vectors, convolutions of three, four and five words, the largest over the sentence, a linear head.

    Kim's network has one layer of convolutions. A layer of width 1 comes before them here: recipes keep a network's
    first layer in high precision, and it would be one of the three.

    It has ``V D + D C + C + sum(k C^2 + C for k in 3, 4, 5) + 3 C K + K`` parameters.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        pad: int = 0,
        width: int = 128,
        channels: int = 100,
        classes: int = 2,
        dropout: float = 0.5,
    ) -> None:
        """Fresh weights from torch's global generator.

        Args:
            vocabulary: number of words, V.
            pad: the word that fills up a sentence; its vector stays zero.
            width: of a word's vector, D.
            channels: of each convolution, C.
            classes: number of classes, K.
            dropout: share of the features that are dropped before the head.
        """
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=pad)
        self.mix = nn.Conv1d(width, channels, 1)
        self.convs = nn.ModuleList(nn.Conv1d(channels, channels, k, padding=k // 2) for k in _WIDTHS)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(len(_WIDTHS) * channels, classes)

    def forward(self, words_NT: Tensor, _lengths_N: Tensor) -> Tensor:
        """Logits (N, K). What fills up a sentence is zero in every layer but the biases' share of it."""
        x_NCT = F.relu(self.mix(self.embedding(words_NT).mT))
        pooled = [F.relu(conv(x_NCT)).amax(dim=2) for conv in self.convs]
        logits_NK: Tensor = self.head(self.drop(torch.cat(pooled, dim=1)))
        return logits_NK
