"""What a format does to a picture: the grays that are lost, side by side with the original.

An integer format maps the darkest and the lightest pixel to its lowest and highest code, as the article does with
-8...7, and back. A logarithmic or floating format multiplies by the smallest power of two that brings the largest
pixel into its range. One scale serves the whole picture, all three colors included.

Dimensions: H height, W width, C color channels (1 or 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import formats
from .errors import HalfbyteError, SpecError
from .formats import Format
from .qtensor import QTensor
from .quantizers import MinMax, Nearest, Pact, quantize

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Picture", "open_image", "picture", "quantize_pixels"]

_GAP = 8  # Pixels between the panels.


@dataclass(frozen=True, kw_only=True)
class Picture:
    """The panels, and the numbers that go with them.

    Attributes:
        image: original, quantized and error side by side; in the error panel white is the largest error.
        format_name: of the codes.
        levels_used: how many different codes the picture needed.
        levels: how many codes there are.
        scale: gray values (of 0...255) between neighboring integers of the format.
        sqnr_db: signal to quantization noise, in decibels; infinite where nothing was lost.
        largest_error: in gray values.
    """

    image: Image
    format_name: str
    levels_used: int
    levels: int
    scale: float
    sqnr_db: float
    largest_error: float


def open_image(path: Path) -> Image:
    """Reads an image: the first frame, upright, as gray or RGB of 8 bits, with its alpha if it has one.

    Raises:
        HalfbyteError: if the file is missing, no image, or Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise HalfbyteError("Images need Pillow. Install it with: pip install 'halfbyte[lab]'") from error
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError as error:
        raise HalfbyteError(f"{path} is no image that Pillow can read. PNG and JPEG are always possible.") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise HalfbyteError(f"{path} cannot be read as an image: {error}.") from error
    if image.mode.startswith("I"):  # 16 bits of gray: Pillow's own conversion to 8 would cut them off at 255.
        image = image.convert("I").point(lambda gray: gray * (1 / 257))
    alpha = "A" if image.mode.endswith(("A", "a")) or "transparency" in image.info else ""
    gray = image.mode in ("1", "L", "LA", "La", "I", "F")
    if gray and alpha and image.mode == "L":
        return image.convert("RGBA").convert("LA")  # A transparent gray value is only understood on the way to RGBA.
    return image.convert(("L" if gray else "RGB") + alpha)


def quantize_pixels(pixels: Tensor, fmt: Format) -> QTensor:
    """The codes of a picture.

    Args:
        pixels: floating, not negative, any shape.
        fmt: a signed integer format maps the range of the pixels to all its codes; an unsigned one divides [0, largest]
            into equal steps; any other gets the smallest power of two as its scale that brings the largest pixel into
            range.
    """
    if fmt.kind != "int":
        return quantize(pixels, Nearest(fmt=fmt))
    if fmt.signed:
        return quantize(pixels, MinMax(bits=fmt.bits))
    amax = float(pixels.max()) if pixels.numel() else 0.0
    return quantize(pixels, Pact(clip=amax or 1.0, bits=fmt.bits))


def picture(image: Image, fmt_name: str, *, bits: int | None = None) -> Picture:
    """Quantizes an image and lays the panels side by side.

    Args:
        image: mode L, LA, RGB or RGBA, as `open_image` returns it. Alpha is kept and not quantized.
        fmt_name: a name in `halfbyte.formats.FORMATS`.
        bits: another width for an integer format, 1 to 8.

    Raises:
        UnknownNameError: if there is no such format.
        SpecError: if the width is impossible or given for a format that has its own, or if the format is for scales.
    """
    fmt = formats.get(fmt_name)
    if fmt.kind == "scale":
        raise SpecError(f"{fmt.name} holds scales and has no zero, so it cannot hold pixels. Use an INT or FP format.")
    if bits is not None:
        if fmt.kind != "int":
            raise SpecError(f"bits={bits} was asked for with {fmt.name}, whose width is {fmt.bits}. Leave --bits out.")
        fmt = formats.integer(bits, signed=fmt.signed)
    pixels_HWC, alpha_HW = _to_tensor(image)
    q = quantize_pixels(pixels_HWC, fmt)
    x_hat_HWC = q.dequantize()
    error_HWC = x_hat_HWC.double() - pixels_HWC.double()
    noise, largest = float(error_HWC.square().sum()), float(error_HWC.abs().max())
    signal = float(pixels_HWC.double().square().sum())
    stretched_HWC = error_HWC.abs() * (255 / largest if largest else 0.0)
    return Picture(
        image=_side_by_side([pixels_HWC, x_hat_HWC, stretched_HWC], alpha_HW),
        format_name=q.format.name,
        levels_used=int(q.codes().unique().numel()),
        levels=sum(math.isfinite(value) for value in set(fmt.values)),
        scale=float(q.scale),
        sqnr_db=10 * math.log10(signal / noise) if noise and signal else math.inf,
        largest_error=largest,
    )


def _to_tensor(image: Image) -> tuple[Tensor, Tensor | None]:
    """Colors as float32 (H, W, C) and alpha as uint8 (H, W), or None where there is none."""
    channels = len(image.getbands())
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, channels)
    if channels in (2, 4):
        return raw[..., :-1].to(torch.float32), raw[..., -1]
    return raw.to(torch.float32), None


def _side_by_side(panels: list[Tensor], alpha_HW: Tensor | None) -> Image:
    """The panels (H, W, C) from left to right with a gap between them, all with the same alpha."""
    from PIL import Image

    columns = []
    for panel_HWC in panels:
        pixels = panel_HWC.round().clamp(0, 255).to(torch.uint8)
        if alpha_HW is not None:
            pixels = torch.cat([pixels, alpha_HW.unsqueeze(-1)], dim=-1)
        gap = torch.full((pixels.shape[0], _GAP, pixels.shape[2]), 255, dtype=torch.uint8)
        columns += [gap, pixels]
    strip = torch.cat(columns[1:], dim=1).contiguous()
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[strip.shape[2]]
    return Image.frombytes(mode, (strip.shape[1], strip.shape[0]), strip.numpy().tobytes())
