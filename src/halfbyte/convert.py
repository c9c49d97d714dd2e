"""From a model to a 4-bit model and back: ordered rules choose each layer's recipe, `summary` says what came of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from . import kernels
from .errors import ConversionError
from .nn import TWINS, adopt, release
from .ops import Plan
from .quantizers import GradScaleSpec, GradScaleState, Grid, MinMax, NonFiniteCounter, Sawb
from .recipes import LayerInfo, Recipe, Rule, get

__all__ = ["ConversionReport", "LayerReport", "convert", "restore", "summary"]

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger("halfbyte")

_LEFT_ALONE = "_halfbyte_left_alone"
"""Attribute of an unconverted layer: why it is one."""

_TWIN_CLASSES = tuple(TWINS.values())


def convert(
    model: Model,
    recipe: str | Recipe,
    rules: Sequence[Rule] = (),
    *,
    backend: str = "reference",
    seed: int | None = None,
) -> Model:
    """Puts a model's linear and convolution layers under a recipe, in place.

    Each layer asks the given rules, then the recipe's own, in order; the first that matches names its recipe, else it
    is the one given here. Where a given rule names a recipe with rules of its own, those of them that choose other
    formats still speak (FP8 for 1x1 convolutions), those that would leave the layer alone do not.

    Parameters stay the same objects, so tied weights stay tied and an optimizer that exists keeps working; learned
    clips are new parameters, so make the optimizer after this call. Everything else in the model (embeddings, norms,
    softmax, attention) is untouched.

    Args:
        model: any module; nothing is changed if an error is raised.
        recipe: a `Recipe` or the name of one in `RECIPES`.
        rules: asked first, in order.
        backend: a name in `halfbyte.kernels.BACKENDS`; ``"reference"`` is emulation in plain PyTorch.
        seed: for recipes that round at random, and only for them; equal seeds give equal runs. None is 0.

    Returns:
        The same model.

    Raises:
        UnknownNameError: if a recipe or backend has no such name.
        ConversionError: if a rule matches no layer, a layer that a rule names cannot be converted, the model has no
            layer to convert or is converted already, or the recipe would leave every layer alone without being fp32.
    """
    chosen = get(recipe)
    kernels.get(backend)
    layers = _layers(model)
    if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
        raise ConversionError(
            f"rules={rules!r} was given; a list of Rule is possible: rules=[Rule(fqn=..., recipe=...)]."
        )
    _check(model, layers, rules)
    plans: list[tuple[LayerInfo, Recipe, str]] = []
    used: set[int] = set()
    for layer in layers:
        layer_recipe, why = chosen, f"recipe {chosen.name}"
        for number, rule in enumerate((*rules, *chosen.rules)):
            if rule.matches(layer):
                layer_recipe, why = get(rule.recipe), str(rule)
                used.add(number)
                break
        for rule in layer_recipe.rules:
            if layer_recipe is not chosen and not get(rule.recipe).leaves_alone and rule.matches(layer):
                layer_recipe, why = get(rule.recipe), f"{why}; {rule}"
                break
        plans.append((layer, layer_recipe, why))
    _check_used(layers, rules, used)
    for number, rule in enumerate(chosen.rules, start=len(rules)):
        if number not in used and not get(rule.recipe).leaves_alone:
            _log.warning("%s: no layer of this model is what its rule speaks of (%s)", chosen.name, rule)
    if layers and not chosen.leaves_alone and all(plan.leaves_alone for _, plan, _ in plans):
        raise ConversionError(
            f"convert(model, {chosen.name!r}) would leave every layer in high precision: "
            f"{', '.join(f'{layer.fqn or type(model).__name__} ({why})' for layer, _, why in plans)}. "
            f"Name the layers to convert: rules=[Rule(fqn='...', recipe={chosen.name!r})]."
        )
    _check_plans(plans, seed)
    _apply(plans, backend, seed or 0)
    return model


def restore(model: Model) -> Model:
    """Gives back plain torch layers with the trained weights, in place. The quantizers' state is dropped.

    Raises:
        ConversionError: if no layer of the model is converted, or one was given another class since.
    """
    converted = [m for m in model.modules() if isinstance(m, _TWIN_CLASSES)]
    for fqn, module in model.named_modules():
        if isinstance(module, _TWIN_CLASSES) and type(module) not in _TWIN_CLASSES:
            kind = type(module).__name__
            raise ConversionError(
                f"Layer {fqn} became a {kind} after it was converted; undo that (a parametrization?)."
            )
    marked = [m for m in model.modules() if hasattr(m, _LEFT_ALONE)]
    if not converted and not marked:
        raise ConversionError("restore was asked for a model without a converted layer; convert(model, ...) makes one.")
    for module in converted:
        release(module)
    for module in marked:
        delattr(module, _LEFT_ALONE)
    return model


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One row of `summary`.

    Attributes:
        fqn: fully qualified name; empty for the model itself.
        kind: class name of the torch layer.
        recipe: name of its recipe; ``"-"`` if it is not converted.
        formats: format of each of the six slots by name; empty if it is not converted.
        why: the rule that decided, or why it cannot be converted.
        note: the gradient's scale, the learned clip, and how many broken tensors were met.
    """

    fqn: str
    kind: str
    recipe: str
    formats: dict[str, str]
    why: str
    note: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What runs in what, and why; ``str()`` is a table.

    Attributes:
        layers: a row for each layer with a GEMM of its own, in the order of registration.
    """

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        slots = ("fprop", "dgrad", "wgrad")
        header = ["layer", "type", "recipe", *slots, "why", "state"]
        rows = [header]
        for layer in self.layers:
            cells = [
                " x ".join(fmt for name, fmt in layer.formats.items() if name.startswith(slot)) or "-" for slot in slots
            ]
            rows.append([layer.fqn or "(model)", layer.kind, layer.recipe, *cells, layer.why, layer.note])
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)


def summary(model: nn.Module) -> ConversionReport:
    """Which layer runs in what, and why, as the model stands now.

    Formats that the first batch decides show both possibilities until then.
    """
    rows = []
    for layer in _layers(model, converted=True):
        module = layer.module
        if isinstance(module, _TWIN_CLASSES):
            plan = module.plan
            assert isinstance(plan, Plan)
            kind, why = type(module).__name__, str(module.why)
            rows.append(
                LayerReport(
                    fqn=layer.fqn,
                    kind=kind,
                    recipe=plan.recipe.name,
                    formats=plan.formats,
                    why=why,
                    note=_note(plan),
                )
            )
        else:
            why = str(getattr(module, _LEFT_ALONE, "not converted"))
            recipe = "fp32" if hasattr(module, _LEFT_ALONE) else "-"
            rows.append(LayerReport(fqn=layer.fqn, kind=type(module).__name__, recipe=recipe, formats={}, why=why))
    for fqn, module in _opaque(model):
        parents = [kind.__name__ for kind in TWINS if isinstance(module, kind)]
        why = f"not converted: a subclass of {parents[0]}" if parents else "not converted: no 4-bit twin of this type"
        rows.append(LayerReport(fqn=fqn, kind=type(module).__name__, recipe="-", formats={}, why=why))
    return ConversionReport(tuple(rows))


def _note(plan: Plan) -> str:
    parts = []
    if plan.input is not None and plan.input.clip is not None and plan.input.format is not None:
        parts.append(f"clip {plan.input.clip.item():.3g}")
    if plan.grad_output is not None and plan.grad_output.grad_scale.started:
        parts.append(f"log2_scale {plan.grad_output.grad_scale.log2_scale.item()}")
    broken = sum(int(m.nonfinite) for m in plan.children() if isinstance(m, NonFiniteCounter))
    if broken:
        parts.append(f"NaN or infinity in {broken} tensors")
    return ", ".join(parts)


def _layers(model: nn.Module, *, converted: bool = False) -> list[LayerInfo]:
    """The model's convertible (and, if asked, converted) layers, each once, in the order of registration."""
    found = [
        (fqn, module)
        for fqn, module in model.named_modules()
        if type(module) in TWINS or (converted and isinstance(module, _TWIN_CLASSES))
    ]
    return [
        LayerInfo(fqn=fqn, module=module, index=index, count=len(found)) for index, (fqn, module) in enumerate(found)
    ]


def _opaque(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with GEMMs of their own that have no twin: recurrent layers, attention, subclasses of torch's layers."""
    others = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear, nn.modules.conv._ConvNd)
    kinds: tuple[type[nn.Module], ...] = (*TWINS, *others)
    for fqn, module in model.named_modules():
        if isinstance(module, kinds) and type(module) not in TWINS and not isinstance(module, _TWIN_CLASSES):
            yield fqn, module


def _check(model: nn.Module, layers: list[LayerInfo], rules: Sequence[Rule]) -> None:
    """Raises for what cannot be converted at all."""
    for fqn, module in model.named_modules():
        if isinstance(module, _TWIN_CLASSES):
            raise ConversionError(
                f"The model is converted already (layer {fqn or '(model)'}); call restore(model) first."
            )
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
            kind = type(module).__name__
            raise ConversionError(
                f"Layer {fqn or '(model)'} ({kind}) has no shape yet; run one batch through the model."
            )
    opaque = list(_opaque(model))
    if not layers:
        what = ", ".join(f"{fqn or '(model)'} ({type(m).__name__})" for fqn, m in opaque) or "none at all"
        kinds = ", ".join(kind.__name__ for kind in TWINS)
        raise ConversionError(
            f"The model has no layer that can be converted. Possible: {kinds}. Its GEMM layers: {what}."
        )
    for fqn, module in opaque:
        info = LayerInfo(fqn=fqn, module=module, index=-1, count=len(layers))
        for rule in rules:
            # A pattern that happens to cover it is no promise; its own name or type is.
            named = rule.fqn == fqn or (rule.type is not None and rule.fqn is None and type(module) in _types(rule))
            if named and rule.matches(info) and not get(rule.recipe).leaves_alone:
                raise ConversionError(
                    f"Rule ({rule}) asks for {fqn or '(model)'}, a {type(module).__name__}, which cannot be converted. "
                    f"Possible: {', '.join(kind.__name__ for kind in TWINS)}."
                )


def _check_plans(plans: list[tuple[LayerInfo, Recipe, str]], seed: int | None) -> None:
    """Raises for what a layer cannot do under the recipe that was chosen for it."""
    specs = [spec for _, recipe, _ in plans for spec in recipe.slots.values()]
    if seed is not None and not any(isinstance(spec, Grid) and spec.stochastic for spec in specs):
        raise ConversionError(f"seed={seed} was given, but no layer's recipe rounds at random; leave it out.")
    for layer, recipe, _ in plans:
        spec = recipe.fprop.input
        affine = isinstance(spec, MinMax) or (isinstance(spec, Sawb) and spec.affine)
        if affine and getattr(layer.module, "padding", None) == "same":
            sides = layer.module._reversed_padding_repeated_twice
            if isinstance(sides, list) and sides[0::2] != sides[1::2]:
                raise ConversionError(
                    f"Layer {layer.fqn or '(model)'} pads unevenly (padding='same' with an even kernel), and {spec} "
                    "would take the padding's zeros for data. Pad in a layer of its own, or give it another recipe."
                )


def _types(rule: Rule) -> tuple[type[nn.Module], ...]:
    return rule.type if isinstance(rule.type, tuple) else () if rule.type is None else (rule.type,)


def _check_used(layers: list[LayerInfo], rules: Sequence[Rule], used: set[int]) -> None:
    for number, rule in enumerate(rules):
        if number in used:
            continue
        listed = "\n".join(f"  {layer.fqn or '(model)'}  {type(layer.module).__name__}" for layer in layers)
        covered = [layer.fqn or "(model)" for layer in layers if rule.matches(layer)]
        if covered:
            raise ConversionError(
                f"Rule {number} ({rule}) decides no layer: earlier rules take all that it matches "
                f"({', '.join(covered)}). Move it up, or leave it out."
            )
        raise ConversionError(f"Rule {number} ({rule}) matches no layer. The model's layers are:\n{listed}")


def _apply(plans: list[tuple[LayerInfo, Recipe, str]], backend: str, seed: int) -> None:
    shared: dict[GradScaleSpec, GradScaleState] = {}
    for layer, recipe, why in plans:
        module = layer.module
        if recipe.leaves_alone:
            setattr(module, _LEFT_ALONE, why)
            continue
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        scale = None
        if recipe.grad_scale is not None and recipe.grad_scale.shared:
            scale = shared.setdefault(recipe.grad_scale, recipe.grad_scale.build(device=weight.device))
        plan = Plan(recipe, device=weight.device, backend=backend, shared_scale=scale, seed=seed, layer=layer.index)
        adopt(module, plan, why)
