"""The recorded run that the last chapter replays: `experiments/explain_run.py` makes it, this file reads it.

The record holds each look's codes, scales and zero points. What a visitor sees beside the codes, the numbers at the
two ends of a tensor's range, is computed here from those.
"""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any

import torch

from .. import formats
from ..qtensor import QTensor, pack
from .tables import plain

__all__ = ["recorded"]


def recorded() -> dict[str, Any]:
    """The run as the page takes it.

    Returns:
        What `experiments/explain_run.py` wrote; in ``tensors`` scale and zero point have given way to ``ends``, for
        integers what the lowest and the highest code stand for at each look, and ``octaves``, for gradients by how many
        powers of two they were raised.
    """
    run: dict[str, Any] = json.loads((resources.files(__package__) / "run.json").read_text(encoding="utf-8"))
    for tensor in run["tensors"].values():
        scales, zero_points = tensor.pop("scale"), tensor.pop("zero_point")
        if zero_points is None:
            tensor["octaves"] = [int(-math.log2(scale)) for scale in scales]
        else:
            tensor["ends"] = [_ends(*pair) for pair in zip(scales, zero_points, strict=True)]
    return run


def _ends(scale: float, zero_point: float) -> list[float]:
    """What the codes -8 and 7 stand for."""
    q = QTensor(
        pack(torch.tensor([8, 7], dtype=torch.uint8), 4),
        torch.tensor(scale),
        formats.int4,
        torch.Size([2]),
        torch.tensor(zero_point, dtype=torch.float64),
    )
    return plain(q.dequantize())
