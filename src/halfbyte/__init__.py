"""Train neural networks in four bits: INT4 weights and activations, radix-4 FP4 gradients (Sun et al., NeurIPS 2020).

import halfbyte as hb

model = hb.convert(model, recipe="ibm2020")
print(hb.summary(model))
# an ordinary PyTorch loop from here on
"""

from __future__ import annotations

from . import formats
from .convert import convert, restore, summary
from .formats import Format, Phase
from .qtensor import QTensor
from .quantizers import LayerGradScale, LossScale, MinMax, Nearest, Pact, Radix4, Sawb, TwoPhase, quantize
from .recipes import RECIPES, REUSE, Dgrad, Fprop, Recipe, Rule, Wgrad

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "REUSE",
    "Dgrad",
    "Format",
    "Fprop",
    "LayerGradScale",
    "LossScale",
    "MinMax",
    "Nearest",
    "Pact",
    "Phase",
    "QTensor",
    "Radix4",
    "Recipe",
    "Rule",
    "Sawb",
    "TwoPhase",
    "Wgrad",
    "convert",
    "formats",
    "quantize",
    "restore",
    "summary",
]
