"""What a recipe is: six operand slots, and the rules for the layers that get another. Frozen, checked at birth.

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

from ..errors import SpecError
from ..kernels import Accumulate
from ..quantizers import (
    GradScaleSpec,
    Grid,
    MinMax,
    Nearest,
    Pact,
    Sawb,
    Spec,
)

__all__ = ["REUSE", "Dgrad", "Fprop", "LayerInfo", "Recipe", "Reuse", "Rule", "Slot", "Wgrad"]


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

    def __post_init__(self) -> None:
        kinds = self.type if isinstance(self.type, tuple) else (self.type,)
        for name, ok, possible in (
            ("recipe", isinstance(self.recipe, str | Recipe), "a Recipe or its name"),
            ("fqn", self.fqn is None or isinstance(self.fqn, str), "a pattern such as 'layer4.*'"),
            (
                "type",
                all(k is None or isinstance(k, type) for k in kinds),
                "a class such as torch.nn.Linear, or several",
            ),
            ("when", self.when is None or callable(self.when), "a function of LayerInfo"),
        ):
            if not ok:
                raise SpecError(f"Rule({name}={getattr(self, name)!r}) was asked for; {possible} is possible.")

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
            if isinstance(spec, Nearest) and spec.scale != "amax":
                self._refuse(f"{name}={spec}", "its scale cannot act, because grad_scale gives a gradient's scale")
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
