"""Where plans can stand in a model: its layers in order, and what of them a rule speaks of."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import nn

from ..nn import TWINS, Unit, is_twin, units_of
from ..recipes import LayerInfo, Rule

__all__ = ["Site", "matches", "named_layers", "owned", "plan_fqn", "sites_of"]

_USES_CHILD: tuple[tuple[str, str], ...] = (("MultiheadAttention", "out_proj"), ("LinearCrossEntropyLoss", "linear"))
"""Modules of torch's that read a child's weight and never call the child."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place for one plan.

    Attributes:
        layer: the module as rules see it: its own name, and its place among the model's layers.
        unit: which of the module's plans.
        number: the plan's own number in the model, from which random rounding draws.
    """

    layer: LayerInfo
    unit: Unit
    number: int

    @property
    def fqn(self) -> str:
        """Fully qualified name of the plan."""
        return plan_fqn(self.layer.fqn, self.unit.name)

    @property
    def shown(self) -> str:
        """Its name in a message."""
        return self.fqn or type(self.layer.module).__name__


def plan_fqn(layer: str, unit: str) -> str:
    """The name of a plan: the layer's, the unit's, or both with a dot between."""
    return ".".join(filter(None, (layer, unit)))


def owned(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight their parent reads without calling them, so that converting them would do nothing."""
    found: set[nn.Module] = set()
    for module in model.modules():
        for parent, name in _USES_CHILD:
            kind, child = getattr(nn, parent, None), getattr(module, name, None)
            if kind is not None and isinstance(module, kind) and isinstance(child, nn.Module):
                found.add(child)
    return found


def named_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that convert or are converted, each once, in the order of registration."""
    skipped = owned(model)
    return [(n, m) for n, m in model.named_modules() if (type(m) in TWINS or is_twin(m)) and m not in skipped]


def sites_of(model: nn.Module) -> list[Site]:
    """Every place for a plan, in the order of registration; those that a rule must name come last.

    Embeddings are not converted but count as layers, so that a language model's first layer is its embedding.
    """
    layers = dict(named_layers(model))
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    order = [(n, m) for n, m in model.named_modules() if n in layers or isinstance(m, embeddings)]
    infos = [
        LayerInfo(fqn=fqn, module=module, index=index, count=len(order))
        for index, (fqn, module) in enumerate(order)
        if fqn in layers
    ]
    places = [(info, unit) for info in infos for unit in units_of(info.module)]
    # A stable order: the numbers of all others must not depend on whether a product is asked for.
    places.sort(key=lambda place: place[1].opt_in)
    return [Site(layer=info, unit=unit, number=number) for number, (info, unit) in enumerate(places)]


def matches(rule: Rule, site: Site) -> bool:
    """Whether a rule speaks of a place.

    A rule that matches the layer matches each of its weights; one can also name the plan (``lstm.hh_l0``). A product
    without a weight (``attn.qk_0``) is matched only by a rule whose pattern ends in ``qk`` or ``pv``, spelled
    out, with or without a head after it: ``*.qk``, ``blocks.0.attn.pv``, ``*.qk_*``. ``*`` does not match it.
    """
    plan = replace(site.layer, fqn=site.fqn)
    if not site.unit.opt_in:
        return rule.matches(plan) or (bool(site.unit.name) and rule.matches(site.layer))
    product = site.unit.name.partition("_")[0]
    if rule.fqn is None or re.search(rf"(?<!\w){product}(_[^.]*)?$", rule.fqn) is None:
        return False
    every_head = replace(site.layer, fqn=plan_fqn(site.layer.fqn, product))
    return rule.matches(every_head) or rule.matches(plan)
