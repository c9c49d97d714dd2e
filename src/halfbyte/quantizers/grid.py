"""Fixed grids: a tensor is rounded to the nearest value of a format, with no statistics but perhaps its magnitude.

`Radix4` is the gradient format of Sun et al. 2020, in the two phases of section 3.3; `TwoPhase` names the pair that a
gradient's two uses get. `Nearest` is any other format: radix 2 (1-3-0), 1-2-1, FP8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import formats
from ..formats import Format, Phase, fp4_e3m0_r4, fp4_e3m0_r4_odd
from ..qtensor import QTensor
from .contract import Quantized, Quantizer, Spec, Use, require, without_nan
from .number import Number, choose, clamp, finite, frexp, magnitude, power_of_two

__all__ = ["Grid", "Nearest", "Radix4", "TwoPhase", "largest_log2_scale"]


@dataclass(frozen=True, kw_only=True)
class Grid(Spec):
    """A spec that is nothing but a format: what a gradient slot takes, because its scale comes from elsewhere."""

    @property
    def format(self) -> Format:
        """The format of the codes."""
        return self.formats[0]

    @property
    def for_gradients(self) -> bool:
        return True

    @property
    def own_scale(self) -> Literal["one", "amax"]:
        """The scale where nobody gives one: 1, or the power of two that brings the largest magnitude just inside."""
        return "one"

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _GridQuantizer(self, device=device, backend=backend)


@dataclass(frozen=True, kw_only=True)
class Radix4(Grid):
    """Radix-4 FP4 with the rounding of Fig. 2c: ``floor(log4(1.6 |x|))``. Its scale is 1 unless one is given.

    Attributes:
        phase: `Phase.EVEN` has the levels 4^-3 ... 4^3, `Phase.ODD` half of them.
        rounding: ``"nearest"``, or ``"stochastic"``: up or down at random, so that the mean over many draws is the
            number itself (inside the format's range). What the two phases are compared with.
    """

    phase: Phase = Phase.EVEN
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        require(isinstance(self.phase, Phase), f"Radix4(phase={self.phase!r})", "Phase.EVEN or Phase.ODD is possible")
        known = self.rounding in ("nearest", "stochastic")
        require(known, f"Radix4(rounding={self.rounding!r})", "'nearest' or 'stochastic' is possible")

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def formats(self) -> tuple[Format, ...]:
        return (fp4_e3m0_r4 if self.phase is Phase.EVEN else fp4_e3m0_r4_odd,)


@dataclass(frozen=True, kw_only=True)
class Nearest(Grid):
    """Any format with a sign, rounded to nearest by its own rule; as an operand by itself, scaled per tensor.

    Attributes:
        fmt: a `Format`, or its name.
        scale: where nobody gives one: ``"amax"``, the power of two that brings the largest magnitude just inside the
            format, or ``"one"``.
    """

    fmt: Format | str
    scale: Literal["one", "amax"] = "amax"

    def __post_init__(self) -> None:
        if isinstance(self.fmt, str):
            object.__setattr__(self, "fmt", formats.get(self.fmt))
        require(
            self.format.kind in ("log", "float"),
            f"Nearest(fmt={self.format.name})",
            "formats with a sign and an exponent are possible; integers go through MinMax, Sawb or Pact",
        )
        require(self.scale in ("one", "amax"), f"Nearest(scale={self.scale!r})", "'one' or 'amax' is possible")

    @property
    def formats(self) -> tuple[Format, ...]:
        assert isinstance(self.fmt, Format)
        return (self.fmt,)

    @property
    def own_scale(self) -> Literal["one", "amax"]:
        return self.scale


@dataclass(frozen=True, kw_only=True)
class TwoPhase:
    """Two-phase rounding (Sun et al. 2020, section 3.3): a gradient's two GEMMs round it to interleaved levels.

    Where one phase rounds up the other mostly rounds down, so errors cancel.

    Attributes:
        dgrad: the phase of the GEMM that gives grad_input; the other phase goes to grad_weight. The paper uses even
            and reports that the swap does as well.
    """

    dgrad: Phase = Phase.EVEN

    @property
    def for_dgrad(self) -> Radix4:
        """The spec of ``dgrad.grad_output``."""
        return Radix4(phase=self.dgrad)

    @property
    def for_wgrad(self) -> Radix4:
        """The spec of ``wgrad.grad_output``."""
        return Radix4(phase=Phase.ODD if self.dgrad is Phase.EVEN else Phase.EVEN)


class _GridQuantizer(Quantizer):
    spec: Grid

    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        low, high = self.range_of(x)
        fmt = self.spec.format
        if self.spec.own_scale == "one":
            # The grid does not depend on the data, so infinities saturate as the format says.
            x = x.clamp(-fmt.max, fmt.max)
            low, high = clamp(low, -fmt.max, fmt.max), clamp(high, -fmt.max, fmt.max)
            scale = torch.ones((), dtype=torch.float32, device=x.device)
        else:
            scale = power_of_two(-clamp(largest_log2_scale(magnitude(low, high), fmt.max), -126, 126))
        x, screened = self.screen(x, scale, low, high, observe=observe)
        return Quantized(QTensor(self._encode(x, scale, use), screened, fmt, x.shape))

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        low, high = self.kernels.value_range(x)
        clean, kept = without_nan(x, scale, low, high)
        return QTensor(self._encode(clean, scale), kept, self.spec.format, x.shape)

    def _encode(self, x: Tensor, scale: Tensor, use: Use | None = None) -> Tensor:
        inv_scale = scale.reciprocal()
        if not self.spec.stochastic:
            return self.kernels.encode(x, self.spec.format, inv_scale=inv_scale)
        draw, part = self.source(x, use)
        return self.kernels.encode_drawn(x, self.spec.format, inv_scale=inv_scale, draw=draw, part=part)


def largest_log2_scale(amax: Number, limit: float) -> Number:
    """The largest whole k with ``amax * 2^k <= limit``; 0 where amax is zero or not finite."""
    mantissa, exponent = frexp(amax)
    limit_mantissa, limit_exponent = math.frexp(limit)
    k = limit_exponent - exponent - choose(mantissa > limit_mantissa, 1, 0)
    return choose((amax > 0) & finite(amax), k, 0)
