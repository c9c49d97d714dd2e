"""A layer's three GEMMs as differentiable functions under a `Plan`.

A plan is a recipe's six slots with their quantizers' state. Between the forward and the backward pass an operation
keeps packed codes, scales and, where a clip needs it, one bit an element (a learned step one float); a floating slot
keeps its tensor.
"""

from __future__ import annotations

from .functions import conv, conv_transpose, linear, matmul
from .plan import Plan, Watcher
from .recurrence import Recurrence

__all__ = ["Plan", "Recurrence", "Watcher", "conv", "conv_transpose", "linear", "matmul"]
