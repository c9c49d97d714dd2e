"""Agreement with other people's code: `ml_dtypes` on every number, `torchao` on the block formats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from halfbyte import MXFP4, NVFP4, Nearest, formats, quantize

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

PAIRS = {
    "fp4_e2m1": "float4_e2m1fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "e8m0": "float8_e8m0fnu",
}
ROUNDED = ["fp4_e2m1", "fp8_e4m3", "fp8_e5m2"]


def theirs(name, x):
    """x rounded by ml_dtypes, in float64."""
    return x.astype(getattr(ml_dtypes, PAIRS[name])).astype(np.float64)


def ours(name, x):
    """x rounded by us, in float64."""
    spec = Nearest(fmt=name, scale="one")
    return quantize(torch.from_numpy(x), spec).dequantize(torch.float64).numpy()


def same(a, b):
    """Whether two arrays are equal to the bit, the sign of zero included."""
    return np.array_equal(a.view(np.int64), b.view(np.int64))


@pytest.mark.parametrize("name", PAIRS)
def test_tables_equal_ml_dtypes(name):
    """Every code stands for the same number, NaN and infinity included."""
    fmt = formats.get(name)
    codes = np.arange(1 << fmt.bits, dtype=np.uint8)
    table = codes.view(getattr(ml_dtypes, PAIRS[name])).astype(np.float64)
    mine = np.array(fmt.values)
    assert np.array_equal(mine, table, equal_nan=True)
    numbers = ~np.isnan(mine)
    assert same(mine[numbers], table[numbers])


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_ties_and_both_neighbors_equal_ml_dtypes(name, dtype):
    """Each value, each tie, and the floats beside them round alike, up to the largest value."""
    values = np.array(sorted({v for v in formats.get(name).values if 0 <= v < math.inf}))
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(dtype)
    x = np.concatenate([points, np.nextafter(points, dtype(0)), np.nextafter(points, dtype(math.inf))])
    x = np.concatenate([x, -x])
    x = x[np.abs(x) <= values[-1]]
    if dtype is np.float32:
        assert same(ours(name, x), theirs(name, x))
    else:
        # ml_dtypes rounds float64 to float32 first, so numbers beside a tie differ there: ours must be the nearer.
        mine, other = ours(name, x), theirs(name, x.astype(np.float32))
        assert (np.abs(mine - x) <= np.abs(other - x)).all()
        exact = x == x.astype(np.float32)
        assert same(mine[exact], other[exact])


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_numbers_of_16_bits_round_as_in_ml_dtypes(name, dtype):
    """All 2^16 inputs of either type within the range of the format."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[(x.abs().float() <= formats.get(name).max)]
    mine = quantize(x, Nearest(fmt=name, scale="one")).dequantize(torch.float64).numpy()
    assert same(mine, theirs(name, x.float().numpy()))
    assert len(x) > 10_000


@pytest.mark.parametrize("name", ROUNDED)
def test_random_numbers_round_as_in_ml_dtypes(name):
    """A million numbers over all magnitudes of the format."""
    fmt = formats.get(name)
    generator = np.random.default_rng(0)
    low, high = math.log2(fmt.min_positive) - 3, math.log2(fmt.max)
    x = (2.0 ** generator.uniform(low, high, 1_000_000) * generator.choice([-1, 1], 1_000_000)).astype(np.float32)
    x = x[np.abs(x) <= fmt.max]
    assert same(ours(name, x), theirs(name, x))


DISTRIBUTIONS = {
    "gaussian": lambda g, shape: g.standard_normal(shape),
    "uniform": lambda g, shape: g.uniform(-1, 1, shape),
    "laplace": lambda g, shape: g.laplace(size=shape),
    "student": lambda g, shape: g.standard_t(3, shape),
    "lognormal": lambda g, shape: g.lognormal(0, 2, shape) * g.choice([-1, 1], shape),
    "sparse": lambda g, shape: g.standard_normal(shape) * (g.random(shape) < 0.2),
    "rows": lambda g, shape: g.standard_normal(shape) * 10.0 ** g.uniform(-2, 2, (shape[0], 1)),
}
SHAPES = [(1, 32), (64, 128), (33, 96), (1, 4096)]


def samples(kind, magnitude):
    """Float32 tensors of one distribution in several shapes."""
    generator = np.random.default_rng(sum(map(ord, kind)))
    for shape in SHAPES:
        yield torch.from_numpy((DISTRIBUTIONS[kind](generator, shape) * magnitude).astype(np.float32))


def close_to_a_tie(units):
    """Where a number in units of its block is within 1e-6 of the middle of two levels of E2M1."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    return ((units.abs()[..., None] - middles).abs() <= 1e-6 * middles).any(-1)


@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 1e5])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
def test_mxfp4_equals_torchao(rule, kind, magnitude):
    """Scales and elements are torchao's own under all four rules, ties and zero blocks included.

    A block of zeros has the scale 2^-127 here and there, and 2^-127 times 0.
    """
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    mode = mx.ScaleCalculationMode[rule.upper()]
    for x in samples(kind, magnitude):
        q = quantize(x, MXFP4(scale_rule=rule))
        scale, packed = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mode)
        codes = torch.stack([packed.view(torch.uint8) & 15, packed.view(torch.uint8) >> 4], -1).reshape(x.shape)
        alive = (x.reshape(-1, 32) != 0).any(-1)
        assert torch.equal(q.block_scale.reshape(-1)[alive], scale.view(torch.uint8).reshape(-1)[alive])
        table = torch.tensor(formats.fp4_e2m1.values)
        assert torch.equal(table[q.codes().int()], table[codes.int()])
        assert q.scale == 1


@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 1e5])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_nvfp4_equals_torchao(kind, magnitude):
    """Block scales and elements are those of torchao's two-level NVFP4, away from ties.

    torchao lets no block scale fall below 2^-6, the smallest normal number of E4M3; blocks whose scale is below are
    left out.
    """
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed")
    compared = 0
    for x in samples(kind, magnitude):
        q = quantize(x, NVFP4())
        tensor_scale = nv.per_tensor_amax_to_scale(x.abs().max())
        scale, packed = nv.nvfp4_quantize(x, 16, tensor_scale)
        codes = torch.stack([packed & 15, packed >> 4], -1).reshape(x.shape)
        assert q.scale.item() == pytest.approx(tensor_scale.item(), rel=2.0**-22)
        wanted = scale.float().reshape(-1).double()
        found = torch.tensor(formats.fp8_e4m3.values, dtype=torch.float64)[q.block_scale.reshape(-1).int()]
        asked = x.reshape(-1, 16).abs().amax(-1).double() / 6 / q.scale.double()
        step = torch.finfo(torch.float8_e4m3fn).eps * torch.exp2(asked.clamp_min(2.0**-6).log2().floor())
        tie = ((asked / step - 0.5) - (asked / step - 0.5).round()).abs() < 1e-4
        sure = (asked >= 2.0**-6) & ~tie
        assert torch.equal(found[sure], wanted[sure])
        units = x.double() / (q.block_factors() * q.scale.double())
        decided = sure.repeat_interleave(16).view(x.shape) & ~close_to_a_tie(units)
        table = torch.tensor(formats.fp4_e2m1.values)
        assert torch.equal(table[q.codes().int()][decided], table[codes.int()][decided])
        compared += int(decided.sum())
    assert compared > 0.3 * sum(math.prod(shape) for shape in SHAPES)
