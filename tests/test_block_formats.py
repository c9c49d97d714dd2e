"""NVFP4 and MXFP4: scales, codes, errors, shapes and knobs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import papers
from halfbyte import MXFP4, NVFP4, formats, oracle, quantize
from halfbyte.errors import NonFiniteWarning, SpecError
from halfbyte.kernels import reference
from halfbyte.kernels.reference.encode import PIECE
from halfbyte.qtensor import unpack
from halfbyte.rng import Draw

RULES = ["floor", "ceil", "even", "rceil"]
FORMATS = [
    NVFP4(),
    NVFP4(square=True),
    NVFP4(four_over_six=True),
    NVFP4(headroom=True, rounding="stochastic"),
    NVFP4(rounding="ms_eden"),
    *(MXFP4(scale_rule=rule) for rule in RULES),
    MXFP4(scale_rule="quest"),
    MXFP4(rounding="stochastic", headroom=True),
]


def codes_of(x, spec):
    """A tensor quantized under seed 3 where the spec draws."""
    return quantize(x, spec, seed=3 if spec.stochastic else None)


def numbers(x, spec):
    """x_hat in float64."""
    return codes_of(x, spec).dequantize(torch.float64)


def block_scales(q):
    """The scales of all blocks as numbers, in the order of the blocks."""
    return torch.tensor(q.blocks.scale_format.values, dtype=torch.float64)[q.block_scale.reshape(-1).int()]


def mx_exponents(x, rule):
    """k of each number's scale 2^k, every number a block of its own."""
    q = quantize(x.reshape(-1, 1), MXFP4(scale_rule=rule))
    assert q.scale == 1
    return (q.block_scale.reshape(-1).int() - 127).tolist()


def gaussian(*shape, seed=0):
    """N(0, 1) in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Two blocks of 16 worked out from the formulas of arXiv 2509.25149: the second is the first over 7.3.
GOLDEN = [-3.2, -1.7, -0.9, -0.44, -0.1, 0, 0.05, 0.2, 0.33, 0.61, 0.8, 1.1, 1.45, 2.2, 2.9, 4.0]


def test_nvfp4_golden_block():
    """s_enc = 2688 / 4 = 672, the block scales are 448 and 60, and eight numbers come out as worked by hand.

    The second block: 4 / 7.3 / 6 * 672 = 61.37, between 60 and 64, so 60. Its numbers are multiples of 60 / 672 / 2.
    """
    q = quantize(torch.tensor(GOLDEN + [v / 7.3 for v in GOLDEN]), NVFP4())
    assert (1 / q.scale.double()).item() == pytest.approx(672, rel=1e-7)
    assert block_scales(q).tolist() == [448, 60]
    x_hat = q.dequantize(torch.float64)
    assert x_hat[:4].tolist() == pytest.approx([-2.666667, -2, -1, -0.333333], abs=1e-6)
    assert x_hat[16:20].tolist() == pytest.approx([-0.357143, -0.267857, -0.133929, -0.044643], abs=1e-6)


def test_mxfp4_golden_block():
    """amax 5 under the floor rule has the scale 2^(2 - 2) = 1, so ties of E2M1 go to the even code, and 7 needs 2."""
    x = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0, 0.26]
    assert numbers(torch.tensor(x), MXFP4()).tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -4, 0.5]
    assert numbers(torch.tensor([7.0, 0.25]), MXFP4(scale_rule="ceil")).tolist() == [8, 0]


def test_block_scales_of_nvfp4_round_ties_to_even():
    """With the largest number 2688 the tensor scale is 1, so a block's scale is E4M3 of its amax / 6.

    Ties: 17 between 16 and 18, 1.0625, 1.1875, 300; half the smallest, 2^-10, is a tie with zero.
    """
    asked = [448, 17, 18, 1.0625, 1.1875, 300, 2.0**-10, 2.0**-10 * 1.01]
    expected = [448, 16, 18, 1, 1.25, 288, 0, 2.0**-9]
    x = torch.zeros(len(asked), 16)
    x[:, 5] = torch.tensor(asked) * 6
    q = quantize(x, NVFP4())
    assert q.scale == 1
    assert block_scales(q).tolist() == expected


def test_a_block_whose_scale_underflows_is_zero():
    """Where E4M3 has no scale that small, the block's numbers become 0, not NaN."""
    x = torch.zeros(2, 16)
    x[0, 0], x[1] = 2688.0, 1e-6
    for spec in FORMATS[:5]:
        x_hat = numbers(x, spec)
        assert x_hat.isfinite().all()
        assert (x_hat[1] == 0).all() or spec.square or spec.rounding == "ms_eden"


@pytest.mark.parametrize("shape", [(40, 64), (7, 50), (3, 5, 33), (100,), (9, 1)])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_nvfp4_equals_the_formulas(shape, spread):
    """Tensor scale, block scales and codes are the paper's, but where a quotient is within 1e-6 of a tie."""
    x = gaussian(*shape) * torch.exp(spread * gaussian(*shape[:-1], 1, seed=1))
    q = quantize(x, NVFP4())
    scale, block_scale, units = papers.nvfp4(x.double().numpy())
    assert q.scale.item() == pytest.approx(scale, rel=2.0**-23)
    blocked = np.abs(papers.blocks(x.double().numpy(), 16)).max(-1) / 6 / scale
    sure = ~papers.undecided(papers.E4M3, blocked)
    assert (block_scales(q).numpy() == block_scale.reshape(-1))[sure.reshape(-1)].all()
    found = q.dequantize(torch.float64).numpy() / q.scale.double().item()
    wanted = papers.from_blocks(papers.nearest(papers.E2M1, units) * block_scale[..., None], shape)
    sure = papers.from_blocks(sure[..., None] & ~papers.undecided(papers.E2M1, units), shape)
    assert sure.mean() > 0.99
    assert (np.abs(found - wanted) <= 1e-12 * np.abs(wanted))[sure].all()


def test_square_blocks_equal_the_formulas():
    """A 16x16 block has one scale, E4M3 of its amax; blocks at the edges are smaller."""
    x = gaussian(40, 50)
    q = quantize(x, NVFP4(square=True))
    scale = x.abs().max().double().item() / 2688
    assert block_scales(q).numel() == 3 * 4
    for row, column in itertools.product(range(0, 40, 16), range(0, 50, 16)):
        block = x[row : row + 16, column : column + 16].double().numpy()
        block_scale = papers.nearest(papers.E4M3, np.abs(block).max() / 6 / scale)
        units = block / (block_scale * scale)
        wanted = papers.nearest(papers.E2M1, units) * block_scale * q.scale.item()
        found = q.dequantize(torch.float64)[row : row + 16, column : column + 16].numpy()
        sure = ~papers.undecided(papers.E2M1, units)
        assert np.allclose(found[sure], wanted[sure], rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(64, 48), (33, 20), (16, 16), (1, 40), (5, 3)])
def test_square_blocks_make_a_matrix_and_its_transpose_the_same_numbers(shape):
    """What a weight is in fprop it is in dgrad: the reason for 16x16 blocks."""
    w = gaussian(*shape) * torch.exp(gaussian(*shape, seed=1))
    assert torch.equal(numbers(w, NVFP4(square=True)), numbers(w.t().contiguous(), NVFP4(square=True)).t())
    assert shape[0] == shape[1] or not torch.equal(numbers(w, NVFP4()), numbers(w.t(), NVFP4()).t())


def test_four_over_six_takes_the_better_of_two_scales():
    """Each block has the smaller squared error of two scales, one that brings its largest number to 6, one to 4.

    arXiv 2512.02010: the tensor scale leaves room for the larger one, 6 * 256 / amax.
    """
    x = gaussian(64, 64)
    q = quantize(x, NVFP4(four_over_six=True))
    wide = x.double().numpy()
    scale = np.abs(wide).max() / (6 * 256)
    assert q.scale.item() == pytest.approx(scale, rel=2.0**-23)
    blocked = papers.blocks(wide, 16)
    errors, candidates = [], []
    for factor in (1.0, 1.5):
        block_scale = papers.nearest(papers.E4M3, factor * np.abs(blocked).max(-1) / 6 / scale)
        units = blocked / (block_scale[..., None] * scale)
        candidates.append(papers.nearest(papers.E2M1, units) * block_scale[..., None] * scale)
        errors.append(np.square(candidates[-1] - blocked).sum(-1))
    better = errors[1] < errors[0]
    wanted = np.where(better[..., None], candidates[1], candidates[0]).reshape(64, 64)
    found = q.dequantize(torch.float64).numpy()
    assert 0.2 < better.mean() < 0.8
    assert np.mean(np.isclose(found, wanted, rtol=1e-6, atol=0)) > 0.995
    assert np.square(found - wide).sum() == pytest.approx(np.minimum(*errors).sum(), rel=1e-4)


def powers_and_neighbors():
    """2^k, 1.5 * 2^k (6 = 1.5 * 4) and 1.75 * 2^k and the floats beside each, over the whole range of float32."""
    found = []
    for k in (-149, -140, -127, -126, -125, -124, -60, -3, -1, 0, 1, 2, 3, 60, 125, 126, 127):
        for mantissa in (1.0, 1.5, 1.75):
            value = torch.tensor(mantissa * 2.0**k, dtype=torch.float64).float()
            found += [value, torch.nextafter(value, torch.tensor(0.0)), torch.nextafter(value, torch.tensor(math.inf))]
    values = torch.stack(found)
    return values[values.isfinite() & (values > 0)]


@pytest.mark.parametrize("rule", RULES)
def test_mx_scale_rules_are_exact(rule):
    """Each rule is the oracle's at its own breaks, one float beside them, among subnormals and at float32's end."""
    x = powers_and_neighbors()
    assert mx_exponents(x, rule) == [oracle.mx_exponent(v, rule) for v in x.tolist()]
    assert mx_exponents(-x, rule) == mx_exponents(x, rule)


def test_mx_scale_rules_by_hand():
    """Powers k of the scale between 4 and 8: floor clips above 6, even above 7, ceil and rceil never."""
    x = torch.tensor([4.0, 5.0, 6.0, 6.01, 6.99, 7.0, 8.0])
    assert mx_exponents(x, "floor") == [0, 0, 0, 0, 0, 0, 1]
    assert mx_exponents(x, "ceil") == [0, 1, 1, 1, 1, 1, 1]
    assert mx_exponents(x, "rceil") == [0, 0, 0, 1, 1, 1, 1]
    assert mx_exponents(x, "even") == [0, 0, 0, 0, 0, 1, 1]


def test_the_oracle_knows_four_rules():
    """Another name raises and says which there are; quest's square root is not exact, so it is not among them."""
    with pytest.raises(ValueError, match="'floor', 'ceil', 'even' and 'rceil'"):
        oracle.mx_exponent(1.0, "quest")


def test_mx_scales_stay_in_e8m0():
    """The largest and the smallest float32 numbers have scales from 2^-127 to 2^127, and no code of NaN."""
    x = torch.tensor([[torch.finfo(torch.float32).max], [2.0**-149], [2.0**-126], [0.0]])
    for rule in (*RULES, "quest"):
        q = quantize(x, MXFP4(scale_rule=rule))
        assert q.block_scale.max() <= 254
        assert q.dequantize(torch.float64).isfinite().all()
        assert q.dequantize(torch.float64)[3] == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(20, 64), (3, 45), (2, 3, 33), (70,), (5, 1)])
def test_mxfp4_codes_equal_the_oracle(rule, shape):
    """Division by a power of two is exact, so every code is the oracle's, ties included."""
    x = gaussian(*shape) * 2.0 ** torch.randint(-20, 20, (*shape[:-1], 1))
    x = torch.where(torch.rand(shape) < 0.3, (x * 4 / x.abs().max()).round() * x.abs().max() / 4, x)
    q = quantize(x, MXFP4(scale_rule=rule))
    codes = []
    for row in x.reshape(-1, shape[-1]).tolist():
        for start in range(0, len(row), 32):
            block = row[start : start + 32]
            k = oracle.mx_exponent(max(abs(v) for v in block), rule)
            codes += [oracle.encode(formats.fp4_e2m1, math.ldexp(v, -k)) for v in block]
    assert q.codes().reshape(-1).tolist() == codes


@pytest.mark.parametrize("seed", range(3))
def test_quest_scale_equals_the_formula(seed):
    """k = floor(log2(2.92247856 / 6 * std + 1e-8)) with the centered deviation of each block (arXiv 2505.14669).

    A short last block takes the root mean square: the deviation of one number from itself is zero.
    """
    x = gaussian(50, 70, seed=seed) * torch.exp(2 * gaussian(50, 1, seed=seed + 9)) + gaussian(50, 1, seed=seed + 5)
    wide = x.double().numpy()
    q = quantize(x, MXFP4(scale_rule="quest"))
    k = np.stack(
        [
            papers.quest_exponent(wide[:, :32]),
            papers.quest_exponent(wide[:, 32:64]),
            papers.quest_exponent(wide[:, 64:], centered=False),
        ],
        1,
    )
    assert (q.block_scale.reshape(50, 3).int() - 127).numpy().astype(float).tolist() == k.tolist()
    factor = 2.0 ** np.repeat(k, 32, 1)[:, :70]
    found = q.dequantize(torch.float64).numpy()
    assert np.array_equal(found, papers.nearest(papers.E2M1, wide / factor) * factor)


def test_quest_s_scale_by_hand():
    """A deviation of 1 asks for a scale of 0.487, so 1/4, which cuts at 1.5; one of 1.03 for 0.502, so 1/2."""
    signs = torch.tensor([1.0, -1.0] * 16)
    assert codes_of(signs, MXFP4(scale_rule="quest")).block_scale.item() == 127 - 2
    assert codes_of(signs * 1.03, MXFP4(scale_rule="quest")).block_scale.item() == 127 - 1
    assert numbers(signs * 1.6 - 0.1, MXFP4(scale_rule="quest"))[:2].tolist() == [1.5, -1.5]


def test_quest_s_gradient_stops_where_a_number_was_cut():
    """The mask is |x / scale| < 6: the gradient of a number at or beyond 6 is zero, of all others itself."""
    x = gaussian(40, 70)
    quantizer = MXFP4(scale_rule="quest").build()
    q, saved = quantizer.quantize(x, differentiable=True)
    g = gaussian(40, 70, seed=1)
    back, learned = quantizer.backward(g.clone(), q, saved)
    inside = x.double().abs() < 6 * q.block_factors()
    assert learned is None
    assert 0.02 < 1 - inside.double().mean() < 0.5
    assert torch.equal(back, torch.where(inside, g, 0.0))
    for spec in (MXFP4(), NVFP4()):
        other = spec.build()
        q, saved = other.quantize(x, differentiable=True)
        assert torch.equal(other.backward(g.clone(), q, saved)[0], g)


MSE = {
    "nvfp4": (NVFP4(), papers.NVFP4_MSE["nearest"]),
    "nvfp4_four_over_six": (NVFP4(four_over_six=True), papers.NVFP4_MSE["four_over_six"]),
    "nvfp4_square": (NVFP4(square=True), papers.NVFP4_MSE["square"]),
    "nvfp4_stochastic": (NVFP4(rounding="stochastic", headroom=True), papers.NVFP4_MSE["stochastic"]),
    "nvfp4_ms_eden": (NVFP4(rounding="ms_eden"), papers.NVFP4_MSE["eden"]),
    "mxfp4_floor": (MXFP4(scale_rule="floor"), papers.MXFP4_MSE["floor"]),
    "mxfp4_rceil": (MXFP4(scale_rule="rceil"), papers.MXFP4_MSE["rceil"]),
    "mxfp4_stochastic": (MXFP4(rounding="stochastic", headroom=True), papers.MXFP4_MSE["stochastic"]),
}


@pytest.mark.parametrize("name", MSE)
def test_mean_squared_error_on_gaussian_numbers(name):
    """The published errors on N(0, 1) within 1 %, on two million numbers."""
    spec, published = MSE[name]
    x = gaussian(1024, 2048)
    error = (numbers(x, spec) - x.double()).square().mean().item()
    assert error == pytest.approx(published, rel=0.01)


STOCHASTIC = [
    NVFP4(rounding="stochastic", headroom=True),
    NVFP4(rounding="stochastic", headroom=True, square=True),
    MXFP4(rounding="stochastic", headroom=True),
    MXFP4(rounding="stochastic", scale_rule="ceil"),
    MXFP4(rounding="stochastic", scale_rule="rceil"),
]


@pytest.mark.parametrize("spec", STOCHASTIC, ids=str)
def test_stochastic_rounding_is_unbiased(spec):
    """The squared error of the mean of n draws falls as 1 / n: from 4 draws to 128 to a 32nd, within 10 %."""
    x = gaussian(32, 96)
    draws = torch.stack([quantize(x, spec, seed=seed).dequantize(torch.float64) for seed in range(256)])
    assert papers.variance_ratio(draws, x, 4, 128) == pytest.approx(1 / 32, rel=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_stochastic_codes_equal_the_oracle(rule):
    """Division by a power of two is exact, so every code is the oracle's for the same noise, saturated ones too."""
    x = gaussian(20, 70)
    x[:, ::7] = (x[:, ::7] * 2).round() / 2
    q = quantize(x, MXFP4(scale_rule=rule, rounding="stochastic"), seed=6)
    noise = Draw(seed=6, layer=0, step=torch.tensor(0), operand=0).uniform(x.numel()).view(x.shape)
    units = x.double() / q.block_factors()
    codes = [
        oracle.encode_stochastic(formats.fp4_e2m1, a, b)
        for a, b in zip(units.reshape(-1).tolist(), noise.reshape(-1).tolist(), strict=True)
    ]
    assert q.codes().reshape(-1).tolist() == codes


@pytest.mark.parametrize("fmt", ["fp4_e2m1", "fp8_e4m3", "fp4_e3m0", "int8"])
def test_stochastic_codes_of_a_long_tensor_are_those_of_its_parts(fmt):
    """What is encoded in pieces, beyond a quarter of a million numbers, has the codes of short tensors side by side."""
    found = formats.get(fmt)
    n = 2 * PIECE + 333
    x, noise, one = 3 * torch.randn(n), torch.rand(n), torch.ones(())
    whole = unpack(reference.encode_stochastic(x, found, inv_scale=one, noise=noise), n, found.bits)
    for start in (0, PIECE - 100, 2 * PIECE - 7, n - 200):
        part = slice(start, start + 200)
        count = len(x[part])
        short = unpack(reference.encode_stochastic(x[part], found, inv_scale=one, noise=noise[part]), count, found.bits)
        assert torch.equal(whole[part], short)


@pytest.mark.parametrize("spec", STOCHASTIC, ids=str)
def test_stochastic_rounding_takes_a_neighbor(spec):
    """Every number becomes one of the two levels around it, in the units of its block."""
    x = gaussian(64, 96)
    for seed in range(4):
        q = quantize(x, spec, seed=seed)
        factor = (q.block_factors() * q.scale.double()).numpy()
        below, above = papers.neighbors(papers.E2M1, x.double().numpy() / factor)
        x_hat = q.dequantize(torch.float64).numpy()
        found = np.abs(x_hat / factor)
        near = np.isclose(found, below, atol=1e-9) | np.isclose(found, above, atol=1e-9)
        assert near.all()
        assert np.isclose(found, above, atol=1e-9).any()
        assert (x_hat * x.numpy() >= 0).all()


def clipped(x, spec):
    """How many numbers lie beyond 6 in the units of their block."""
    q = codes_of(x, spec)
    limit = 6 * q.block_factors() * q.scale.double()
    return int((x.double().abs() > limit * (1 + 1e-6)).sum())


def test_headroom_ends_where_e4m3_has_no_finer_scales():
    """A block 2^15 below the largest still has room; one 2^17 below, between two of E4M3's last scales, is cut."""
    x = torch.zeros(3, 16)
    x[:, 0] = torch.tensor([2688.0, 2688 * 2.0**-15, 6 * 1.4 * 2.0**-9])
    spec = NVFP4(rounding="stochastic", headroom=True)
    assert clipped(x[:2], spec) == 0
    assert clipped(x, spec) == 1


@pytest.mark.parametrize("spec", [NVFP4(rounding="stochastic"), MXFP4(rounding="stochastic")], ids=str)
def test_headroom_is_what_keeps_stochastic_rounding_from_clipping(spec):
    """Without headroom a part of the blocks' largest numbers is beyond 6 and comes out too small; with it none is."""
    x = gaussian(256, 128)
    roomy = replace(spec, headroom=True)
    assert clipped(x, spec) > 100
    assert clipped(x, roomy) == 0
    bias = {}
    for each in (spec, roomy):
        mean = sum(quantize(x, each, seed=seed).dequantize(torch.float64) for seed in range(60)) / 60
        top = x.abs() > 2.5
        bias[each] = ((mean - x.double()) * x.sign())[top].mean().item()
    assert bias[spec] < -0.02
    assert abs(bias[roomy]) < 0.01


def eden_parts(x, group=128):
    """(scale, block scales, numbers in units of both, factor of each group) of MS-EDEN (arXiv 2601.22813).

    The authors' code: the largest code is to stand for 6 / (17 / 16 * 0.93), the largest block scale is 256, and the
    factor of a group of 128 is sum(z^2) / sum(z q).
    """
    top = 6 / (17 / 16 * 0.93)
    scale = np.abs(x).max() / 255.99 / top
    blocked = papers.blocks(x, 16)
    block_scale = papers.nearest(papers.E4M3, np.abs(blocked).max(-1) / top / scale)
    z = blocked / (block_scale[..., None] * scale)
    q = papers.nearest(papers.E2M1, z)
    groups = (z * z).sum(-1), (z * q).sum(-1)
    upper, lower = (papers.blocks(g, group // 16).sum(-1) for g in groups)
    factor = np.repeat(upper / lower, group // 16, -1)[..., : block_scale.shape[-1]]
    whole = x.shape[-1] // group * (group // 16)  # a rotation cuts the rest into smaller pieces: each block by itself
    factor[..., whole:] = groups[0][..., whole:] / groups[1][..., whole:]
    return scale, block_scale, z, factor


@pytest.mark.parametrize("shape", [(40, 256), (11, 200)])
def test_ms_eden_equals_the_formulas(shape):
    """Codes are those of nearest rounding, and block scales neighbors of scale times factor, with that mean.

    The mean of 400 draws lies within 5 standard errors, whose bound is half a gap of E4M3 over sqrt(400).
    """
    x = gaussian(*shape)
    spec = NVFP4(rounding="ms_eden")
    scale, block_scale, z, factor = eden_parts(x.double().numpy())
    asked = (block_scale * factor).reshape(-1)
    below, above = papers.neighbors(papers.E4M3, asked)
    sure = ~papers.undecided(papers.E2M1, z)
    wanted = papers.from_blocks(papers.nearest(papers.E2M1, z), shape)
    table = np.array(formats.fp4_e2m1.values)
    draws = []
    for seed in range(400):
        q = quantize(x, spec, seed=seed)
        draws.append(block_scales(q).numpy())
        if seed == 0:
            same = table[q.codes().numpy()] == wanted
            assert same[papers.from_blocks(sure, shape)].all()
            assert q.scale.item() == pytest.approx(scale, rel=1e-6)
    drawn = np.stack(draws)
    assert ((drawn == below) | (drawn == above) | np.isclose(drawn, asked, rtol=1e-5)).all()
    assert (np.abs(drawn.mean(0) - asked) <= 5 * (above - below) / 2 / 20 + 1e-5 * asked).all()
    assert (drawn.std(0) > 0).mean() > 0.9


def test_ms_eden_is_unbiased_over_rotations():
    """Under random rotations of 128 numbers the squared error of a mean falls as 1 / n; nearest rounding's stops.

    Nearest shrinks rotated, so Gaussian, numbers by half a percent or more. Of noise 9 * 10^-3 / n, 256 draws leave
    4 * 10^-5, and the square of that bias is more than a quarter of it.
    """
    x = gaussian(64, 128).double()
    h = torch.from_numpy(papers.sylvester(128))
    ratios = {}
    for spec in (NVFP4(rounding="ms_eden"), NVFP4()):
        generator = torch.Generator().manual_seed(0)
        draws = []
        for n in range(512):
            signs = torch.randint(0, 2, (128,), generator=generator) * 2.0 - 1
            q = quantize(((x * signs) @ h).float(), spec, seed=n if spec.stochastic else None)
            draws.append((q.dequantize(torch.float64) @ h) * signs)
        ratios[spec.rounding] = papers.variance_ratio(torch.stack(draws), x, 4, 256)
    assert ratios["ms_eden"] == pytest.approx(1 / 64, rel=0.15)
    assert ratios["nearest"] > 1.25 / 64


@pytest.mark.parametrize("spec", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (4, 0), (1, 7), (7, 1), (3, 17), (2, 3, 65), (5, 16)])
def test_any_shape(spec, shape):
    """Short last blocks, single rows, scalars and empty tensors keep their shape and stay close to their numbers."""
    x = torch.randn(shape)
    q = codes_of(x, spec)
    assert q.shape == x.shape
    assert q.codes().shape == x.shape
    x_hat = q.dequantize()
    assert x_hat.shape == x.shape
    if x.numel():
        assert (x_hat - x).abs().max() <= 0.5 * x.abs().max()


@pytest.mark.parametrize("spec", [NVFP4(), NVFP4(four_over_six=True), *FORMATS[5:10]], ids=str)
def test_blocks_know_nothing_of_each_other(spec):
    """A row's codes are the same in a longer tensor, whose rows end in a short block too, at the same tensor scale."""
    size = 16 if isinstance(spec, NVFP4) else 32
    x = gaussian(6, 2 * size + 5)
    x[:, 0], x[:, size], x[:, 2 * size] = 5.0, -5.0, 5.0
    whole = numbers(x, spec)
    for row in range(6):
        for start in (0, size, 2 * size):
            part = x[row, start : start + size]
            assert torch.equal(numbers(part, spec), whole[row, start : start + size])


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_views_and_types(spec):
    """A transposed view, float64, float16 and bfloat16 give the numbers of the contiguous float32 tensor."""
    x = gaussian(48, 40).to(torch.bfloat16).float()
    x_hat = numbers(x, spec)
    assert torch.equal(numbers(x.t().contiguous().t(), spec), x_hat)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(numbers(x.to(dtype), spec), numbers(x.to(dtype).float(), spec))
    assert torch.allclose(numbers(x.double(), spec), x_hat, rtol=1e-5, atol=0.5)


@pytest.mark.parametrize("spec", FORMATS, ids=str)
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_a_power_of_two_passes_through(spec, factor):
    """Scales follow the tensor's magnitude: 2^k times the numbers gives 2^k times the results."""
    x = gaussian(40, 48)
    if getattr(spec, "scale_rule", "") == "quest" and factor < 1:
        factor = 2.0**-4  # the formula's 1e-8 is no power of two
    assert torch.equal(numbers(x * factor, spec), numbers(x, spec) * factor)


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_zeros_and_signs(spec):
    """An all-zero tensor and an all-zero block are reproduced, and a sign never changes."""
    x = gaussian(33, 70)
    x[3:20], x[:, 32:64] = 0.0, 0.0
    x_hat = numbers(x, spec)
    assert (x_hat[x == 0] == 0).all()
    assert (x_hat * x.double() >= 0).all()
    assert (numbers(torch.zeros(5, 40), spec) == 0).all()
    assert codes_of(torch.zeros(5, 40), spec).scale.isfinite()


@pytest.mark.parametrize("spec", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_plausible_comes_of_a_broken_tensor(spec, bad):
    """NaN or an infinity anywhere warns and makes all of the tensor NaN."""
    x = gaussian(20, 40)
    x[2, 3] = bad
    with pytest.warns(NonFiniteWarning):
        assert numbers(x, spec).isnan().all()


@pytest.mark.parametrize("spec", FORMATS, ids=str)
@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes_stay_finite(spec, magnitude):
    """Numbers at either end of float32 come back finite, and not larger than 4/3 of the largest."""
    x = gaussian(17, 40).clamp(-1, 1) * magnitude
    x_hat = numbers(x, spec)
    assert x_hat.isfinite().all()
    assert x_hat.abs().max() <= 2 * x.abs().max().double()


def test_the_codes_fill_four_bits_and_a_scale_each_block():
    """3 x 50 codes take 75 bytes; NVFP4 adds a byte for each of 3 x 4 blocks, MXFP4 one for each of 3 x 2."""
    x = gaussian(3, 50)
    assert quantize(x, NVFP4()).nbytes == 75 + 4 + 12
    assert quantize(x, MXFP4()).nbytes == 75 + 4 + 6
    assert quantize(gaussian(40, 50), NVFP4(square=True)).nbytes == 1000 + 4 + 12
    assert quantize(x, NVFP4()).blocks.scale_format is formats.fp8_e4m3
    assert quantize(x, MXFP4()).blocks.scale_format is formats.e8m0


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(spec):
    """One thread and four make the same codes and scales."""
    x = gaussian(300, 1100)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 4):
            torch.set_num_threads(n)
            found.append(codes_of(x, spec))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].qdata, found[1].qdata)
    assert torch.equal(found[0].block_scale, found[1].block_scale)
    assert torch.equal(found[0].scale, found[1].scale)


FIELDS = {
    NVFP4: {
        "rounding": ["nearest", "stochastic", "ms_eden"],
        "square": [False, True],
        "four_over_six": [False, True],
        "headroom": [False, True],
    },
    MXFP4: {
        "scale_rule": [*RULES, "quest"],
        "rounding": ["nearest", "stochastic"],
        "headroom": [False, True],
    },
}


@pytest.mark.parametrize("kind", FIELDS)
def test_every_field_acts_or_raises(kind):
    """Of all combinations each is refused with a text, or differs in its numbers from all that can be asked for."""
    x = gaussian(64, 80) * torch.exp(gaussian(64, 80, seed=1))
    seen = []
    for values in itertools.product(*FIELDS[kind].values()):
        fields = dict(zip(FIELDS[kind], values, strict=True))
        try:
            spec = kind(**fields)
        except SpecError as error:
            assert f"{kind.__name__}(" in str(error)  # noqa: PT017
            continue
        seen.append((fields, numbers(x, spec)))
    assert len(seen) >= 5
    for (one, first), (other, second) in itertools.combinations(seen, 2):
        assert not torch.equal(first, second), (one, other)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: NVFP4(rounding="up"), "'nearest', 'stochastic'.*'ms_eden'"),
        (lambda: MXFP4(rounding="ms_eden"), "'nearest' or 'stochastic'"),
        (lambda: MXFP4(scale_rule="round"), "floor.*ceil.*even.*rceil.*quest"),
        (lambda: quantize(torch.ones(3), NVFP4(rounding="stochastic")), "without a seed"),
        (lambda: quantize(torch.ones(3), NVFP4(), seed=1), "rounds at random"),
        (lambda: quantize(torch.ones(3), MXFP4(), scale=1.0), "scale"),
    ],
)
def test_refuses_what_means_nothing(make, text):
    """Each field is checked at birth, and the text says what is possible."""
    with pytest.raises(SpecError, match=text):
        make()


def test_a_seed_decides():
    """Equal seeds give equal codes, other seeds others."""
    x = gaussian(20, 40)
    for spec in (s for s in FORMATS if s.stochastic):
        first, second, third = (quantize(x, spec, seed=seed) for seed in (5, 5, 6))
        assert torch.equal(first.dequantize(), second.dequantize())
        assert not torch.equal(first.dequantize(), third.dequantize())
