"""What training changes in its examples, a whole batch at a time; every choice is drawn from the generator given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pad_crop_flip"]


def pad_crop_flip(images_NCHW: Tensor, generator: torch.Generator, *, padding: int = 4) -> Tensor:
    """Each image moved by up to ``padding`` pixels either way, zeros moving in, and mirrored with probability a half.

    Args:
        images_NCHW: a batch.
        generator: decides, on the CPU.
        padding: pixels on every side.
    """
    count, _, height, width = images_NCHW.shape
    down, right = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows_NH = down + torch.arange(height)
    columns = torch.arange(width)
    columns_NW = right + torch.where(mirrored, columns.flip(0), columns)
    padded = F.pad(images_NCHW, (padding,) * 4)
    found_NHWC = padded[torch.arange(count)[:, None, None], :, rows_NH[:, :, None], columns_NW[:, None, :]]
    return found_NHWC.permute(0, 3, 1, 2).contiguous()
