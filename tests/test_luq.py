"""LUQ: unbiased rounding to zero and seven powers of two (Chmiel et al., arXiv 2112.10769)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import papers
from halfbyte import Luq, formats, oracle, quantize
from halfbyte.errors import NonFiniteWarning, SpecError
from halfbyte.rng import Draw


def numbers(x, seed=0):
    """x_hat in float64."""
    return quantize(x, Luq(), seed=seed).dequantize(torch.float64)


def test_the_levels_are_the_largest_magnitude_over_powers_of_two():
    """amax 64 has alpha = 1 and the levels 0, 1, 2, 4 ... 64; both ends are reproduced, and nothing else exists."""
    x = torch.cat([torch.linspace(-64, 64, 20_001), torch.tensor([64.0, -64.0])])
    found = numbers(x)
    assert sorted(set(found.abs().tolist())) == [0, *(2.0**k for k in range(7))]
    assert found[-2:].tolist() == [64, -64]
    assert len(set((found + 0.0).tolist())) == 15


@pytest.mark.parametrize("top", [1.0, -3.7, 1e-30, -2.5e30, 0.1])
def test_the_top_level_is_the_largest_magnitude_of_either_sign(top):
    """The extreme element is reproduced to the bit, negative or positive, in every draw: nothing is clipped."""
    x = torch.tensor([top, top / 2, -top / 2, top / 64, -top])
    for seed in range(5):
        found = quantize(x, Luq(), seed=seed)
        assert found.format is formats.fp4_e3m0
        assert torch.equal(found.dequantize(), x)


def test_below_alpha_a_number_becomes_zero_or_alpha():
    """|x| < alpha goes to alpha with probability |x| / alpha, else to zero (5 standard errors of 40,000 draws)."""
    n = 40_000
    for share in (0.01, 0.25, 0.5, 0.9):
        x = torch.full((n + 1,), -share)
        x[-1] = 64.0
        found = numbers(x, seed=3)[:-1]
        assert set((found + 0.0).tolist()) == {0.0, -1.0}
        assert (found != 0).double().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / n))


def test_between_two_levels_the_share_decides():
    """For 2^(n-1) alpha < x < 2^n alpha the upper level has probability (x - 2^(n-1) alpha) / (2^(n-1) alpha)."""
    n = 40_000
    for low in (1.0, 8.0, 32.0):
        for share in (0.1, 0.5, 0.75):
            x = torch.full((n + 1,), low * (1 + share))
            x[-1] = 64.0
            found = numbers(x, seed=3)[:-1]
            assert set(found.tolist()) == {low, 2 * low}
            spread = 5 * math.sqrt(share * (1 - share) / n)
            assert (found == 2 * low).double().mean().item() == pytest.approx(share, abs=spread)


def test_it_is_unbiased():
    """The squared error of the mean of n draws falls as 1 / n: from 4 draws to 128 to a 32nd, within 10 %."""
    x = torch.randn(40, 50) * torch.exp(torch.randn(40, 1))
    draws = torch.stack([numbers(x, seed) for seed in range(256)])
    assert papers.variance_ratio(draws, x, 4, 128) == pytest.approx(1 / 32, rel=0.1)


def test_every_number_becomes_a_neighbor():
    """The result is one of the two levels around the number, and never of the other sign."""
    x = torch.randn(5000) * torch.exp(2 * torch.randn(5000))
    alpha = x.abs().max().double().item() / 64
    below, above = papers.neighbors(papers.LUQ, x.double().numpy() / alpha)
    for seed in range(3):
        found = numbers(x, seed)
        assert (found * x.double() >= 0).all()
        units = found.abs().numpy() / alpha
        assert (np.isclose(units, below, rtol=1e-6) | np.isclose(units, above, rtol=1e-6)).all()


def test_codes_equal_the_oracle():
    """For a largest magnitude that is a power of two every code is the oracle's for the same noise."""
    x = torch.cat([torch.randn(500) * torch.exp(2 * torch.randn(500)), torch.tensor(formats.fp4_e3m0.values)])
    x = torch.cat([x.clamp(-32, 32), torch.tensor([32.0])])
    noise = Draw(seed=9, layer=0, step=torch.tensor(0), operand=0).uniform(len(x))
    expected = [
        oracle.encode_stochastic(formats.fp4_e3m0, a / 4, b) for a, b in zip(x.tolist(), noise.tolist(), strict=True)
    ]
    assert quantize(x, Luq(), seed=9).codes().tolist() == expected


@pytest.mark.parametrize("x", [torch.zeros(5), torch.empty(0, 3), torch.tensor(-0.3)], ids=["zeros", "empty", "0-d"])
def test_odd_tensors(x):
    """All-zero, empty and 0-d tensors are reproduced."""
    q = quantize(x, Luq(), seed=0)
    assert torch.equal(q.dequantize(), x)
    assert q.scale.isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_plausible_comes_of_a_broken_tensor(bad):
    """NaN or an infinity warns and makes all of the tensor NaN."""
    with pytest.warns(NonFiniteWarning):
        assert numbers(torch.tensor([1.0, bad, 2.0])).isnan().all()


def test_a_seed_is_asked_for_and_decides():
    """Without a seed it raises; equal seeds give equal codes, other seeds others."""
    x = torch.randn(500)
    with pytest.raises(SpecError, match="without a seed"):
        quantize(x, Luq())
    assert torch.equal(numbers(x, 1), numbers(x, 1))
    assert not torch.equal(numbers(x, 1), numbers(x, 2))


def test_results_do_not_depend_on_the_number_of_threads():
    """One thread and four make the same codes."""
    x = torch.randn(300_000)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 4):
            torch.set_num_threads(n)
            found.append(quantize(x, Luq(), seed=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].qdata, found[1].qdata)
    assert torch.equal(found[0].scale, found[1].scale)
