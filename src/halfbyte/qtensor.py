"""`QTensor`: a tensor of codes, packed two to a byte, with the scale that turns codes back into numbers.

    x_hat = scale * (value_of(code) - zero_point)

always, with ``value_of`` the format's table and, in the block formats, ``scale`` a number for the tensor times one for
the element's block. The layout (planar in blocks of 128 codes) is in `pack`; it is what both
a compiler and a hand-written kernel can vectorize, and `QTensor.codes` hides it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats import Format

__all__ = [
    "BITS_BLOCK",
    "BLOCK",
    "Blocks",
    "QTensor",
    "pack",
    "pack_bits",
    "packed_size",
    "round_once",
    "unpack",
    "unpack_bits",
]

BLOCK = 128
"""Codes in one block of the packed layout; a full block of 4-bit codes fills 64 bytes."""

BITS_BLOCK = 512
"""Bits in one block of the layout of `pack_bits`; a full block fills 64 bytes."""


def packed_size(numel: int, bits: int) -> int:
    """Bytes that `numel` codes of that many bits fill: two to a byte up to four bits, else one each."""
    return (numel + 1) // 2 if bits <= 4 else numel


def pack(codes: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Codes to bytes. Codes of more than four bits stay one to a byte.

    The layout of codes of up to four bits is planar: of each block of 128 codes, byte j holds code j in its low and
    code 64 + j in its high half. A last block of r < 128 codes does the same around its own middle, h = (r + 1) // 2:
    byte j holds code j and code h + j. So n codes fill exactly (n + 1) // 2 bytes.

    Args:
        codes: uint8 of shape (n,), contiguous. Bits above the code's own are ignored.
        bits: width of a code.
        out: where to write, uint8 of shape (packed_size(n, bits),); a new tensor if None.

    Returns:
        uint8 of shape (packed_size(n, bits),).
    """
    n = codes.numel()
    if out is None:
        out = torch.empty(packed_size(n, bits), dtype=torch.uint8, device=codes.device)
    if bits > 4:
        return out.copy_(codes)
    whole = n // BLOCK * BLOCK
    if whole:
        planes = codes[:whole].view(-1, 2, BLOCK // 2)
        _merge(planes[:, 0], planes[:, 1], out[: whole // 2].view(-1, BLOCK // 2))
    if n > whole:
        half = (n - whole + 1) // 2
        low, high = codes[whole : whole + half], codes[whole + half :]
        if high.numel() < half:
            high = torch.cat([high, high.new_zeros(1)])
        _merge(low, high, out[whole // 2 :])
    return out


def _merge(low: Tensor, high: Tensor, out: Tensor) -> None:
    torch.bitwise_and(low, 15, out=out)
    out.bitwise_or_(high << 4)


def unpack(qdata: Tensor, numel: int, bits: int, out: Tensor | None = None) -> Tensor:
    """Bytes back to codes: the inverse of `pack`.

    Args:
        qdata: uint8 of shape (packed_size(numel, bits),).
        numel: how many codes.
        bits: width of a code.
        out: where to write, uint8 of shape (numel,); a new tensor if None.

    Returns:
        uint8 of shape (numel,), each code in its low bits.
    """
    if bits > 4:
        return qdata if out is None else out.copy_(qdata)
    if out is None:
        out = torch.empty(numel, dtype=torch.uint8, device=qdata.device)
    whole = numel // BLOCK * BLOCK
    if whole:
        packed = qdata[: whole // 2].view(-1, BLOCK // 2)
        planes = out[:whole].view(-1, 2, BLOCK // 2)
        torch.bitwise_and(packed, 15, out=planes[:, 0])
        torch.bitwise_right_shift(packed, 4, out=planes[:, 1])
    if numel > whole:
        tail = qdata[whole // 2 :]
        half = tail.numel()
        torch.bitwise_and(tail, 15, out=out[whole : whole + half])
        out[whole + half :] = (tail >> 4)[: numel - whole - half]
    return out


def pack_bits(mask: Tensor, out: Tensor | None = None) -> Tensor:
    """Booleans to bits, planar in blocks of 512: bit k of byte j of a block is element ``64 * k + j``.

    A last block of r < 512 elements does the same with (r + 7) // 8 bytes in the place of 64.

    Args:
        mask: bool of shape (n,), contiguous.
        out: where to write, uint8 of shape ((n + 7) // 8,); a new tensor if None.

    Returns:
        uint8 of shape ((n + 7) // 8,).
    """
    flat = mask.view(torch.uint8)
    n = flat.numel()
    if out is None:
        out = torch.empty((n + 7) // 8, dtype=torch.uint8, device=mask.device)
    whole = n // BITS_BLOCK * BITS_BLOCK
    if whole:
        _merge_bits(flat[:whole].view(-1, 8, BITS_BLOCK // 8), out[: whole // 8].view(-1, BITS_BLOCK // 8))
    if n > whole:
        size = (n - whole + 7) // 8
        padded = flat.new_zeros(8 * size)
        padded[: n - whole] = flat[whole:]
        _merge_bits(padded.view(1, 8, size), out[whole // 8 :].view(1, size))
    return out


def _merge_bits(planes: Tensor, out: Tensor) -> None:
    out.copy_(planes[:, 0])
    for k in range(1, 8):
        out.add_(planes[:, k], alpha=1 << k)


def unpack_bits(bits: Tensor, numel: int) -> Tensor:
    """Bits back to booleans of shape (numel,): the inverse of `pack_bits`."""
    out = torch.empty(bits.numel() * 8, dtype=torch.uint8, device=bits.device)
    whole = numel // BITS_BLOCK * BITS_BLOCK
    if whole:
        _split_bits(bits[: whole // 8].view(-1, BITS_BLOCK // 8), out[:whole].view(-1, 8, BITS_BLOCK // 8))
    if numel > whole:
        size = bits.numel() - whole // 8
        _split_bits(bits[whole // 8 :].view(1, size), out[whole:].view(1, 8, size))
    return out[:numel].view(torch.bool)


def _split_bits(packed: Tensor, planes: Tensor) -> None:
    for k in range(8):
        torch.bitwise_right_shift(packed, k, out=planes[:, k])
    planes.bitwise_and_(1)


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to another floating type, rounded once, to nearest.

    torch goes to the 16-bit types through float32, which would round twice; so that step rounds to odd, which leaves
    every tie of the second step undecided until then.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    near = x.float()
    bits = near.view(torch.int32)
    error = x - near.double()
    nudge = ((error != 0) & (near != 0) & (bits & 1 == 0)).int()
    away = (error > 0) == (near > 0)
    return torch.where(away, bits + nudge, bits - nudge).view(torch.float32).to(dtype)


@dataclass(frozen=True)
class Blocks:
    """Which elements of a tensor share a scale.

    The tensor is seen in the shape `view` (the same elements in the same order) and cut into blocks of `sizes`, from
    the start of each dimension; the last block of a dimension may be short.

    Attributes:
        view: a shape of as many elements as the tensor.
        sizes: length of a block in each dimension of the view.
        scale_format: what the blocks' scales are stored in, as codes; None for float32.
    """

    view: tuple[int, ...]
    sizes: tuple[int, ...]
    scale_format: Format | None

    @property
    def grid(self) -> tuple[int, ...]:
        """How many blocks there are in each dimension."""
        return tuple(-(-length // size) for length, size in zip(self.view, self.sizes, strict=True))

    def split(self, x: Tensor) -> Tensor:
        """x with each blocked dimension cut in two, (number of the block, place in it), zeros in short blocks.

        Args:
            x: in the shape of `view`.

        Returns:
            Shape (grid[0], sizes[0], grid[1], sizes[1], ...).
        """
        short = [n * s - v for n, s, v in zip(self.grid, self.sizes, self.view, strict=True)]
        if any(short):
            x = torch.nn.functional.pad(x, [p for extra in reversed(short) for p in (0, extra)])
        return x.reshape([length for pair in zip(self.grid, self.sizes, strict=True) for length in pair])

    @property
    def places(self) -> list[int]:
        """The dimensions of `split`'s result that run inside a block."""
        return list(range(1, 2 * len(self.sizes), 2))

    def spread(self, per_block: Tensor) -> Tensor:
        """A number for each block, repeated for each element: from the shape of `grid` to that of `view`."""
        for dim, (size, length) in enumerate(zip(self.sizes, self.view, strict=True)):
            if size >= length:
                per_block = per_block.expand([length if d == dim else n for d, n in enumerate(per_block.shape)])
            elif size > 1:
                per_block = per_block.repeat_interleave(size, dim).narrow(dim, 0, length)
        return per_block


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor. It holds nothing but codes and what is needed to read them.

    Invariants: `qdata` is uint8 of shape (packed_size(numel, format.bits),) in the layout of `pack`, in the row-major
    order of `shape`; `scale` is float32 of shape (); `zero_point` is None (zero) or float64 of shape (), in units of
    the format's integers, and need not be whole. A `scale` of NaN marks a tensor that held NaN or an infinity: all of
    it dequantizes to NaN, so nothing plausible comes out.

    Attributes:
        qdata: packed codes.
        scale: the step between neighboring integers of the format, times its unit.
        format: which numbers the codes stand for.
        shape: logical shape.
        zero_point: the code value that stands for 0.0; None for exactly 0.
        block_scale: one more factor for each block: codes of ``blocks.scale_format``, uint8, or float32, in the shape
            of ``blocks.grid``; None where the whole tensor has one scale.
        blocks: which elements share a `block_scale`; None without.
    """

    qdata: Tensor
    scale: Tensor
    format: Format
    shape: torch.Size
    zero_point: Tensor | None = None
    block_scale: Tensor | None = None
    blocks: Blocks | None = None

    @property
    def numel(self) -> int:
        """How many codes there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, the scales and the zero point."""
        parts = (self.qdata, self.scale, self.zero_point, self.block_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def codes(self) -> Tensor:
        """The codes, uint8 in the logical shape: 0...15 for a 4-bit format."""
        codes = unpack(self.qdata, self.numel, self.format.bits)
        return (codes.clone() if codes is self.qdata else codes).view(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that the codes stand for, in the logical shape.

        Computed in float64 and rounded once to `dtype`.
        """
        table = torch.tensor(self.format.values, dtype=torch.float64, device=self.qdata.device)
        values = table[self.codes().int()]
        if self.zero_point is not None:
            values = values - self.zero_point
        factors = self.block_factors()
        if factors is not None:
            values = values * factors
        return round_once(values * self.scale.double(), dtype)

    def block_factors(self) -> Tensor | None:
        """Each element's block scale, float64 in the logical shape; None where there are no blocks."""
        if self.blocks is None:
            return None
        assert self.block_scale is not None
        factors = self.block_scale.double()
        if self.blocks.scale_format is not None:
            table = torch.tensor(self.blocks.scale_format.values, dtype=torch.float64, device=self.qdata.device)
            factors = table[self.block_scale.int()]
        return self.blocks.spread(factors).reshape(self.shape)

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor on another device."""
        zero_point, block_scale = (None if t is None else t.to(device) for t in (self.zero_point, self.block_scale))
        return replace(
            self,
            qdata=self.qdata.to(device),
            scale=self.scale.to(device),
            zero_point=zero_point,
            block_scale=block_scale,
        )

    def __repr__(self) -> str:
        zero_point = "" if self.zero_point is None else f", zero_point={self.zero_point.item():.6g}"
        blocks = ""
        if self.blocks is not None:
            scale_format = self.blocks.scale_format
            blocks = f", blocks of {self.blocks.sizes} in {scale_format.name if scale_format else 'float32'}"
        return (
            f"QTensor(shape={tuple(self.shape)}, format={self.format.name}, scale={self.scale.item():.6g}"
            f"{zero_point}{blocks}, {self.nbytes} bytes)"
        )
