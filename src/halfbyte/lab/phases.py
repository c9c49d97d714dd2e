"""The phases of a run: ordinary training and, where it is asked for, fine-tuning in high precision.

Fine-tuning is how LUQ closes its last gap (Chmiel et al., Accurate Neural Training with 4-bit Matrix Multiplications at
Standard Formats, ICLR 2023, FNT): for the last epochs activations and gradients are in high precision, the weights stay
in four bits, and the learning rate climbs a straight line and comes down another. Any recipe can be given this phase.
One that quantizes nothing gets the same epochs and the same learning rate and keeps its formats, so that a comparison
compares nothing but formats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, cast

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..convert import convert, restore
from ..ops import Plan
from ..quantizers import Quantizer
from ..recipes import Dgrad, Fprop, Recipe, Rule, Wgrad, get
from ..stash import STEP
from .tasks import Settings

__all__ = [
    "PEAK",
    "conventions",
    "cosine",
    "fine_tuning",
    "optimizer",
    "ordinary",
    "prepare",
    "schedule",
    "switch",
    "triangle",
]

PEAK = 0.1
"""The tip of the triangle as a share of the settings' learning rate. The paper gives the shape and no number for it."""


def fine_tuning(recipe: Recipe) -> Recipe:
    """The recipe of the fine-tuning phase: weights as they were, everything else in floating point.

    dgrad multiplies by the weight's codes of fprop, so that the gradient is that of the network as it computes.

    Args:
        recipe: that of ordinary training.

    Returns:
        Its name with ``_fine_tuning`` at the end; the recipe itself where no slot holds a spec.
    """
    if recipe.in_floating_point:
        return recipe
    rules = tuple(dataclasses.replace(rule, recipe=_of_rule(rule)) for rule in recipe.rules)
    # A rotation that the weights' codes are in belongs to the codes.
    fprop = dataclasses.replace(recipe.fprop, input=None) if recipe.fprop.weight is not None else Fprop()
    return Recipe(
        name=f"{recipe.name}_fine_tuning",
        description=f"The weights of {recipe.name}; activations and gradients in floating point.",
        source="Chmiel et al., ICLR 2023, FNT",
        fprop=fprop,
        dgrad=Dgrad(),
        wgrad=Wgrad(),
        rules=rules,
    )


def _of_rule(rule: Rule) -> str | Recipe:
    """What a rule names, in the fine-tuning phase."""
    return rule.recipe if get(rule.recipe).in_floating_point else fine_tuning(get(rule.recipe))


def conventions(recipe: Recipe, *, fine_tune: int) -> dict[str, str]:
    """Every numerical convention of every recipe that may have a part in a run, by the recipe's name.

    Args:
        recipe: that of the run; those that its rules name are included.
        fine_tune: epochs of fine-tuning; if any, the recipes of that phase are included.
    """
    own = [recipe, *(get(rule.recipe) for rule in recipe.rules)]
    phases = own if fine_tune == 0 else [*own, *(fine_tuning(r) for r in own)]
    return {r.name: r.conventions for r in phases}


def ordinary(settings: Settings, batches_per_epoch: int) -> Callable[[int, int], float]:
    """Ordinary training's share of the learning rate, from the batches done and the batches in all.

    In closed form: it depends on the count of batches and on nothing that was computed before.
    """

    def shape(done: int, total: int) -> float:
        if done < settings.warmup:
            return (done + 1) / settings.warmup
        match settings.schedule:
            case "cosine":
                return cosine(done - settings.warmup, total - settings.warmup)
            case "drops":
                return 0.1 ** sum(done >= share * total for share in settings.drops)
            case "decay":
                return settings.decay ** max(0, done // batches_per_epoch + 1 - settings.hold)
            case _:
                return math.sqrt(settings.warmup / (done + 1))

    return shape


def cosine(done: int, total: int) -> float:
    """From 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * done / total))


def triangle(done: int, total: int) -> float:
    """Fine-tuning's share of the learning rate: up to `PEAK` and down again, the same at both ends, never 0.

    Of T batches, number k (from 0) gets ``PEAK (1 - |2k + 1 - T| / T)``.
    """
    return PEAK * (1 - abs(2 * done + 1 - total) / total)


def optimizer(network: nn.Module, settings: Settings) -> Optimizer:
    """The optimizer that the settings name, over every parameter, with fresh state."""
    rate, decay = settings.learning_rate, settings.weight_decay
    parameters: list[dict[str, Any]] = [{"params": list(network.parameters())}]
    if settings.learned_rate is not None:
        learned = {id(m.learned) for m in network.modules() if isinstance(m, Quantizer) and m.learned is not None}
        others = [p for p in network.parameters() if id(p) not in learned]
        parameters = [{"params": others}]
        if learned:
            found = [p for p in network.parameters() if id(p) in learned]
            parameters.append({"params": found, "lr": settings.learned_rate})
    if settings.optimizer != "sgd":
        kind = Adam if settings.optimizer == "adam" else AdamW
        return kind(parameters, lr=rate, weight_decay=decay, betas=settings.betas or (0.9, 0.999))
    return SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)


def schedule(stepped: Optimizer, shape: Callable[[int, int], float], total: int) -> LambdaLR:
    """A learning rate a batch.

    Args:
        stepped: the optimizer.
        shape: `cosine` or `triangle`.
        total: batches in the phase.
    """
    return LambdaLR(stepped, lambda done: shape(done, total))


def prepare(model: nn.Module, recipe: Recipe, seed: int, backend: str = "reference", stash: str = "") -> nn.Module:
    """Converts a model in place.

    Args:
        model: as its task makes it.
        recipe: its numerics.
        seed: of the run. Only a recipe that draws random numbers gets it; `halfbyte.convert` refuses one without a use.
        backend: who computes, see `halfbyte.convert`.
        stash: how what autograd saves is kept, see there; empty for as torch keeps it.
    """
    drawn = recipe.random or stash
    return convert(
        model, recipe, backend=backend, seed=seed if drawn else None, stash=cast(Literal["int4", "int8"], stash) or None
    )


def switch(model: nn.Module, recipe: Recipe, seed: int, backend: str = "reference", stash: str = "") -> nn.Module:
    """Takes a model from ordinary training to fine-tuning, in place.

    Parameters stay the same objects with the same bits. What the weights' quantizers have learned or measured stays,
    and so does each layer's count of steps; the other quantizers' state is dropped.

    Args:
        model: as `prepare` left it, trained or not.
        recipe: that of ordinary training.
        seed: of the run.
        backend: who computes, see `halfbyte.convert`.
        stash: as in `prepare`.
    """
    next_recipe = fine_tuning(recipe)
    if next_recipe is recipe:
        return model
    before = _plans(model)
    stashed = getattr(model, STEP, None)
    restore(model)
    prepare(model, next_recipe, seed, backend, stash)
    if stashed is not None:
        getattr(model, STEP).copy_(stashed)
    for name, plan in _plans(model).items():
        plan.step.copy_(before[name].step)
        old, new = before[name].weight, plan.weight
        if isinstance(old, Quantizer) and isinstance(new, Quantizer):
            new.load_state_dict(old.state_dict())
    return model


def _plans(model: nn.Module) -> dict[str, Plan]:
    """The plans in a model by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Plan)}
