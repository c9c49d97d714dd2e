"""A picture of our own for the first chapter: evening over hills and a lake, all of it smooth.

Smooth skies are where missing gray values show first, as bands.

Dimensions: H height, W width; the last dimension holds red, green and blue.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["paint"]

_SUN = (0.66, 0.44)  # Across and down, as shares of the picture.
_SHORE = 0.72
_SKY = ((0.0, (38, 52, 104)), (0.22, (92, 90, 148)), (0.36, (214, 134, 132)), (0.52, (252, 204, 140)))
_RIDGES = (  # Height of the middle, of the waves, how many waves, and the color.
    (0.52, 0.055, (1.3, 3.1, 7.3), (150, 112, 138)),
    (0.60, 0.050, (0.9, 2.3, 5.9), (96, 78, 116)),
    (0.68, 0.038, (1.7, 4.1, 9.7), (46, 46, 78)),
)


def paint(height: int = 192, width: int = 288) -> Tensor:
    """The picture, uint8 of shape (H, W, 3).

    Args:
        height: in pixels.
        width: in pixels.
    """
    down_HW = ((torch.arange(height, dtype=torch.float64) + 0.5) / height).unsqueeze(1).expand(height, width)
    across_HW = ((torch.arange(width, dtype=torch.float64) + 0.5) / width).unsqueeze(0).expand(height, width)
    # The lake shows the upper part upside down, squeezed and a little darker.
    mirrored_HW = _SHORE - (down_HW - _SHORE) * 1.7
    in_lake_HW = down_HW > _SHORE
    scene = _land(torch.where(in_lake_HW, mirrored_HW, down_HW), across_HW, height)
    depth_HW = ((down_HW - _SHORE) / (1 - _SHORE)).clamp(0, 1)
    ripple_HW = 1 + 0.05 * torch.sin(520 * depth_HW.sqrt() + 9 * across_HW) * depth_HW
    shade_HW = torch.where(in_lake_HW, (0.86 - 0.4 * depth_HW) * ripple_HW, 1.0)
    return (scene * shade_HW.unsqueeze(-1)).round().clamp(0, 255).to(torch.uint8)


def _land(down_HW: Tensor, across_HW: Tensor, height: int) -> Tensor:
    """Sky, sun and ridges at the given places; float64 of shape (H, W, 3), 0 to 255."""
    scene = _sky(down_HW)
    aspect = 1.5
    distance_HW = (((across_HW - _SUN[0]) * aspect).square() + (down_HW - _SUN[1]).square()).sqrt()
    glow_HW = torch.exp(-distance_HW * 7).unsqueeze(-1)
    scene = scene + glow_HW * (torch.tensor([255.0, 232.0, 176.0], dtype=torch.float64) - scene)
    scene = _over(scene, (255, 246, 220), (0.055 - distance_HW) * height)
    for middle, swing, waves, color in _RIDGES:
        crest_HW = torch.full_like(across_HW, middle)
        for number, wave in enumerate(waves):
            crest_HW = crest_HW - swing / (number + 1) * torch.sin(6.283 * wave * across_HW + 7 * middle * wave)
        scene = _over(scene, color, (down_HW - crest_HW) * height)
    return scene


def _sky(down_HW: Tensor) -> Tensor:
    """Straight lines between the colors of the sky."""
    scene = torch.tensor(_SKY[0][1], dtype=torch.float64).expand(*down_HW.shape, 3)
    for (low, color_low), (high, color_high) in itertools.pairwise(_SKY):
        share = ((down_HW - low) / (high - low)).clamp(0, 1).unsqueeze(-1)
        first, last = (torch.tensor(color, dtype=torch.float64) for color in (color_low, color_high))
        scene = torch.where(share > 0, first + share * (last - first), scene)
    return scene


def _over(scene: Tensor, color: tuple[int, int, int], inside_HW: Tensor) -> Tensor:
    """A color laid over a scene where a place lies inside by some pixels, with an edge of one pixel."""
    cover = (inside_HW + 0.5).clamp(0, 1).unsqueeze(-1)
    return scene + cover * (torch.tensor(color, dtype=torch.float64) - scene)
