"""The Transformer that reads a sentence and writes another (Vaswani et al., arXiv 1706.03762).

Dimensions: N batch, S pieces of the source, T pieces of the target, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import HalfbyteError

__all__ = ["Transformer"]


class Transformer(nn.Module):
    """Encoder and decoder with one embedding for both languages, which is the output's matrix too (tied, as there).

    Norms come before the branches, which trains without a long warm-up; the paper's come after them. The output is
    ``F.linear`` with the embedding: no layer of its own, so no recipe puts it into four bits.

    With F the width within a branch an encoder's layer has ``4 D^2 + 2 D F + F + 9 D`` parameters and a decoder's
    ``8 D^2 + 2 D F + F + 15 D``; the embedding has ``V D``, the two last norms ``4 D``.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        pad: int,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        inner: int = 256,
        dropout: float = 0.3,
        longest: int = 256,
    ) -> None:
        """Fresh weights from torch's global generator.

        Args:
            vocabulary: number of pieces, V.
            pad: the piece that fills up a sentence.
            width: D; a multiple of `heads`.
            layers: of the encoder, and of the decoder.
            heads: of each attention.
            inner: width within a layer's two-layer network.
            dropout: share of the values that are dropped after the embedding and in every branch.
            longest: pieces of the longest sentence.

        Raises:
            HalfbyteError: if the width is not a multiple of the heads.
        """
        super().__init__()
        if width % heads:
            raise HalfbyteError(f"width={width} was asked for with heads={heads}; it must be a multiple of the heads.")
        self.pad = pad
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=pad)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        nn.init.zeros_(self.embedding.weight[pad])
        self.register_buffer("positions", _waves(longest, width), persistent=False)
        self.drop = nn.Dropout(dropout)
        shape: dict[str, Any] = {"d_model": width, "nhead": heads, "dim_feedforward": inner, "dropout": dropout}
        encoder = nn.TransformerEncoderLayer(**shape, batch_first=True, norm_first=True)
        decoder = nn.TransformerDecoderLayer(**shape, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(encoder, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, layers, norm=nn.LayerNorm(width))
        # Copies of one layer would start with equal weights.
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    positions: Tensor

    def forward(self, source_NS: Tensor, target_NT: Tensor) -> Tensor:
        """The next piece's logits (N, T, V) after each piece of the target; those at t depend on the pieces up to t.

        Args:
            source_NS: int64; filled up with `pad`.
            target_NT: int64; it begins with a piece that stands for the beginning.
        """
        return self.decode(self.encode(source_NS), source_NS, target_NT)

    def encode(self, source_NS: Tensor) -> Tensor:
        """What the decoder looks at: (N, S, D)."""
        read_NSD: Tensor = self.encoder(self._embed(source_NS), src_key_padding_mask=source_NS == self.pad)
        return read_NSD

    def decode(self, read_NSD: Tensor, source_NS: Tensor, target_NT: Tensor) -> Tensor:
        """`forward` once the source has been read."""
        length = target_NT.shape[1]
        later_TT = torch.ones(length, length, dtype=torch.bool, device=target_NT.device).triu(1)
        x_NTD = self.decoder(
            self._embed(target_NT),
            read_NSD,
            tgt_mask=later_TT,
            memory_key_padding_mask=source_NS == self.pad,
            tgt_is_causal=True,
        )
        return F.linear(x_NTD, self.embedding.weight)

    def _embed(self, pieces_NT: Tensor) -> Tensor:
        """Vectors of pieces and places."""
        length = pieces_NT.shape[1]
        if length > len(self.positions):
            raise HalfbyteError(
                f"A sentence of {length} pieces was given; this model sees at most {len(self.positions)}."
            )
        x_NTD = self.embedding(pieces_NT) * math.sqrt(self.embedding.embedding_dim)
        dropped_NTD: Tensor = self.drop(x_NTD + self.positions[:length])
        return dropped_NTD


def _waves(longest: int, width: int) -> Tensor:
    """Sines and cosines of each place, (longest, width), by section 3.5 of the paper."""
    places = torch.arange(longest).unsqueeze(1)
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    return torch.stack([(places * rates).sin(), (places * rates).cos()], dim=2).flatten(1)[:, :width]
