"""Train neural networks in four bits: INT4 weights and activations, radix-4 FP4 gradients (Sun et al., NeurIPS 2020).

import halfbyte as hb

model = hb.convert(model, recipe="ibm2020")
print(hb.summary(model))
# an ordinary PyTorch loop from here on
"""

from __future__ import annotations

from . import formats, probes
from .auditing import AuditReport, audit
from .convert import convert, restore, summary
from .export import load
from .formats import Format, Phase
from .qtensor import QTensor
from .quantizers import (
    MXFP4,
    NVFP4,
    AbsMax,
    BitSplit,
    Hadamard,
    LayerGradScale,
    LossScale,
    Lsq,
    Luq,
    MinMax,
    Nearest,
    Pact,
    Radix4,
    Sawb,
    TwoPhase,
    quantize,
)
from .recipes import RECIPES, REUSE, Dgrad, Fprop, Recipe, Requantize, Rule, Wgrad

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "NVFP4",
    "RECIPES",
    "REUSE",
    "AbsMax",
    "AuditReport",
    "BitSplit",
    "Dgrad",
    "Format",
    "Fprop",
    "Hadamard",
    "LayerGradScale",
    "LossScale",
    "Lsq",
    "Luq",
    "MinMax",
    "Nearest",
    "Pact",
    "Phase",
    "QTensor",
    "Radix4",
    "Recipe",
    "Requantize",
    "Rule",
    "Sawb",
    "TwoPhase",
    "Wgrad",
    "audit",
    "convert",
    "formats",
    "load",
    "probes",
    "quantize",
    "restore",
    "summary",
]
