"""Uniform grids whose range comes from the data: min-max (affine), SAWB (symmetric, from two moments), absmax.

`MinMax` is the scheme of popular accounts of 4-bit training: the smallest number becomes -8, the largest 7, anew for
every tensor. `Sawb` is what IBM uses for weights (Choi et al., SysML 2019): the clip that minimizes the mean squared
error, as a linear function of the root mean square and the mean magnitude. `AbsMax` is the plainest there is: the
largest magnitude becomes the largest code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..formats import Format, int4, int8
from ..qtensor import QTensor, pack_bits, unpack_bits
from .contract import Quantized, Quantizer, Spec, Use, require, without_nan
from .number import Number, absolute, choose, finite, inverse, larger, magnitude, put, read, root, rounded, stored

__all__ = ["AbsMax", "MinMax", "Sawb"]

SAWB_COEFFICIENTS: dict[int, tuple[float, float]] = {
    # levels: (c1, c2) of clip = c1 * sqrt(E[w^2]) + c2 * E[|w|]. IBM's own, from fms-model-optimizer, where they exist.
    3: (2.6, -1.71),
    4: (3.12, -2.064),
    8: (7.509, -6.892),
    15: (12.035, -12.03),
    16: (12.68, -12.80),
    32: (17.74, -18.64),
    127: (28.24, -30.81),
    255: (31.76, -35.04),
    256: (31.76, -35.04),
    # Refit on six distributions for the widths that IBM's table lacks (SAWB_REFIT names them).
    7: (7.015, -6.367),
    31: (16.419, -17.084),
    63: (21.139, -22.611),
    64: (21.176, -22.645),
    128: (25.594, -27.827),
}

SAWB_REFIT = frozenset({7, 31, 63, 64, 128})
"""Level counts whose coefficients are a refit, not IBM's."""


def _container(bits: int) -> Format:
    """The integer format whose codes hold that many bits."""
    return int4 if bits <= 4 else int8


@dataclass(frozen=True, kw_only=True)
class MinMax(Spec):
    """Affine: ``[min, max]`` becomes ``[-2^(bits-1), 2^(bits-1) - 1]``, re-scaled for every tensor.

    ``qdata = clamp(rint((x - min) * inv_scale) - 2^(bits-1))`` with ``inv_scale = (2^bits - 1) / (max - min)``.
    The zero point is not rounded, so the ends of the range are codes (the lower is met exactly, the upper up to the
    rounding of the scale to float32) and 0.0 need not be one. The gradient passes unchanged.

    Attributes:
        bits: 1 to 8; up to 4 are stored as `int4`.
        momentum: in ``eval`` the range is a running one, ``running = momentum * running + (1 - momentum) * new`` over
            the training batches; 0 keeps the last one.
    """

    bits: int = 4
    momentum: float = 0.9

    def __post_init__(self) -> None:
        require(1 <= self.bits <= 8, f"MinMax(bits={self.bits})", "1 to 8 bits are possible")
        require(0 <= self.momentum < 1, f"MinMax(momentum={self.momentum})", "0 up to but not 1 is possible")

    @property
    def affine(self) -> bool:
        return True

    @property
    def formats(self) -> tuple[Format, ...]:
        return (_container(self.bits),)

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _MinMaxQuantizer(self, device=device, backend=backend)


class _MinMaxQuantizer(Quantizer):
    spec: MinMax
    low: Tensor
    high: Tensor

    def __init__(self, spec: MinMax, *, device: torch.device | None, backend: str) -> None:
        super().__init__(spec, device=device, backend=backend)
        # NaN until the first training batch has been seen.
        self.declare("low", torch.nan, torch.float32, device=device)
        self.declare("high", torch.nan, torch.float32, device=device)

    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        seen_low, seen_high = self.range_of(x)
        low, high = rounded(seen_low), rounded(seen_high)
        if observe:
            keep, new = self.spec.momentum, finite(low) & finite(high)
            for running, now in ((self.low, low), (self.high, high)):
                before = read(running)
                # As in float32: each product and their sum are rounded.
                mixed = rounded(rounded(rounded(keep) * before) + rounded(rounded(1 - keep) * now))
                put(running, choose(new, choose(finite(before), mixed, now), before))
        elif not self.training:
            # What training never saw is taken from the tensor itself.
            past = read(self.low), read(self.high)
            low, high = (choose(finite(old), old, now) for old, now in zip(past, (low, high), strict=True))
        steps = (1 << self.spec.bits) - 1
        span = high - low
        flat = span < 2.0**-120
        # A constant tensor is reproduced: one step of its own size, all codes the lowest.
        scale = choose(flat, choose(low == 0, 1.0, absolute(low)), span / steps)
        inv_scale = choose(flat, 0.0, inverse(steps, span))
        # A range that float32 cannot hold is as broken as an infinity.
        x, kept = self.screen(x, stored(scale), seen_low, rounded(larger(seen_high, span)), observe=observe)
        return Quantized(self._encode(x, kept, stored(inv_scale), stored(low)))

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        low, high = self.kernels.value_range(x)
        inv_scale = scale.reciprocal()
        x, scale = self.screen(x, scale, read(low), read(high), observe=False)
        return self._encode(x, scale, inv_scale, low.float().nan_to_num(nan=0.0))

    def _encode(self, x: Tensor, scale: Tensor, inv_scale: Tensor, low: Tensor) -> QTensor:
        bottom = -(1 << (self.spec.bits - 1))
        fmt = self.spec.formats[0]
        qdata = self.kernels.encode(
            x, fmt, inv_scale=inv_scale, low=low, offset=bottom, code_range=(bottom, -1 - bottom)
        )
        return QTensor(qdata, scale, fmt, x.shape, bottom - low.double() / scale.double())


@dataclass(frozen=True, kw_only=True)
class Sawb(Spec):
    """Statistics-aware weight binning: ``clip = c1 * sqrt(E[w^2]) - |c2| * E[|w|]``, from the present weights.

    15 levels (the default) have an exact zero: ``qdata = clamp(rint(w * 7 / clip), -7, 7)``. 16 levels have none: they
    are the odd multiples of ``clip / 15``. The formula is made for bell-shaped weights; for weights of nearly one
    magnitude it gives next to nothing or less, so the clip is never below their mean magnitude (and where it is not
    above zero, the largest magnitude is taken). In ``eval`` the clip of the last training forward is used.

    Attributes:
        bits: 2 to 8.
        levels: ``2**bits - 1`` (zero is a level) or ``2**bits``; None for the former.
        ste: ``"identity"`` lets the gradient pass everywhere (IBM's default, "sawb+"); ``"clipped"`` stops it where
            ``|w| > clip`` and costs one saved bit a weight.
        ibm_shifted: round ``7 w / clip + 7`` instead of ``7 w / clip``, as fms-model-optimizer does; only exact ties
            differ. For an odd number of levels.
    """

    bits: int = 4
    levels: int | None = None
    ste: Literal["identity", "clipped"] = "identity"
    ibm_shifted: bool = False

    def __post_init__(self) -> None:
        require(2 <= self.bits <= 8, f"Sawb(bits={self.bits})", "2 to 8 bits are possible")
        if self.levels is None:
            object.__setattr__(self, "levels", (1 << self.bits) - 1)
        most = 1 << self.bits
        possible = f"{most - 1} or {most} levels are possible with {self.bits} bits"
        require(self.levels in (most - 1, most), f"Sawb(bits={self.bits}, levels={self.levels})", possible)
        require(self.ste in ("identity", "clipped"), f"Sawb(ste={self.ste!r})", "'identity' or 'clipped' is possible")
        shiftable = not self.ibm_shifted or self.levels == most - 1
        require(shiftable, f"Sawb(levels={self.levels}, ibm_shifted=True)", "an even number of levels has no ties at 0")

    @property
    def affine(self) -> bool:
        """Whether zero is no level, so that codes have a zero point of -1/2."""
        return self.levels == 1 << self.bits

    @property
    def formats(self) -> tuple[Format, ...]:
        return (_container(self.bits),)

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _SawbQuantizer(self, device=device, backend=backend)


class _SawbQuantizer(Quantizer):
    spec: Sawb
    last_clip: Tensor

    def __init__(self, spec: Sawb, *, device: torch.device | None, backend: str) -> None:
        super().__init__(spec, device=device, backend=backend)
        # NaN until the first training forward.
        self.declare("last_clip", torch.nan, torch.float32, device=device)

    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        low, high = self.range_of(x)
        clip = self._clip(x, low, high)
        if observe:
            put(self.last_clip, choose(finite(clip), clip, read(self.last_clip)))
        elif not self.training:
            last = read(self.last_clip)
            clip = choose(finite(last), last, clip)
        assert self.spec.levels is not None
        half_steps = (self.spec.levels - 1) / 2
        # All-zero weights have no clip: scale and inverse 0 reproduce them.
        scale, inv_scale, limit = stored(clip / half_steps), stored(inverse(half_steps, clip)), stored(clip)
        x, scale = self.screen(x, scale, low, larger(high, clip), observe=observe)
        q = self._encode(x, scale, inv_scale, limit)
        if differentiable and self.spec.ste == "clipped":
            wide = x.detach().abs().to(torch.promote_types(x.dtype, torch.float32))  # As exact as the clip.
            return Quantized(q, (pack_bits((wide <= limit).reshape(-1)),))
        return Quantized(q)

    def _clip(self, x: Tensor, low: Number, high: Number) -> Number:
        mean_abs, mean_square = map(read, self.kernels.moments(x))
        assert self.spec.levels is not None
        c1, c2 = SAWB_COEFFICIENTS[self.spec.levels]
        clip = c1 * root(mean_square) + c2 * mean_abs
        return rounded(choose(clip > 0, larger(clip, mean_abs), magnitude(low, high)))

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        low, high = self.kernels.value_range(x)
        assert self.spec.levels is not None
        clip = scale * ((self.spec.levels - 1) / 2)
        inv_scale = scale.reciprocal()
        x, scale = without_nan(x, scale, low, high)
        return self._encode(x, scale, inv_scale, clip)

    def _encode(self, x: Tensor, scale: Tensor, inv_scale: Tensor, clip: Tensor) -> QTensor:
        fmt = self.spec.formats[0]
        assert self.spec.levels is not None
        top = (self.spec.levels - 1) // 2
        if self.spec.affine:
            # Levels lie halfway between whole numbers: count from -clip, so code -8 stands for -7.5 steps.
            codes = (-top - 1, top)
            qdata = self.kernels.encode(x, fmt, inv_scale=inv_scale, low=-clip, offset=-top - 1, code_range=codes)
            return QTensor(qdata, scale, fmt, x.shape, torch.full_like(scale, -0.5, dtype=torch.float64))
        low, offset = (-clip, -top) if self.spec.ibm_shifted else (None, 0)
        qdata = self.kernels.encode(x, fmt, inv_scale=inv_scale, low=low, offset=offset, code_range=(-top, top))
        return QTensor(qdata, scale, fmt, x.shape)

    def backward(self, grad: Tensor, q: QTensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        if saved:
            assert saved[0] is not None
            inside = unpack_bits(saved[0], q.numel).view(q.shape)
            grad = grad.masked_fill(~inside, 0.0)
        return grad, None


@dataclass(frozen=True, kw_only=True)
class AbsMax(Spec):
    """Symmetric integers up to ``n = 2^(bits-1) - 1``: the largest magnitude becomes n. The gradient passes unchanged.

    Attributes:
        bits: 2 to 8.
        rounding: ``"nearest"``, ties to even, or ``"stochastic"``, whose mean over many draws is the number itself.
    """

    bits: int = 8
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        require(2 <= self.bits <= 8, f"AbsMax(bits={self.bits})", "2 to 8 bits are possible")
        known = self.rounding in ("nearest", "stochastic")
        require(known, f"AbsMax(rounding={self.rounding!r})", "'nearest' or 'stochastic' is possible")

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def for_gradients(self) -> bool:
        return True

    @property
    def formats(self) -> tuple[Format, ...]:
        return (_container(self.bits),)

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _AbsMaxQuantizer(self, device=device, backend=backend)


class _AbsMaxQuantizer(Quantizer):
    spec: AbsMax

    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        low, high = self.range_of(x)
        amax = magnitude(low, high)
        x, scale = self.screen(x, stored(amax / self._top), low, high, observe=observe)
        return Quantized(self._encode(x, scale, stored(inverse(self._top, amax)), use))

    @property
    def _top(self) -> int:
        return int((1 << (self.spec.bits - 1)) - 1)

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        x, kept = without_nan(x, scale, *self.kernels.value_range(x))
        return self._encode(x, kept, scale.reciprocal(), None)

    def _encode(self, x: Tensor, scale: Tensor, inv_scale: Tensor, use: Use | None) -> QTensor:
        fmt, top = self.spec.formats[0], self._top
        if not self.spec.stochastic:
            qdata = self.kernels.encode(x, fmt, inv_scale=inv_scale, code_range=(-top, top))
        else:
            draw, part = self.source(x, use)
            qdata = self.kernels.encode_drawn(x, fmt, inv_scale=inv_scale, draw=draw, part=part, code_range=(-top, top))
        return QTensor(qdata, scale, fmt, x.shape)
