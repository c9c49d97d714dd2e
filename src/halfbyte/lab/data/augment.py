"""What training changes in its examples, a whole batch at a time; every choice is drawn from the generator given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import HalfbyteError

__all__ = ["mask_bands", "pad_crop_flip"]


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


def mask_bands(
    frames_NTF: Tensor, generator: torch.Generator, *, stack: int = 1, time: int = 20, bands: int = 8
) -> Tensor:
    """Zeros in two stretches of time and two of frequency in each utterance, of random place and width.

    Zero is the mean of every band. (Park et al., SpecAugment, arXiv 1904.08779, without its warping of time.)

    Args:
        frames_NTF: a batch, each frame made of ``stack`` successive ones with the same bands.
        generator: decides, on the CPU.
        stack: how many frames one is made of; a mask of time covers whole stacks, one of frequency all in a stack.
        time: frames, before stacking, of the longest stretch of time; never more than a fifth of the batch's longest
            utterance, and anywhere in its length, so that a mask may lie behind the end of a shorter one.
        bands: bands of the widest stretch of frequency, less one.
    """
    count, frames, width = frames_NTF.shape
    if width % stack:
        raise HalfbyteError(f"Frames of {width} numbers were given; stack={stack} must divide that.")
    keep_NTSM = torch.ones(count, frames, stack, width // stack, dtype=torch.bool)
    for length, longest, shape in (
        (frames, min(time // stack, frames // 5) + 1, (count, -1, 1, 1)),
        (width // stack, bands, (count, 1, 1, -1)),
    ):
        for _ in range(2):
            size = torch.randint(longest, (count, 1), generator=generator)
            start = (torch.rand(count, 1, generator=generator) * (length - size + 1)).long()
            place = torch.arange(length)
            keep_NTSM &= ~((place >= start) & (place < start + size)).view(shape)
    return frames_NTF * keep_NTSM.view(count, frames, width)
