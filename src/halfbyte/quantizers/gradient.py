"""A gradient is quantized once for each of its two uses: `GradQuantizer` makes what dgrad and wgrad multiply.

Specs that are nothing but a format (`Grid`) share the layer's gradient scale; all others bring a scale of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..formats import Format, Phase
from ..kernels import Gemm
from ..qtensor import QTensor
from .contract import Quantizer, Spec, Use
from .grid import Grid
from .layer_scale import GradScaleState
from .number import magnitude, power_of_two, read
from .state import NonFiniteCounter

__all__ = ["GradQuantizer", "Parts", "scale_limit"]

Parts = tuple[QTensor | Tensor, ...]
"""What stands for one operand: the sum of these. One, but for sampled and split gradients."""


def scale_limit(specs: Sequence[Spec | None]) -> float:
    """MAX of the vote: the largest scaled gradient that every format under the layer's scale can hold.

    Both phases of radix 4 share one scale and with it the even phase's 64: the odd phase's 32 is the nearest level to
    anything up to 80.
    """
    limits = [
        spec.format.max * (math.isqrt(spec.format.radix) if spec.format.phase is Phase.ODD else 1)
        for spec in specs
        if isinstance(spec, Grid)
    ]
    return min(limits, default=math.inf)


class GradQuantizer(NonFiniteCounter):
    """Turns grad_output into what dgrad and what wgrad multiply.

    Attributes:
        specs: of ``dgrad.grad_output`` and ``wgrad.grad_output``; None leaves it in floating point.
        samples: how many independent quantizations stand for it in either.
        gains: what each of the two is multiplied by.
        shared: whether one random quantization serves both.
        grad_scale: the layer's scale, perhaps shared with other layers; None where no spec is a `Grid`.
        dgrad: quantizer of a dgrad spec that brings its own scale, or None.
        wgrad: the same for wgrad.
    """

    def __init__(
        self,
        specs: Mapping[Gemm, Spec | None],
        grad_scale: GradScaleState | None,
        *,
        samples: Mapping[Gemm, int],
        gains: Mapping[Gemm, float],
        shared: bool = False,
        device: torch.device | None = None,
        backend: str = "reference",
    ) -> None:
        assert any(specs.values()), "a gradient quantizer with nothing to quantize"
        super().__init__(device=device, backend=backend)
        self.specs = dict(specs)
        self.samples = dict(samples)
        self.gains = dict(gains)
        self.shared = shared
        self.grad_scale = grad_scale
        self._limit = scale_limit(list(specs.values()))
        self._grids = {gemm: spec for gemm, spec in specs.items() if isinstance(spec, Grid)}
        self._formats = {gemm: spec.format for gemm, spec in self._grids.items()}
        for gemm, spec in specs.items():
            own = spec is not None and not isinstance(spec, Grid)
            self.register_module(gemm, spec.build(device=device, backend=backend) if own and spec else None)

    def quantize(self, grads: Mapping[Gemm, Tensor], uses: Mapping[Gemm, Use], *, observe: bool) -> dict[Gemm, Parts]:
        """The operands of the GEMMs that are asked for. Called in the backward pass.

        Args:
            grads: grad_output as each GEMM sees it (after its transform); any shape.
            uses: what each is for.
            observe: whether the largest magnitude is kept for the vote, see `Plan.begin`.

        Returns:
            For each GEMM the parts whose sum stands for its gradient; the gradient itself where its spec is None.
        """
        found: dict[Gemm, Parts] = {g: (grad,) for g, grad in grads.items() if self.specs[g] is None}
        scaled = {g: grads[g] for g in grads if g in self._grids}
        if scaled:
            found |= self._under_layer_scale(scaled, uses, observe=observe)
        for gemm in grads:
            if gemm not in found:
                other = next(iter(found), None)
                found[gemm] = (
                    found[other] if self.shared and other else self._own(gemm, grads[gemm], uses[gemm], observe)
                )
        return {gemm: self._amplified(gemm, parts) for gemm, parts in found.items()}

    def _amplified(self, gemm: Gemm, parts: Parts) -> Parts:
        """The parts times the GEMM's gain."""
        gain = self.gains[gemm]
        if gain == 1.0:
            return parts
        return tuple(replace(q, scale=q.scale * gain) if isinstance(q, QTensor) else q for q in parts)

    def _own(self, gemm: Gemm, grad: Tensor, use: Use, observe: bool) -> Parts:
        """The parts by a spec that brings its own scale."""
        quantizer = getattr(self, gemm)
        assert isinstance(quantizer, Quantizer)
        if self.shared:
            # One draw for both, so that wgrad's does not depend on whether dgrad is needed.
            use = replace(use, draw=replace(use.draw, operand=0))
        return self._sampled(
            gemm, use, lambda u: quantizer.parts(grad, use=u, observe=observe and u.sample == use.sample)
        )

    def _sampled(self, gemm: Gemm, use: Use, draw: Callable[[Use], tuple[QTensor, ...]]) -> Parts:
        """The mean of that many draws, as the sum of its parts: the scale of each is divided, by a power of two."""
        count = self.samples[gemm]
        if count == 1:
            return draw(use)
        parts = [q for number in range(count) for q in draw(replace(use, sample=use.sample + number))]
        return tuple(replace(q, scale=q.scale / count) for q in parts)

    def _under_layer_scale(
        self, grads: Mapping[Gemm, Tensor], uses: Mapping[Gemm, Use], *, observe: bool
    ) -> dict[Gemm, Parts]:
        """The codes under the layer's scale; both GEMMs' from one walk over the gradient."""
        assert self.grad_scale is not None
        grad = next(iter(grads.values()))
        fixed: list[Format] = []
        for gemm in grads:
            if not self._grids[gemm].stochastic and self._formats[gemm] not in fixed:
                fixed.append(self._formats[gemm])
        known = self.grad_scale.settled()
        if known is not None:
            inv_scale = power_of_two(known)
            packed, *ends = self.kernels.encode_each_with_range(grad, fixed, inv_scale=inv_scale)
        else:
            ends = [*self.kernels.value_range(grad)]
        low, high = map(read, ends)
        log2_scale = self.grad_scale.exponent(magnitude(low, high), self._limit, observe=observe)
        clean, scale = self.screen(grad, power_of_two(-log2_scale), low, high, observe=observe)
        if known is None:
            inv_scale = power_of_two(log2_scale)
            packed = self.kernels.encode_each(clean, fixed, inv_scale=inv_scale)
        found: dict[Gemm, Parts] = {}
        for gemm in grads:

            def codes(use: Use, fmt: Format = self._formats[gemm]) -> tuple[QTensor, ...]:
                draw, part = use.source()
                qdata = self.kernels.encode_drawn(clean, fmt, inv_scale=inv_scale, draw=draw, part=part)
                return (QTensor(qdata, scale, fmt, grad.shape),)

            if self._grids[gemm].stochastic:
                found[gemm] = self._sampled(gemm, uses[gemm], codes)
            else:
                fmt = self._formats[gemm]
                found[gemm] = (QTensor(packed[fixed.index(fmt)], scale, fmt, grad.shape),)
        return found

    def extra_repr(self) -> str:
        return ", ".join(f"{gemm}: {spec}" for gemm, spec in self.specs.items())
