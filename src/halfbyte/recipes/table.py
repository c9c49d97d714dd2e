"""The recipes by name, IBM's family first. Data, nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..errors import HalfbyteError, UnknownNameError
from ..own import is_own, named
from ..quantizers import (
    ExactGradScale,
    GradScaleSpec,
    LayerGradScale,
    LossScale,
    MinMax,
    Nearest,
    Pact,
    Sawb,
    Spec,
    TwoPhase,
)
from .conditions import HIGH_PRECISION, bottom_pointwise, pointwise
from .followers import FOLLOWERS
from .schema import Recipe, Rule
from .slots import Dgrad, Fprop, Wgrad

__all__ = ["RECIPES", "find", "get"]


_SUN = "Sun et al., Ultra-Low Precision 4-bit Training of Deep Neural Networks, NeurIPS 2020"

_INT4 = Fprop(input=Pact(signed=None), weight=Sawb())
_TWO_PHASE = TwoPhase()
_RADIX4_GAIN = math.log(4) / (1.6 - 0.4)
"""The inverse of the mean of q / x on log-uniform numbers: q is 0.4 to 1.6 times the number that it stands for."""

_E5M2 = Nearest(fmt="fp8_e5m2")
_FP8_GRADIENTS = Recipe(
    name="ibm2020_fp8_gradients",
    description="INT4 forward, FP8 gradients: what hybrid recipes give their 1x1 convolutions.",
    source=f"{_SUN}, section 4.2",
    fprop=_INT4,
    dgrad=Dgrad(grad_output=_E5M2),
    wgrad=Wgrad(grad_output=_E5M2),
    grad_scale=LayerGradScale(),
)


def _ibm(
    name: str,
    description: str,
    where: str,
    *,
    dgrad: Spec | None = _TWO_PHASE.for_dgrad,
    wgrad: Spec | None = _TWO_PHASE.for_wgrad,
    grad_scale: GradScaleSpec | None = LayerGradScale(),  # noqa: B008 - a frozen value
    gain: float = 1.0,
    rules: tuple[Rule, ...] = (),
) -> Recipe:
    """A member of the paper's family: INT4 forward, first, last and depthwise layers in high precision."""
    return Recipe(
        name=name,
        description=description,
        source=f"{_SUN}, {where}",
        fprop=_INT4,
        dgrad=Dgrad(grad_output=dgrad, gain=gain),
        wgrad=Wgrad(grad_output=wgrad, gain=gain),
        grad_scale=grad_scale,
        rules=(*HIGH_PRECISION, *rules),
    )


_ALL: tuple[Recipe, ...] = (
    Recipe(name="fp32", description="Nothing is converted: the baseline."),
    Recipe(name="bf16", description="Every GEMM in bfloat16: the 16-bit baseline.", dtype=torch.bfloat16),
    Recipe(
        name="article",
        description="Min-max INT4 for every layer's input and weight, the data too; two-phase radix-4 gradients.",
        source="the popular account of Sun et al. 2020: [min, max] becomes -8 to 7, anew every round",
        fprop=Fprop(input=MinMax(), weight=MinMax(momentum=0.0)),
        dgrad=Dgrad(grad_output=_TWO_PHASE.for_dgrad),
        wgrad=Wgrad(grad_output=_TWO_PHASE.for_wgrad),
        grad_scale=LayerGradScale(),
    ),
    _ibm("ibm2020", "INT4 SAWB weights, INT4 PACT activations, radix-4 FP4 gradients in two phases.", "section 3"),
    _ibm(
        "ibm2020_dw_fp8",
        "ibm2020 with FP8 (1-5-2) gradients for grad_weight.",
        "section 4.2 (dx FP4, dW FP8)",
        wgrad=_E5M2,
    ),
    _ibm(
        "ibm2020_gain",
        "ibm2020 with every rounded gradient times 1.155: what radix-4 rounding takes on average, given back.",
        "section 3; the gain is ours",
        gain=_RADIX4_GAIN,
    ),
    _ibm(
        "ibm2020_1x1_fp8",
        "ibm2020 with FP8 gradients in every 1x1 convolution.",
        "section 4.2",
        rules=(Rule(recipe=_FP8_GRADIENTS, when=pointwise, why="1x1 convolution"),),
    ),
    _ibm(
        "ibm2020_bottom_1x1_fp8",
        "ibm2020 with FP8 gradients in the first, reducing 1x1 convolution of a bottleneck.",
        "section 4.2",
        rules=(Rule(recipe=_FP8_GRADIENTS, when=bottom_pointwise, why="reducing 1x1 convolution"),),
    ),
    _ibm(
        "int4_forward_only",
        "INT4 weights and activations, gradients in floating point.",
        "Table 1, second column",
        dgrad=None,
        wgrad=None,
        grad_scale=None,
    ),
    _ibm(
        "one_phase",
        "Ablation: ibm2020 with the even phase for both gradient GEMMs.",
        "Fig. 1d",
        wgrad=_TWO_PHASE.for_dgrad,
    ),
    _ibm(
        "loss_scale",
        "Ablation: ibm2020 with one dynamic scale for the whole network.",
        "Fig. 1c",
        grad_scale=LossScale(),
    ),
    _ibm(
        "exact_scale",
        "Ablation: ibm2020 with each gradient's own scale instead of one that follows it by an octave a step.",
        "section 3.2; the arm is ours",
        grad_scale=ExactGradScale(),
    ),
    _ibm(
        "radix2_130",
        "Ablation: radix-2 1-3-0 gradients for grad_input, FP8 for grad_weight, one dynamic scale.",
        "Fig. 1a",
        dgrad=Nearest(fmt="fp4_e3m0"),
        wgrad=_E5M2,
        grad_scale=LossScale(),
    ),
    _ibm(
        "radix2_121",
        "Ablation: 1-2-1 gradients for grad_input, FP8 for grad_weight, one dynamic scale.",
        "Fig. 1a",
        dgrad=Nearest(fmt="fp4_e2m1"),
        wgrad=_E5M2,
        grad_scale=LossScale(),
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*_ALL, *FOLLOWERS)}
"""The recipes by name."""

OWN_RECIPE = "a Recipe of your own (on the command line module:recipe)"
"""What is possible besides those names."""


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of that name; a `Recipe` is returned as it is.

    Raises:
        UnknownNameError: if there is none of that name; the text suggests the nearest.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise UnknownNameError("recipe", str(recipe), RECIPES, OWN_RECIPE)
    return RECIPES[recipe]


def find(name: str) -> Recipe:
    """The recipe that somebody typed: one of `RECIPES`, or ``module:recipe`` for one of their own, under that name.

    `get` never imports a module, so names that come from files are for `get`.

    Raises:
        UnknownNameError: if there is none of that name; the text suggests the nearest.
        HalfbyteError: if the module cannot be imported, or holds no such recipe; for a `Recipe` in place of a name.
    """
    if not isinstance(name, str):
        given = f"the Recipe {name.name!r}" if isinstance(name, Recipe) else f"a {type(name).__name__}"
        raise HalfbyteError(
            f"A recipe goes by its name here, because commands and records name it; got {given}. One of your own is "
            "module:variable: mine:recipe is the variable recipe of mine.py."
        )
    if is_own(name):
        return replace(named(name, Recipe, "a Recipe (dataclasses.replace makes one of another)"), name=name)
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES, OWN_RECIPE)
    return RECIPES[name]
