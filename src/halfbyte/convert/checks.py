"""What conversion refuses, before anything has changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConversionError
from ..nn import TWINS, is_twin, units_of
from ..quantizers import Spec
from ..recipes import REUSE, LayerInfo, Recipe, Rule, get
from .report import opaque
from .sites import Site, matches

__all__ = ["check_choice", "check_model", "check_rules", "check_used"]

_WRAPPERS = {
    "DistributedDataParallel": "convert the plain model, then wrap it",
    "DataParallel": "convert the plain model and train it on one device, or with DistributedDataParallel",
    "FullyShardedDataParallel": "convert the plain model, then wrap it",
    "FSDPModule": "convert the plain model, then call fully_shard",
    "OptimizedModule": "convert the plain model, then call torch.compile",
    "ScriptModule": "convert the plain module; TorchScript cannot run what it becomes",
}
"""Class names, so that nothing need be imported to look for them; each with its cure."""


def check_model(model: nn.Module) -> None:
    """Raises for a model that cannot be converted at all.

    Raises:
        ConversionError: with the cure.
    """
    for fqn, module in model.named_modules():
        name, kind = fqn or "(model)", type(module).__name__
        if is_twin(module):
            raise ConversionError(f"The model is converted already (layer {name}); call restore(model) first.")
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
            raise ConversionError(f"Layer {name} ({kind}) has no shape yet; run one batch through the model.")
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.split(".")[0] == "torch":
                raise ConversionError(f"Layer {name} is wrapped already ({base.__name__}): {_WRAPPERS[base.__name__]}.")
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise ConversionError(f"Layer {name} ({kind}) is quantized for inference; convert the model it came from.")


def check_rules(model: nn.Module, sites: Sequence[Site], rules: Sequence[Rule]) -> None:
    """Raises for rules that are none, that name what cannot be converted, and for a model with nothing to convert.

    Raises:
        ConversionError: with what is possible.
    """
    if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
        raise ConversionError(
            f"rules={rules!r} was given; a list of Rule is possible: rules=[Rule(fqn=..., recipe=...)]."
        )
    without_twin = list(opaque(model))
    kinds = ", ".join(kind.__name__ for kind in TWINS)
    if not sites:
        what = ", ".join(f"{fqn or '(model)'} ({type(m).__name__})" for fqn, m in without_twin) or "none at all"
        raise ConversionError(
            f"The model has no layer that can be converted. Possible: {kinds}. Its GEMM layers: {what}."
        )
    for fqn, module in without_twin:
        info = LayerInfo(fqn=fqn, module=module, index=-1, count=len(sites))
        for rule in rules:
            # A pattern that happens to cover it is no promise; its own name or type is.
            named = rule.fqn == fqn or (rule.type is not None and rule.fqn is None and type(module) in _types(rule))
            if named and rule.matches(info) and not get(rule.recipe).leaves_alone:
                hint = "; convert first, parametrize then" if nn.utils.parametrize.is_parametrized(module) else ""
                raise ConversionError(
                    f"Rule ({rule}) asks for {fqn or '(model)'}, a {type(module).__name__}, which cannot be "
                    f"converted{hint}. Possible: {kinds}."
                )


def check_used(sites: Sequence[Site], rules: Sequence[Rule], used: set[int]) -> None:
    """Raises for a rule of the user's that decided nothing.

    Raises:
        ConversionError: that lists the layers.
    """
    for number, rule in enumerate(rules):
        if number in used:
            continue
        covered = [site.shown for site in sites if matches(rule, site)]
        if covered:
            raise ConversionError(
                f"Rule {number} ({rule}) decides no layer: earlier rules take all that it matches "
                f"({', '.join(covered)}). Move it up, or leave it out."
            )
        listed = "\n".join(
            f"  {_listed(layer)}" for layer in {site.layer.module: site.layer for site in sites}.values()
        )
        raise ConversionError(f"Rule {number} ({rule}) matches no layer. The model's layers are:\n{listed}")


def check_choice(site: Site, recipe: Recipe) -> None:
    """Raises for what a layer cannot do under the recipe that was chosen for it.

    Raises:
        ConversionError: with the cure.
    """
    module = site.layer.module
    for name, parameter in module.named_parameters():
        if (problem := _problem(parameter)) and not recipe.leaves_alone:
            raise ConversionError(
                f"Layer {site.shown}: its {name} is {problem}; a plain tensor of torch.float16, bfloat16, float32 or "
                "float64 is possible. Convert before whatever made it so, or give the layer Rule(fqn=..., "
                "recipe='fp32')."
            )
    affine = isinstance(recipe.fprop.input, Spec) and recipe.fprop.input.affine
    grad = recipe.wgrad.grad_output
    reused = affine and recipe.wgrad.input is REUSE
    _check_steps(site, recipe)
    if site.unit.over_steps and reused and grad is not None and grad.along_reduction:
        raise ConversionError(
            f"Layer {site.shown}: {recipe.fprop.input} has a zero point of its own for each step, and {grad} has "
            "blocks that run over the steps, so one wgrad for all steps is not possible. Give fprop.input a spec "
            f"without a zero point, or the layer Rule(fqn={site.fqn!r}, recipe='fp32')."
        )
    if affine and getattr(module, "padding", None) == "same":
        sides = module._reversed_padding_repeated_twice
        if isinstance(sides, list) and sides[0::2] != sides[1::2]:
            raise ConversionError(
                f"Layer {site.shown} pads unevenly (padding='same' with an even kernel), and {recipe.fprop.input} "
                "would take the padding's zeros for data. Pad in a layer of its own, or give it another recipe."
            )


def _check_steps(site: Site, recipe: Recipe) -> None:
    """Raises where the codes of all steps cannot be one operand of wgrad."""
    spec = recipe.fprop.input
    if not (site.unit.over_steps and isinstance(spec, Spec) and recipe.wgrad.input is REUSE):
        return
    cure = f"Give wgrad.input a spec of its own, or Requantize, or the layer Rule(fqn={site.fqn!r}, recipe='fp32')."
    if spec.blocks:
        raise ConversionError(
            f"Layer {site.shown}: {spec} has a scale for each block, and wgrad reuses its codes, whose blocks would "
            f"have to run over the steps. {cure}"
        )
    if recipe.accumulate == "fp16_chunk64" and not spec.learns:
        raise ConversionError(
            f"Layer {site.shown}: {spec} has another scale at each step, and accumulate='fp16_chunk64' needs one for "
            "all products of a sum. Use a learned clip, Pact(...), or accumulate='exact'."
        )


def _problem(parameter: Tensor) -> str | None:
    """Why a parameter cannot be quantized; None if it can."""
    kind = type(parameter)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {kind.__name__}"
    floating = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return None if parameter.dtype in floating else str(parameter.dtype)


def _listed(layer: LayerInfo) -> str:
    """A layer's line in a message: name, type, and the names of its plans if there are several."""
    units = units_of(layer.module)
    plans = [unit.name for unit in units if not unit.opt_in]
    by_name = ["qk", "pv"] if len(plans) < len(units) else []
    more = f"  ({', '.join(plans)}{'; by name only: ' + ', '.join(by_name) if by_name else ''})" if plans[0] else ""
    return f"{layer.fqn or '(model)'}  {type(layer.module).__name__}{more}"


def _types(rule: Rule) -> tuple[type[nn.Module], ...]:
    return rule.type if isinstance(rule.type, tuple) else () if rule.type is None else (rule.type,)
