"""LUQ: unbiased rounding of gradients to powers of two (Chmiel et al., arXiv 2112.10769, ICLR 2023).

Its format has the levels ``alpha * 2^k``, k = 0 ... 6, and zero. The scale makes the top level the largest magnitude,
so nothing saturates; every number, those below alpha included, goes up or down at random so that its mean is itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import Format, fp4_e3m0
from ..qtensor import QTensor
from .contract import Quantized, Quantizer, Spec, Use, without_nan
from .number import inverse, magnitude, stored

__all__ = ["Luq"]


@dataclass(frozen=True, kw_only=True)
class Luq(Spec):
    """Radix-2 FP4 with the largest magnitude as its top level and stochastic rounding everywhere.

    ``alpha`` is the largest magnitude over 64: with seven levels above zero that is what makes the top one the maximum.
    (The paper prints ``max / 2^(2^(b-1))``, which would need five levels or nine.)
    """

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def for_gradients(self) -> bool:
        return True

    @property
    def formats(self) -> tuple[Format, ...]:
        return (fp4_e3m0,)

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _LuqQuantizer(self, device=device, backend=backend)


class _LuqQuantizer(Quantizer):
    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        low, high = self.range_of(x)
        amax = magnitude(low, high)
        x, scale = self.screen(x, stored(amax / fp4_e3m0.max), low, high, observe=observe)
        return Quantized(self._encode(x, scale, stored(inverse(fp4_e3m0.max, amax)), use))

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        x, kept = without_nan(x, scale, *self.kernels.value_range(x))
        return self._encode(x, kept, scale.reciprocal(), None)

    def _encode(self, x: Tensor, scale: Tensor, inv_scale: Tensor, use: Use | None) -> QTensor:
        draw, part = self.source(x, use)
        qdata = self.kernels.encode_drawn(x, fp4_e3m0, inv_scale=inv_scale, draw=draw, part=part)
        return QTensor(qdata, scale, fp4_e3m0, x.shape)
