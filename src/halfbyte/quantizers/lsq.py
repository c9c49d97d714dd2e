"""LSQ: the step between codes is learned (Esser et al., ICLR 2020), as Xi et al. (arXiv 2306.11987) use it.

Their forward pass rotates both operands by a Hadamard matrix and rounds them to INT4 with a learned step each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed import least_of_ranks, mean_of_ranks, most_of_ranks
from ..formats import Format, int4, int8
from ..qtensor import QTensor, pack_bits, unpack_bits
from .contract import Quantized, Quantizer, Spec, Use, require, without_nan
from .number import absolute, clamp, read, stored

__all__ = ["Lsq"]


@dataclass(frozen=True, kw_only=True)
class Lsq(Spec):
    """A learned step: ``qdata = clamp(rint(x / |step|), -2^(bits-1), 2^(bits-1) - 1)``.

    The step starts at ``2 mean|x| / sqrt(2^(bits-1) - 1)`` of the first training batch. The gradient of x passes where
    nothing was cut; that of the step is, over all elements, the lowest code or the highest where x was cut and
    ``rint(x / step) - x / step`` elsewhere, over the root of their number times the highest code.

    Attributes:
        bits: 2 to 8. Needs one float an element for the backward pass, and one bit.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        require(2 <= self.bits <= 8, f"Lsq(bits={self.bits})", "2 to 8 bits are possible")

    @property
    def learns(self) -> bool:
        return True

    @property
    def formats(self) -> tuple[Format, ...]:
        return (int4 if self.bits <= 4 else int8,)

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _LsqQuantizer(self, device=device, backend=backend)


class _LsqQuantizer(Quantizer):
    """State: `step`, and whether the first batch has set it."""

    spec: Lsq
    step: nn.Parameter
    ready: Tensor

    def __init__(self, spec: Lsq, *, device: torch.device | None, backend: str) -> None:
        super().__init__(spec, device=device, backend=backend)
        self.declare_parameter("step", 1.0, device=device)
        self.declare("ready", False, torch.bool, device=device)

    @property
    def learned(self) -> nn.Parameter:
        return self.step

    @property
    def _limits(self) -> tuple[int, int]:
        top = int(1 << (self.spec.bits - 1)) - 1
        return -top - 1, top

    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        if observe:
            self.check_first()
        ends = self.kernels.value_range(x)
        low, high = map(read, ends)
        bottom, top = self._limits
        step = self.step.detach().reshape(()).float()
        if not self.ready:
            if observe:
                # All ranks decide alike. A broken tensor makes the mean below not finite on all of them.
                least, most = least_of_ranks(ends[0].nan_to_num()), most_of_ranks(ends[1].nan_to_num())
            first = (2 * self.kernels.moments(x)[0] / math.sqrt(top) + 1e-10).float()
            first = mean_of_ranks(first) if observe else first
            step = torch.where(first.isfinite(), first, step)
            # A batch that is empty, all zero or broken decides nothing.
            if observe and bool(first.isfinite() & (least < most)):
                self.set_first(step)
                self.ready.fill_(True)
        size = clamp(absolute(read(step)), torch.finfo(torch.float32).tiny, math.inf)
        inv_scale = stored(1 / size)
        clean, scale = self.screen(x, stored(size), low, high, observe=observe)
        q = self._encode(clean, scale, inv_scale)
        if not differentiable:
            return Quantized(q)
        wide = clean.detach().to(torch.promote_types(clean.dtype, torch.float32)) * inv_scale
        inside = (wide >= bottom) & (wide <= top)
        return Quantized(q, (pack_bits(inside.reshape(-1)), torch.where(inside, wide.round() - wide, wide.sign())))

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        x, kept = without_nan(x, scale, *self.kernels.value_range(x))
        return self._encode(x, kept, scale.reciprocal())

    def _encode(self, x: Tensor, scale: Tensor, inv_scale: Tensor) -> QTensor:
        fmt = self.spec.formats[0]
        qdata = self.kernels.encode(x, fmt, inv_scale=inv_scale, code_range=self._limits)
        return QTensor(qdata, scale, fmt, x.shape)

    def backward(self, grad: Tensor, q: QTensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        bits, residue = saved
        assert bits is not None
        assert residue is not None
        bottom, top = self._limits
        inside = unpack_bits(bits, q.numel).view(q.shape)
        weight = torch.where(inside, residue, torch.where(residue > 0, float(top), float(bottom)))
        total = self.kernels.stable_sum((grad * weight).reshape(-1))
        # The step used is |step|, so its gradient has the parameter's sign.
        sign = torch.where(self.step.detach().reshape(()) < 0, -1.0, 1.0)
        grad_step = (sign * total / math.sqrt(top * max(q.numel, 1))).float()
        return grad.masked_fill(~inside, 0.0), grad_step

    def extra_repr(self) -> str:
        step = self.shown if self.ready else "not yet known"
        return f"{self.spec.formats[0].name}, step={step}"
