"""Recipes: what each operand of a layer's three GEMMs becomes, and which layers are left alone. Data, nothing else."""

from __future__ import annotations

from .conditions import bottom_pointwise, depthwise, first_or_last, pointwise
from .schema import LayerInfo, Recipe, Rule
from .slots import REUSE, Dgrad, Fprop, Gemms, Requantize, Reuse, Slot, Wgrad
from .table import RECIPES, find, get

__all__ = [
    "RECIPES",
    "REUSE",
    "Dgrad",
    "Fprop",
    "Gemms",
    "LayerInfo",
    "Recipe",
    "Requantize",
    "Reuse",
    "Rule",
    "Slot",
    "Wgrad",
    "bottom_pointwise",
    "depthwise",
    "find",
    "first_or_last",
    "get",
    "pointwise",
]
