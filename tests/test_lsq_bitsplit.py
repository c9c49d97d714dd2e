"""The learned step and the bit splitting of Xi et al. (arXiv 2306.11987), against the formulas of their code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import papers
import shapes
from halfbyte import BitSplit, Lsq, quantize
from halfbyte.errors import NonFiniteWarning, SpecError
from halfbyte.formats import int4, int8
from halfbyte.kernels import Linear
from halfbyte.quantizers import Use
from halfbyte.rng import Draw


def prepared(step, bits=4):
    """A quantizer whose step is given."""
    quantizer = Lsq(bits=bits).build()
    quantizer.quantize(torch.tensor([1.0, -2.0]), observe=True)
    quantizer.learned.data.fill_(step)
    return quantizer


def signed(q):
    """The codes as whole numbers."""
    return torch.tensor([q.format.integers[c] for c in q.codes().flatten().tolist()]).view(q.shape)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_starts_from_the_mean_magnitude(bits):
    """The first training batch sets the step to 2 mean|x| / sqrt(2^(bits-1) - 1) + 1e-10: sqrt(7) for four bits."""
    quantizer = Lsq(bits=bits).build()
    assert quantizer.learned.shape == (1,)
    x = torch.randn(40, 50)
    wanted = 2 * x.double().abs().mean().item() / math.sqrt(2 ** (bits - 1) - 1) + 1e-10
    q = quantizer.quantize(x, observe=True).q
    assert quantizer.learned.item() == pytest.approx(wanted, rel=1e-6)
    assert q.scale.item() == pytest.approx(wanted, rel=1e-6)
    quantizer.quantize(10 * x, observe=True)
    assert quantizer.learned.item() == pytest.approx(wanted, rel=1e-6)


def test_lsq_s_start_by_hand():
    """|x| has the mean 3.5 / 2: the step is 3.5 / sqrt(7) = 1.322876."""
    assert quantize(torch.tensor([0.5, -3.0]), Lsq()).scale.item() == pytest.approx(1.3228757, rel=1e-6)


def test_lsq_moves_no_state_outside_training():
    """A look that is not observed leaves the step to be chosen by the first batch that is."""
    quantizer = Lsq().build()
    quantizer.quantize(torch.randn(30) * 100)
    x = torch.randn(30)
    quantizer.quantize(x, observe=True)
    assert quantizer.learned.item() == pytest.approx(2 * x.abs().double().mean().item() / 7**0.5, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("step", [0.25, 0.3, -0.3])
def test_lsq_forward_equals_the_formula(bits, step):
    """Codes are clamp(round(x / |s|), -2^(bits-1), 2^(bits-1) - 1), and x_hat is |s| times them."""
    x = torch.randn(4000) * 2 ** (bits - 1) * 0.25
    q = prepared(step, bits).quantize(x).q
    v = x.double() / abs(torch.tensor(step).double().item())
    wanted = v.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    sure = ((v - 0.5) - (v - 0.5).round()).abs() > 1e-6 * v.abs().clamp_min(1)
    assert torch.equal(signed(q)[sure].double(), wanted[sure])
    assert wanted.min() == -(2 ** (bits - 1))
    assert wanted.max() == 2 ** (bits - 1) - 1
    assert q.format is (int4 if bits <= 4 else int8)
    assert q.scale == abs(torch.tensor(step))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("step", [0.25, -0.25, 0.3])
def test_lsq_backward_equals_the_formula(bits, step):
    """dx = g where nothing is cut; ds = sum g * (lowest code, highest code, or round(v) - v) / sqrt(highest * N).

    A step below zero is used as |s|, so its gradient has the other sign.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    quantizer = prepared(step, bits)
    x, g = torch.randn(60, 50) * high * 0.25, torch.randn(60, 50)
    q, saved = quantizer.quantize(x, observe=True, differentiable=True)
    dx, ds = quantizer.backward(g.clone(), q, saved)
    v = x.double() / abs(torch.tensor(step).double())
    inside = (v >= low) & (v <= high)
    assert 0.02 < 1 - inside.double().mean().item() < 0.9
    weight = torch.where(inside, v.round() - v, torch.where(v < low, float(low), float(high)))
    wanted = (g.double() * weight).sum() / math.sqrt(high * x.numel()) * math.copysign(1, step)
    assert torch.equal(dx, torch.where(inside, g, 0.0))
    assert ds.reshape(-1).tolist() == pytest.approx([wanted.item()], rel=1e-4)


def test_lsq_backward_by_hand():
    """s = 1, x = (-9, -8, 0.25, 7, 7.5): cut, low end, inside, high end, cut.

    With g = 1: dx = (0, 1, 1, 1, 0) and ds = (-8 + 0 - 0.25 + 0 + 7) / sqrt(35).
    """
    quantizer = prepared(1.0)
    q, saved = quantizer.quantize(torch.tensor([-9.0, -8.0, 0.25, 7.0, 7.5]), differentiable=True)
    dx, ds = quantizer.backward(torch.ones(5), q, saved)
    assert dx.tolist() == [0, 1, 1, 1, 0]
    assert ds.item() == pytest.approx(-1.25 / 35**0.5, rel=1e-6)


@pytest.mark.parametrize("x", [torch.zeros(4), torch.empty(0, 3)], ids=["zeros", "empty"])
def test_lsq_learns_nothing_from_nothing(x):
    """An all-zero or empty first batch is reproduced and leaves the choice of the step to the next."""
    quantizer = Lsq().build()
    assert torch.equal(quantizer.quantize(x, observe=True).q.dequantize(), x)
    later = torch.randn(30)
    quantizer.quantize(later, observe=True)
    assert quantizer.learned.item() == pytest.approx(2 * later.abs().double().mean().item() / 7**0.5, rel=1e-5)


def test_lsq_state_is_saved():
    """A loaded quantizer goes on with the saved step and does not choose again."""
    first, second = Lsq().build(), Lsq().build()
    first.quantize(torch.randn(30), observe=True)
    second.load_state_dict(first.state_dict())
    x = torch.randn(30) * 50
    assert torch.equal(first.quantize(x, observe=True).q.codes(), second.quantize(x, observe=True).q.codes())


def test_lsq_refuses_what_means_nothing():
    """2 to 8 bits are possible."""
    for bits in (1, 9):
        with pytest.raises(SpecError, match="2 to 8 bits"):
            Lsq(bits=bits)


def test_lsq_bits_act():
    """Each width gives other numbers."""
    x = torch.randn(200)
    found = [quantize(x, Lsq(bits=bits)).dequantize() for bits in range(2, 9)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


EXAMPLE = [-2, -1.3, -0.02, 0, 0.005, 0.3, 0.71, 2]


def use(gemm, rows, columns, step=0, partner=None, features=5, **other):
    """What a gradient of a linear layer is quantized for, at that step."""
    return Use(
        gemm=gemm,
        operand=0,
        geometry=Linear(rows=rows, in_features=features, out_features=columns),
        draw=Draw(seed=1, layer=0, step=torch.tensor(step), operand=2),
        partner=partner,
        **other,
    )


def split(grad, gemm="dgrad", sampling="none", step=0, partner=None):
    """Both parts of a (rows, columns) gradient."""
    features = 5 if partner is None else partner.shape[1]
    quantizer = BitSplit(sampling=sampling).build()
    return quantizer.parts(grad, use=use(gemm, *grad.shape, step=step, partner=partner, features=features))


def target(grad):
    """What the mean of many draws must be: 14 hi plus the rest cut to -6...6, over the scale."""
    scale, hi, rest = papers.bit_split(grad.double().numpy())
    return torch.from_numpy((14 * hi + np.clip(rest, -6, 6)) / scale)


def test_bit_split_golden_example():
    """Scale 49, hi = (-6, -5, 0, 0, 0, 1, 2, 6), and what is left for lo: (-14, 6.3, -0.98, 0, 0.245, 0.7, 6.79, 14).

    Worked with the formulas of the authors' code; lo is what is left, cut to -6...6 and rounded at random.
    """
    hi, lo = split(torch.tensor([EXAMPLE]))
    assert signed(hi).tolist() == [[-6, -5, 0, 0, 0, 1, 2, 6]]
    assert 1 / lo.scale.item() == pytest.approx(49, rel=1e-6)
    assert hi.scale.item() == pytest.approx(14 * lo.scale.item(), rel=1e-6)
    left = [-14, 6.3, -0.98, 0, 0.245, 0.7, 6.79, 14]
    seen = [set() for _ in left]
    for step in range(60):
        for values, code in zip(seen, signed(split(torch.tensor([EXAMPLE]), step=step)[1])[0].tolist(), strict=True):
            values.add(code)
    # -0.98 is -1 in 98 % of the draws, 0 in the others.
    assert seen[2] <= {-1, 0}
    seen[2] = {-1}
    assert seen == [{-6}, {6}, {-1}, {0}, {0, 1}, {0, 1}, {6}, {6}]


def test_bit_split_reconstructs_to_one_unit():
    """14 hi + lo is within one unit of the scaled gradient up to 90 / 98 of the largest magnitude, and 90 beyond."""
    grad = torch.randn(50, 40)
    hi, lo = split(grad)
    assert (hi.format, lo.format) == (int4, int4)
    assert max(signed(hi).abs().max(), signed(lo).abs().max()) <= 6
    scale, wanted, _ = papers.bit_split(grad.double().numpy())
    scaled = grad.double() * scale
    whole = 14 * signed(hi) + signed(lo)
    inside = scaled.abs() <= 90
    assert ((whole - scaled).abs()[inside] <= 1 + 1e-4).all()
    assert (whole.abs()[~inside] == 90).all()
    assert (~inside).any()
    quotient = np.abs(scaled.numpy()) / 14
    sure = np.abs(quotient - np.floor(quotient) - 0.5) > 1e-5
    assert (signed(hi).numpy() == wanted)[sure].all()


def test_bit_split_low_part_is_unbiased():
    """The squared error of the mean of n draws, against the cut gradient, falls as 1 / n: to a 32nd from 4 to 128."""
    grad = torch.randn(30, 40)
    draws = torch.stack([sum(part.dequantize(torch.float64) for part in split(grad, step=n)) for n in range(256)])
    assert papers.variance_ratio(draws, target(grad), 4, 128) == pytest.approx(1 / 32, rel=0.1)


def scores(grad, partner=None):
    """The score of each of the 2N rows: its norm, for wgrad times the norm of the row that it multiplies."""
    hi = papers.bit_split(grad.double().numpy())[1]
    lo = signed(split(grad)[1]).double().numpy()
    rows = np.stack([np.linalg.norm(14 * hi, axis=1), np.linalg.norm(lo, axis=1)])
    return rows if partner is None else rows * np.linalg.norm(partner.double().numpy(), axis=1)


@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_rows_are_kept_with_the_probability_of_their_score(gemm, spread):
    """A kept row is multiplied by 1 / p, p proportional to its score, at most 1, summing to N; others are zero.

    The scores come from the rows of either part, so for lo from the codes of that very draw. With a spread of 3 some
    rows are kept for sure.
    """
    torch.manual_seed(1)
    grad = torch.randn(40, 30) * torch.exp(spread * torch.randn(40, 1)).clamp_max(20)
    partner = torch.randn(40, 7) * torch.exp(torch.randn(40, 1)) if gemm == "wgrad" else None
    p = papers.keep_probabilities(scores(grad, partner).reshape(-1)).reshape(2, 40)
    assert p.sum() == pytest.approx(40, rel=1e-6) or (p == 1).all()
    parts = split(grad, gemm, "leverage", partner=partner)
    for part, probability in zip(parts, p, strict=True):
        factors = part.block_scale.reshape(-1).double().numpy()
        kept = factors > 0
        assert factors[kept] * probability[kept] == pytest.approx(1, rel=1e-4)
        assert (signed(part)[~torch.from_numpy(kept)] == 0).all()


@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
def test_half_of_the_rows_are_kept_in_the_mean(gemm):
    """Over 200 draws the mean number of kept rows is N of 2N within five standard errors (at most sqrt(N / 2) each)."""
    grad, partner = torch.randn(64, 30), torch.randn(64, 7)
    counts = [
        sum((part.block_scale > 0).sum().item() for part in split(grad, gemm, "leverage", n, partner))
        for n in range(200)
    ]
    assert np.mean(counts) == pytest.approx(64, abs=5 * (64 / 2 / 200) ** 0.5)
    assert np.std(counts) > 1


@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
def test_sampled_products_are_unbiased(gemm):
    """The mean of n sampled products tends to the product of the cut gradient: its squared error falls as 1 / n."""
    grad = torch.randn(24, 16) * torch.exp(0.5 * torch.randn(24, 1))
    partner = torch.randn(24, 9)
    weight = torch.randn(16, 9, dtype=torch.float64)

    def multiply(x):
        return x @ weight if gemm == "dgrad" else x.t() @ partner.double()

    wanted, draws = multiply(target(grad)), []
    for n in range(1024):
        parts = split(grad, gemm, "leverage", n, partner if gemm == "wgrad" else None)
        draws.append(sum(multiply(part.dequantize(torch.float64)) for part in parts))
    assert papers.variance_ratio(torch.stack(draws), wanted, 4, 64) == pytest.approx(1 / 16, rel=0.15)


def test_leverage_beats_even_odds():
    """For rows of very different size the sampled wgrad has less variance than keeping each row with probability 1/2.

    With even odds the variance of a row's product is that product's square (1/p - 1 = 1).
    """
    grad = torch.randn(64, 20) * torch.exp(1.5 * torch.randn(64, 1))
    partner = torch.randn(64, 8)
    wanted = grad.double().t() @ partner.double()
    errors = []
    for n in range(40):
        parts = split(grad, "wgrad", "leverage", n, partner)
        found = sum(part.dequantize(torch.float64) for part in parts).t() @ partner.double()
        errors.append((found - wanted).square().sum().item())
    even = (grad.double().square().sum(1) * partner.double().square().sum(1)).sum().item()
    assert np.mean(errors) < 0.7 * even


def test_sampling_is_a_knob_that_acts():
    """Leverage sampling drops rows, "none" none; both keep hi and lo as they are in the rows that are kept."""
    grad = torch.randn(40, 30)
    whole, sampled = split(grad), split(grad, sampling="leverage")
    assert all(part.blocks is None for part in whole)
    assert sum((part.block_scale == 0).sum() for part in sampled) > 10
    for every, some in zip(whole, sampled, strict=True):
        kept = some.block_scale.reshape(-1) > 0
        assert torch.equal(signed(some)[kept], signed(every)[kept])


@pytest.mark.parametrize("sampling", ["leverage", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (0, 4), (5, 3)])
def test_any_shape(sampling, shape):
    """Single rows, single columns and empty gradients are split; zeros stay zeros."""
    for grad in (torch.randn(shape), torch.zeros(shape)):
        for gemm in ("dgrad", "wgrad"):
            partner = torch.randn(shape[0], 5) if gemm == "wgrad" else None
            parts = split(grad, gemm, sampling, partner=partner)
            total = sum(part.dequantize() for part in parts)
            assert total.shape == grad.shape
            assert total.isfinite().all()
            assert (total[grad == 0] == 0).all()


@pytest.mark.parametrize("name", ["conv1d", "conv2d_grouped", "conv_transpose", "batched"])
@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
def test_sampled_products_of_other_layers_are_unbiased(name, gemm):
    """Rows of a convolution are positions (and groups), of a batch of products its rows: the products' means agree."""
    geometry = shapes.GEOMETRIES[name]
    first, second = shapes.operand_shapes(geometry, gemm)
    grad, other = torch.randn(first), torch.randn(second)
    wanted, draws = shapes.product(geometry, gemm, target(grad), other), []
    quantizer = BitSplit().build()
    for n in range(256):
        each = Use(
            gemm=gemm,
            operand=0,
            geometry=geometry,
            draw=Draw(seed=1, layer=0, step=torch.tensor(n), operand=2),
            partner=other,
        )
        parts = sum(part.dequantize(torch.float64) for part in quantizer.parts(grad, use=each))
        draws.append(geometry.apply(gemm, parts, other.double()).view(wanted.shape))
    assert papers.variance_ratio(torch.stack(draws), wanted, 4, 64) == pytest.approx(1 / 16, rel=0.15)


def test_a_broken_gradient_makes_both_parts_nan():
    """NaN or an infinity warns, and nothing plausible comes out."""
    grad = torch.randn(5, 4)
    grad[2, 1] = math.inf
    for sampling in ("leverage", "none"):
        with pytest.warns(NonFiniteWarning):
            parts = split(grad, sampling=sampling)
        assert sum(part.dequantize() for part in parts).isnan().all()


def test_random_numbers_follow_the_draw():
    """Equal draws give equal parts; another step gives others."""
    grad = torch.randn(40, 30)
    first, again, other = (split(grad, sampling="leverage", step=n) for n in (0, 0, 1))
    assert all(torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1].codes(), other[1].codes())
    assert not torch.equal(first[0].block_scale, other[0].block_scale)


def test_bit_split_refuses_what_means_nothing():
    """The field is checked at birth, and one tensor cannot be made of it."""
    with pytest.raises(SpecError, match="'leverage' or 'none'"):
        BitSplit(sampling="half")
    with pytest.raises(SpecError, match="two"):
        quantize(torch.randn(3), BitSplit(), seed=1)
