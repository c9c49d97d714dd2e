"""The rotation of both operands along a GEMM's reduction: orthogonal, and gone from the product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import papers
import shapes
from halfbyte import Hadamard, oracle
from halfbyte.errors import SpecError
from halfbyte.kernels import Reduction
from halfbyte.rng import Draw

NVIDIA = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
SPECS = [
    Hadamard(),
    Hadamard(size=4),
    Hadamard(size=16, signs="nvidia"),
    Hadamard(size=64, signs="random"),
    Hadamard(size=128, signs="random"),
]


def draw(step=0, **other):
    """A draw of seed 1 at that step."""
    return Draw(**{"seed": 1, "layer": 0, "operand": 7, **other}, step=torch.tensor(step))


def matrix(spec, length, signs=None):
    """What the rotation multiplies a row of that length by, (length, length) in float64."""
    rows = torch.eye(length, dtype=torch.float64)
    return spec.rotate(rows, Reduction((length, length), 1, 0), signs)


@pytest.mark.parametrize("size", [2, 4, 16, 64, 256])
def test_the_matrix_is_sylvester_s(size):
    """Without signs a group is multiplied by Sylvester's matrix over the root of its size."""
    x = torch.arange(1, size + 1, dtype=torch.float64).view(1, size)
    found = Hadamard(size=size).rotate(x, Reduction((1, size), 1, 0), None)
    whole = [float(v) for v in oracle.hadamard(range(1, size + 1))]
    if size in (4, 16, 64, 256):
        assert (found[0] * size**0.5).tolist() == whole
    else:
        assert (found[0] * size**0.5).tolist() == pytest.approx(whole, rel=1e-14)
    assert np.allclose(matrix(Hadamard(size=size), size), papers.sylvester(size), rtol=1e-14, atol=0)


def test_four_numbers_by_hand():
    """(1, 2, 3, 4) H / 2 = (10, -2, -4, 0) / 2."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert Hadamard(size=4).rotate(x, Reduction((1, 4), 1, 0), None).tolist() == [[5, -1, -2, 0]]


def test_nvidia_s_signs_are_the_published_ones():
    """diag(signs) H / 4 with the fixed signs of arXiv 2509.25149, in a group of 16, whatever the draw."""
    spec = Hadamard(size=16, signs="nvidia")
    for step in (0, 1):
        signs = spec.draw_signs(draw(step))
        assert signs.tolist() == NVIDIA
    wanted = np.diag(NVIDIA) @ papers.sylvester(16)
    assert np.array_equal(matrix(spec, 16, signs).numpy(), wanted)


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 45, 64, 100, 200])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_matrix_is_orthogonal_for_every_length(spec, length):
    """R R^T is the identity, short lengths and tails included."""
    r = matrix(spec, length, spec.draw_signs(draw()))
    assert torch.allclose(r @ r.t(), torch.eye(length, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [3, 31, 45, 77, 100])
def test_a_tail_is_cut_into_smaller_powers_of_two(length):
    """45 under size 32 is 32, 8, 4 and 1: the matrix is made of those blocks, and nothing is padded."""
    wanted = np.zeros((length, length))
    start = 0
    for size in papers.pieces(length, 32):
        wanted[start : start + size, start : start + size] = papers.sylvester(size)
        start += size
    assert start == length
    assert np.allclose(matrix(Hadamard(size=32), length), wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rotating_back_is_the_inverse(spec):
    """rotate_back(rotate(x)) is x, along any axis of any view, in float32 to its rounding."""
    signs = spec.draw_signs(draw())
    for shape, axis in (((6, 77), 1), ((77, 6), 0), ((3, 2, 45, 4), 2)):
        view = Reduction(shape, axis, 0 if axis else 1)
        x = torch.randn(shape)
        turned = spec.rotate(x, view, signs)
        assert turned.dtype == x.dtype
        assert not torch.equal(turned, x)
        assert torch.allclose(spec.rotate_back(turned, view, signs), x, rtol=0, atol=2e-6)


def test_the_axis_is_the_one_that_turns():
    """A rotation along axis 0 is the transpose of that of the transpose along axis 1; a view may split a dimension."""
    x = torch.randn(40, 6)
    spec = Hadamard(size=8)
    along_rows = spec.rotate(x, Reduction((40, 6), 0, 1), None)
    assert torch.equal(along_rows, spec.rotate(x.t().contiguous(), Reduction((6, 40), 1, 0), None).t())
    split = spec.rotate(x.view(2, 20, 6), Reduction((2, 20, 6), 1, 0), None)
    assert split.shape == (2, 20, 6)
    assert torch.equal(split[1], spec.rotate(x[20:], Reduction((20, 6), 0, 1), None))


@pytest.mark.parametrize("which", shapes.GEMMS)
@pytest.mark.parametrize("name", shapes.GEOMETRIES)
@pytest.mark.parametrize("spec", [Hadamard(size=8), Hadamard(size=16, signs="nvidia")], ids=str)
def test_rotations_cancel_in_every_gemm(spec, name, which):
    """The product of both rotated operands is the product, for every layer, any K, groups, strides and dilation."""
    geometry = shapes.GEOMETRIES[name]
    signs = spec.draw_signs(draw())
    operands = [torch.randn(s, dtype=torch.float64) for s in shapes.operand_shapes(geometry, which)]
    turned = [spec.rotate(x, geometry.reduction_view(which, i), signs) for i, x in enumerate(operands)]
    wanted = shapes.product(geometry, which, *operands)
    found = geometry.apply(which, *turned).view(wanted.shape)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-11)
    lengths = {geometry.reduction_view(which, i).shape[geometry.reduction_view(which, i).axis] for i in (0, 1)}
    assert len(lengths) == 1
    if lengths.pop() > 1:
        assert not torch.allclose(geometry.apply(which, turned[0], operands[1]).view(wanted.shape), wanted)


def test_an_outlier_is_spread_over_its_group():
    """One number of 8 among 64 zeros becomes 64 numbers of magnitude 1."""
    x = torch.zeros(1, 64)
    x[0, 17] = 8.0
    assert (Hadamard(size=64).rotate(x, Reduction((1, 64), 1, 0), None).abs() == 1).all()


def test_random_signs_are_keyed_by_the_draw():
    """The same draw gives the same signs; another seed, layer, step, operand or rank others; all are -1 or 1."""
    spec = Hadamard(size=64, signs="random")
    first = spec.draw_signs(draw())
    assert torch.equal(first, spec.draw_signs(draw()))
    assert first.shape == (64,)
    assert sorted(set(first.tolist())) == [-1, 1]
    others = [{"seed": 2}, {"layer": 1}, {"step": 1}, {"operand": 8}, {"rank": 1}]
    for other in others:
        assert not torch.equal(first, spec.draw_signs(draw(**other)))
    assert Hadamard(size=64).draw_signs(draw()) is None


def test_random_signs_are_fair():
    """Over 500 steps the mean of 64 signs is 0 within five standard errors, in total and for each place."""
    signs = torch.stack([Hadamard(size=64, signs="random").draw_signs(draw(step)) for step in range(500)])
    assert abs(signs.mean().item()) < 5 / (64 * 500) ** 0.5
    assert (signs.mean(0).abs() < 5 / 500**0.5).all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Hadamard(size=0), "power of two"),
        (lambda: Hadamard(size=1), "power of two"),
        (lambda: Hadamard(size=24), "power of two"),
        (lambda: Hadamard(signs="fixed"), "'none', 'random' or 'nvidia'"),
        (lambda: Hadamard(size=32, signs="nvidia"), "size 16"),
    ],
)
def test_refuses_what_means_nothing(make, text):
    """Each field is checked at birth, and the text says what is possible."""
    with pytest.raises(SpecError, match=text):
        make()


def test_every_field_acts():
    """Another size or other signs give other numbers."""
    specs = (Hadamard(size=16), Hadamard(size=32), Hadamard(size=16, signs="nvidia"), SPECS[3])
    found = [matrix(spec, 64, spec.draw_signs(draw())) for spec in specs]
    for i, one in enumerate(found):
        assert all(not torch.equal(one, other) for other in found[:i])
