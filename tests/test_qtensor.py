"""Packing: where each code and each bit goes, and what a `QTensor` says of itself."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import halfbyte as hb
from halfbyte import formats, oracle
from halfbyte.formats import FORMATS, Format
from halfbyte.qtensor import QTensor, pack, pack_bits, packed_size, unpack, unpack_bits
from halfbyte.quantizers import Spec

SIZES = [0, 1, 2, 3, 5, 63, 64, 65, 126, 127, 128, 129, 130, 191, 255, 256, 257, 383, 384, 1000, 1023, 4097]
BIT_SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 511, 512, 513, 519, 520, 521, 1023, 1024, 1025, 1543, 4100]


def planar(codes: list[int]) -> list[int]:
    """The layout of 4-bit codes, one byte at a time: blocks of 128, the rest around its own middle."""
    found = []
    for start in range(0, len(codes), 128):
        block = codes[start : start + 128]
        half = 64 if len(block) == 128 else (len(block) + 1) // 2
        for j in range(half):
            high = block[half + j] if half + j < len(block) else 0
            found.append(block[j] | high << 4)
    return found


def planar_bits(mask: list[bool]) -> list[int]:
    """The layout of bits, one bit at a time: blocks of 512, the rest with a shorter row."""
    found = []
    for start in range(0, len(mask), 512):
        block = mask[start : start + 512]
        row = 64 if len(block) == 512 else (len(block) + 7) // 8
        found += [sum(1 << k for k in range(8) if any(block[row * k + j : row * k + j + 1])) for j in range(row)]
    return found


def random_codes(n: int, seed: int = 0) -> Tensor:
    rng = random.Random(n + seed)
    return torch.tensor([rng.randrange(16) for _ in range(n)], dtype=torch.uint8)


def random_mask(n: int) -> Tensor:
    rng = random.Random(n)
    return torch.tensor([rng.random() < 0.5 for _ in range(n)], dtype=torch.bool)


@pytest.mark.parametrize("n", SIZES)
def test_four_bit_layout(n: int) -> None:
    """Byte j of a block of 128 holds code j and code 64 + j; a shorter last block does so around its middle."""
    codes = random_codes(n)
    assert pack(codes, 4).tolist() == planar(codes.tolist())


def test_four_bit_layout_by_hand() -> None:
    """Five codes have their middle at three: bytes (0, 3), (1, 4) and (2, nothing)."""
    assert pack(torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8), 4).tolist() == [0x41, 0x52, 0x03]


@pytest.mark.parametrize("n", SIZES)
def test_four_bit_round_trip(n: int) -> None:
    """Unpacking gives back the packed codes, for sizes around every boundary of the layout."""
    codes = random_codes(n)
    packed = pack(codes, 4)
    assert packed.numel() == packed_size(n, 4) == (n + 1) // 2
    assert torch.equal(unpack(packed, n, 4), codes)


@given(st.integers(0, 3000), st.sampled_from([1, 2, 3, 4]))
def test_round_trip_of_any_size(n: int, bits: int) -> None:
    """Codes of up to four bits survive packing in any number, in the same planar layout."""
    codes = random_codes(n) & ((1 << bits) - 1)
    packed = pack(codes, bits)
    assert packed.tolist() == planar(codes.tolist())
    assert torch.equal(unpack(packed, n, bits), codes)


@pytest.mark.parametrize("n", [0, 1, 127, 300])
def test_eight_bit_codes_stay_a_byte_each(n: int) -> None:
    """Codes of more than four bits are stored in order, one to a byte."""
    codes = torch.arange(n, dtype=torch.int64).to(torch.uint8)
    assert torch.equal(pack(codes, 8), codes)
    assert torch.equal(unpack(codes, n, 8), codes)
    assert packed_size(n, 8) == packed_size(n, 5) == n


@pytest.mark.parametrize("n", [1, 77, 128, 200])
def test_bits_above_a_code_are_ignored(n: int) -> None:
    """What the upper half of a byte holds does not leak into the neighbor's half."""
    codes = random_codes(n)
    assert torch.equal(pack(codes | 0xA0, 4), pack(codes, 4))


@pytest.mark.parametrize("n", [1, 64, 128, 129, 333])
def test_pack_and_unpack_write_where_told(n: int) -> None:
    """With `out` the result lands there, all of it, and nothing beside it changes."""
    codes = random_codes(n)
    for bits in (4, 8):
        size = packed_size(n, bits)
        room = torch.full((size + 2,), 0xEE, dtype=torch.uint8)
        assert pack(codes, bits, out=room[1:-1]).data_ptr() == room[1:].data_ptr()
        assert torch.equal(room[1:-1], pack(codes, bits))
        back = torch.full((n + 2,), 0xEE, dtype=torch.uint8)
        unpack(room[1:-1], n, bits, out=back[1:-1])
        assert torch.equal(back[1:-1], codes)
        assert [room[0], room[-1], back[0], back[-1]] == [0xEE] * 4


@pytest.mark.parametrize("n", [1, 128, 129])
def test_packing_leaves_the_codes_alone(n: int) -> None:
    """Neither packing nor unpacking changes its input."""
    codes = random_codes(n)
    packed = pack(codes, 4)
    before, packed_before = codes.clone(), packed.clone()
    pack(codes, 4)
    unpack(packed, n, 4)
    assert torch.equal(codes, before)
    assert torch.equal(packed, packed_before)


@pytest.mark.parametrize("n", BIT_SIZES)
def test_bit_layout(n: int) -> None:
    """Bit k of byte j of a block of 512 is element 64 k + j; a shorter last block has a shorter row than 64."""
    mask = random_mask(n)
    assert pack_bits(mask).tolist() == planar_bits(mask.tolist())


def test_bit_layout_by_hand() -> None:
    """Of ten elements in two bytes, 0, 2, 4, 6, 8 lie in the first and 1, 3, 5, 7, 9 in the second."""
    mask = torch.tensor([True, False, False, True, True, False, False, False, True, True])
    assert pack_bits(mask).tolist() == [0b10101, 0b10010]


@pytest.mark.parametrize("n", BIT_SIZES)
def test_bit_round_trip(n: int) -> None:
    """Unpacked bits are the booleans that were packed, in (n + 7) // 8 bytes."""
    mask = random_mask(n)
    packed = pack_bits(mask)
    assert packed.numel() == (n + 7) // 8
    assert unpack_bits(packed, n).dtype == torch.bool
    assert torch.equal(unpack_bits(packed, n), mask)


@given(st.integers(0, 5000))
def test_bit_round_trip_of_any_size(n: int) -> None:
    """Booleans survive packing in any number, in the layout of the scalar form."""
    mask = random_mask(n)
    assert pack_bits(mask).tolist() == planar_bits(mask.tolist())
    assert torch.equal(unpack_bits(pack_bits(mask), n), mask)


@pytest.mark.parametrize("n", [1, 512, 700])
def test_pack_bits_writes_where_told(n: int) -> None:
    """With `out` the bits land there whatever was in it, and the mask stays as it was."""
    mask = random_mask(n)
    out = torch.full(((n + 7) // 8,), 0xFF, dtype=torch.uint8)
    pack_bits(mask, out)
    assert torch.equal(out, pack_bits(mask))
    assert torch.equal(mask, random_mask(n))


def test_equal_stretches_pack_one_after_another() -> None:
    """Whole blocks packed by themselves and laid end to end are the whole tensor packed, for codes and for bits."""
    codes, mask = random_codes(128 * 3 + 77), random_mask(512 * 3 + 77)
    assert torch.equal(torch.cat([pack(codes[:256], 4), pack(codes[256:], 4)]), pack(codes, 4))
    assert torch.equal(torch.cat([pack_bits(mask[:1024]), pack_bits(mask[1024:])]), pack_bits(mask))


def tensor_of(codes: Tensor, fmt: Format, scale: float = 1.0, zero_point: float | None = None) -> QTensor:
    zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.float64)
    return QTensor(pack(codes.reshape(-1), fmt.bits), torch.tensor(scale), fmt, codes.shape, zero)


@pytest.mark.parametrize(
    ("fmt", "shape", "zero_point", "nbytes"),
    [
        (formats.int4, (3, 5), None, 8 + 4),
        (formats.int4, (3, 5), 0.5, 8 + 4 + 8),
        (formats.int8, (3, 5), None, 15 + 4),
        (formats.uint4, (), None, 1 + 4),
        (formats.uint4, (0, 7), None, 4),
    ],
)
def test_nbytes(fmt: Format, shape: tuple[int, ...], zero_point: float | None, nbytes: int) -> None:
    """A tensor costs half a byte (or one) a code, four bytes of scale and eight of zero point."""
    q = tensor_of(torch.zeros(shape, dtype=torch.uint8), fmt, zero_point=zero_point)
    assert q.nbytes == nbytes
    assert q.numel == torch.Size(shape).numel()


@pytest.mark.parametrize("fmt", [formats.int4, formats.int8, formats.fp8_e4m3], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (7, 19), (2, 3, 5, 7)])
def test_codes_have_the_logical_shape(fmt: Format, shape: tuple[int, ...]) -> None:
    """`codes` gives back what was packed, in row-major order of the shape."""
    codes = random_codes(torch.Size(shape).numel()).view(shape)
    assert torch.equal(tensor_of(codes, fmt).codes(), codes)


@pytest.mark.parametrize("fmt", [formats.int4, formats.int8], ids=str)
def test_codes_are_a_copy(fmt: Format) -> None:
    """Changing what `codes` returned does not change the tensor."""
    codes = random_codes(130)
    q = tensor_of(codes, fmt)
    q.codes().fill_(0)
    assert torch.equal(q.codes(), codes)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_dequantize_is_the_table_times_the_scale(fmt: Format) -> None:
    """Every code dequantizes to scale times its value, exact in float64, negative zero and infinities included."""
    codes = torch.arange(1 << fmt.bits).to(torch.uint8)
    got = tensor_of(codes, fmt, scale=0.375).dequantize(torch.float64)
    wanted = torch.tensor([0.375 * v for v in fmt.values], dtype=torch.float64)
    assert torch.equal(got.nan_to_num(nan=12345.0), wanted.nan_to_num(nan=12345.0))
    assert torch.equal(got.signbit()[~got.isnan()], wanted.signbit()[~got.isnan()])


def test_dequantize_subtracts_the_zero_point() -> None:
    """x_hat = scale * (value - zero_point): code 3 with zero point -2.5 and step 0.5 is 2.75."""
    q = tensor_of(torch.tensor([3, 15], dtype=torch.uint8), formats.int4, scale=0.5, zero_point=-2.5)
    assert q.dequantize().tolist() == [2.75, 0.75]


@pytest.mark.parametrize(("dtype", "limits"), [(torch.float32, {}), (torch.float16, {"precision": 11})])
def test_dequantize_rounds_once(dtype: torch.dtype, limits: dict[str, int]) -> None:
    """The exact scale * (value - zero_point) of short numbers is rounded once, to the type asked for."""
    scale = float(torch.tensor(0.1))
    q = tensor_of(torch.arange(16).to(torch.uint8), formats.int4, scale=scale, zero_point=-0.5)
    wanted = [oracle.to_binary((v + 0.5) * scale, **limits) for v in formats.int4.values]
    assert q.dequantize(dtype).dtype == dtype
    assert q.dequantize(dtype).tolist() == wanted


def test_dequantize_to_float16_does_not_round_twice() -> None:
    """3 * 342.1666870... is 1026.5 and a hair, so 1027 in float16; by way of float32 it would be the tie, so 1026."""
    scale = 342.16668701171875
    exact = 3 * Fraction(scale)
    assert Fraction(2053, 2) < exact < Fraction(2053, 2) * (1 + Fraction(1, 2**24))
    assert tensor_of(torch.tensor([3], dtype=torch.uint8), formats.int4, scale).dequantize(torch.float16).item() == 1027


def test_a_scale_of_nan_dequantizes_to_nan() -> None:
    """A tensor that held NaN gives nothing plausible back, not even where its code is zero."""
    assert tensor_of(torch.zeros(3, dtype=torch.uint8), formats.int4, scale=float("nan")).dequantize().isnan().all()


def test_to_another_device_keeps_everything() -> None:
    """A tensor moved to the device "meta" has codes, scale and zero point there, and the same format and shape."""
    q = tensor_of(random_codes(9).view(3, 3), formats.int4, zero_point=0.5).to("meta")
    assert q.zero_point is not None
    assert {q.qdata.device.type, q.scale.device.type, q.zero_point.device.type} == {"meta"}
    assert (q.format, q.shape) == (formats.int4, torch.Size([3, 3]))


def test_repr_says_shape_format_scale_and_size() -> None:
    """A tensor prints its shape, format, scale, zero point and bytes, and no numbers."""
    q = tensor_of(torch.zeros(2, 3, dtype=torch.uint8), formats.int4, scale=0.25, zero_point=0.5)
    assert repr(q) == "QTensor(shape=(2, 3), format=int4, scale=0.25, zero_point=0.5, 15 bytes)"
    q = tensor_of(torch.zeros(2, 3, dtype=torch.uint8), formats.uint4)
    assert repr(q) == "QTensor(shape=(2, 3), format=uint4, scale=1, 7 bytes)"


SPECS = [
    hb.MinMax(),
    hb.MinMax(bits=8),
    hb.Sawb(),
    hb.Pact(clip=1.5, signed=True),
    hb.Radix4(),
    hb.Nearest(fmt="fp8_e4m3"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 3),
        lambda x: x[:, ::2, 1:, :],
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:1, :1, :1].expand(3, 4, 5, 6),
        lambda x: x.flip(2).permute(2, 0, 3, 1),
    ],
    ids=["transposed", "sliced", "channels_last", "expanded", "permuted"],
)
def test_layout_of_the_input_in_memory_does_not_matter(spec: Spec, view) -> None:
    """A strided tensor gets the codes of its contiguous copy, in row-major order of its shape."""
    x = view(torch.randn(3, 4, 5, 6))
    plain = x.clone(memory_format=torch.contiguous_format)
    assert plain.is_contiguous()
    got, wanted = hb.quantize(x, spec), hb.quantize(plain, spec)
    assert torch.equal(got.codes(), wanted.codes())
    assert torch.equal(got.scale, wanted.scale)
    assert got.shape == x.shape


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1), (127,), (3, 43), (257,)])
def test_any_shape_can_be_quantized(spec: Spec, shape: tuple[int, ...]) -> None:
    """Empty, zero-dimensional and odd-sized tensors keep their shape and get near numbers."""
    x = torch.randn(shape)
    q = hb.quantize(x, spec)
    assert q.shape == x.shape == q.dequantize().shape
    assert q.qdata.numel() == packed_size(x.numel(), q.format.bits)
    assert ((q.dequantize() - x).abs() <= x.abs() + 0.5).all()


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantize_leaves_its_input_alone(spec: Spec, scale: float | None) -> None:
    """The tensor that was quantized is unchanged, with the spec's own scale and with a given one."""
    x = torch.randn(1000)
    before = x.clone()
    hb.quantize(x, spec, scale)
    assert torch.equal(x, before)
