"""Recurrent networks over frames of sound.

Dimensions: N batch, T frames of the longest utterance, F numbers in a frame, D width, K symbols or classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Listener", "Recognizer"]


class _Recurrent(nn.Module):
    """A stack of bidirectional LSTMs and a linear head."""

    def __init__(self, inputs: int, outputs: int, *, width: int, layers: int, dropout: float) -> None:
        """Fresh weights from torch's global generator.

        Args:
            inputs: numbers in a frame, F.
            outputs: symbols or classes, K.
            width: of each direction's state, D.
            layers: stacked LSTMs.
            dropout: share of the values that are dropped between LSTMs and before the head.
        """
        super().__init__()
        inner = dropout if layers > 1 else 0.0  # torch's LSTM warns of dropout that has no place.
        self.lstm = nn.LSTM(inputs, width, layers, batch_first=True, bidirectional=True, dropout=inner)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, outputs)

    def read(self, frames_NTF: Tensor) -> Tensor:
        """(N, T, 2 D)."""
        y_NTD, _ = self.lstm(frames_NTF)
        dropped_NTD: Tensor = self.drop(y_NTD)
        return dropped_NTD


class Recognizer(_Recurrent):
    """From frames to the symbols of CTC: the shape of Sun et al.'s network for speech, four layers in both directions.

    With F inputs it has ``2 (4 D F + 4 D^2 + 8 D) + (layers - 1) 2 (12 D^2 + 8 D) + 2 D K + K`` parameters.
    """

    def forward(self, frames_NTF: Tensor, lengths_N: Tensor) -> Tensor:
        """Logits (N, T, K) of each frame; those beyond an utterance's length mean nothing.

        What fills up is zero, and the backward direction meets it first, the same zeros whatever the batch but for
        their number.
        """
        logits_NTK: Tensor = self.head(self.read(frames_NTF))
        return logits_NTK


class Listener(_Recurrent):
    """From frames to one class for the utterance: the mean over its frames decides."""

    def forward(self, frames_NTF: Tensor, lengths_N: Tensor) -> Tensor:
        """Logits (N, K)."""
        real_NT = torch.arange(frames_NTF.shape[1], device=frames_NTF.device) < lengths_N[:, None]
        y_NTD = self.read(frames_NTF) * real_NT[:, :, None]
        logits_NK: Tensor = self.head(y_NTD.sum(1) / lengths_N[:, None])
        return logits_NK
