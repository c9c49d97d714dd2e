"""What a recipe is: a numerical plan for the three GEMMs of a layer, and the rules for the layers that get another.

Frozen, checked at birth. A variant of a recipe is ``dataclasses.replace(recipe, ...)``; a new one is a new `Recipe`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import SpecError
from ..kernels import Accumulate, Gemm
from ..quantizers import GradScaleSpec, Grid, Hadamard
from .checks import problems
from .slots import Dgrad, Fprop, Gemms, Slot, Wgrad

__all__ = ["LayerInfo", "Recipe", "Rule"]


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
        grad_scale: how the gradient's scale is found; needed exactly where a gradient's spec is nothing but a format
            (`Radix4`, `Nearest`). All others bring their own.
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
        for problem in problems(self.gemms, self.grad_scale, self.accumulate, self.dtype):
            raise SpecError(f"Recipe {self.name!r}: {problem}.")
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise SpecError(f"Recipe {self.name!r}: rules={self.rules!r} was given; a tuple of Rule is possible.")

    @property
    def conventions(self) -> str:
        """Every field of everything in it, in one line: what a checkpoint must agree with."""
        names = ("fprop", "dgrad", "wgrad", "grad_scale", "accumulate", "dtype")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @property
    def gemms(self) -> Gemms:
        """The three GEMMs' slots together."""
        return Gemms(fprop=self.fprop, dgrad=self.dgrad, wgrad=self.wgrad)

    @property
    def slots(self) -> dict[str, Slot]:
        """The six slots by name, in the order of the GEMMs."""
        return self.gemms.slots

    @property
    def transforms(self) -> dict[Gemm, Hadamard | None]:
        """The transform of each GEMM."""
        return self.gemms.transforms

    @property
    def random(self) -> bool:
        """Whether anything in it draws random numbers, so that a seed acts."""
        return self.gemms.random

    @property
    def quantizes_gradient(self) -> bool:
        """Whether either grad_output slot holds a spec."""
        return self.dgrad.grad_output is not None or self.wgrad.grad_output is not None

    @property
    def one_gradient(self) -> bool:
        """Whether one quantization of the gradient serves both backward GEMMs."""
        spec = self.dgrad.grad_output
        if spec is None or spec != self.wgrad.grad_output or spec.along_reduction or isinstance(spec, Grid):
            return False
        plain = self.dgrad.transform is None and self.wgrad.transform is None
        return plain and self.dgrad.samples == self.wgrad.samples == 1

    @property
    def in_floating_point(self) -> bool:
        """Whether no slot holds a spec."""
        return not self.gemms.specs

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
            lines += [f"  {f'{gemm}.transform':<18} {turn}" for gemm, turn in self.transforms.items() if turn]
            samples = (("dgrad", self.dgrad.samples), ("wgrad", self.wgrad.samples))
            lines += [f"  {f'{gemm}.samples':<18} {count}" for gemm, count in samples if count > 1]
            gains = (("dgrad", self.dgrad.gain), ("wgrad", self.wgrad.gain))
            lines += [f"  {f'{gemm}.gain':<18} {gain:.6g}" for gemm, gain in gains if gain != 1]
            lines.append(f"  {'grad scale':<18} {self.grad_scale or 'none'}")
            lines.append(f"  {'accumulate':<18} {self.accumulate}")
        for rule in self.rules:
            name = rule.recipe if isinstance(rule.recipe, str) else rule.recipe.name
            lines.append(f"  {name} for {rule}")
        return "\n".join(lines)
