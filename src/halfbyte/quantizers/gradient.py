"""A gradient is quantized once for each of its two uses: `GradQuantizer` returns the pair."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import Phase
from ..qtensor import QTensor
from ..rng import uniform
from .contract import NonFiniteCounter
from .grid import Grid, power_of_two
from .layer_scale import GradScaleState

__all__ = ["GradQuantizer", "scale_limit"]


def scale_limit(specs: Sequence[Grid | None]) -> float:
    """MAX of the vote: the largest scaled gradient that every format in use can hold.

    Both phases of radix 4 share one scale and with it the even phase's 64: the odd phase's 32 is the nearest level to
    anything up to 80.
    """
    return min(
        spec.format.max * (math.isqrt(spec.format.radix) if spec.format.phase is Phase.ODD else 1)
        for spec in specs
        if spec is not None
    )


class GradQuantizer(NonFiniteCounter):
    """Turns grad_output into what dgrad and what wgrad multiply, under one scale.

    Attributes:
        dgrad: spec of ``dgrad.grad_output``; None leaves it in floating point.
        wgrad: spec of ``wgrad.grad_output``; None leaves it in floating point.
        grad_scale: the scale's state, perhaps shared with other layers.
        seed: what random rounding draws from, with the layer's number and the step.
        layer: the layer's number in its model.
        step: how many gradients have been quantized; int64 of shape ().
    """

    step: Tensor

    def __init__(
        self,
        dgrad: Grid | None,
        wgrad: Grid | None,
        grad_scale: GradScaleState,
        *,
        device: torch.device | None = None,
        backend: str = "reference",
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        assert dgrad or wgrad, "a gradient quantizer with nothing to quantize"
        super().__init__(device=device, backend=backend)
        self.dgrad = dgrad
        self.wgrad = wgrad
        self.grad_scale = grad_scale
        self.seed = seed
        self.layer = layer
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))

    def quantize_pair(self, grad: Tensor, *, observe: bool = True) -> tuple[QTensor | Tensor, QTensor | Tensor]:
        """(for_dgrad, for_wgrad), each codes or, where its spec is None, the gradient itself.

        Called in the backward pass.

        Args:
            grad: grad_output, any shape.
            observe: whether the largest magnitude is kept for the vote and the step counted, see `Plan.begin`.
        """
        low, high = self.kernels.value_range(grad)
        log2_scale = self.grad_scale.exponent(
            torch.maximum(low.abs(), high.abs()), scale_limit([self.dgrad, self.wgrad]), observe=observe
        )
        clean, scale = self.screen(grad, power_of_two(-log2_scale), low, high, observe=observe)
        inv_scale = power_of_two(log2_scale)
        fixed = dict.fromkeys(s.format for s in (self.dgrad, self.wgrad) if s is not None and not s.stochastic)
        packed = dict(zip(fixed, self.kernels.encode_each(clean, tuple(fixed), inv_scale=inv_scale), strict=True))

        def codes(spec: Grid | None, operand: int) -> QTensor | Tensor:
            if spec is None:
                return grad
            if spec.stochastic:
                noise = uniform(grad.numel(), seed=self.seed, layer=self.layer, step=self.step, operand=operand)
                qdata = self.kernels.encode_stochastic(clean, spec.format, inv_scale=inv_scale, noise=noise)
            else:
                qdata = packed[spec.format]
            return QTensor(qdata, scale, spec.format, grad.shape)

        pair = codes(self.dgrad, 0), codes(self.wgrad, 1)
        self.step += observe
        return pair

    def extra_repr(self) -> str:
        return f"dgrad: {self.dgrad}, wgrad: {self.wgrad}"
