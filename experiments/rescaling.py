"""Must four-bit ranges be set anew in every round? Yes: weights, activations and gradients move (the article's claim).

    python experiments/rescaling.py [--data-dir DIR] [--seeds 3] [--out FILE]

Popular accounts of four-bit training say that [min, max] becomes -8 to 7 anew in every round, since the numbers of a
network move as it learns: a range that fits at first fits no more later. The recipe `article` does that, in every
layer, the data included, and its gradients' scales follow by a vote. Against it: the ranges of the first batch kept for
good, for the weights alone, for the inputs of the layers alone, for both, and also the gradients' scales kept.

Expected before the first run: keeping the weights' ranges costs little (Adam and SGD move most weights by less than
their first range in so few steps, but those that grow saturate), keeping the inputs' ranges more, because before the
first step activations are not what they become; both together at least a point on fashion. Keeping the gradients'
scales costs most: gradients shrink by orders of magnitude as the loss falls, until they underflow to zero. On digits
`article` is within half a point of the best, and all else within some points.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import Study, differs, grounds, variant
from torch import Tensor

import halfbyte as hb
from halfbyte.quantizers import Quantized, Quantizer, Use
from halfbyte.quantizers.layer_scale import GradScaleState


@dataclass(frozen=True, kw_only=True)
class FirstRange(hb.MinMax):
    """Min-max whose range is that of the first training tensor, for good; what lies beyond saturates."""

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _FirstRange(self, device=device, backend=backend)


class _FirstRange(Quantizer):
    def __init__(self, spec: FirstRange, *, device: torch.device | None, backend: str) -> None:
        super().__init__(spec, device=device, backend=backend)
        # Judging, min-max takes the range of training; with no momentum that is the last that it observed.
        self.inner = hb.MinMax(bits=spec.bits, momentum=0.0).build(device=device, backend=backend)

    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        known = bool(self.inner.low.isfinite())
        self.inner.train(not known)
        return self.inner.quantize(x, observe=observe and not known, use=use)

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> hb.QTensor:
        return self.inner.quantize_scaled(x, scale)


@dataclass(frozen=True, kw_only=True)
class FirstScale(hb.LayerGradScale):
    """A scale for each layer that fits its first gradient, for good."""

    def build(self, *, device: torch.device | None = None) -> GradScaleState:
        return _FirstScale(self, device=device)


class _FirstScale(GradScaleState):
    def advance(self, stepped: Tensor | bool = True) -> None:
        """Takes no vote."""


def arms() -> list[hb.Recipe]:
    """The baseline, everything anew in every round, and what of it is kept."""
    anew, kept = hb.RECIPES["article"].fprop, FirstRange()
    return [
        hb.RECIPES["fp32"],
        hb.RECIPES["article"],
        variant("article", "weights_kept", fprop=hb.Fprop(input=anew.input, weight=kept)),
        variant("article", "inputs_kept", fprop=hb.Fprop(input=kept, weight=anew.weight)),
        variant("article", "both_kept", fprop=hb.Fprop(input=kept, weight=kept)),
        variant("article", "gradients_kept", grad_scale=FirstScale()),
        variant("article", "all_kept", fprop=hb.Fprop(input=kept, weight=kept), grad_scale=FirstScale()),
    ]


def main(given: Sequence[str] | None = None) -> int:
    """Trains, prints the tables and the verdict."""
    study = Study(script=Path(__file__), doc=__doc__)
    asked = study.arguments(given)
    for ground in grounds(asked):
        values = study.compare(ground, arms())
        where, point = f"{ground.name}: ", " points"
        hard = ground.name != "digits"
        study.checks += [
            differs(
                where + "keeping the weights' ranges costs something", values, "weights_kept", "article", unit=point
            ),
            differs(where + "keeping the inputs' ranges costs something", values, "inputs_kept", "article", unit=point),
            differs(
                where + ("keeping both costs at least a point" if hard else "keeping both costs something"),
                values,
                "both_kept",
                "article",
                by=1.0 if hard else 0.0,
                unit=point,
            ),
            differs(
                where + "keeping the gradients' scales costs more than keeping both ranges",
                values,
                "gradients_kept",
                "both_kept",
                unit=point,
            ),
            differs(where + "keeping all is worse than keeping nothing", values, "all_kept", "article", unit=point),
        ]
    return study.finish()


if __name__ == "__main__":
    sys.exit(main())
