"""From a model to a 4-bit model and back: ordered rules choose each layer's recipe, `summary` says what came of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import nn

from .. import kernels
from .. import stash as stashing
from ..errors import ConversionError, UnknownNameError
from ..nn import TWINS, Unit, adopt, is_twin, release
from ..ops import Plan
from ..quantizers import GradScaleSpec, GradScaleState, Pact
from ..recipes import Recipe, Rule, get
from .checks import check_choice, check_model, check_rules, check_used
from .report import LEFT_ALONE, ConversionReport, LayerReport, summary
from .sites import Site, matches, sites_of

__all__ = ["PROMISE", "ConversionReport", "LayerReport", "convert", "restore", "summary"]

Model = TypeVar("Model", bound=nn.Module)

PROMISE = "_halfbyte_promise"
"""Attribute of a converted model: for each plan that was promised, by name, the name of its recipe."""

_NESTED = "_halfbyte_use_nested_tensor"
"""Attribute of a TransformerEncoder: what ``use_nested_tensor`` was."""

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
"""The attribute in which DistributedDataParallel looks for names."""

_SETTLE = 500
"""For how many passes a learned clip follows the tensors of a recurrent network (docs/decisions/0021)."""

_log = logging.getLogger("halfbyte")


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What the rules chose for a place."""

    site: Site
    recipe: Recipe
    why: str


def convert(
    model: Model,
    recipe: str | Recipe,
    rules: Sequence[Rule] = (),
    *,
    backend: str = "auto",
    seed: int | None = None,
    stash: Literal["int4", "int8"] | None = None,
) -> Model:
    """Puts a model's layers under a recipe, in place: linear, convolution, recurrent layers and attention.

    Each weight of each layer asks the given rules, then the recipe's own, in order; the first that matches names its
    recipe, else it is the one given here. A rule that matches a layer matches all its weights; a pattern can also name
    one (``"lstm.hh_l0"``, ``"attention.q"``). The two products inside attention have no weight and stay in floating
    point unless a given rule names them (``"*.qk"``, ``"*.pv"``). Where a given rule names a recipe with rules of its
    own, those of them that choose other formats still speak (FP8 for 1x1 convolutions), those that would leave the
    layer alone do not.

    Parameters stay the same objects, so tied weights stay tied and an optimizer that exists keeps working; learned
    clips are new parameters, so make the optimizer after this call. Everything else in the model (embeddings, norms,
    softmax) is untouched. Convert before a model is compiled, sharded or wrapped for several processes.

    Args:
        model: any module; nothing is changed if an error is raised.
        recipe: a `Recipe` or the name of one in `RECIPES`.
        rules: asked first, in order.
        backend: who computes, always to the same bits. ``"native"`` computes on packed codes in compiled integer code,
            and hands what it has no kernel for (other devices, block formats) to ``"reference"``, which is emulation in
            plain PyTorch. ``"auto"`` is native where the compiled library is there, else reference.
        seed: for recipes that draw random numbers, or a stash, and only for them; equal seeds give equal runs. None
            is 0.
        stash: what autograd saves in the whole model's forward pass, not only in converted layers, is kept as codes of
            four or eight bits that are rounded at random, and as single bits where that is exact
            (`halfbyte.stash`); None leaves it alone.

    Returns:
        The same model.

    Raises:
        UnknownNameError: if a recipe, backend or stash has no such name.
        UnsupportedError: if the backend is ``"native"`` and its library is absent.
        ConversionError: if a rule matches no layer, a layer that a rule names cannot be converted, the model has no
            layer to convert, is converted or wrapped already, or the recipe would leave every layer alone without
            being fp32.
    """
    chosen = get(recipe)
    backend = kernels.resolve(backend)
    kernels.get(backend)
    if stash is not None and stash not in stashing.BITS:
        raise UnknownNameError("stash", str(stash), stashing.BITS)
    check_model(model)
    sites = sites_of(model)
    check_rules(model, sites, rules)
    choices = _choose(sites, chosen, rules)
    _check(choices, chosen, seed, has_stash=stash is not None)
    _apply(model, choices, backend, seed or 0)
    if stash is not None:
        stashing.attach(model, stash, backend=backend, seed=seed or 0, device=_device(model))
    return model


def restore(model: Model) -> Model:
    """Gives back plain torch layers with the trained weights, in place. The quantizers' state is dropped.

    Raises:
        ConversionError: if no layer of the model is converted, or one was given another class since.
    """
    converted = [(fqn, m) for fqn, m in model.named_modules() if is_twin(m)]
    for fqn, module in converted:
        if type(module) not in TWINS.values():
            kind = type(module).__name__
            raise ConversionError(
                f"Layer {fqn} became a {kind} after it was converted; undo that (a parametrization?)."
            )
    marked = [m for m in model.modules() if hasattr(m, LEFT_ALONE)]
    if not converted and not marked:
        raise ConversionError("restore was asked for a model without a converted layer; convert(model, ...) makes one.")
    for _, module in converted:
        release(module)
    for module in model.modules():
        stashing.detach(module)
    if _DDP_IGNORES in vars(model):
        left = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        kept = [name for name in vars(model).pop(_DDP_IGNORES) if name in left]
        if kept:
            vars(model)[_DDP_IGNORES] = kept
    for module in model.modules():
        if _NESTED in vars(module):
            module.use_nested_tensor = vars(module).pop(_NESTED)
        for name in (LEFT_ALONE, PROMISE):
            vars(module).pop(name, None)
    return model


def _choose(sites: Sequence[Site], chosen: Recipe, rules: Sequence[Rule]) -> list[_Choice]:
    """The recipe of each place, by the first rule that matches.

    Raises:
        ConversionError: if a given rule decides nothing.
    """
    choices: list[_Choice] = []
    used: set[int] = set()
    for site in sites:
        found = next((n for n, rule in enumerate(rules) if matches(rule, site)), None)
        if found is None and site.unit.opt_in:
            continue  # no recipe asks for it, not even in a rule of its own
        if found is None:
            own = range(len(rules), len(rules) + len(chosen.rules))
            found = next((n for n in own if matches(chosen.rules[n - len(rules)], site)), None)
        recipe, why = chosen, f"recipe {chosen.name}"
        if found is not None:
            used.add(found)
            rule = (*rules, *chosen.rules)[found]
            recipe, why = get(rule.recipe), str(rule)
        if recipe is not chosen:
            for rule in recipe.rules:
                if not get(rule.recipe).leaves_alone and matches(rule, site):
                    recipe, why = get(rule.recipe), f"{why}; {rule}"
                    break
        choices.append(_Choice(site=site, recipe=recipe, why=why))
    check_used(sites, rules, used)
    for number, rule in enumerate(chosen.rules, start=len(rules)):
        if number not in used and not get(rule.recipe).leaves_alone:
            _log.warning("%s: no layer of this model is what its rule speaks of (%s)", chosen.name, rule)
    return choices


def _check(choices: Sequence[_Choice], chosen: Recipe, seed: int | None, *, has_stash: bool) -> None:
    """Raises for choices that come to nothing, or that a layer cannot follow."""
    if not chosen.leaves_alone and all(choice.recipe.leaves_alone for choice in choices):
        raise ConversionError(
            f"convert(model, {chosen.name!r}) would leave every layer in high precision: "
            f"{', '.join(f'{c.site.shown} ({c.why})' for c in choices)}. "
            f"Name the layers to convert: rules=[Rule(fqn='...', recipe={chosen.name!r})]."
        )
    if seed is not None and not has_stash and not any(choice.recipe.random for choice in choices):
        raise ConversionError(f"seed={seed} was given, but no layer's recipe rounds at random; leave it out.")
    for choice in choices:
        check_choice(choice.site, choice.recipe)


def _apply(model: nn.Module, choices: Sequence[_Choice], backend: str, seed: int) -> None:
    """Gives each layer its plans and the model its promise."""
    shared: dict[GradScaleSpec, GradScaleState] = {}
    promise: dict[str, str] = {}
    by_layer: dict[nn.Module, list[_Choice]] = {}
    grows = any(isinstance(module, nn.RNNBase | nn.RNNCellBase) for module in model.modules())
    for choice in choices:
        by_layer.setdefault(choice.site.layer.module, []).append(choice)
    for module, group in by_layer.items():
        whys = {choice.site.unit.name: choice.why for choice in group}
        plans = {}
        for choice in group:
            if not choice.recipe.leaves_alone:
                plans[choice.site.unit.name] = _plan(choice, shared, backend, seed, grows=grows)
                promise[choice.site.fqn] = choice.recipe.name
        if plans:
            adopt(module, plans, whys)
        else:
            setattr(module, LEFT_ALONE, whys)
    if not promise:
        return
    vars(model)[PROMISE] = promise
    _keep_from_ddp(model)
    for module in model.modules():
        # In evaluation it would make nested tensors of its input, which only torch's fused operator takes.
        if isinstance(module, nn.TransformerEncoder) and any(is_twin(m) for m in module.modules()):
            vars(module)[_NESTED] = module.use_nested_tensor
            module.use_nested_tensor = False


def _keep_from_ddp(model: nn.Module) -> None:
    """Tells DistributedDataParallel not to overwrite a rank's statistics and votes with those of rank 0.

    The ranks agree by themselves on what must be equal (`halfbyte.distributed`).
    """
    own = {id(buffer) for m in model.modules() if isinstance(m, Plan) for buffer in m.buffers()}
    names = [name for name, buffer in model.named_buffers() if id(buffer) in own]
    vars(model)[_DDP_IGNORES] = [*getattr(model, _DDP_IGNORES, ()), *names]


def _plan(
    choice: _Choice, shared: dict[GradScaleSpec, GradScaleState], backend: str, seed: int, *, grows: bool
) -> Plan:
    recipe, device = _start(choice.recipe, choice.site.unit, grows=grows), _device(choice.site.layer.module)
    scale = None
    if recipe.grad_scale is not None and recipe.grad_scale.shared:
        scale = shared.setdefault(recipe.grad_scale, recipe.grad_scale.build(device=device))
    return Plan(recipe, device=device, backend=backend, shared_scale=scale, seed=seed, layer=choice.site.number)


def _start(recipe: Recipe, unit: Unit, *, grows: bool) -> Recipe:
    """The recipe with a learned clip that starts well.

    Where the input is known to lie in -1 to 1 it starts at 1: the first hidden state is all zeros, and a clip that
    waits for the first batch would learn nothing from it. IBM's fms-model-optimizer starts the clips of its LSTM at 1,
    too.
    Where tensors grow as the model learns, it follows them at first.
    """
    spec = recipe.fprop.input
    if not isinstance(spec, Pact):
        return recipe
    if unit.bounded and spec.clip is None:
        spec = replace(spec, clip=1.0, signed=True if spec.signed is None else spec.signed)
    if grows and spec.settle is None:
        spec = replace(spec, settle=_SETTLE)
    return replace(recipe, fprop=replace(recipe.fprop, input=spec))


def _device(module: nn.Module) -> torch.device:
    """Where a layer's weights are; all of them are in one place."""
    return next(module.parameters()).device
