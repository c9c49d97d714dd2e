"""The scale of a layer's gradient: a power of two that follows the gradient's magnitude.

`LayerGradScale` is the paper's GradScale (Sun et al. 2020, section 3.2, Fig. 3a): one number a layer, moved by at most
one octave a step, by a vote on where the largest scaled gradient lies. `ExactGradScale` recomputes it at every
backward pass; `LossScale` is the one dynamic scale for a whole network that mixed-precision training uses. The last two
are there to be compared with.

State moves at one place. A backward pass only observes the largest magnitude; the vote is taken once per optimizer
step, when the next training forward finds that the weights have changed. Gradient accumulation therefore votes once,
with the largest magnitude of all its backward passes. The ranks of a distributed run sum their votes (Fig. 3a).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed import least_of_ranks, most_of_ranks, sum_of_ranks
from .contract import require
from .grid import largest_log2_scale
from .number import Number, choose, clamp, finite, larger, power_of_two, put, read
from .state import Stateful

__all__ = ["ExactGradScale", "GradScaleSpec", "GradScaleState", "LayerGradScale", "LossScale", "vote"]


@dataclass(frozen=True, kw_only=True)
class GradScaleSpec:
    """How a gradient's scale is found.

    Attributes:
        log2_min: the scale is never below 2 to this.
        log2_max: the scale is never above 2 to this.
    """

    log2_min: int = -40
    log2_max: int = 60

    def __post_init__(self) -> None:
        possible = "-126 <= log2_min <= log2_max <= 126 is possible"
        asked = f"{type(self).__name__}(log2_min={self.log2_min}, log2_max={self.log2_max})"
        require(-126 <= self.log2_min <= self.log2_max <= 126, asked, possible)
        first = getattr(self, "log2_first", None)
        inside = f"log2_min <= log2_first <= log2_max, here {self.log2_min} to {self.log2_max}, is possible"
        ok = first is None or self.log2_min <= first <= self.log2_max
        require(ok, f"{type(self).__name__}(log2_first={first})", inside)

    @property
    def shared(self) -> bool:
        """Whether all layers of a model have one scale between them."""
        return False

    def build(self, *, device: torch.device | None = None) -> GradScaleState:
        """Fresh state."""
        return GradScaleState(self, device=device)


@dataclass(frozen=True, kw_only=True)
class LayerGradScale(GradScaleSpec):
    """One scale a layer, moved by the vote of Fig. 3a. It starts where the first gradient wants it.

    Attributes:
        log2_first: the first exponent; None takes the largest that keeps the first gradient inside the format.
    """

    log2_first: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExactGradScale(GradScaleSpec):
    """One scale a layer, recomputed from every gradient: nothing is stale and nothing saturates."""

    log2_min: int = -126
    log2_max: int = 126


@dataclass(frozen=True, kw_only=True)
class LossScale(GradScaleSpec):
    """One scale for the whole network, as dynamic loss scaling has it.

    It is halved after a step in which some layer's largest scaled gradient lay beyond its format, and doubled after
    `growth_interval` steps without. Such a step is not skipped (a layer cannot skip the optimizer): it saturates.

    Attributes:
        log2_first: the first exponent.
        growth_interval: clean steps before the scale is doubled.
    """

    log2_first: int = 16
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.growth_interval > 0, f"LossScale(growth_interval={self.growth_interval})", "1 or more is possible")

    @property
    def shared(self) -> bool:
        return True


def vote(amax: Number, limit: float) -> Number:
    """One worker's vote on its layer's scale (Fig. 3a).

    Args:
        amax: the largest magnitude of the scaled gradient.
        limit: MAX, the largest value of the format: 64 for radix 4.

    Returns:
        +1 (scale up) in (0, MAX/2], 0 in (MAX/2, MAX], -1 beyond and for NaN. A gradient that is all zero votes 0: the
        paper's interval, which includes zero, would drive the scale up for ever.
    """
    return choose(amax <= limit, choose((amax > 0) & (amax <= limit / 2), 1, 0), -1)


class GradScaleState(Stateful):
    """The state of one scale.

    Attributes:
        spec: what it was built from.
        log2_scale: the exponent in force; int32 of shape ().
        started: whether a gradient has set or confirmed the first exponent; bool of shape ().
        observed: the largest ``amax / limit`` of the unscaled gradients since the last vote; -1 for none. float64.
        clean_steps: steps without overflow (`LossScale`); int32 of shape ().
    """

    spec: GradScaleSpec
    log2_scale: Tensor
    started: Tensor
    observed: Tensor
    clean_steps: Tensor

    def __init__(self, spec: GradScaleSpec, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        first = getattr(spec, "log2_first", None)
        # 2^20 serves a layer whose first gradients are all zero.
        self.declare("log2_scale", 20 if first is None else first, torch.int32, device=device)
        self.declare("started", first is not None, torch.bool, device=device)
        self.declare("observed", -1.0, torch.float64, device=device)
        self.declare("clean_steps", 0, torch.int32, device=device)
        self._agreed = False

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.spec.shared and not keep_vars:
            # Each layer saves a copy of its own: safetensors refuses one tensor under several names.
            destination.update({prefix + name: destination[prefix + name].clone() for name in self._buffers})

    def settled(self) -> Number | None:
        """The exponent that the next gradient is scaled with, if it does not depend on that; None if it may.

        On other devices than the CPU always None: only they know.
        """
        if not self.started.is_cpu or isinstance(self.spec, ExactGradScale) or not self.started:
            return None
        return read(self.log2_scale)

    def exponent(self, amax: Tensor | Number, limit: float, *, observe: bool = True) -> Number:
        """The exponent to scale a gradient with, which it may set if it is the first; observes the gradient.

        Args:
            amax: largest magnitude of the unscaled gradient; floating, shape ().
            limit: the largest value of the format it goes to.
            observe: whether to keep what was seen.

        Returns:
            A whole number, `log2_scale` from now on if it is observed.
        """
        amax, now, started = read(amax), read(self.log2_scale), read(self.started)
        usable = (amax > 0) & finite(amax)
        wanted = clamp(largest_log2_scale(amax, limit), self.spec.log2_min, self.spec.log2_max)
        following = choose(usable, wanted, now)
        exponent = following if isinstance(self.spec, ExactGradScale) else choose(started, now, following)
        if observe:
            put(self.log2_scale, exponent)
            put(self.started, choose(usable, True, started))
            relative = choose(finite(amax), amax / limit, math.inf)
            put(self.observed, larger(read(self.observed), relative))
        return exponent

    def advance(self, stepped: Tensor | bool = True) -> None:
        """Takes the vote on what has been observed since the last one.

        Args:
            stepped: whether the optimizer has stepped since; without that nothing happens. bool of shape ().
        """
        if isinstance(self.spec, ExactGradScale):
            return
        if not self._agreed:
            # Each rank's first gradient chose for itself; a rank without one yet makes all of them ask again.
            both = least_of_ranks(torch.stack([self.log2_scale, self.started.int()]))
            self.log2_scale.copy_(both[0])
            self._agreed = bool(both[1])
        observed, now = read(self.observed), read(self.log2_scale)
        seen = choose(read(stepped), observed >= 0, False)
        amax = clamp(observed, 0.0, math.inf) * read(power_of_two(now))
        if isinstance(self.spec, LossScale):
            overflow = self._together(most_of_ranks, choose(seen, choose(amax <= 1.0, 0, 1), 0)) > 0
            clean = choose(overflow, 0, read(self.clean_steps) + choose(seen, 1, 0))
            grow = clean >= self.spec.growth_interval
            put(self.clean_steps, choose(grow, 0, clean))
            step = choose(grow, 1, 0) - choose(overflow, 1, 0)
        else:
            step = clamp(self._together(sum_of_ranks, choose(seen, vote(amax, 1.0), 0)), -1, 1)
        put(self.log2_scale, clamp(now + step, self.spec.log2_min, self.spec.log2_max))
        put(self.observed, choose(seen, -1.0, observed))

    def _together(self, reduce: Callable[[Tensor], Tensor], whole: Number) -> Number:
        """A whole number that all ranks agree on."""
        return read(reduce(torch.as_tensor(whole, device=self.log2_scale.device)))

    def extra_repr(self) -> str:
        return f"{type(self.spec).__name__}, log2_scale={self.log2_scale.item() if self.started else 'not yet known'}"
