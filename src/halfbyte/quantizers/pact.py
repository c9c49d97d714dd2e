"""PACT: an activation's clip is learned (Choi et al., arXiv 1805.06085).

The clip is a parameter: the optimizer moves it, its weight decay pulls it down, and it is saved with the model. Where
no first value is given, the first training batch chooses the one of least squared error, and where the network's
tensors grow as it learns, the clip follows them for some steps before it is learned (`settling`).
"""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import least_of_ranks, mean_of_ranks, most_of_ranks
from ..formats import Format, int4, int8, integer, uint4
from ..qtensor import QTensor, pack_bits, unpack_bits
from .contract import Quantized, Quantizer, Spec, Use, repr_as_before, require, without_nan
from .number import Number, clamp, read, rounded, stored
from .settling import Settling

__all__ = ["Pact"]

_log = logging.getLogger("halfbyte")
_uint8 = integer(8, signed=False)

MIN_CLIP = 1e-3
"""The clip used is never below this, so that a clip pushed to zero or beyond can come back."""

_LEAST = float(rounded(MIN_CLIP))
_SAMPLE = 1 << 16
_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class Pact(Spec):
    """A learned clip: unsigned ``[0, clip]`` in 2^bits levels, or signed ``[-clip, clip]`` in 2^bits - 1.

    ``qdata = clamp(rint(x * n / clip))`` with n = 15 (unsigned) or 7 (signed) for four bits. Gradients: that of x
    passes where x is inside the clip (ends included); that of the clip is the sum over the elements at or above it,
    minus, if signed, the sum over those at or below its negative. (fms-model-optimizer omits that sign.)

    Attributes:
        clip: first value; None lets the first training batch choose.
        signed: whether negative numbers are kept; None lets the first training batch decide: signed if it holds one.
        bits: 2 to 8.
        plus: PACT+: the gradient of the clip also counts the rounding error of each element inside, and that of x
            stops at the clip itself. Needs one float an element for the backward pass instead of one bit.
        settle: for so many training passes after the first, the clip is set to the one of least squared error on the
            tensors of the pass before, and only then learned. None is 0, but `halfbyte.convert` makes it 500 in a model
            with recurrent layers, whose states grow as it learns.
    """

    clip: float | None = None
    signed: bool | None = False
    bits: int = 4
    plus: bool = False
    settle: int | None = None

    def __post_init__(self) -> None:
        require(2 <= self.bits <= 8, f"Pact(bits={self.bits})", "2 to 8 bits are possible")
        require(self.clip is None or self.clip > 0, f"Pact(clip={self.clip})", "a clip is above zero, or None")
        counted = self.settle is None or (isinstance(self.settle, int) and self.settle >= 0)
        require(counted, f"Pact(settle={self.settle})", "0 or more passes are possible")

    def __repr__(self) -> str:
        return repr_as_before(self, "settle", None)

    @property
    def learns(self) -> bool:
        return True

    @property
    def formats(self) -> tuple[Format, ...]:
        wide = self.bits > 4
        unsigned, signed = (_uint8, int8) if wide else (uint4, int4)
        if self.signed is None:
            return (unsigned, signed)
        return (signed,) if self.signed else (unsigned,)

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _PactQuantizer(self, device=device, backend=backend)


class _PactQuantizer(Quantizer):
    """State: `clip`, whether it has been set, and the sign that was found (-1 unknown, 0 unsigned, 1 signed)."""

    spec: Pact
    clip: nn.Parameter
    ready: Tensor
    sign: Tensor
    settling: Settling | None

    def __init__(self, spec: Pact, *, device: torch.device | None, backend: str) -> None:
        super().__init__(spec, device=device, backend=backend)
        self.declare_parameter("clip", 1.0 if spec.clip is None else spec.clip, device=device)
        self.declare("ready", spec.clip is not None, torch.bool, device=device)
        self.declare("sign", -1 if spec.signed is None else int(spec.signed), torch.int64, device=device)
        self.settling = Settling(spec.settle, device=device) if spec.settle else None
        self._follows = self.settling is not None
        self._settled: tuple[bool, int] | None = None
        self._warned = False

    @property
    def learned(self) -> nn.Parameter:
        return self.clip

    def _state(self) -> tuple[bool, int]:
        """(ready, sign) as Python values, read from the buffers once they cannot change any more."""
        if self._settled is None:
            state = bool(self.ready), int(self.sign)
            if not (state[0] and state[1] >= 0):
                return state
            self._settled = state
        return self._settled

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._settled = self._first_value = None
        self._follows = self.settling is not None
        super()._load_from_state_dict(*args, **kwargs)

    def begin_pass(self) -> None:
        if self.settling is None or not self._follows:
            return
        self.check_first()
        clip = self.settling.advance()
        if clip is not None:
            self.set_first(clip)
        self._follows = bool(self.settling.left > 0)

    @property
    def format(self) -> Format | None:
        sign = self._state()[1]
        if sign < 0:
            return None
        return self.spec.formats[-1 if sign else 0]

    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        if observe and not self._follows:
            self.check_first()
        ready, sign = self._state()
        settled = ready and sign >= 0
        clip: Number = self.clip
        if not settled:
            clip, sign = self._decide(x.detach(), ready, sign, observe=observe)
        clip, levels = clamp(read(clip), _LEAST, math.inf), self._levels(sign)
        fmt, limit, plus = self.spec.formats[-1 if sign else 0], stored(clip), differentiable and self.spec.plus
        qdata, ends, saved = self.kernels.encode_clipped(
            x, fmt, clip=limit, code_range=(-levels if sign else 0, levels), mask=differentiable and not plus
        )
        low, high = map(read, ends)
        if settled:
            self._watch_sign(low, sign)
        if observe and self._follows:
            assert self.settling is not None
            self.settling.see(x, clip, levels, signed=bool(sign))
        if plus:
            x, scale = self.screen(x, stored(clip / levels), low, high, observe=observe)
            return Quantized(QTensor(qdata, scale, fmt, x.shape), self._residue(x.detach(), limit, sign))
        scale = self.marked(stored(clip / levels), low, high, observe=observe)
        return Quantized(QTensor(qdata, scale, fmt, x.shape), saved if differentiable else ())

    def _decide(self, x: Tensor, ready: bool, sign: int, *, observe: bool) -> tuple[Tensor, int]:
        """Clip and sign for a batch before they are settled, which it settles if it is usable and observed."""
        low, high = self.kernels.value_range(x)
        clip = self.clip.detach().reshape(())
        broken = self.kernels.has_nonfinite(low, high)
        if observe:
            # All ranks decide alike, and none of them from a batch that is broken on one.
            low, high = least_of_ranks(low.nan_to_num()), most_of_ranks(high.nan_to_num())
            broken = most_of_ranks(broken.int()).bool()
        # A batch that is empty, all zero or broken decides nothing.
        usable = bool(~broken & (low < high))
        if sign < 0:
            sign = int(low < 0) if usable else 0
        if not ready and usable:
            clip = _best_clip(x, low, high, self._levels(sign), signed=bool(sign)).to(clip.device)
            clip = mean_of_ranks(clip) if observe else clip
        if observe and usable:
            self.sign.fill_(sign)
            self.set_first(clip)
            self.ready.fill_(True)
            if self.spec.signed is None or self.spec.clip is None:
                kind = "signed" if sign else "unsigned"
                _log.info("first batch, range [%.4g, %.4g]: %s activation, clip %.4g", low, high, kind, clip)
        return clip, sign

    def _levels(self, sign: int) -> int:
        """n: whole steps between zero and the clip."""
        return (1 << (self.spec.bits - sign)) - 1

    def _watch_sign(self, low: Number, sign: int) -> None:
        """Says once when an activation that the first batch showed as non-negative turns negative."""
        if self.spec.signed is None and sign == 0 and not self._warned and not isinstance(low, Tensor) and low < 0:
            self._warned = True
            warnings.warn(
                f"{self.spec}: the first batch had no negative number, this one has {low:.4g}; it is cut to 0. "
                "Give this layer Pact(signed=True).",
                stacklevel=4,
            )

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        low, high = self.kernels.value_range(x)
        sign = int(low < 0) if self.spec.signed is None else int(self.spec.signed)
        inv_scale = scale.reciprocal()
        x, scale = without_nan(x, scale, low, high)
        fmt = self.spec.formats[-1 if sign else 0]
        levels = self._levels(sign)
        qdata = self.kernels.encode(x, fmt, inv_scale=inv_scale, code_range=(-levels if sign else 0, levels))
        return QTensor(qdata, scale, fmt, x.shape)

    def _residue(self, x: Tensor, clip: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        """PACT+: d(x_hat)/d(clip) is +-1 at and beyond the clip and (round z - z) / n inside, z = x / step."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        levels = self._levels(sign)
        z = wide * (levels / clip)
        weight = torch.where(wide >= clip, 1.0, (z.round() - z) / levels)
        weight = torch.where(wide <= (-clip if sign else 0.0), -float(sign), weight)
        inside = (wide < clip) & (wide > (-clip if sign else 0.0))
        return pack_bits(inside.reshape(-1)), weight

    def backward(self, grad: Tensor, q: QTensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        inside, second = saved
        assert inside is not None
        if not self.spec.plus:
            return self.kernels.clip_backward(grad, q, inside, second)
        assert second is not None
        grad_clip = self.kernels.stable_sum((grad * second).reshape(-1)).float()
        return grad.masked_fill(~unpack_bits(inside, q.numel).view(q.shape), 0.0), grad_clip

    def extra_repr(self) -> str:
        ready, _ = self._state()
        fmt = self.format
        clip = self.shown if ready else "not yet known"
        return f"{fmt.name if fmt else 'sign not yet known'}, clip={clip}"


def _best_clip(x: Tensor, low: Tensor, high: Tensor, levels: int, *, signed: bool) -> Tensor:
    """The clip of least squared error among 64 fractions of the largest magnitude, on at most 65,536 elements."""
    amax = torch.maximum(low.abs(), high.abs()) if signed else high.clamp_min(0)
    flat = x.reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].double()
    if amax == 0 or sample.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=x.device)
    # A little above each fraction, so that the largest element itself is no exact tie with the clip.
    candidates = amax.double() * torch.arange(1, _CANDIDATES + 1, device=x.device) * ((1 + 2.0**-8) / _CANDIDATES)
    errors = []
    for clip in candidates:
        step = clip / levels
        rounded = (sample / step).round().clamp(-levels if signed else 0, levels) * step
        errors.append((rounded - sample).square().sum())
    return candidates[int(torch.stack(errors).argmin())].float()
