"""Quantizers: from floating tensors to codes, and their gradients back. The contract is in `contract`."""

from __future__ import annotations

from .bitsplit import BitSplit
from .block import MXFP4, NVFP4
from .contract import Quantized, Quantizer, Spec, Use, in_backward, quantize
from .gradient import GradQuantizer, Parts
from .grid import Grid, Nearest, Radix4, TwoPhase
from .layer_scale import ExactGradScale, GradScaleSpec, GradScaleState, LayerGradScale, LossScale, vote
from .linear import AbsMax, MinMax, Sawb
from .log import Luq
from .lsq import Lsq
from .pact import Pact
from .state import NonFiniteCounter, Stateful
from .transforms import Hadamard

__all__ = [
    "MXFP4",
    "NVFP4",
    "AbsMax",
    "BitSplit",
    "ExactGradScale",
    "GradQuantizer",
    "GradScaleSpec",
    "GradScaleState",
    "Grid",
    "Hadamard",
    "LayerGradScale",
    "LossScale",
    "Lsq",
    "Luq",
    "MinMax",
    "Nearest",
    "NonFiniteCounter",
    "Pact",
    "Parts",
    "Quantized",
    "Quantizer",
    "Radix4",
    "Sawb",
    "Spec",
    "Stateful",
    "TwoPhase",
    "Use",
    "in_backward",
    "quantize",
    "vote",
]
