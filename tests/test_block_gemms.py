"""The three GEMMs of every layer on block formats: where blocks run, and what the product is."""

from __future__ import annotations

import pytest
import torch

import shapes
from halfbyte import MXFP4, NVFP4, BitSplit, Luq, Sawb, quantize
from halfbyte.kernels import Batched, Conv, Linear, reference
from halfbyte.qtensor import QTensor
from halfbyte.quantizers import Use
from halfbyte.rng import Draw

SPECS = [NVFP4(), NVFP4(square=True), NVFP4(rounding="ms_eden"), MXFP4(), MXFP4(rounding="stochastic", headroom=True)]


def use(geometry, gemm, operand, step=0):
    """What an operand is quantized for."""
    draw = Draw(seed=1, layer=0, step=torch.tensor(step), operand=operand)
    return Use(gemm=gemm, operand=operand, geometry=geometry, draw=draw)


def encoded(spec, x, geometry, gemm, operand):
    """x in the codes of a spec, for its place in a GEMM."""
    return spec.build().quantize(x, use=use(geometry, gemm, operand)).q


def close(found, wanted):
    """Whether a float32 result is the float64 one rounded once, up to what float64 sums lose."""
    return bool(((found.double() - wanted).abs() <= 2.0**-24 * wanted.abs() + 1e-13 * wanted.abs().max()).all())


@pytest.mark.parametrize("gemm", shapes.GEMMS)
@pytest.mark.parametrize("name", shapes.GEOMETRIES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_block_gemms_equal_float64_on_the_dequantized_operands(spec, name, gemm):
    """fprop, dgrad and wgrad are torch's own layer in float64 on what the codes stand for, rounded once."""
    geometry = shapes.GEOMETRIES[name]
    operands = [torch.randn(s) * 3 for s in shapes.operand_shapes(geometry, gemm)]
    codes = [encoded(spec, x, geometry, gemm, i) for i, x in enumerate(operands)]
    assert all(isinstance(q, QTensor) and q.blocks is not None for q in codes)
    wanted = shapes.product(geometry, gemm, *(q.dequantize(torch.float64) for q in codes))
    found = reference.gemm(gemm, *codes, geometry)
    assert found.dtype == torch.float32
    assert close(found.view(wanted.shape), wanted)


@pytest.mark.parametrize("name", ["linear_odd", "conv2d_dilated", "conv_transpose_grouped", "batched"])
@pytest.mark.parametrize("gemm", shapes.GEMMS)
@pytest.mark.parametrize("blocks_first", [True, False])
def test_blocks_meet_other_codes(name, gemm, blocks_first):
    """A block format against one scale for a tensor, zero point included, and against a floating operand."""
    geometry = shapes.GEOMETRIES[name]
    operands = [torch.randn(s) for s in shapes.operand_shapes(geometry, gemm)]
    place = 0 if blocks_first else 1
    q = encoded(NVFP4(), operands[place], geometry, gemm, place)
    for other in (Sawb(), Sawb(levels=16), None):
        plain = operands[1 - place]
        second = plain if other is None else quantize(plain, other)
        pair = (q, second) if blocks_first else (second, q)
        wide = [t.dequantize(torch.float64) if isinstance(t, QTensor) else t.double() for t in pair]
        wanted = shapes.product(geometry, gemm, *wide)
        found = reference.gemm(gemm, *pair, geometry).view(wanted.shape)
        if other is None:
            assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
        else:
            assert close(found, wanted)


@pytest.mark.parametrize("gemm", shapes.GEMMS)
@pytest.mark.parametrize("name", shapes.GEOMETRIES)
@pytest.mark.parametrize("spec", [NVFP4(), NVFP4(square=True), MXFP4(scale_rule="even")], ids=str)
def test_blocks_run_along_the_reduction(spec, name, gemm):
    """A tensor quantized for a GEMM has the numbers that `quantize` gives with the reduction as its last dimension."""
    geometry = shapes.GEOMETRIES[name]
    for place, shape in enumerate(shapes.operand_shapes(geometry, gemm)):
        x = torch.randn(shape) * torch.exp(torch.randn(shape))
        q = encoded(spec, x, geometry, gemm, place)
        assert q.shape == x.shape
        assert torch.equal(q.dequantize(torch.float64), shapes.by_hand(x, spec, geometry.reduction_view(gemm, place)))


LINEAR_AXES = {"fprop": (1, 1), "dgrad": (1, 0), "wgrad": (0, 0)}


@pytest.mark.parametrize("gemm", shapes.GEMMS)
def test_the_reduction_of_a_linear_layer_by_hand(gemm):
    """y = x w^T sums over I, g w over O, g^T x over N: 40 x 50, 30 x 50 and 40 x 30 have these block counts of 16."""
    geometry = Linear(rows=40, in_features=50, out_features=30)
    for place, shape in enumerate(shapes.operand_shapes(geometry, gemm)):
        axis = LINEAR_AXES[gemm][place]
        assert geometry.reduction_view(gemm, place).axis == axis
        x = torch.randn(shape)
        q = encoded(NVFP4(), x, geometry, gemm, place)
        assert q.block_scale.numel() == shape[1 - axis] * -(-shape[axis] // 16)
        wanted = quantize(x if axis == 1 else x.t().contiguous(), NVFP4()).dequantize()
        assert torch.equal(q.dequantize(), wanted if axis == 1 else wanted.t())


def test_the_reduction_of_a_convolution_by_hand():
    """fprop sums over a group's input channels, dgrad over its output channels, wgrad over images, in both operands."""
    geometry = shapes.conv((20, 36, 5, 5), (66, 18, 3, 3), padding=1, groups=2)
    expected = {
        # (images, positions, groups) x blocks of 18 channels; (O, taps) x blocks of I / G.
        ("fprop", 0): 20 * 25 * 2 * 2,
        ("fprop", 1): 66 * 9 * 2,
        # 33 output channels a group are three blocks of 16.
        ("dgrad", 0): 20 * 25 * 2 * 3,
        ("dgrad", 1): 36 * 9 * 3,
        # 20 images are two blocks.
        ("wgrad", 0): 66 * 25 * 2,
        ("wgrad", 1): 36 * 25 * 2,
    }
    for (gemm, place), count in expected.items():
        x = torch.randn(shapes.operand_shapes(geometry, gemm)[place])
        assert encoded(NVFP4(), x, geometry, gemm, place).block_scale.numel() == count


def test_square_blocks_are_the_same_in_fprop_and_dgrad():
    """A weight in 16x16 blocks has one set of numbers for both, so its codes can be reused; in rows it has not."""
    for name in ("linear_odd", "conv2d", "conv2d_grouped", "conv_transpose", "batched"):
        geometry = shapes.GEOMETRIES[name]
        w = torch.randn(shapes.operand_shapes(geometry, "fprop")[1])
        one, other = (encoded(NVFP4(square=True), w, geometry, gemm, 1) for gemm in ("fprop", "dgrad"))
        assert torch.equal(one.dequantize(), other.dequantize())
        one, other = (encoded(NVFP4(), w, geometry, gemm, 1) for gemm in ("fprop", "dgrad"))
        assert not torch.equal(one.dequantize(), other.dequantize())


def test_float32_sums_are_a_knob_that_acts():
    """accumulate="fp32" rounds on the way where blocks differ much in size; fp16 chunks are refused with the cure."""
    geometry = Linear(rows=20, in_features=600, out_features=30)
    codes = [
        encoded(NVFP4(), torch.randn(s) * torch.exp(3 * torch.randn(s)), geometry, "fprop", i)
        for i, s in enumerate(shapes.operand_shapes(geometry, "fprop"))
    ]
    exact, other = (reference.gemm("fprop", *codes, geometry, accumulate=how) for how in ("exact", "fp32"))
    assert not torch.equal(exact, other)
    assert torch.allclose(exact, other, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    with pytest.raises(ValueError, match="'exact' or 'fp32'"):
        reference.gemm("fprop", *codes, geometry, accumulate="fp16_chunk64")


@pytest.mark.parametrize("gemm", shapes.GEMMS)
@pytest.mark.parametrize(
    "geometry",
    [
        Linear(rows=300, in_features=257, out_features=129),
        shapes.conv((8, 32, 14, 14), (48, 32, 3, 3), padding=1),
        Batched(batch=8, rows=65, columns=33, inner=64),
    ],
    ids=["linear", "conv", "batched"],
)
def test_products_do_not_depend_on_the_number_of_threads(geometry, gemm):
    """One thread and four give the same result to the bit: what is summed is rounded to float32 once, at the end."""
    found, threads = [], torch.get_num_threads()
    operands = [torch.randn(s) for s in shapes.operand_shapes(geometry, gemm)]
    try:
        for n in (1, 4):
            torch.set_num_threads(n)
            codes = [encoded(MXFP4(), x, geometry, gemm, i) for i, x in enumerate(operands)]
            found.append(reference.gemm(gemm, *codes, geometry))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["linear_odd", "conv2d_grouped", "conv_transpose", "batched"])
@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
def test_drawn_rows_and_powers_of_two_multiply_exactly(name, gemm):
    """Split gradients, whose rows have a factor each, and LUQ codes, against INT4: float64 rounded once."""
    geometry = shapes.GEOMETRIES[name]
    grad, other = (torch.randn(s) for s in shapes.operand_shapes(geometry, gemm))
    second = quantize(other, Sawb())
    parts = [*BitSplit().build().parts(grad, use=use(geometry, gemm, 0)), quantize(grad, Luq(), seed=1)]
    for part in parts:
        wanted = shapes.product(geometry, gemm, part.dequantize(torch.float64), second.dequantize(torch.float64))
        found = reference.gemm(gemm, part, second, geometry).view(wanted.shape)
        # Two roundings: codes under one scale are summed as integers, rounded, and multiplied once.
        assert ((found.double() - wanted).abs() <= 2.0**-22 * wanted.abs() + 1e-13 * wanted.abs().max()).all()


def test_views_hold_every_element_in_order():
    """A reduction's view has as many elements as its operand, and its axis and the one across differ."""
    for geometry in shapes.GEOMETRIES.values():
        for gemm in shapes.GEMMS:
            for place, shape in enumerate(shapes.operand_shapes(geometry, gemm)):
                view = geometry.reduction_view(gemm, place)
                assert torch.Size(view.shape).numel() == torch.Size(shape).numel()
                assert view.axis != view.across
                if isinstance(geometry, Conv) and gemm != "wgrad":
                    assert view.shape[1 if place == 0 else 0] == geometry.groups
