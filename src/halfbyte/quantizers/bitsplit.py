"""Bit splitting with leverage-score sampling: gradients as two INT4 tensors, half of whose rows are drawn.

Xi et al., Training Transformers with 4-bit Integers (arXiv 2306.11987). A gradient is ``14 * high + low`` over a
scale: an INT4 part and the INT4 residue of it, rounded at random. That is twice the work of one INT4 product; it is won
back by keeping each of the 2N rows with a probability that follows its share of the result, N rows in the mean, each
kept row divided by its probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..formats import Format, int4
from ..qtensor import Blocks, QTensor
from .contract import Quantized, Quantizer, Spec, Use, require
from .number import read

__all__ = ["BitSplit"]

_BASE = 14
_TOP = 6
"""Both parts are cut to -6...6, as the authors' code does: ``14 * 6 + 6 = 90`` of a range of 98."""

_ROUNDS = 30
"""Most rounds of re-distributing probability; each takes at least one row to 1, and few are ever needed."""


@dataclass(frozen=True, kw_only=True)
class BitSplit(Spec):
    """For grad_output slots: ``x = (14 * high + low) / s`` with ``s = 98 / amax``, two INT4 tensors.

    ``high = rint(clamp(s x / 14, -6, 6))``; ``low`` is what is left, stochastically rounded within -6...6. As in
    the authors' code magnitudes above 90/98 of the largest are cut, and so is a residue between 6 and 7: there, about a
    seventh of the range, the estimate is biased.

    Attributes:
        sampling: ``"leverage"`` keeps each row of either part with probability ``min(1, p)``, p proportional to the
            row's norm (for wgrad: times the norm of the row that it multiplies), and N of the 2N rows in the mean;
            ``"none"`` keeps all.
    """

    sampling: Literal["leverage", "none"] = "leverage"

    def __post_init__(self) -> None:
        known = self.sampling in ("leverage", "none")
        require(known, f"BitSplit(sampling={self.sampling!r})", "'leverage' or 'none' is possible")

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def blocks(self) -> bool:
        return self.sampling == "leverage"

    @property
    def along_reduction(self) -> bool:
        return self.sampling == "leverage"

    @property
    def for_gradients(self) -> bool:
        return True

    @property
    def splits(self) -> bool:
        return True

    @property
    def formats(self) -> tuple[Format, ...]:
        return (int4,)

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _BitSplitQuantizer(self, device=device, backend=backend)


class _BitSplitQuantizer(Quantizer):
    spec: BitSplit

    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        require(False, f"one tensor of {self.spec}", "it makes two of one and stands in grad_output slots only")
        raise AssertionError

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        return self.quantize(x).q

    def parts(self, x: Tensor, *, use: Use, observe: bool = False) -> tuple[QTensor, ...]:
        low, high = self.kernels.value_range(x)
        amax = torch.maximum(low.abs(), high.abs()).double()
        whole = _BASE * (_TOP + 1)
        step = (amax / whole).float()
        clean, step = self.screen(x, step, read(low), read(high), observe=observe)
        scaled = clean.double() * torch.where(amax > 0, whole / amax, 0.0)
        upper = (scaled / _BASE).clamp(-_TOP, _TOP).round()
        rest = scaled - _BASE * upper
        # Adding noise before rounding to nearest is stochastic rounding to a neighbor.
        noise = self.noise(x, use).double().view(x.shape)
        lower = torch.floor(rest + noise).clamp(-_TOP, _TOP)
        scales = (step * _BASE, step)
        if self.spec.sampling == "none":
            return tuple(self._pack(codes, scale) for codes, scale in zip((upper, lower), scales, strict=True))
        weights, blocks = self._sample(_BASE * upper, lower, use)
        return tuple(
            self._pack(self._kept(codes, weight, blocks), scale, weight, blocks)
            for codes, scale, weight in zip((upper, lower), scales, weights, strict=True)
        )

    def _pack(
        self, codes: Tensor, scale: Tensor, weight: Tensor | None = None, blocks: Blocks | None = None
    ) -> QTensor:
        qdata = self.kernels.encode(codes, int4, inv_scale=torch.ones_like(scale))
        return QTensor(qdata, scale, int4, codes.shape, block_scale=weight, blocks=blocks)

    def _kept(self, codes: Tensor, weight: Tensor, blocks: Blocks) -> Tensor:
        """The codes, zero in the rows that were not drawn."""
        return codes * (blocks.spread(weight) > 0).reshape(codes.shape)

    def _sample(self, upper: Tensor, lower: Tensor, use: Use) -> tuple[tuple[Tensor, Tensor], Blocks]:
        """For each row of both parts 0, or the reciprocal of the probability with which it was kept; float32."""
        lies = use.geometry.reduction_view("dgrad", 0)
        sizes = tuple(length if d == lies.axis else 1 for d, length in enumerate(lies.shape))
        blocks = Blocks(lies.shape, sizes, None)
        score = torch.stack(
            [t.reshape(lies.shape).square().sum(lies.axis, keepdim=True).sqrt() for t in (upper, lower)]
        )
        if use.gemm == "wgrad" and use.partner is not None:
            given = use.partner.dequantize(torch.float64) if isinstance(use.partner, QTensor) else use.partner.double()
            norms = use.geometry.sum_over("fprop", 0, given.square()).expand(use.geometry.output_shape)
            score = score * norms.reshape(lies.shape).amax(lies.axis, keepdim=True).sqrt()
        probability = _probabilities(score.reshape(-1), score.numel() // 2).reshape(score.shape)
        noise = self.kernels.uniform(score.numel(), *use.source(1)).view(score.shape)
        weight = torch.where(noise < probability, 1 / probability, 0.0).float()
        return (weight[0], weight[1]), blocks


def _probabilities(score: Tensor, budget: int) -> Tensor:
    """Probabilities proportional to the scores that sum to `budget` and are at most 1.

    Args:
        score: non-negative, float64 of shape (2N,).
        budget: N; fewer rows with a score than that are all kept.
    """
    p = score * (budget / score.sum().clamp_min(torch.finfo(torch.float64).tiny))
    for _ in range(_ROUNDS):
        over = p > 1
        sure = p >= 1
        if not over.any():
            break
        rest = torch.where(sure, 0.0, score)
        factor = (budget - sure.sum()).clamp_min(0) / rest.sum().clamp_min(torch.finfo(torch.float64).tiny)
        p = torch.where(sure, 1.0, rest * factor)
    return p.clamp_max(1.0)
