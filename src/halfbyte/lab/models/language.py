"""Two small language models that predict the next symbol: a recurrent one and a Transformer.

Both end in a decoder of their own weights: it is not tied to the embedding, so that each can be left in high precision
without the other.

Dimensions: N batch, T symbols of a sequence, D width, H heads, V size of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import HalfbyteError

__all__ = ["GPT", "LSTMModel"]

State = tuple[Tensor, Tensor]


class LSTMModel(nn.Module):
    """Embedding, stacked LSTM, linear decoder, with dropout between the parts (Zaremba et al., 2014).

    It has ``V D + layers (8 D^2 + 8 D) + D V + V`` parameters: 280,897 for 65 characters at the defaults.
    """

    def __init__(self, vocabulary: int, *, width: int = 128, layers: int = 2, dropout: float = 0.0) -> None:
        """Fresh weights from torch's global generator.

        Args:
            vocabulary: number of symbols, V.
            width: of the embedding and of each LSTM's state, D.
            layers: stacked LSTMs.
            dropout: share of the values that are dropped after the embedding, between LSTMs and before the decoder.

        Raises:
            HalfbyteError: if a size is below 1.
        """
        super().__init__()
        _demand(self, vocabulary=vocabulary, width=width, layers=layers)
        self.embedding = nn.Embedding(vocabulary, width)
        # torch's LSTM drops nothing after its last layer, and warns where there is only one.
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, symbols_NT: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next symbol's logits after each symbol.

        Args:
            symbols_NT: int64.
            state: what an earlier call returned, to go on from there; None to start from zero.

        Returns:
            Logits (N, T, V), and the state: twice (layers, N, D).
        """
        x_NTD, state = self.lstm(self.drop(self.embedding(symbols_NT)), state)
        logits_NTV: Tensor = self.head(self.drop(x_NTD))
        return logits_NTV, state


class _Block(nn.Module):
    """Attention to earlier symbols, then a two-layer network; each is normed before and added after (pre-norm)."""

    causal: Tensor

    def __init__(self, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)
        # True is where a query (row) must not look: at keys (columns) that come after it.
        mask = torch.ones(context, context, dtype=torch.bool).triu(1)
        self.register_buffer("causal", mask, persistent=False)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """(N, T, D) to the same."""
        h_NTD = self.norm1(x_NTD)
        mask_TT = self.causal[: x_NTD.shape[1], : x_NTD.shape[1]]
        attended_NTD, _ = self.attention(h_NTD, h_NTD, h_NTD, attn_mask=mask_TT, need_weights=False)
        x_NTD = x_NTD + self.drop(attended_NTD)
        h_NTD = self.down(self.gelu(self.up(self.norm2(x_NTD))))
        result_NTD: Tensor = x_NTD + self.drop(h_NTD)
        return result_NTD


class GPT(nn.Module):
    """A decoder-only Transformer with learned positions, pre-norm blocks and GELU (Radford et al., 2019).

    It has ``V D + context D + layers (12 D^2 + 13 D) + 2 D + D V + V`` parameters: 421,697 for 65 characters at the
    defaults.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        context: int = 64,
        dropout: float = 0.0,
    ) -> None:
        """Fresh weights from torch's global generator.

        Args:
            vocabulary: number of symbols, V.
            width: of everything between the blocks, D; a multiple of `heads`.
            layers: blocks.
            heads: attention heads of a block, H.
            context: longest sequence.
            dropout: share of the values that are dropped after the embedding, in attention and after each branch.

        Raises:
            HalfbyteError: if a size is below 1, or the width is not a multiple of the heads.
        """
        super().__init__()
        _demand(self, vocabulary=vocabulary, width=width, layers=layers, heads=heads, context=context)
        if width % heads:
            raise HalfbyteError(f"width={width} was asked for with heads={heads}; it must be a multiple of the heads.")
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, context, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for embedding in (self.embedding, self.position):  # torch's own N(0, 1) would drown what the blocks add.
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, symbols_NT: Tensor) -> Tensor:
        """The next symbol's logits after each symbol; those at t depend on the symbols up to t alone.

        Args:
            symbols_NT: int64, at most `context` symbols.

        Returns:
            Logits (N, T, V).

        Raises:
            HalfbyteError: if the sequence is longer than the context.
        """
        length = symbols_NT.shape[1]
        if length > self.context:
            raise HalfbyteError(f"A sequence of {length} symbols was given; this model sees at most {self.context}.")
        x_NTD = self.embedding(symbols_NT) + self.position.weight[:length]
        x_NTD = self.drop(x_NTD)
        for block in self.blocks:
            x_NTD = block(x_NTD)
        logits_NTV: Tensor = self.head(self.norm(x_NTD))
        return logits_NTV


def _demand(model: nn.Module, **sizes: int) -> None:
    """Raises for a size that no network can have."""
    for name, size in sizes.items():
        if size < 1:
            raise HalfbyteError(f"{type(model).__name__}({name}={size}) was asked for; {name} is 1 or more.")
