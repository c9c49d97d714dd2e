"""Leaving the house: packed 4-bit weights as safetensors, a quantized graph as ONNX, plain weights for PyTorch.

All three take a converted model, trained or not; the command ``halfbyte export`` takes a checkpoint of a run.
What comes out is what the model computes in evaluation: the codes of its weights are the same in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import whole
from . import safetensors
from .loading import load
from .onnx import save_onnx
from .packed import FileError, Packed, pack_model, plain_state
from .weights import Weight, weights_in

__all__ = [
    "FileError",
    "Packed",
    "Weight",
    "load",
    "pack_model",
    "plain_state",
    "save_onnx",
    "save_safetensors",
    "save_torch",
    "weights_in",
]


def save_safetensors(
    model: nn.Module, path: str | Path, *, recipe: str = "", more: Mapping[str, Any] | None = None
) -> Packed:
    """Writes a model with packed weights; `halfbyte.load` brings it back.

    Args:
        model: converted, trained or not.
        path: the file.
        recipe: the name that the model was converted by, where rules brought others in; empty finds it.
        more: plain values that the file shall say, too.

    Returns:
        What was written.

    Raises:
        UnsupportedError: if a weight cannot be exported: computed, sharded, broken.
        HalfbyteError: if safetensors is not installed.
    """
    packed = pack_model(model, recipe, more)
    safetensors.write(packed, Path(path))
    return packed


def save_torch(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Writes a plain ``state_dict`` in which each weight is what its codes stand for, for PyTorch without halfbyte.

    Activations are not rounded there: their clips are no part of a plain network.

    Args:
        model: converted, trained or not.
        path: the file; ``torch.load(path, weights_only=True)`` reads it.

    Returns:
        What was written.

    Raises:
        UnsupportedError: if a weight cannot be exported: computed, sharded, broken.
    """
    state = plain_state(model)
    with whole(Path(path)) as partial:
        torch.save(state, partial)
    return state
