"""From bytes to what a network takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .source import Prepare

__all__ = ["normalizer"]


def normalizer(mean: Sequence[float], deviation: Sequence[float]) -> Prepare:
    """Turns pixels 0...255 into floats whose channels have mean 0 and standard deviation 1 over the data set.

    Args:
        mean: of each channel, with pixels as numbers in [0, 1].
        deviation: likewise.

    Returns:
        A function from uint8 (N, C, H, W) to float32 of that shape.
    """
    scale_C11 = 1 / (255 * torch.tensor(deviation)).view(-1, 1, 1)
    offset_C11 = -(torch.tensor(mean) / torch.tensor(deviation)).view(-1, 1, 1)

    def prepare(pixels_NCHW: Tensor) -> Tensor:
        return torch.addcmul(offset_C11, pixels_NCHW.to(torch.float32), scale_C11)

    return prepare
