"""Recipes: what each operand of a layer's three GEMMs becomes, and which layers are left alone. Data, nothing else."""

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
