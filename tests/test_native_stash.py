"""The native stash and norm equal the reference to the bit, on every instruction set and number of threads."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import native, reference
from halfbyte.rng import Draw
from native_library import isa, needs_library

__all__ = ["isa"]  # a fixture, used by its name

pytestmark = [needs_library, pytest.mark.usefixtures("isa")]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Around the blocks of 128 codes and 512 bits, the chunks of 4096, and the reference's pieces of 262,144.
LENGTHS = [1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 255, 511, 512, 513, 4095, 4096, 4097, 33_001]
DRAW = Draw(seed=3 << 40 | 11, layer=3, step=torch.tensor(7), operand=255, rank=2)
# Images, channels, numbers of a plane: smaller and larger than a vector, a block, a task and a row of sums.
PLANES = [
    (1, 1, 1),
    (3, 5, 1),
    (2, 3, 7),
    (4, 6, 16),
    (3, 4, 49),
    (5, 3, 300),
    (2, 2, 1024),
    (1, 2, 5000),
    (1, 1, 8200),
]


def same(one: object, other: object) -> bool:
    """Whether two results are the same to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        bits = [x.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def numbers(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers whose blocks have different scales and offsets; among them blocks of one number, and zeros."""
    block = torch.arange(length) // 128
    x = torch.randn(length) * torch.exp2(-(block % 11).float()) + (block % 3) * 5.0
    x[block % 7 == 3] = -1.003
    x[block % 7 == 5] = -0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_numbers_are_the_reference_s(bits: int, dtype: torch.dtype) -> None:
    """Codes, minima, steps and what is decoded of them are the same for every length."""
    for length in LENGTHS:
        x = numbers(length, dtype)
        wanted, found = reference.stash_encode(x, bits, DRAW), native.stash_encode(x, bits, DRAW)
        assert same(wanted, found), length
        codes, steps, finite = found
        assert finite
        decoded = native.stash_decode(codes, steps, length, bits)
        assert same(reference.stash_decode(codes, steps, length, bits), decoded), length


@pytest.mark.parametrize("extreme", [math.nan, math.inf, -math.inf, 3.3e38])
@pytest.mark.parametrize("place", [0, 77, 128, 299])
def test_what_is_not_finite_is_found(place: int, extreme: float) -> None:
    """NaN, infinities and ranges beyond float32 are reported, wherever in a block they are, as the reference does."""
    x = torch.randn(300)
    x[place], x[place ^ 1] = extreme, -3.3e38 if extreme == 3.3e38 else 0.0
    assert [k.stash_encode(x, 4, DRAW)[2] for k in (native, reference)] == [False, False]


def test_tiny_steps_are_zero_in_both() -> None:
    """Blocks whose step is below 2^-120 or subnormal get the same codes."""
    for exponent in (-110, -116, -117, -118, -126, -140, -149):
        x = torch.linspace(0, 1, 128) * 2.0**exponent
        assert same(reference.stash_encode(x, 4, DRAW), native.stash_encode(x, 4, DRAW)), exponent


def test_relu_is_the_reference_s() -> None:
    """Results, bits and masked gradients are the same for every length, with NaN and infinities, in place too."""
    for length in LENGTHS:
        x, grad = numbers(length), torch.randn(length)
        x[:: max(length // 5, 1)] = torch.tensor([math.nan, -0.0, 0.0, math.inf, -math.inf])[torch.randint(5, (1,))]
        wanted, found = reference.relu(x), native.relu(x)
        assert same(wanted, found), length
        assert same(reference.relu_backward(grad, found[1]), native.relu_backward(grad, found[1])), length
        again = x.clone()
        assert same(native.relu(again, again), wanted)


@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_norm_is_the_reference_s(shape: tuple[int, int, int]) -> None:
    """Sums over planes, results, codes, bits, sums of the backward pass and gradients are the same."""
    images, channels, size = shape
    x, grad = numbers(images * channels * size).view(shape), torch.randn(shape)
    factor, shift = torch.rand(channels) + 0.5, torch.randn(channels)
    assert same(reference.plane_moments(x), native.plane_moments(x))
    for bits, with_relu in itertools.product((4, 8), (False, True)):
        both = [k.norm_forward(x, factor, shift, bits, DRAW, with_relu=with_relu) for k in (reference, native)]
        assert same(*both)
        _, codes, steps, positive, _ = both[1]
        kept = grad, codes, steps, bits, positive
        assert same(*(k.norm_sums(*kept) for k in (reference, native)))
        assert same(*(k.norm_backward(*kept, factor, shift, factor) for k in (reference, native)))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """One and three threads give the same codes, sums and gradients."""
    x, factor = torch.randn(9, 40, 300), torch.rand(40)
    found = []
    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        forward = native.norm_forward(x, factor, factor, 4, DRAW, with_relu=True)
        sums = native.norm_sums(x, *forward[1:3], 4, forward[3])
        relu = native.relu(x.view(-1))
        found.append((native.plane_moments(x), forward, sums, relu, native.stash_encode(x.view(-1), 8, DRAW)))
    torch.set_num_threads(before)
    assert same(*found)
