"""The scale of a layer's gradient: `LayerGradScale` (the paper's vote), `ExactGradScale`, `LossScale`."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from halfbyte import LayerGradScale, Nearest, Phase, QTensor, Radix4, Recipe, Sawb, convert, formats, oracle
from halfbyte.errors import NonFiniteWarning, SpecError
from halfbyte.quantizers import ExactGradScale, GradQuantizer, GradScaleState, LossScale, vote
from halfbyte.quantizers.gradient import scale_limit
from halfbyte.recipes import Dgrad, Fprop, Wgrad

MAX = 64.0
AFTER_64 = math.ldexp(1 + 2**-23, 6)
AFTER_32 = math.ldexp(1 + 2**-23, 5)


def step(state: GradScaleState, *amaxes: float, limit: float = MAX) -> int:
    """One optimizer step with a backward pass for each magnitude; the exponent afterwards."""
    for amax in amaxes:
        state.exponent(torch.tensor(amax), limit)
    state.advance()
    return int(state.log2_scale)


@pytest.mark.parametrize(
    ("amax", "expected"),
    [
        (0.0, 0),
        (1e-45, 1),
        (31.0, 1),
        (32.0, 1),
        (AFTER_32, 0),
        (63.0, 0),
        (64.0, 0),
        (AFTER_64, -1),
        (1e30, -1),
        (math.inf, -1),
        (math.nan, -1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vote(amax, expected, dtype):
    """Fig. 3a at MAX = 64: +1 in (0, 32], 0 in (32, 64], -1 beyond and for NaN; all-zero stays."""
    assert vote(torch.tensor(amax, dtype=dtype), MAX) == expected


def test_scale_climbs_an_octave_a_step_to_where_the_gradient_fits():
    """From s = 1 and amax = 1e-6 it is 2^n after n updates up to 2^25 after 25, and then constant (section 10.5).

    1e-6 * 2^25 = 33.6 lies in (32, 64].
    """
    state = LayerGradScale(log2_first=0).build()
    assert [step(state, 1e-6) for _ in range(30)] == [*range(1, 26), 25, 25, 25, 25, 25]


def test_scale_descends_an_octave_a_step():
    """From 2^20 and amax = 1 it comes down to 2^6 = 64, where 1 lies in (32, 64] after scaling."""
    state = LayerGradScale(log2_first=20).build()
    assert [step(state, 1.0) for _ in range(16)] == [*range(19, 5, -1), 6, 6]


@pytest.mark.parametrize(("scaled", "moved"), [(32.0, 1), (AFTER_32, 0), (64.0, 0), (AFTER_64, -1), (0.0, 0)])
@pytest.mark.parametrize("log2_first", [0, 20, -7])
def test_update_at_the_interval_s_ends(scaled, moved, log2_first):
    """The update is exact at 32, 64 and one float32 unit beyond each, whatever the scale in force."""
    state = LayerGradScale(log2_first=log2_first).build()
    assert step(state, scaled * 2.0**-log2_first) == log2_first + moved


@pytest.mark.parametrize("limit", [6.0, 8.0, 448.0, 57344.0])
def test_update_at_other_formats_limits(limit):
    """The interval is (limit / 2, limit] for every format, to one float32 unit."""
    after = torch.nextafter(torch.tensor(limit), torch.tensor(math.inf)).item()
    half = torch.nextafter(torch.tensor(limit / 2), torch.tensor(math.inf)).item()
    moved = [
        step(LayerGradScale(log2_first=3).build(), x / 8, limit=limit) - 3 for x in (limit / 2, half, limit, after)
    ]
    assert moved == [1, 0, 0, -1]


def test_all_zero_gradients_leave_the_scale():
    """A layer that gets no gradient stays where it is, for ever."""
    state = LayerGradScale(log2_first=5).build()
    assert {step(state, 0.0) for _ in range(100)} == {5}


@pytest.mark.parametrize("exponent", [-30, -5, 0, 5, 6, 7, 20])
def test_first_gradient_sets_the_scale(exponent):
    """It starts at 2^floor(log2(64 / amax)), exact at powers of two and one unit beside; that step votes 0."""
    for ulps in (-1, 0, 1):
        amax = math.ldexp(1 + ulps * 2**-23, exponent)
        state = LayerGradScale().build()
        found = int(state.exponent(torch.tensor(amax), MAX))
        assert Fraction(amax) * Fraction(2) ** found <= 64 < Fraction(amax) * Fraction(2) ** (found + 1)
        state.advance()
        assert int(state.log2_scale) == found


def test_second_gradient_does_not_set_the_scale():
    """Only the first gradient jumps; from then on the scale moves by votes."""
    state = LayerGradScale().build()
    assert step(state, 1.0) == 6
    assert int(state.exponent(torch.tensor(2.0**-10), MAX)) == 6
    state.advance()
    assert int(state.log2_scale) == 7


def test_first_exponent_that_was_given_is_kept():
    """With log2_first the first gradient does not jump."""
    assert int(LayerGradScale(log2_first=3).build().exponent(torch.tensor(1.0), MAX)) == 3


@pytest.mark.parametrize("amax", [0.0, math.nan, math.inf])
def test_a_first_gradient_that_says_nothing_does_not_set_the_scale(amax):
    """All-zero and broken first gradients are scaled by 2^20, and the next usable one still sets the scale."""
    state = LayerGradScale().build()
    assert int(state.exponent(torch.tensor(amax), MAX)) == 20
    state.advance()
    assert int(state.exponent(torch.tensor(1.0), MAX)) == 6


@pytest.mark.parametrize("amax", [math.nan, math.inf])
def test_a_broken_gradient_votes_down(amax):
    """NaN and infinity vote -1, even beside a small gradient of the same step."""
    assert step(LayerGradScale(log2_first=0).build(), 1e-6, amax, 1e-6) == -1


def test_scale_stays_within_its_limits():
    """It never leaves [2^-40, 2^60], by votes or at the start."""
    up, down = LayerGradScale(log2_first=58).build(), LayerGradScale(log2_first=-38).build()
    assert [step(up, 1e-38) for _ in range(4)] == [59, 60, 60, 60]
    assert [step(down, 1e38) for _ in range(4)] == [-39, -40, -40, -40]
    assert int(LayerGradScale().build().exponent(torch.tensor(1e-30), MAX)) == 60
    assert int(LayerGradScale().build().exponent(torch.tensor(1e30), MAX)) == -40


def test_limits_can_be_set():
    """log2_min and log2_max hold for votes and for the start."""
    spec = LayerGradScale(log2_min=-1, log2_max=2)
    assert step(spec.build(), 1e-6) == 2
    assert step(spec.build(), 1e6) == -1


def test_accumulation_takes_the_largest_and_votes_once():
    """Three backward passes before a step are one vote, by the largest magnitude, in any order."""
    for order in ((1e-3, 40.0, 1.0), (40.0, 1e-3, 1.0), (1.0, 1e-3, 40.0)):
        assert step(LayerGradScale(log2_first=0).build(), *order) == 0
    assert step(LayerGradScale(log2_first=0).build(), 1.0, 1.0, 1.0) == 1
    assert step(LayerGradScale(log2_first=0).build(), 1.0, 65.0, 1.0) == -1


def test_scale_is_constant_between_steps():
    """All backward passes of one step use the same exponent."""
    state = LayerGradScale(log2_first=4).build()
    assert [int(state.exponent(torch.tensor(a), MAX)) for a in (1e-6, 1e6, 1.0)] == [4, 4, 4]


@pytest.mark.parametrize(
    "spec", [LayerGradScale(), LayerGradScale(log2_first=4), LossScale(), ExactGradScale()], ids=str
)
def test_unobserved_gradient_moves_nothing(spec):
    """With observe=False the exponent is what observing would give, and no state moves."""
    state, other = spec.build(), spec.build()
    before = {name: value.clone() for name, value in state.state_dict().items()}
    found = state.exponent(torch.tensor(1e-3), MAX, observe=False)
    assert found == other.exponent(torch.tensor(1e-3), MAX)
    assert all(torch.equal(value, before[name]) for name, value in state.state_dict().items())


@pytest.mark.parametrize(
    "spec", [LayerGradScale(log2_first=4), LossScale(growth_interval=1), ExactGradScale()], ids=str
)
def test_a_step_without_a_gradient_changes_nothing(spec):
    """Advancing without an observation, or twice after one, has no further effect."""
    state = spec.build()
    step(state, 1e-6)
    after = {name: value.clone() for name, value in state.state_dict().items()}
    state.advance()
    state.advance()
    assert all(torch.equal(value, after[name]) for name, value in state.state_dict().items())


def test_exact_scale_is_recomputed_from_every_gradient():
    """ExactGradScale is 2^floor(log2(64 / amax)) each time, with no memory and nothing beyond the format."""
    state = ExactGradScale().build()
    found = []
    for amax in (1.0, 1e-6, 64.0, AFTER_64, 1e6, 1.0):
        found.append(int(state.exponent(torch.tensor(amax), MAX)))
        state.advance()
    assert found == [6, 25, 0, -1, -14, 6]


def test_exact_scale_keeps_its_limits():
    """Its limits are those of a float32 scale unless given."""
    assert int(ExactGradScale().build().exponent(torch.tensor(1e-45), MAX)) == 126
    assert int(ExactGradScale(log2_max=10).build().exponent(torch.tensor(1e-6), MAX)) == 10


def test_loss_scale_starts_at_2_to_16():
    """As in mixed-precision training (dynamic loss scaling); the first gradient does not move it."""
    assert int(LossScale().build().exponent(torch.tensor(1e-9), MAX)) == 16
    assert LossScale().growth_interval == 2000


@pytest.mark.parametrize("amax", [AFTER_64 * 2.0**-16, 1.0, math.inf, math.nan])
def test_loss_scale_halves_after_an_overflow(amax):
    """One unit beyond the format is an overflow; the largest value itself is none."""
    assert step(LossScale().build(), 1e-9, amax) == 15
    assert step(LossScale().build(), 64.0 * 2.0**-16) == 16


def test_loss_scale_doubles_after_the_growth_interval():
    """Every third clean step doubles it, and an overflow starts the count anew."""
    state = LossScale(growth_interval=3).build()
    assert [step(state, 1e-9) for _ in range(7)] == [16, 16, 17, 17, 17, 18, 18]
    assert step(state, 1.0) == 17
    assert [step(state, 1e-9) for _ in range(3)] == [17, 17, 18]


def test_loss_scale_counts_only_steps_with_a_gradient():
    """A step that saw no gradient is neither clean nor an overflow."""
    state = LossScale(growth_interval=2).build()
    assert [step(state, 1e-9), step(state), step(state), step(state, 1e-9)] == [16, 16, 16, 17]


def tiny(grad_scale) -> torch.nn.Sequential:
    recipe = Recipe(
        name="tiny",
        fprop=Fprop(weight=Sawb()),
        dgrad=Dgrad(grad_output=Radix4()),
        wgrad=Wgrad(grad_output=Radix4(phase=Phase.ODD)),
        grad_scale=grad_scale,
    )
    return convert(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)), recipe)


@pytest.mark.parametrize(("spec", "states"), [(LossScale(), 1), (LayerGradScale(), 2), (ExactGradScale(), 2)], ids=str)
def test_who_shares_a_scale(spec, states):
    """A loss scale is one for the model; the other two are one a layer."""
    model = tiny(spec)
    assert len({id(layer.plan.grad_output.grad_scale) for layer in model}) == states


def test_shared_loss_scale_moves_once_a_step():
    """Two layers that observe one loss scale count one step, not two, and one overflow halves it once."""
    model = tiny(LossScale(growth_interval=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    state = model[0].plan.grad_output.grad_scale
    seen = []
    for size in (1e-9, 1e-9, 1e-9, 1.0, 1e-9):
        model(torch.randn(3, 6)).mul(size).sum().backward()
        optimizer.step()
        seen.append(int(state.log2_scale))
    # A vote is taken by the forward pass after the step: growth shows at the third pass, the overflow at the fifth.
    assert seen == [16, 16, 17, 17, 16]


def test_model_votes_once_an_optimizer_step():
    """With gradient accumulation a converted layer's scale moves after the step, not after each backward pass."""
    model = tiny(LayerGradScale(log2_first=0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    state = model[1].plan.grad_output.grad_scale
    seen = []
    for micro_batch in range(6):
        model(torch.randn(3, 6)).mul(1e-6).sum().backward()
        seen.append(int(state.log2_scale))
        if micro_batch % 2:
            optimizer.step()
    assert seen == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "spec", [LayerGradScale(), LayerGradScale(log2_first=3), ExactGradScale(), LossScale(growth_interval=3)], ids=str
)
@pytest.mark.parametrize("cut", range(6))
def test_state_dict_continues_identically(spec, cut):
    """Saved between the backward pass and the vote, or before, a reloaded state goes on as the first would have."""
    amaxes = [0.0, 1e-6, 3.0, 1e4, 1e-3, 1e-9, 1e-9, 1e-9]
    first, second = spec.build(), spec.build()
    for amax in amaxes[:cut]:
        step(first, amax)
    first.exponent(torch.tensor(amaxes[cut]), MAX)
    second.load_state_dict(first.state_dict())
    first.advance()
    second.advance()
    for amax in amaxes[cut + 1 :]:
        assert step(first, amax) == step(second, amax)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(
    ("specs", "limit"),
    [
        ((Radix4(), Radix4(phase=Phase.ODD)), 64.0),
        ((Radix4(phase=Phase.ODD), None), 64.0),
        ((Radix4(), Nearest(fmt="fp8_e5m2")), 64.0),
        ((None, Nearest(fmt="fp8_e5m2")), 57344.0),
        ((Nearest(fmt="fp4_e2m1"), Nearest(fmt="fp8_e4m3")), 6.0),
        ((Nearest(fmt="fp4_e3m0"), None), 8.0),
    ],
)
def test_limit_is_what_every_format_in_use_can_hold(specs, limit):
    """MAX is the smallest of the formats' largest values; the odd phase counts as the even one (its nearest to 64)."""
    assert scale_limit(specs) == limit


ONCE = {"dgrad": 1, "wgrad": 1}


def quantizer(dgrad, wgrad, grad_scale) -> GradQuantizer:
    return GradQuantizer({"dgrad": dgrad, "wgrad": wgrad}, grad_scale.build(), samples=ONCE, gains=ONCE)


def pair_of(quantizer, grad):
    """What dgrad and wgrad get of a gradient, one part each."""
    found = quantizer.quantize({"dgrad": grad, "wgrad": grad}, {}, observe=True)
    assert [len(parts) for parts in found.values()] == [1, 1]
    return found["dgrad"][0], found["wgrad"][0]


def test_both_uses_of_a_gradient_share_one_scale():
    """The two phases are made from the same scaled gradient, and each equals the oracle's rounding of it."""
    grad = torch.randn(200) * 1e-4
    pair = pair_of(quantizer(Radix4(), Radix4(phase=Phase.ODD), LayerGradScale(log2_first=17)), grad)
    for q, fmt in zip(pair, (formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd), strict=True):
        assert isinstance(q, QTensor)
        assert q.scale.item() == 2.0**-17
        assert q.codes().tolist() == oracle.quantize(grad.tolist(), fmt, inv_scale=2.0**17)


def test_unquantized_use_gets_the_gradient_itself():
    """A slot without a spec is left in floating point, untouched."""
    grad = torch.randn(20)
    for_dgrad, for_wgrad = pair_of(quantizer(None, Radix4(), ExactGradScale()), grad)
    assert for_dgrad is grad
    assert isinstance(for_wgrad, QTensor)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_gradient_gives_nan_and_is_counted(bad):
    """A NaN or infinity in the gradient makes both results NaN, warns, and is counted."""
    both = quantizer(Radix4(), Radix4(phase=Phase.ODD), LayerGradScale())
    with pytest.warns(NonFiniteWarning, match="NaN or infinity"):
        pair = pair_of(both, torch.tensor([1.0, bad]))
    assert all(q.dequantize().isnan().all() for q in pair)
    assert both.nonfinite == 1


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LayerGradScale(log2_min=5, log2_max=4), "log2_min <= log2_max"),
        (lambda: LayerGradScale(log2_min=-127), "-126 <= log2_min"),
        (lambda: ExactGradScale(log2_max=127), "log2_max <= 126"),
        (lambda: LossScale(growth_interval=0), "1 or more is possible"),
    ],
)
def test_refuses_what_means_nothing(make, text):
    """Each field is checked at birth, and the text says what is possible."""
    with pytest.raises(SpecError, match=text):
        make()


@pytest.mark.parametrize("spec", [LayerGradScale, LossScale])
@pytest.mark.parametrize("first", [61, 200, -41])
def test_a_first_exponent_outside_the_limits_is_refused(spec, first):
    """The first exponent lies within the limits that later ones keep to."""
    with pytest.raises(SpecError, match="log2_min <= log2_first <= log2_max"):
        spec(log2_first=first)
