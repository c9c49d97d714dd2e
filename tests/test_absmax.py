"""Symmetric integers scaled to the largest magnitude: the wider control."""

from __future__ import annotations

import math

import pytest
import torch

import papers
from halfbyte import AbsMax, oracle, quantize
from halfbyte.errors import NonFiniteWarning, SpecError
from halfbyte.formats import int4, int8
from halfbyte.rng import Draw


def signed(q):
    """The codes as whole numbers."""
    return torch.tensor([q.format.integers[c] for c in q.codes().flatten().tolist()]).view(q.shape)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_magnitude_becomes_the_highest_code(bits):
    """scale = amax / (2^(bits-1) - 1) for the extreme of either sign, and every code between is used."""
    top = 2 ** (bits - 1) - 1
    for extreme in (3.0, -3.0):
        x = torch.cat([torch.linspace(-2.999, 2.999, 2001), torch.tensor([extreme])])
        q = quantize(x, AbsMax(bits=bits))
        assert q.scale.item() == pytest.approx(3 / top, rel=1e-7)
        assert signed(q)[-1] == math.copysign(top, extreme)
        assert set(range(-top + 1, top)) <= set(signed(q).tolist()) <= set(range(-top, top + 1))
        assert q.format is (int4 if bits <= 4 else int8)
        assert q.zero_point is None


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_equal_the_oracle(bits):
    """Codes are clamp(rint(x * inv_scale)) with inv_scale the rounded (2^(bits-1) - 1) / amax, ties to even."""
    x = torch.cat([torch.randn(400), torch.tensor([4.0, 2.0, 1.0, -3.0])])
    top = 2 ** (bits - 1) - 1
    q = quantize(x, AbsMax(bits=bits))
    inv_scale = torch.tensor(top / x.abs().max().item(), dtype=torch.float64).float().item()
    assert q.codes().tolist() == oracle.quantize(x.tolist(), q.format, inv_scale=inv_scale, code_range=(-top, top))


def test_stochastic_codes_equal_the_definition():
    """|x / scale| goes up where the noise is below its fraction; amax 127 has the scale 1."""
    x = torch.cat([127 * (2 * torch.rand(500) - 1), torch.tensor([127.0, -126.5, 0.0])])
    noise = Draw(seed=4, layer=0, step=torch.tensor(0), operand=0).uniform(len(x)).double()
    magnitude = x.double().abs()
    wanted = (magnitude.floor() + (noise < magnitude.frac())) * x.double().sign()
    assert torch.equal(signed(quantize(x, AbsMax(rounding="stochastic"), seed=4)).double(), wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_is_unbiased_and_nearest_is_not(bits):
    """The squared error of the mean of n draws falls as 1 / n: from 4 draws to 128 to a 32nd, within 10 %."""
    x = torch.randn(40, 50)
    spec = AbsMax(bits=bits, rounding="stochastic")
    draws = torch.stack([quantize(x, spec, seed=seed).dequantize(torch.float64) for seed in range(256)])
    assert papers.variance_ratio(draws, x, 4, 128) == pytest.approx(1 / 32, rel=0.1)
    assert not torch.equal(draws[0], quantize(x, AbsMax(bits=bits)).dequantize(torch.float64))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("x", [torch.zeros(5), torch.empty(0, 3), torch.tensor(-0.3)], ids=["zeros", "empty", "0-d"])
def test_odd_tensors(x, rounding):
    """All-zero, empty and 0-d tensors are reproduced."""
    q = quantize(x, AbsMax(rounding=rounding), seed=0 if rounding == "stochastic" else None)
    assert torch.allclose(q.dequantize(), x, rtol=1e-6, atol=0)
    assert q.shape == x.shape


def test_nothing_plausible_comes_of_a_broken_tensor():
    """NaN or an infinity warns and makes all of the tensor NaN."""
    for bad in (math.nan, math.inf):
        with pytest.warns(NonFiniteWarning):
            assert quantize(torch.tensor([1.0, bad]), AbsMax()).dequantize().isnan().all()


def test_every_field_acts():
    """Each width, and the other rounding, gives other numbers."""
    x = torch.randn(300)
    found = [quantize(x, AbsMax(bits=bits)).dequantize() for bits in range(2, 9)]
    found.append(quantize(x, AbsMax(rounding="stochastic"), seed=1).dequantize())
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AbsMax(bits=1), "2 to 8 bits"),
        (lambda: AbsMax(bits=9), "2 to 8 bits"),
        (lambda: AbsMax(rounding="up"), "'nearest' or 'stochastic'"),
        (lambda: quantize(torch.ones(3), AbsMax(rounding="stochastic")), "without a seed"),
    ],
)
def test_refuses_what_means_nothing(make, text):
    """Each field is checked at birth, and the text says what is possible."""
    with pytest.raises(SpecError, match=text):
        make()
