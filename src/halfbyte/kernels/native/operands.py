"""Operands and shapes as the library reads them: the structures of halfbyte.h."""

from __future__ import annotations

import ctypes
from functools import cache

from ...formats import Format
from ...qtensor import QTensor
from ..geometry import Conv
from ..reference.encode import NATIVE

__all__ = ["Codes", "ConvShape", "codes_of", "conv_shape", "is_float8", "readable", "three"]

_LARGEST = 4096
"""The largest magnitude that the kernels of whole numbers read: a 16-bit product of two fits 32 bits many times."""

_WORD = 1 << 15


class Codes(ctypes.Structure):
    """``hb_codes`` of halfbyte.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("flip", ctypes.c_int32),
        ("low", ctypes.c_int32),
        ("high", ctypes.c_int32),
        ("table", ctypes.c_int16 * 16),
        ("planes", ctypes.c_void_p),
        ("plane", ctypes.c_int32),
    )


class ConvShape(ctypes.Structure):
    """``hb_conv_shape`` of halfbyte.h."""

    _fields_ = (
        ("images", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("fan_in", ctypes.c_int64),
        ("fan_out", ctypes.c_int64),
        *((name, ctypes.c_int64 * 3) for name in ("input", "output", "kernel", "stride", "padding", "dilation")),
    )


def is_float8(fmt: Format) -> bool:
    """Whether a format is one of the two 8-bit floats."""
    return fmt.bits == 8 and fmt in NATIVE


@cache
def _described(fmt: Format) -> bytes:
    """The ``hb_codes`` of a format, without a tensor."""
    whole = [i or 0 for i in fmt.integers]
    if is_float8(fmt):
        planes = ctypes.cast(_planes(fmt), ctypes.c_void_p)
        return bytes(Codes(None, 0, 8, 0, -128, 127, (ctypes.c_int16 * 16)(), planes, 0))
    table = (whole + [0] * 16)[:16] if fmt.bits <= 4 else [0] * 16
    flip = 1 << (fmt.bits - 1) if fmt.signed else 0
    return bytes(Codes(None, 0, fmt.bits, flip, min(whole), max(whole), (ctypes.c_int16 * 16)(*table), None, 0))


@cache
def _planes(fmt: Format) -> ctypes.Array[ctypes.c_int16]:
    """An 8-bit float's whole numbers in 16 bits: the lowest ones, with their sign, the next, and what is left."""
    planes: list[list[int]] = [[], [], []]
    for number in fmt.integers:
        left = number or 0
        for plane in planes:
            plane.append((left + _WORD) % (2 * _WORD) - _WORD)
            left = (left - plane[-1]) // (2 * _WORD)
        # The upper one of two signed digits of 8 bits holds 127.
        assert left == 0
        assert all(plane[-1] < 127.5 * 256 for plane in planes)
    return (ctypes.c_int16 * 768)(*planes[0], *planes[1], *planes[2])


def codes_of(q: QTensor) -> Codes:
    """The ``hb_codes`` of a tensor, which must outlive it."""
    codes = Codes.from_buffer_copy(_described(q.format))
    codes.codes, codes.numel = q.qdata.data_ptr(), q.numel
    return codes


def readable(fmt: Format) -> bool:
    """Whether the kernels of whole numbers take codes of that format."""
    return fmt.kind != "scale" and (fmt.bits <= 4 or fmt.kind == "int") and fmt.max_integer <= _LARGEST


def three(lengths: tuple[int, ...], missing: int) -> tuple[int, int, int]:
    """Lengths in depth, height and width. One dimension is the height, along which a kernel can be cut."""
    if len(lengths) == 1:
        return (missing, lengths[0], missing)
    depth, height, width = (missing,) * (3 - len(lengths)) + lengths
    return (depth, height, width)


@cache
def conv_shape(geometry: Conv) -> ConvShape:
    """The ``hb_conv_shape`` of a convolution."""
    groups = geometry.groups
    out, fan_in = geometry.weight_shape[:2]
    spatial = (
        (geometry.input_shape[2:], 1),
        (geometry.output_shape[2:], 1),
        (geometry.weight_shape[2:], 1),
        (geometry.stride, 1),
        (geometry.padding, 0),
        (geometry.dilation, 1),
    )
    triples = [(ctypes.c_int64 * 3)(*three(lengths, missing)) for lengths, missing in spatial]
    return ConvShape(geometry.input_shape[0], groups, fan_in, out // groups, *triples)
