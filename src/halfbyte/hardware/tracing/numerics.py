"""Which recipe each weight gets, decided by `halfbyte.convert` on a copy without data, and what formats follow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import nn

from ...convert import convert, summary
from ...convert.report import LEFT_ALONE
from ...convert.sites import named_layers, plan_fqn
from ...formats import Format
from ...nn import is_twin, plans_of, units_of, whys_of
from ...quantizers import Spec
from ...recipes import Recipe, Rule
from ..workload import Phase
from .products import Product

__all__ = ["DTYPE_NAMES", "Numerics", "Place", "part_of"]

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
"""What a workload calls torch's types."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one plan stands, or could: a weight, some rows of one, or a product without a weight.

    Attributes:
        layer: fully qualified name of the plan.
        kind: class of its layer, or ``"matmul"``.
        recipe: what it is computed by; None for high precision.
        high: format of what the recipe leaves in floating point.
        why: the rule that decided.
        over_steps: whether one wgrad serves all steps of a sequence.
        rows: which rows of the weight; empty for all of them.
    """

    layer: str
    kind: str
    recipe: Recipe | None
    high: str
    why: str
    over_steps: bool = False
    rows: range = range(0)

    @property
    def recipe_name(self) -> str:
        """The recipe's name, or the format of high precision."""
        return self.high if self.recipe is None else self.recipe.name

    def operands(self, phase: Phase) -> tuple[Spec | None, Spec | None]:
        """What both operands are rounded by."""
        return (None, None) if self.recipe is None else self.recipe.gemms.operands(phase)

    def formats(self, phase: Phase, *, signed: bool) -> tuple[str, str]:
        """The formats of both operands.

        Args:
            phase: of which GEMM.
            signed: whether the layer's input may hold negative numbers; decides where a recipe leaves it to the data.
        """
        a, b = self.operands(phase)
        inputs = {"fprop": (True, False), "dgrad": (False, False), "wgrad": (False, True)}[phase]
        pairs = zip((a, b), inputs, strict=True)
        first, second = (
            self.high if spec is None else _format(spec, signed or not given).name for spec, given in pairs
        )
        return first, second

    def products(self, phase: Phase) -> int:
        """How many GEMMs make that phase's: the samples of a gradient, or the two parts that it is split in."""
        if self.recipe is None or phase == "fprop":
            return 1
        gemm = self.recipe.dgrad if phase == "dgrad" else self.recipe.wgrad
        spec = gemm.grad_output
        # Where rows are drawn, half of the two parts' rows are left in the mean: the work of one product.
        parts = 2 if spec is not None and spec.splits and not spec.blocks else 1
        return gemm.samples * parts


def _format(spec: Spec, signed: bool) -> Format:
    fitting = [fmt for fmt in spec.formats if fmt.signed == signed]
    return (fitting or list(spec.formats))[-1]


class Numerics:
    """The places of a model, found by a weight's name or by a product's."""

    def __init__(self, model: nn.Module, recipe: Recipe, rules: Sequence[Rule], *, high: str) -> None:
        """Converts a copy.

        Args:
            model: a copy without data, which is changed.
            recipe: the recipe.
            rules: asked before the recipe's own.
            high: format of layers that are left alone, and of products without a weight.

        Raises:
            ConversionError: as `halfbyte.convert.convert`; not where the recipe is a plain baseline without rules.
        """
        self.high = high
        self.kinds = {fqn: type(module).__name__ for fqn, module in model.named_modules()}
        self.whys = {row.fqn: row.why for row in summary(model).layers}
        # A baseline computes everything in one type, also what no layer of ours could take over.
        self.baseline = recipe if recipe.in_floating_point and not (recipe.rules or rules) else None
        if self.baseline is None:
            convert(model, recipe, rules, backend="reference")
        self._weights: dict[str, list[Place]] = {}
        self._products: dict[str, list[Place]] = {}
        for fqn, module in named_layers(model):
            self._read(fqn, module)

    def of_weight(self, name: str, rows: range, layer: str) -> list[tuple[Place, int]]:
        """The places that share a product with a weight, each with its number of the product's columns.

        Args:
            name: of the parameter.
            rows: which of its rows the product reads.
            layer: whose forward multiplies it, for a weight that no layer with a plan owns.
        """
        places = self._weights.get(name)
        if places is None:
            return [(self._left_alone(name, layer), len(rows))]
        shares = [(place, _overlap(place.rows, rows) if place.rows else len(rows)) for place in places]
        return [(place, share) for place, share in shares if share]

    def of_product(self, layer: str, product: str | None) -> list[tuple[Place, int]]:
        """The places of a product without a weight, each with the number of heads that it speaks for.

        Args:
            layer: whose forward multiplies.
            product: ``"qk"`` or ``"pv"`` in an attention layer of torch's; else None.
        """
        heads = self._products.get(f"{layer}.{product}") if product else None
        if heads:
            alike = groupby(heads, key=lambda place: (place.recipe, place.why))
            found = [list(group) for _, group in alike]
            if len(found) == 1:
                return [(replace(heads[0], layer=plan_fqn(layer, product or "")), len(heads))]
            return [(group[0], len(group)) for group in found]
        why = self.baseline_why or self.whys.get(layer) or "not converted: a product without a weight"
        return [(Place(layer=layer, kind="matmul", recipe=None, high=self.high, why=why), 1)]

    @property
    def baseline_why(self) -> str:
        """Why everything is as it is under a plain baseline; empty under a recipe that quantizes."""
        return f"recipe {self.baseline.name}" if self.baseline is not None else ""

    def _left_alone(self, name: str, layer: str) -> Place:
        """The place of a weight without a plan."""
        shown = re.sub(r"(^|\.)parametrizations\..*", "", name)
        owner = shown if shown != name else shown.rpartition(".")[0]
        if shown == name and name.rpartition(".")[2] == "weight":
            shown = owner
        why = self.baseline_why or self.whys.get(owner) or self.whys.get(layer) or "not converted: no layer of its own"
        return Place(layer=shown, kind=self.kinds.get(owner, "matmul"), recipe=None, high=self.high, why=why)

    def _read(self, fqn: str, module: nn.Module) -> None:
        plans = plans_of(module)
        whys: dict[str, str] = whys_of(module) if is_twin(module) else getattr(module, LEFT_ALONE, {})
        parameters = {name for name, _ in module.named_parameters(recurse=True, remove_duplicate=False)}
        for unit in units_of(module):
            plan = plans.get(unit.name)
            recipe = None if plan is None or plan.recipe.in_floating_point else plan.recipe
            high = self.high
            decided = self.baseline if plan is None else plan.recipe
            if decided is not None and decided.dtype is not None:
                high = DTYPE_NAMES[decided.dtype]
            place = Place(
                layer=plan_fqn(fqn, unit.name),
                kind="matmul" if unit.opt_in else self.kinds[fqn],
                recipe=recipe,
                high=high,
                why=self.baseline_why or whys.get(unit.name) or "not converted: a product without a weight",
                over_steps=unit.over_steps,
            )
            if unit.opt_in:
                self._products.setdefault(plan_fqn(fqn, unit.name.partition("_")[0]), []).append(place)
            for name, rows in _weights_of(module, unit.name, parameters):
                self._weights.setdefault(plan_fqn(fqn, name), []).append(replace(place, rows=rows))


def _weights_of(module: nn.Module, unit: str, parameters: set[str]) -> Iterator[tuple[str, range]]:
    """The parameter that a unit multiplies, and which rows of it; no rows stands for all."""
    if isinstance(module, nn.MultiheadAttention) and unit in ("q", "k", "v"):
        width = module.embed_dim
        first = "qkv".index(unit) * width
        if module.in_proj_weight is None:
            yield f"{unit}_proj_weight", range(0)
        else:
            yield "in_proj_weight", range(first, first + width)
    elif isinstance(module, nn.MultiheadAttention) and unit == "out":
        yield "out_proj.weight", range(0)
    else:
        names = ("weight",) if not unit else (f"weight_{unit}", f"{unit}_weight", f"{unit}.weight", unit)
        yield from ((name, range(0)) for name in names if name in parameters)


def _overlap(one: range, other: range) -> int:
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))


def part_of(product: Product, place: Place, share: int, total: int) -> Product:
    """A place's part of a product: its columns where it has a weight, else its heads."""
    if share == total:
        return product
    return product.some(share, total) if place.kind == "matmul" else product.columns(share)
