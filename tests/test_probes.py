"""Probes: what they measure, held against numbers worked by hand, and that they change nothing."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte import probes
from halfbyte.errors import ConversionError, SpecError
from halfbyte.recipes import Dgrad, Fprop, Recipe, Wgrad


def everywhere(model: nn.Module, recipe: str | Recipe) -> nn.Module:
    """The model with every layer under the recipe, whatever the recipe's own rules."""
    return hb.convert(model, recipe, [hb.Rule(recipe=recipe)])


def network() -> nn.Sequential:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def step(model: nn.Module, seed: int = 0) -> None:
    """One forward and backward pass."""
    data = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    model(data).square().mean().backward()


def row(probe: probes.Probe, slot: str, layer: str = "0") -> probes.ProbeRow:
    """The latest row of a slot."""
    return [r for r in probe.rows if (r.slot, r.layer) == (slot, layer)][-1]


@pytest.mark.parametrize("recipe", ["ibm2020", "luq_smp2", "nvfp4", "int4_hq_lss", "quartet2"])
def test_a_probe_changes_no_bit(recipe: str) -> None:
    """Two training steps end in the same parameters, gradients and state with a probe and without."""
    results = []
    for probed in (False, True):
        model = everywhere(network(), recipe)
        probe = probes.attach(model) if probed else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in (0, 1):
            optimizer.zero_grad()
            step(model, seed)
            optimizer.step()
        assert probe is None or probe.rows
        results.append({**model.state_dict(), **{n: p.grad for n, p in model.named_parameters()}})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def hand_worked(x: list[float]) -> probes.ProbeRow:
    """The row of an input under PACT with clip 15, whose sixteen codes stand for 0 to 15."""
    recipe = Recipe(name="hand", fprop=Fprop(input=hb.Pact(clip=15.0), weight=hb.Sawb()))
    model = everywhere(nn.Linear(len(x), 2), recipe)
    with probes.attach(model) as probe:
        model(torch.tensor([x])).sum().backward()
    return row(probe, "fprop.input", "")


def test_rates_and_histogram_by_hand() -> None:
    """Of 0, 0.25, 3, 20 and 15 one of four numbers vanishes, one of five is cut off; the codes are 0, 0, 3, 15, 15."""
    found = hand_worked([0.0, 0.25, 3.0, 20.0, 15.0])
    assert found.underflow_rate == 1 / 4
    assert found.saturation_rate == 1 / 5
    assert found.histogram == ((2, 0, 0, 1, *(0,) * 11, 2),)
    assert found.formats == ("uint4",)


def test_error_measures_by_hand() -> None:
    """3.25 and 4 become 3 and 4: SQNR of 26.5625 to 0.0625, bias -0.25 / 7.25, cosine 25.75 / sqrt(26.5625 25)."""
    found = hand_worked([3.25, 4.0])
    assert found.sqnr_db == pytest.approx(10 * math.log10(26.5625 / 0.0625), rel=1e-12)
    assert found.bias == pytest.approx(-0.25 / 7.25, rel=1e-12)
    assert found.cosine == pytest.approx(25.75 / math.sqrt(26.5625 * 25), rel=1e-12)
    assert found.log2_scale == 0.0
    assert found.gradient_to_noise is None


def test_what_loses_nothing_has_infinite_sqnr() -> None:
    """Whole numbers within the clip have no noise and a cosine of one."""
    found = hand_worked([3.0, 4.0])
    assert (found.sqnr_db, found.bias, found.cosine) == (math.inf, 0.0, 1.0)


def gradient_row(gradient: list[float], recipe: Recipe) -> probes.ProbeRow:
    """The dgrad row of a layer whose output gets that gradient."""
    model = everywhere(nn.Linear(3, len(gradient)), recipe)
    with probes.attach(model) as probe:
        model(torch.randn(1, 3, requires_grad=True)).backward(torch.tensor([gradient]))
    return row(probe, "dgrad.grad_output", "")


def radix4(**scale: int) -> Recipe:
    """Radix-4 gradients under a layer scale, forward in floating point but for the weight."""
    return Recipe(
        name="r4",
        fprop=Fprop(weight=hb.Sawb()),
        dgrad=Dgrad(grad_output=hb.Radix4()),
        wgrad=Wgrad(grad_output=hb.Radix4()),
        grad_scale=hb.LayerGradScale(**scale),
    )


def test_gradient_to_noise_by_hand() -> None:
    """3 and 4 become 4 and 4 in radix 4: |g| = 5, noise 1, so the ratio is 5 / sqrt(3)."""
    found = gradient_row([3.0, 4.0], radix4(log2_first=0))
    assert found.gradient_to_noise == pytest.approx(5 / math.sqrt(3), rel=1e-12)
    assert found.direction == "backward"


def test_log2_scale_is_the_layer_scale() -> None:
    """The exponent that a probe shows for a gradient is the one that the layer's scale holds."""
    assert gradient_row([3.0, 4.0], radix4(log2_first=7)).log2_scale == 7.0


@pytest.mark.parametrize("gain", [1.0, 1.155, 4.0])
def test_a_gain_is_not_in_what_is_cut_off_nor_in_the_scale(gain: float) -> None:
    """Of 3, 100 and 300 under a scale of one, two lie beyond the largest level, 64, whatever they are multiplied by."""
    base = radix4(log2_first=0, log2_max=0)
    found = gradient_row([3.0, 100.0, 300.0], replace(base, dgrad=replace(base.dgrad, gain=gain)))
    assert (found.saturation_rate, found.log2_scale) == (2 / 3, 0.0)


def test_a_gradient_that_vanishes_has_cosine_zero() -> None:
    """A gradient far below the smallest level underflows as a whole, and its direction is lost."""
    found = gradient_row([1e-9, -1e-9], radix4(log2_first=0, log2_max=0))
    assert (found.underflow_rate, found.cosine, found.bias) == (1.0, 0.0, -1.0)


def test_split_gradients_are_measured_on_the_sum_of_their_parts() -> None:
    """98, 87, 17 become 14 (6, 6, 1) + (6, 3, 3) = 90, 87, 17: an error of 8 in one of three, which was cut off."""
    recipe = Recipe(name="split", fprop=Fprop(weight=hb.Sawb()), dgrad=Dgrad(grad_output=hb.BitSplit(sampling="none")))
    found = gradient_row([98.0, 87.0, 17.0], recipe)
    assert found.formats == ("int4", "int4")
    assert [[c for c, n in enumerate(counts) if n] for counts in found.histogram] == [[1, 6], [3, 6]]
    assert found.sqnr_db == pytest.approx(10 * math.log10((98**2 + 87**2 + 17**2) / 8**2), rel=1e-12)
    assert found.saturation_rate == 1 / 3


def test_rows_that_are_not_drawn_are_not_cut_off() -> None:
    """With leverage sampling dropped rows become zero, but only what is beyond 90 / 98 of the largest is cut off."""
    recipe = Recipe(name="split", fprop=Fprop(weight=hb.Sawb()), dgrad=Dgrad(grad_output=hb.BitSplit()))
    model = everywhere(nn.Linear(3, 8), recipe)
    gradient = torch.randn(64, 8)
    with probes.attach(model) as probe:
        model(torch.randn(64, 3, requires_grad=True)).backward(gradient)
    found = row(probe, "dgrad.grad_output", "")
    cut_off = (gradient.abs() > gradient.abs().max() * 90 / 98).double().mean()
    assert found.saturation_rate == float(cut_off)
    assert found.underflow_rate > 0.05


def test_samples_of_a_mean_show_the_scale_of_one() -> None:
    """Two samples, each with half of the scale, are shown with the scale that one quantization has: amax / 8."""
    recipe = Recipe(name="smp", fprop=Fprop(weight=hb.Sawb()), wgrad=Wgrad(grad_output=hb.Luq(), samples=2))
    model = everywhere(nn.Linear(3, 2), recipe)
    with probes.attach(model) as probe:
        model(torch.randn(1, 3)).backward(torch.tensor([[4.0, -1.0]]))
    assert row(probe, "wgrad.grad_output", "").log2_scale == 1.0  # 4 / 8 is 2^-1.


def test_the_histogram_counts_every_time_step() -> None:
    """A recurrent layer's row is over all time steps: as many codes as the states have numbers."""
    model = everywhere(nn.LSTM(5, 6), "ibm2020")
    with probes.attach(model) as probe:
        model(torch.randn(7, 3, 5))[0].sum().backward()
    assert sum(row(probe, "fprop.input", "hh_l0").histogram[0]) == 7 * 3 * 6
    assert sum(row(probe, "fprop.weight", "hh_l0").histogram[0]) == 24 * 6


def test_every_second_step() -> None:
    """`every=2` looks at the first step from attaching on, and at each second one after it."""
    model = everywhere(network(), "ibm2020")
    step(model)
    probe = probes.attach(model, every=2)
    for seed in range(5):
        step(model, seed)
    assert sorted({r.step for r in probe.rows}) == [2, 4, 6]


def test_evaluation_is_not_looked_at() -> None:
    """A forward pass in `eval` leaves no row."""
    model = everywhere(network(), "ibm2020").eval()
    with probes.attach(model) as probe:
        model(torch.randn(2, 12))
    assert probe.rows == []
    assert str(probe) == "No training step has been seen yet."


def test_several_probes_at_once() -> None:
    """Two probes see the same; one that is detached keeps its rows, and the other goes on."""
    model = everywhere(network(), "ibm2020")
    first, second = probes.attach(model), probes.attach(model)
    step(model)
    assert first.rows == second.rows
    first.detach()
    first.detach()
    step(model)
    assert {r.step for r in first.rows} == {1}
    assert {r.step for r in second.rows} == {1, 2}
    second.detach()
    assert all(plan.watcher is None for plan in (model[0].plan, model[2].plan))


def test_a_copy_is_not_watched() -> None:
    """A copy of a probed model has no probe, and the original keeps its own."""
    model = everywhere(network(), "ibm2020")
    probe = probes.attach(model)
    copied = copy.deepcopy(model)
    step(copied)
    assert probe.rows == []
    assert copied[0].plan.watcher is None
    step(model)
    assert probe.rows


def test_the_table_shows_direction_beside_names() -> None:
    """The table says what its arrows mean and has a line for each operand of the latest step."""
    model = everywhere(network(), "ibm2020")
    with probes.attach(model) as probe:
        step(model)
        step(model)
    lines = str(probe).splitlines()
    assert lines[0].startswith("step 2 (→ forward, ← backward)")
    assert [line.split()[:3] for line in lines[1:]] == [
        ["→", "0", "fprop.input"],
        ["→", "0", "fprop.weight"],
        ["→", "2", "fprop.input"],
        ["→", "2", "fprop.weight"],
        ["←", "2", "dgrad.grad_output"],
        ["←", "2", "wgrad.grad_output"],
        ["←", "0", "dgrad.grad_output"],
        ["←", "0", "wgrad.grad_output"],
    ]


def test_rows_as_json() -> None:
    """All rows are valid JSON; what JSON cannot hold is a string."""
    recipe = Recipe(name="hand", fprop=Fprop(input=hb.Pact(clip=15.0), weight=hb.Sawb()))
    model = everywhere(nn.Linear(2, 2), recipe)
    with probes.attach(model) as probe:
        model(torch.tensor([[3.0, 4.0]])).sum().backward()
    found = json.loads(probe.to_json(), parse_constant=pytest.fail)
    assert [entry["slot"] for entry in found] == ["fprop.input", "fprop.weight"]
    assert found[0]["sqnr_db"] == "inf"
    assert found[0]["histogram"] == [[0, 0, 0, 1, 1, *(0,) * 11]]


def test_a_model_without_plans_is_refused_with_the_cure() -> None:
    """Nothing is quantized in a model that was not converted, and the error says what to call."""
    with pytest.raises(ConversionError, match=r"Call halfbyte.convert\(model, recipe=...\) first"):
        probes.attach(nn.Linear(2, 2))


def test_every_below_one_is_refused() -> None:
    """`every=0` would look at no step."""
    with pytest.raises(SpecError, match=r"attach\(every=0\) was asked for; 1 or more is possible"):
        probes.attach(everywhere(network(), "ibm2020"), every=0)
