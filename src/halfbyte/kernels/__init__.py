"""The table of backends: who turns tensors into codes and multiplies codes.

Every backend is a module with the same functions, and every one equals `reference` bit for bit: codes, masks,
statistics, and the exact integer sums of the three GEMMs. `reference` computes on codes in plain PyTorch; training on
it shows what four bits do to accuracy and is called *emulation*, not 4-bit execution.
"""

from __future__ import annotations

from types import ModuleType

from ..errors import UnknownNameError
from . import reference
from .geometry import Conv, Gemm, Geometry, Linear
from .reference.gemm import Accumulate

__all__ = ["BACKENDS", "Accumulate", "Conv", "Gemm", "Geometry", "Linear", "get"]

BACKENDS: dict[str, ModuleType] = {"reference": reference}


def get(name: str) -> ModuleType:
    """The backend of that name.

    Raises:
        UnknownNameError: if there is none.
    """
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, BACKENDS)
    return BACKENDS[name]
