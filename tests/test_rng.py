"""Counter-based random numbers, and the rounding that draws them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import oracle
from halfbyte.errors import SpecError
from halfbyte.kernels import reference
from halfbyte.qtensor import unpack
from halfbyte.recipes import Dgrad, Fprop, Wgrad
from halfbyte.rng import Draw, philox, uniform

STOCHASTIC = hb.Radix4(rounding="stochastic")


def draw(n: int, *, seed: int = 1, layer: int = 2, step: int = 3, operand: int = 0) -> Tensor:
    """Numbers for one use."""
    return uniform(n, seed=seed, layer=layer, step=torch.tensor(step), operand=operand)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], words: list[int]) -> None:
    """The known answers of the Random123 distribution for philox4x32 with ten rounds."""
    found = philox(tuple(torch.tensor([c]) for c in counter), (key[0], key[1]))  # type: ignore[arg-type]
    assert [int(w) for w in found] == words


def test_numbers_lie_in_the_unit_interval_and_fill_it() -> None:
    """100,000 numbers lie in [0, 1), on the grid of 2^-24, with the mean and variance of a uniform law (5 sigma)."""
    u = draw(100_000)
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())
    assert abs(float(u.double().mean()) - 0.5) < 5 * (1 / 12 / 1e5) ** 0.5
    assert abs(float(u.double().var()) - 1 / 12) < 5 * (1 / 180 / 1e5) ** 0.5


@pytest.mark.parametrize("other", [{"seed": 2}, {"seed": 1 + 2**32}, {"layer": 3}, {"step": 4}, {"operand": 1}])
def test_every_part_of_the_key_matters(other: dict[str, int]) -> None:
    """Another seed, layer, step or operand gives other numbers."""
    assert not torch.equal(draw(64), draw(64, **other))


def test_a_number_depends_on_its_place_only() -> None:
    """The first numbers of a long draw are those of a short one."""
    assert torch.equal(draw(1000)[:77], draw(77))


def test_stochastic_rounding_equals_the_oracle() -> None:
    """Each code is the oracle's for the same number and noise, beyond the range and at every value too."""
    fmt = STOCHASTIC.format
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500) * torch.exp(4 * torch.randn(500)), torch.tensor(fmt.values), torch.tensor([1e9])])
    noise = uniform(len(x), seed=5, layer=0, step=torch.tensor(0), operand=0)
    found = hb.quantize(x, STOCHASTIC, seed=5).codes()
    expected = [oracle.encode_stochastic(fmt, a, b) for a, b in zip(x.tolist(), noise.tolist(), strict=True)]
    assert found.tolist() == expected


def test_stochastic_rounding_decides_exactly_at_the_threshold() -> None:
    """Noise equal to the number's share of the way stays down, one unit less goes up; noise 0 moves no value."""
    shares = torch.arange(1, 64) / 64
    x = torch.cat([1 + 3 * shares, 1 + 3 * shares, torch.tensor([1.0, 0.0])])  # between the values 1 and 4
    noise = torch.cat([shares, shares - 2.0**-24, torch.zeros(2)])
    qdata = reference.encode_stochastic(x, STOCHASTIC.format, inv_scale=torch.ones(()), noise=noise)
    assert unpack(qdata, len(x), 4).tolist() == [4] * 63 + [5] * 63 + [4, 0]


def test_stochastic_rounding_is_unbiased_and_nearest_is_not() -> None:
    """The mean over 40,000 draws is the number itself (5 sigma); nearest rounding of the same number is 27 % off."""
    x = torch.full((40_000,), 1.37)
    values = hb.quantize(x, STOCHASTIC, seed=0).dequantize().double()
    assert set(values.tolist()) == {1.0, 4.0}
    sigma = ((1.37 - 1) * (4 - 1.37) / len(x)) ** 0.5
    assert abs(float(values.mean()) - float(x[0])) < 5 * sigma
    assert hb.quantize(x[:1], hb.Radix4()).dequantize().item() == 1.0


def test_a_seed_is_asked_for_exactly_where_it_acts() -> None:
    """Random rounding without a seed raises, and so does a seed without random rounding."""
    with pytest.raises(SpecError, match="without a seed"):
        hb.quantize(torch.ones(3), STOCHASTIC)
    with pytest.raises(SpecError, match="rounds at random"):
        hb.quantize(torch.ones(3), hb.Radix4(), seed=1)
    with pytest.raises(SpecError, match="random rounding is for the slots of dgrad and wgrad"):
        hb.Recipe(name="x", fprop=Fprop(weight=STOCHASTIC))


def gradients(seed: int, steps: int) -> list[Tensor]:
    """grad_weight of a layer under stochastic gradients, step by step."""
    recipe = replace(
        hb.RECIPES["ibm2020"],
        name="stochastic",
        dgrad=Dgrad(grad_output=STOCHASTIC),
        wgrad=Wgrad(grad_output=STOCHASTIC),
    )
    torch.manual_seed(0)
    layer = hb.convert(nn.Linear(16, 16), recipe, seed=seed)
    x, g = torch.rand(8, 16), torch.randn(8, 16)
    found = []
    for _ in range(steps):
        layer.zero_grad()
        layer(x).backward(g)
        found.append(layer.weight.grad.clone())
    return found


def test_a_layer_draws_anew_each_step_and_the_same_in_every_run() -> None:
    """Equal seeds give equal runs; another seed and another step give other gradients."""
    first, again, other = gradients(0, 2), gradients(0, 2), gradients(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def keyed(**other: int) -> Draw:
    """A draw with one part of its key changed."""
    fields = {"seed": 1, "layer": 2, "step": 3, "operand": 4, "rank": 0} | other
    return Draw(**fields | {"step": torch.tensor(fields["step"])})  # type: ignore[arg-type]


OTHERS = [{"seed": 2}, {"seed": 1 + 2**32}, {"layer": 3}, {"step": 4}, {"operand": 5}, {"rank": 1}, {"rank": 2}]


def test_a_draw_is_a_function_of_its_key() -> None:
    """The same key gives the same numbers; another seed, layer, step, operand, rank or part gives others."""
    base = keyed().uniform(64)
    assert torch.equal(base, keyed().uniform(64))
    found = [base, *(keyed(**other).uniform(64) for other in OTHERS), *(keyed().uniform(64, part) for part in (1, 2))]
    for i, one in enumerate(found):
        assert all(not torch.equal(one, other) for other in found[:i])


def test_no_two_keys_of_a_run_share_a_number() -> None:
    """3 values of each part of the key, 729 draws of 8 numbers, hold no two equal rows."""
    values = range(3)
    rows = [
        tuple(keyed(seed=s, layer=a, step=t, operand=o, rank=r).uniform(8, p).tolist())
        for s in values
        for a in values
        for t in values
        for o in values
        for r in values
        for p in values
    ]
    assert len(set(rows)) == 3**6


def test_seeds_and_ranks_do_not_meet() -> None:
    """A seed on one rank is no other seed on another: 64 seeds, low and high, on 16 ranks give 1024 different draws."""
    seeds = [*range(32), *(s << 32 for s in range(1, 33))]
    assert len({tuple(keyed(seed=s, rank=r).uniform(4).tolist()) for s in seeds for r in range(16)}) == 64 * 16


@pytest.mark.parametrize("other", [*OTHERS, {"part": 1}], ids=str)
def test_draws_of_different_keys_are_uncorrelated(other: dict[str, int]) -> None:
    """The correlation of 50,000 pairs is zero within five standard errors."""
    n, fields = 50_000, dict(other)
    part = fields.pop("part", 0)
    one, two = keyed().uniform(n).double() - 0.5, keyed(**fields).uniform(n, part).double() - 0.5
    assert abs(float((one * two).mean()) * 12) < 5 / n**0.5


def test_signs_are_fair_and_follow_the_key() -> None:
    """100,000 signs are -1 or 1 with mean zero (5 sigma), the same for the same key."""
    signs = keyed().signs(100_000)
    assert sorted(set(signs.tolist())) == [-1.0, 1.0]
    assert abs(float(signs.mean())) < 5 / 100_000**0.5
    assert torch.equal(signs[:50], keyed().signs(50))
    assert not torch.equal(signs[:50], keyed(step=9).signs(50))
    assert not torch.equal(signs[:50], keyed().signs(50, part=1))


def test_numbers_do_not_depend_on_the_number_of_threads() -> None:
    """One thread and four draw the same numbers."""
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 4):
            torch.set_num_threads(n)
            found.append(keyed().uniform(300_001))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
