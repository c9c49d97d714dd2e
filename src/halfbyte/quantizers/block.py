"""Block formats: E2M1 codes with a scale for every 16 or 32 of them along a GEMM's reduction.

`MXFP4` is the OCP microscaling format: blocks of 32, the scale a power of two (E8M0). What people call MXFP4 differs in
how that power is found, so the rule is named. `NVFP4` is NVIDIA's: blocks of 16, the scale an E4M3 number, and one
float32 scale for the tensor that brings the blocks' scales into E4M3's range.

Blocks run along the reduction of the GEMM that the tensor goes to, because only there a product of two scales can be
taken out of a partial sum. So an input or a weight has other codes in fprop than in wgrad or dgrad, unless its blocks
are square.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..formats import Format, e8m0, fp4_e2m1, fp8_e4m3
from ..kernels import Reduction
from ..kernels.reference.blocks import e4m3_inverse, e4m3_numbers, mx_powers, nv_encoding
from ..qtensor import Blocks, QTensor, pack_bits, unpack_bits
from .contract import Quantized, Quantizer, Spec, Use, require
from .number import power_of_two, read

__all__ = ["MXFP4", "NVFP4"]

_MX_BLOCK = 32
_NV_BLOCK = 16
_QUEST = 2.92247856
"""QuEST's clip of a Gaussian for E2M1, in standard deviations, as Quartet uses it (arXiv 2505.14669)."""

_EDEN_GROUP = 128
_EDEN_LARGEST = 6 / (17 / 16 * 0.93)
_EDEN_SCALES = 255.99
"""Quartet II (arXiv 2601.22813): block scales stay below 256, so that a correction up to 448/256 never overflows."""


class _Block(Spec):
    """What the block formats share."""

    @property
    def blocks(self) -> bool:
        return True

    @property
    def along_reduction(self) -> bool:
        return True

    @property
    def formats(self) -> tuple[Format, ...]:
        return (fp4_e2m1,)


@dataclass(frozen=True, kw_only=True)
class MXFP4(_Block):
    """E2M1 in blocks of 32 with a power-of-two scale each.

    Attributes:
        scale_rule: the exponent of a block whose largest magnitude is ``amax``: ``"floor"`` (OCP)
            ``floor(log2 amax) - 2``, which cuts what lies above 6; ``"ceil"`` ``ceil(log2 amax) - 2``; ``"even"`` as
            floor, after rounding amax to one bit behind the leading one; ``"rceil"`` ``ceil(log2(amax / 6))``, the
            smallest that cuts nothing (TetraJet's "truncation-free"); ``"quest"`` from the standard deviation
            (``floor(log2(2.92 std / 6))``; of a short block from the root mean square), whose gradient stops where a
            number was cut.
        rounding: ``"nearest"``, or ``"stochastic"``: up or down at random, with the number itself as the mean where
            nothing is cut.
        headroom: multiply by 3/4 first and by 4/3 after, so that the floor rule never cuts (Tseng et al.,
            arXiv 2502.20586).
    """

    scale_rule: Literal["floor", "ceil", "even", "rceil", "quest"] = "floor"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    headroom: bool = False

    def __post_init__(self) -> None:
        rules = ("floor", "ceil", "even", "rceil", "quest")
        known = self.scale_rule in rules
        require(known, f"MXFP4(scale_rule={self.scale_rule!r})", f"possible are {', '.join(rules)}")
        known = self.rounding in ("nearest", "stochastic")
        require(known, f"MXFP4(rounding={self.rounding!r})", "'nearest' or 'stochastic' is possible")
        asked = f"MXFP4(headroom=True, scale_rule={self.scale_rule!r})"
        require(not self.headroom or self.scale_rule == "floor", asked, "headroom is for the rule 'floor'")

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def for_gradients(self) -> bool:
        return self.scale_rule != "quest"  # whose cut would need a mask

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _MxQuantizer(self, device=device, backend=backend)


@dataclass(frozen=True, kw_only=True)
class NVFP4(_Block):
    """E2M1 in blocks of 16 with an E4M3 scale each and a float32 scale for the tensor.

    Attributes:
        rounding: ``"nearest"``; ``"stochastic"``; or ``"ms_eden"`` (Quartet II), which rounds codes to nearest and
            corrects the blocks' scales, rounded at random, so that the estimate is unbiased over the random signs of
            the GEMM's `Hadamard`, but for the last elements of a reduction that 16 does not divide.
        square: blocks of 16x16, so that a weight has the same codes in fprop and dgrad.
        four_over_six: of two scales for each block, which bring its largest magnitude to 6 or to 4, take the one with
            the smaller squared error (arXiv 2512.02010).
        headroom: scales larger by 17/16, so that no block is cut whose scale is rounded down; without it stochastic
            rounding is biased there. (Not 2^15 and more below the largest block, where E4M3 has coarser numbers.)
    """

    rounding: Literal["nearest", "stochastic", "ms_eden"] = "nearest"
    square: bool = False
    four_over_six: bool = False
    headroom: bool = False

    def __post_init__(self) -> None:
        known = self.rounding in ("nearest", "stochastic", "ms_eden")
        require(known, f"NVFP4(rounding={self.rounding!r})", "'nearest', 'stochastic' or 'ms_eden' is possible")
        plain = self.rounding == "nearest" and not self.headroom
        asked = f"NVFP4(four_over_six=True, rounding={self.rounding!r}, headroom={self.headroom})"
        require(plain or not self.four_over_six, asked, "four_over_six goes with rounding='nearest' and no headroom")
        eden = self.rounding == "ms_eden"
        asked = f"NVFP4(rounding='ms_eden', square={self.square}, headroom={self.headroom})"
        require(not eden or not (self.square or self.headroom), asked, "ms_eden has scales and blocks of its own")

    @property
    def along_reduction(self) -> bool:
        return not self.square

    @property
    def stochastic(self) -> bool:
        return self.rounding != "nearest"

    @property
    def for_gradients(self) -> bool:
        return True

    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        return _NvQuantizer(self, device=device, backend=backend)


class _BlockQuantizer(Quantizer, abc.ABC):
    """Cuts a tensor into blocks, finds their scales, encodes."""

    size: int
    scale_format: Format

    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        lies = use.view if use is not None else _last_dimension(x)
        sizes = [1] * len(lies.shape)
        sizes[lies.axis] = self.size
        if getattr(self.spec, "square", False):
            sizes[lies.across] = self.size
        blocks = Blocks(lies.shape, tuple(sizes), self.scale_format)
        seen = x.detach().reshape(lies.shape)
        amax, largest = self.kernels.block_amax(self.wide(seen), blocks)
        top = read(largest.float())
        one = torch.ones((), dtype=torch.float32, device=x.device)
        # A number that float32 cannot hold has no scale and is as broken as an infinity.
        clean, whole = self.screen(seen, one, top, top, observe=observe)
        clean = self.wide(clean)
        if clean is not seen:
            amax, _ = self.kernels.block_amax(clean, blocks)
        qdata, scale, codes = self.encoded(clean, amax, blocks, lies, use)
        q = QTensor(qdata, scale * whole, fp4_e2m1, x.shape, block_scale=codes, blocks=blocks)
        return Quantized(q, self.saved(clean, codes, blocks) if differentiable else ())

    def wide(self, x: Tensor) -> Tensor:
        """x in a type whose arithmetic this is."""
        return x

    def saved(self, x: Tensor, codes: Tensor, blocks: Blocks) -> tuple[Tensor | None, ...]:
        """What the backward pass needs: nothing, where the gradient passes everywhere."""
        return ()

    @abc.abstractmethod
    def encoded(
        self, x: Tensor, amax: Tensor, blocks: Blocks, lies: Reduction, use: Use | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The packed codes; the tensor's scale, float32 of shape (); the codes of the blocks' scales, uint8.

        Args:
            x: finite numbers in the view's shape.
            amax: of each block.
            blocks: how x is cut.
            lies: the view.
            use: what it is for.
        """

    def round(self, x: Tensor, inverse: Tensor, blocks: Blocks, use: Use | None) -> Tensor:
        """Packed codes of numbers times one of each block, as the spec rounds."""
        if self.spec.rounding != "stochastic":  # type: ignore[attr-defined]
            return self.kernels.encode_blocks(x, inverse, blocks)
        draw, part = self.source(x, use)
        return self.kernels.encode_blocks(x, inverse, blocks, draw=draw, part=part)

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        require(False, f"scale={scale.item()} with {self.spec}", "a block format finds the scales of its blocks itself")
        raise AssertionError


class _MxQuantizer(_BlockQuantizer):
    spec: MXFP4
    size = _MX_BLOCK
    scale_format = e8m0

    def encoded(
        self, x: Tensor, amax: Tensor, blocks: Blocks, lies: Reduction, use: Use | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        factor, whole = (0.75, 4 / 3) if self.spec.headroom else (1.0, 1.0)
        if self.spec.scale_rule == "quest":
            codes, inverse = mx_powers(_quest(blocks.split(_wide(x)), blocks), factor=factor)
        else:
            codes, inverse = self.kernels.mx_scales(amax, rule=self.spec.scale_rule, factor=factor)
        scale = torch.full((), whole, dtype=torch.float32, device=x.device)
        return self.round(x, inverse, blocks, use), scale, codes

    def saved(self, x: Tensor, codes: Tensor, blocks: Blocks) -> tuple[Tensor | None, ...]:
        if self.spec.scale_rule != "quest":
            return ()
        inverse = power_of_two(e8m0.bias - codes.int())
        return (pack_bits(((_wide(x) * blocks.spread(inverse)).abs() < fp4_e2m1.max).reshape(-1)),)

    def backward(self, grad: Tensor, q: QTensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        if saved:
            assert saved[0] is not None
            grad = grad.masked_fill(~unpack_bits(saved[0], q.numel).view(q.shape), 0.0)
        return grad, None


def _wide(x: Tensor) -> Tensor:
    """x in the type of its arithmetic."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _quest(split: Tensor, blocks: Blocks) -> Tensor:
    """QuEST's exponent of each block's scale, int32 in the shape of the grid."""
    count = blocks.split(torch.ones(blocks.view, device=split.device, dtype=split.dtype)).sum(blocks.places)
    mean = split.sum(blocks.places) / count
    # A few numbers around their own mean say little of their size: short blocks take the mean square.
    mean = torch.where(count == _MX_BLOCK, mean, 0.0)
    variance = split.square().sum(blocks.places) / count - mean.square()
    size = _QUEST / 6 * variance.clamp_min(0).sqrt() + 1e-8
    return torch.frexp(size)[1] - 1


class _NvQuantizer(_BlockQuantizer):
    spec: NVFP4
    size = _NV_BLOCK
    scale_format = fp8_e4m3

    def wide(self, x: Tensor) -> Tensor:
        return x.float() if x.dtype == torch.float64 else x

    def encoded(
        self, x: Tensor, amax: Tensor, blocks: Blocks, lies: Reduction, use: Use | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.spec.rounding == "ms_eden":
            return self._eden(x.float(), amax, blocks, lies, use)
        # The largest block's scale becomes E4M3's largest, 448; 256 leaves room for one and a half times it.
        largest = 256.0 if self.spec.four_over_six else fp8_e4m3.max
        limit = fp4_e2m1.max * 16 / 17 if self.spec.headroom else fp4_e2m1.max
        scale, codes, inverse = self.kernels.nv_scales(amax, limit=limit, largest=largest)
        qdata = self.round(x, inverse, blocks, use)
        if not self.spec.four_over_six:
            return qdata, scale, codes
        x = x.float()
        other = self._e4m3(1.5 * (amax / limit) * nv_encoding(amax, limit=limit, largest=largest))
        wider = e4m3_inverse(other, scale)
        error = self._error(qdata, codes, x, scale, blocks)
        better = self._error(self.round(x, wider, blocks, use), other, x, scale, blocks) < error
        qdata = self.round(x, torch.where(better, wider, inverse), blocks, use)
        return qdata, scale, torch.where(better, other, codes)

    def _e4m3(self, block_scale: Tensor) -> Tensor:
        """The nearest E4M3 codes of the blocks' scales."""
        one = torch.ones((), dtype=torch.float32, device=block_scale.device)
        return self.kernels.encode(block_scale, fp8_e4m3, inv_scale=one).view(block_scale.shape)

    def _error(self, qdata: Tensor, codes: Tensor, x: Tensor, scale: Tensor, blocks: Blocks) -> Tensor:
        """The squared error of each block in those codes."""
        shape = torch.Size(blocks.view)
        error = QTensor(qdata, scale, fp4_e2m1, shape, block_scale=codes, blocks=blocks).dequantize() - x
        return blocks.split(error).square().sum(blocks.places)

    def _eden(
        self, x: Tensor, amax: Tensor, blocks: Blocks, lies: Reduction, use: Use | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scales corrected by ``sum z^2 / sum z q`` over groups of 128, then rounded at random between E4M3 numbers."""
        top = amax.max() if amax.numel() else amax.new_zeros(())
        scale = top / _EDEN_SCALES / _EDEN_LARGEST
        scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
        block_scale = e4m3_numbers(self._e4m3(amax / _EDEN_LARGEST / scale))
        block_scale = torch.where(block_scale == 0, 1.0, block_scale)
        scaled = x / blocks.spread(block_scale * scale)
        one = torch.ones((), dtype=torch.float32, device=x.device)
        qdata = self.kernels.encode(scaled, fp4_e2m1, inv_scale=one)
        rounded = QTensor(qdata, one, fp4_e2m1, torch.Size(blocks.view)).dequantize()
        squares, products = (
            _in_groups(blocks.split(scaled * t).sum(blocks.places), lies.axis, lies.shape[lies.axis])
            for t in (scaled, rounded)
        )
        corrected = block_scale * torch.where(products > 0, squares / products, 1.0)
        noise = self.noise(corrected, use)
        codes = self.kernels.encode_stochastic(corrected, fp8_e4m3, inv_scale=one, noise=noise)
        return qdata, scale, codes.view(corrected.shape)


def _in_groups(per_block: Tensor, axis: int, length: int) -> Tensor:
    """Sums over the eight blocks of each whole group of 128, for each of them; the blocks left over stand alone.

    A rotation cuts what 128 does not divide into smaller pieces, and a factor must not span two of them.
    """
    some = _EDEN_GROUP // _NV_BLOCK
    whole = length // _EDEN_GROUP
    head = per_block.narrow(axis, 0, whole * some).unflatten(axis, (whole, some)).sum(axis + 1)
    tail = per_block.narrow(axis, whole * some, per_block.shape[axis] - whole * some)
    return torch.cat((head.repeat_interleave(some, axis), tail), axis)


def _last_dimension(x: Tensor) -> Reduction:
    """The view of a tensor outside a layer: blocks along its last dimension, square ones over its last two."""
    shape = tuple(x.shape) if x.dim() > 1 else (1, x.numel())
    return Reduction(shape, len(shape) - 1, len(shape) - 2)
