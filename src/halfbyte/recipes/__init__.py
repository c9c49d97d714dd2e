"""Recipes: what each operand of a layer's three GEMMs becomes, and which layers are left alone. Data, nothing else.

A layer has three GEMMs of two operands each: six slots.

    fprop(input, weight)         -> output
    dgrad(grad_output, weight)   -> grad_input
    wgrad(grad_output, input)    -> grad_weight

A slot holds a `Spec`, or `REUSE` (the codes that fprop made), or None (floating point). A variant of a recipe is
``dataclasses.replace(recipe, ...)``; a new one is a new `Recipe`.
"""

from __future__ import annotations

from .schema import REUSE, Dgrad, Fprop, LayerInfo, Recipe, Reuse, Rule, Wgrad
from .table import RECIPES, bottom_pointwise, depthwise, first_or_last, get, pointwise

__all__ = [
    "RECIPES",
    "REUSE",
    "Dgrad",
    "Fprop",
    "LayerInfo",
    "Recipe",
    "Reuse",
    "Rule",
    "Wgrad",
    "bottom_pointwise",
    "depthwise",
    "first_or_last",
    "get",
    "pointwise",
]
