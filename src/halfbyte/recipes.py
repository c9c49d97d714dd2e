"""Recipes: what each operand of a layer's three GEMMs becomes, and which layers are left alone. Data, nothing else.

A layer has three GEMMs of two operands each: six slots.

    fprop(input, weight)         -> output
    dgrad(grad_output, weight)   -> grad_input
    wgrad(grad_output, input)    -> grad_weight

A slot holds a `Spec`, or `REUSE` (the codes that fprop made), or None (floating point). A variant of a recipe is
``dataclasses.replace(recipe, ...)``; a new one is a new `Recipe`.
"""

from __future__ import annotations

import enum
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import nn

from .errors import SpecError, UnknownNameError
from .kernels import Accumulate
from .quantizers import (
    GradScaleSpec,
    Grid,
    LayerGradScale,
    LossScale,
    MinMax,
    Nearest,
    Pact,
    Sawb,
    Spec,
    TwoPhase,
)

__all__ = ["RECIPES", "REUSE", "Dgrad", "Fprop", "LayerInfo", "Recipe", "Reuse", "Rule", "Wgrad", "get"]


class Reuse(enum.Enum):
    """The type of `REUSE`."""

    REUSE = "reuse"

    def __str__(self) -> str:
        return "reuse"


REUSE: Final = Reuse.REUSE
"""In a backward slot: the codes that fprop made of the same tensor."""

Slot = Spec | Reuse | None


@dataclass(frozen=True, kw_only=True)
class Fprop:
    """The operands of the forward GEMM."""

    input: Spec | None = None
    weight: Spec | None = None


@dataclass(frozen=True, kw_only=True)
class Dgrad:
    """The operands of the GEMM that gives grad_input."""

    grad_output: Grid | None = None
    weight: Slot = REUSE


@dataclass(frozen=True, kw_only=True)
class Wgrad:
    """The operands of the GEMM that gives grad_weight."""

    grad_output: Grid | None = None
    input: Slot = REUSE


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a rule's `when` is asked about.

    Attributes:
        fqn: fully qualified name in the model; empty for the model itself.
        module: the layer.
        index: its place among the model's convertible layers, in the order of registration.
        count: how many of those there are.
    """

    fqn: str
    module: nn.Module
    index: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which layers get which recipe. All conditions that are given must hold; with none, every layer matches.

    Attributes:
        recipe: a `Recipe` or the name of one; ``"fp32"`` leaves the layer alone.
        fqn: a pattern for the fully qualified name, with ``*``, ``?`` and ``[...]``: ``"layer4.*"``, ``"*.conv1"``.
        type: a module type, or several.
        when: a function of `LayerInfo`.
        why: shown by `summary`; made from the conditions if empty.
    """

    recipe: str | Recipe
    fqn: str | None = None
    type: type[nn.Module] | tuple[type[nn.Module], ...] | None = None
    when: Callable[[LayerInfo], bool] | None = None
    why: str = ""

    def matches(self, layer: LayerInfo) -> bool:
        """Whether the rule speaks of that layer."""
        if self.fqn is not None and not fnmatch.fnmatchcase(layer.fqn, self.fqn):
            return False
        if self.type is not None and not isinstance(layer.module, self.type):
            return False
        return self.when is None or self.when(layer)

    def __str__(self) -> str:
        if self.why:
            return self.why
        types = self.type if isinstance(self.type, tuple) else () if self.type is None else (self.type,)
        parts = [
            *([f"fqn {self.fqn}"] if self.fqn is not None else []),
            *([f"type {' or '.join(t.__name__ for t in types)}"] if types else []),
            *([getattr(self.when, "__name__", "when")] if self.when is not None else []),
        ]
        return "rule: " + (", ".join(parts) or "every layer")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A numerical plan for a layer, and the rules for the layers that get another.

    Attributes:
        name: how it is called.
        description: one sentence.
        source: where it comes from.
        fprop: operands of the forward GEMM.
        dgrad: operands of the GEMM that gives grad_input.
        wgrad: operands of the GEMM that gives grad_weight.
        grad_scale: how the gradient's scale is found; needed exactly where a gradient is quantized.
        accumulate: how products are summed, see `halfbyte.kernels.reference.gemm`.
        dtype: what an unquantized layer computes in; None leaves it as it is. Only where all slots are None.
        rules: asked after the user's own rules; the first that matches a layer decides, else this recipe does.
    """

    name: str
    description: str = ""
    source: str = ""
    fprop: Fprop = field(default_factory=Fprop)
    dgrad: Dgrad = field(default_factory=Dgrad)
    wgrad: Wgrad = field(default_factory=Wgrad)
    grad_scale: GradScaleSpec | None = None
    accumulate: Accumulate = "exact"
    dtype: torch.dtype | None = None
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for name, spec in self.slots.items():
            self._check_slot(name, spec)
        if self.quantizes_gradient != isinstance(self.grad_scale, GradScaleSpec):
            cure = "give grad_scale=LayerGradScale()" if self.quantizes_gradient else "leave grad_scale out"
            self._refuse(
                f"grad_scale={self.grad_scale!r}", f"it goes with a quantized grad_output and only there; {cure}"
            )
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            self._refuse(f"rules={self.rules!r}", "a tuple of Rule is possible")
        if self.dtype not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
            self._refuse(f"dtype={self.dtype!r}", "torch.bfloat16, float16, float32, float64 or None is possible")
        if self.dtype is not None and not self.in_floating_point:
            self._refuse(f"dtype={self.dtype}", "it is for layers whose six slots are all None")
        if self.accumulate not in ("exact", "fp32", "fp16_chunk64"):
            self._refuse(f"accumulate={self.accumulate!r}", "exact, fp32 and fp16_chunk64 are possible")
        if self.accumulate != "exact":
            affine = [n for n, s in self.slots.items() if isinstance(s, MinMax) or (isinstance(s, Sawb) and s.affine)]
            if affine:
                self._refuse(f"accumulate={self.accumulate!r}", f"it cannot act: {affine[0]} has a zero point")
            if not any(isinstance(a, Spec) and isinstance(b, Spec) for a, b in self._operands()):
                self._refuse(f"accumulate={self.accumulate!r}", "it cannot act: no GEMM has two quantized operands")

    def _check_slot(self, name: str, spec: object) -> None:
        """Refuses what cannot stand in that slot."""
        if spec is None:
            return
        if name.endswith("grad_output"):
            if not isinstance(spec, Grid):
                self._refuse(f"{name}={spec!r}", "Radix4, Nearest or None is possible there")
            return
        forward = name.startswith("fprop")
        if not isinstance(spec, Spec if forward else (Spec, Reuse)):
            self._refuse(f"{name}={spec!r}", f"a Spec{'' if forward else ', REUSE'} or None is possible there")
        if isinstance(spec, Grid) and spec.stochastic:
            self._refuse(f"{name}={spec}", "random rounding is for grad_output slots")
        if not forward and isinstance(spec, Pact):
            self._refuse(
                f"{name}={spec}", "a learned clip gets no gradient in a backward slot; MinMax and Sawb learn none"
            )

    def _refuse(self, asked: str, possible: str) -> None:
        raise SpecError(f"Recipe {self.name!r}: {asked} was given; {possible}.")

    def _operands(self) -> list[tuple[Slot, Slot]]:
        """Both operands of each GEMM, with what is reused in the place of `REUSE`."""
        weight = self.fprop.weight if self.dgrad.weight is REUSE else self.dgrad.weight
        given = self.fprop.input if self.wgrad.input is REUSE else self.wgrad.input
        return [
            (self.fprop.input, self.fprop.weight),
            (self.dgrad.grad_output, weight),
            (self.wgrad.grad_output, given),
        ]

    @property
    def slots(self) -> dict[str, Slot]:
        """The six slots by name, in the order of the GEMMs."""
        return {
            "fprop.input": self.fprop.input,
            "fprop.weight": self.fprop.weight,
            "dgrad.grad_output": self.dgrad.grad_output,
            "dgrad.weight": self.dgrad.weight,
            "wgrad.grad_output": self.wgrad.grad_output,
            "wgrad.input": self.wgrad.input,
        }

    @property
    def quantizes_gradient(self) -> bool:
        """Whether either grad_output slot holds a spec."""
        return self.dgrad.grad_output is not None or self.wgrad.grad_output is not None

    @property
    def in_floating_point(self) -> bool:
        """Whether no slot holds a spec."""
        return not any(isinstance(spec, Spec) for spec in self.slots.values())

    @property
    def leaves_alone(self) -> bool:
        """Whether a layer under this recipe is not touched at all."""
        return self.in_floating_point and self.dtype is None

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.description}", *([f"source: {self.source}"] if self.source else [])]
        if self.in_floating_point:
            lines.append(f"all GEMMs in {'the dtype they have' if self.dtype is None else str(self.dtype)}")
        else:
            lines += [f"  {name:<18} {'float' if spec is None else spec}" for name, spec in self.slots.items()]
            lines.append(f"  {'grad scale':<18} {self.grad_scale or 'none'}")
            lines.append(f"  {'accumulate':<18} {self.accumulate}")
        for rule in self.rules:
            name = rule.recipe if isinstance(rule.recipe, str) else rule.recipe.name
            lines.append(f"  {name} for {rule}")
        return "\n".join(lines)


def first_or_last(layer: LayerInfo) -> bool:
    """The model's first or last layer. A model of fewer than three has no layer between, so the rule is silent."""
    return layer.count > 2 and layer.index in (0, layer.count - 1)


def depthwise(layer: LayerInfo) -> bool:
    """A convolution whose groups have one input channel each."""
    groups = getattr(layer.module, "groups", 1)
    return groups > 1 and groups == getattr(layer.module, "in_channels", 0)


def pointwise(layer: LayerInfo) -> bool:
    """A convolution of kernel size 1."""
    kernel = getattr(layer.module, "kernel_size", None)
    return isinstance(kernel, tuple) and all(k == 1 for k in kernel)


def bottom_pointwise(layer: LayerInfo) -> bool:
    """A 1x1 convolution that does not widen: the first, reducing one of a bottleneck block."""
    module = layer.module
    return pointwise(layer) and int(getattr(module, "out_channels", 0)) <= int(getattr(module, "in_channels", 0))


_SUN = "Sun et al., Ultra-Low Precision 4-bit Training of Deep Neural Networks, NeurIPS 2020"

_HIGH_PRECISION: tuple[Rule, ...] = (
    Rule(recipe="fp32", when=first_or_last, why="first or last layer"),
    Rule(recipe="fp32", when=depthwise, why="depthwise convolution"),
)
_INT4 = Fprop(input=Pact(signed=None), weight=Sawb())
_TWO_PHASE = TwoPhase()
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
    dgrad: Grid | None = _TWO_PHASE.for_dgrad,
    wgrad: Grid | None = _TWO_PHASE.for_wgrad,
    grad_scale: GradScaleSpec | None = LayerGradScale(),  # noqa: B008 - a frozen value
    rules: tuple[Rule, ...] = (),
) -> Recipe:
    """A member of the paper's family: INT4 forward, first, last and depthwise layers in high precision."""
    return Recipe(
        name=name,
        description=description,
        source=f"{_SUN}, {where}",
        fprop=_INT4,
        dgrad=Dgrad(grad_output=dgrad),
        wgrad=Wgrad(grad_output=wgrad),
        grad_scale=grad_scale,
        rules=(*_HIGH_PRECISION, *rules),
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

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
"""The recipes by name."""


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of that name; a `Recipe` is returned as it is.

    Raises:
        UnknownNameError: if there is none of that name; the text suggests the nearest.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise UnknownNameError("recipe", recipe, RECIPES)
    return RECIPES[recipe]
