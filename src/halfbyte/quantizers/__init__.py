"""Quantizers: from floating tensors to codes, and their gradients back. The contract is in `contract`."""

from __future__ import annotations

from .contract import NonFiniteCounter, Quantized, Quantizer, Spec, in_backward, quantize
from .gradient import GradQuantizer
from .grid import Grid, Nearest, Radix4, TwoPhase
from .layer_scale import ExactGradScale, GradScaleSpec, GradScaleState, LayerGradScale, LossScale, vote
from .linear import MinMax, Sawb
from .pact import Pact

__all__ = [
    "ExactGradScale",
    "GradQuantizer",
    "GradScaleSpec",
    "GradScaleState",
    "Grid",
    "LayerGradScale",
    "LossScale",
    "MinMax",
    "Nearest",
    "NonFiniteCounter",
    "Pact",
    "Quantized",
    "Quantizer",
    "Radix4",
    "Sawb",
    "Spec",
    "TwoPhase",
    "in_backward",
    "quantize",
    "vote",
]
