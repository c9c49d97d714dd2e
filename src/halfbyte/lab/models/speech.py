"""Recurrent networks over frames of sound.

Dimensions: N batch, T frames of the longest utterance, F numbers in a frame, D width, K symbols or classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

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

    def read(self, frames_NTF: Tensor, lengths_N: Tensor | None) -> Tensor | PackedSequence:
        """What the last LSTM says of each frame, after dropout: (N, T, 2 D), or with lengths the real frames, packed.

        What fills up an utterance is left out, not only ignored afterwards: the backward direction would begin in it,
        and the longest utterance of a batch would decide what is heard of the others. Nor do the clips and scales of a
        recipe see it.
        """
        if lengths_N is None:
            dropped_NTD: Tensor = self.drop(self.lstm(frames_NTF)[0])
            return dropped_NTD
        real = pack_padded_sequence(frames_NTF, lengths_N.cpu(), batch_first=True, enforce_sorted=False)
        y: PackedSequence = self.lstm(real)[0]
        return y._replace(data=self.drop(y.data))


class Recognizer(_Recurrent):
    """From frames to the symbols of CTC: the shape of Sun et al.'s network for speech, four layers in both directions.

    With F inputs it has ``2 (4 D F + 4 D^2 + 8 D) + (layers - 1) 2 (12 D^2 + 8 D) + 2 D K + K`` parameters.
    """

    def forward(self, frames_NTF: Tensor, lengths_N: Tensor | None = None) -> Tensor:
        """Logits (N, T, K) of each frame; those beyond an utterance's length mean nothing.

        Args:
            frames_NTF: frames, filled up at their ends with anything.
            lengths_N: frames of each utterance, at least 1; None where all have T, and for a trace or a graph, which
                cannot hold what depends on them.
        """
        y = self.read(frames_NTF, lengths_N)
        if isinstance(y, Tensor):
            logits_NTK: Tensor = self.head(y)
            return logits_NTK
        return _filled_up(y._replace(data=self.head(y.data)), frames_NTF.shape[1])


class Listener(_Recurrent):
    """From frames to one class for the utterance: the mean over its frames decides."""

    def forward(self, frames_NTF: Tensor, lengths_N: Tensor | None = None) -> Tensor:
        """Logits (N, K), of what `Recognizer.forward` takes."""
        y = self.read(frames_NTF, lengths_N)
        steps = frames_NTF.shape[1]
        y_NTD = y if isinstance(y, Tensor) else _filled_up(y, steps)
        count = steps if lengths_N is None else lengths_N[:, None]
        logits_NK: Tensor = self.head(y_NTD.sum(1) / count)
        return logits_NK


def _filled_up(y: PackedSequence, steps: int) -> Tensor:
    """(N, T, ...) of T steps, with zeros beyond the length of each utterance."""
    return pad_packed_sequence(y, batch_first=True, total_length=steps)[0]
