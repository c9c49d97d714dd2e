"""Block formats in plain PyTorch: the largest magnitude of each block, the blocks' scales, and codes under them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import e8m0, fp4_e2m1, fp8_e4m3
from ...qtensor import Blocks
from ...rng import Draw
from .encode import encode, wide_dtype
from .stochastic import encode_stochastic

MX_RULES = {"floor": 2.0, "ceil": 0.5, "even": 0.875, "rceil": 0.75}
"""For each rule the mantissa, in [1/2, 1), from which on (``"even"``) or beyond which the exponent is one more."""


def block_amax(x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each block, and of all.

    Args:
        x: any floating type, in the shape of ``blocks.view``.
        blocks: how it is cut.

    Returns:
        float32 (float64 for float64) in the shape of ``blocks.grid``, and of shape (), 0 for an empty tensor; NaN where
        a number is.
    """
    amax = blocks.split(x.to(wide_dtype(x.dtype))).abs().amax(blocks.places)
    return amax, amax.max() if amax.numel() else amax.new_zeros(())


def nv_scales(amax: Tensor, *, limit: float, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """NVFP4's scales: E4M3 for each block, and a float32 one that makes the largest block's `largest`.

    Args:
        amax: of each block, finite float32.
        limit: what a block's largest magnitude becomes in codes.
        largest: what the largest block's scale becomes.

    Returns:
        The tensor's scale, float32 of shape (); the codes of the blocks' scales, uint8 in the shape of `amax`; and what
        the numbers of a block are multiplied by, ``1 / (block scale * scale)``, float32: 0 where the block's scale
        rounded to zero.
    """
    scale_enc = nv_encoding(amax, limit=limit, largest=largest)
    scale = scale_enc.reciprocal()
    codes = e4m3_codes(amax / limit * scale_enc)
    return scale, codes, e4m3_inverse(codes, scale)


def nv_encoding(amax: Tensor, *, limit: float, largest: float) -> Tensor:
    """The reciprocal of a tensor's scale under NVFP4, before it is rounded: float32 of shape ()."""
    top = amax.max() if amax.numel() else torch.zeros((), device=amax.device)
    scale_enc = limit * largest / top
    return torch.where((top > 0) & scale_enc.isfinite(), scale_enc, 1.0)


def mx_scales(amax: Tensor, *, rule: str, factor: float) -> tuple[Tensor, Tensor]:
    """MXFP4's scales: a power of two for each block.

    Args:
        amax: of each block, finite.
        rule: a name in `MX_RULES`.
        factor: what all numbers are multiplied by besides.

    Returns:
        The E8M0 codes of the blocks' scales, uint8 in the shape of `amax`; what the numbers of a block are multiplied
        by, float32.
    """
    # amax = m * 2^e with m in [1/2, 1): floor(log2 amax) is e - 1.
    mantissa, exponent = torch.frexp(amax)
    up = MX_RULES[rule]
    more = mantissa >= up if rule == "even" else mantissa > up
    return mx_powers(torch.where(amax > 0, exponent - 3 + more.int(), -e8m0.bias), factor=factor)


def mx_powers(exponent: Tensor, *, factor: float) -> tuple[Tensor, Tensor]:
    """`mx_scales` for exponents that are known, int32."""
    exponent = exponent.clamp(-e8m0.bias, e8m0.bias - 1)
    inverse = ((127 - exponent) << 23).view(torch.float32)
    return (exponent + e8m0.bias).to(torch.uint8), inverse if factor == 1 else inverse * factor


def encode_blocks(x: Tensor, inverse: Tensor, blocks: Blocks, *, draw: Draw | None = None, part: int = 0) -> Tensor:
    """The packed E2M1 codes of ``x * inverse``, a number of `inverse` for each block.

    Args:
        x: numbers but no NaN, any floating type, in the shape of ``blocks.view``.
        inverse: float32 in the shape of ``blocks.grid``.
        blocks: how it is cut.
        draw: where random numbers come from; None rounds to nearest.
        part: which of the draw's sets of numbers.

    Returns:
        uint8 in the layout of `halfbyte.qtensor.pack`.
    """
    scaled = x.detach().to(wide_dtype(x.dtype)) * blocks.spread(inverse)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    if draw is None:
        return encode(scaled, fp4_e2m1, inv_scale=one)
    return encode_stochastic(scaled, fp4_e2m1, inv_scale=one, noise=draw.uniform(x.numel(), part))


def e4m3_codes(x: Tensor) -> Tensor:
    """The nearest E4M3 codes, uint8 in the shape of x."""
    one = torch.ones((), dtype=torch.float32, device=x.device)
    return encode(x, fp8_e4m3, inv_scale=one).view(x.shape)


def e4m3_numbers(codes: Tensor) -> Tensor:
    """E4M3 codes as float32."""
    return codes.view(torch.float8_e4m3fn).float()


def e4m3_inverse(codes: Tensor, scale: Tensor) -> Tensor:
    """``1 / (block scale * scale)``, 0 for a block whose scale rounded to zero: it holds nothing."""
    product = e4m3_numbers(codes) * scale
    return torch.where(product > 0, product.reciprocal(), 0.0).clamp_max(torch.finfo(torch.float32).max)
