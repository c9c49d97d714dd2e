"""The self-test of quantizers: every sound one passes, and each kind of lie fails its own check."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte import formats, qtensor, rng
from halfbyte.auditing import SelfTest, chosen, published
from halfbyte.auditing.selftest import self_test
from halfbyte.kernels import reference
from halfbyte.ops import Plan
from halfbyte.quantizers import Quantizer, Spec, block
from halfbyte.recipes import Dgrad, Fprop, Recipe, Wgrad
from kernel_faults import replace_kernel

FORWARD = [
    hb.AbsMax(bits=4),
    hb.AbsMax(bits=8),
    hb.Lsq(),
    hb.Lsq(bits=3),
    hb.MinMax(),
    hb.MinMax(bits=3),
    hb.MinMax(bits=1),
    hb.MXFP4(),
    hb.MXFP4(scale_rule="ceil"),
    hb.MXFP4(scale_rule="even"),
    hb.MXFP4(scale_rule="rceil"),
    hb.MXFP4(scale_rule="quest"),
    hb.Nearest(fmt="fp4_e1m2"),
    hb.Nearest(fmt="fp4_e2m1"),
    hb.Nearest(fmt="fp8_e4m3"),
    hb.Nearest(fmt="fp8_e5m2"),
    hb.NVFP4(),
    hb.NVFP4(square=True),
    hb.NVFP4(four_over_six=True),
    hb.Pact(),
    hb.Pact(signed=None),
    hb.Pact(signed=True, bits=3),
    hb.Sawb(),
    hb.Sawb(levels=16),
    hb.Sawb(bits=2),
    hb.Sawb(ibm_shifted=True),
]
GRADIENTS = [
    hb.AbsMax(bits=4, rounding="stochastic"),
    hb.BitSplit(),
    hb.BitSplit(sampling="none"),
    hb.Luq(),
    hb.MXFP4(rounding="stochastic"),
    hb.MXFP4(rounding="stochastic", headroom=True),
    hb.NVFP4(rounding="stochastic"),
    hb.NVFP4(rounding="stochastic", headroom=True),
]
UNDER_LAYER_SCALE = [
    hb.Radix4(),
    hb.Radix4(phase=hb.Phase.ODD),
    hb.Radix4(rounding="stochastic"),
    hb.Nearest(fmt="fp4_e3m0"),
]


def results(*, forward: Spec | None = None, gradient: Spec | None = None, other: Spec | None = None) -> list[SelfTest]:
    """The self-test of a plan with that weight, and those gradients for dgrad and wgrad."""
    scaled = gradient in UNDER_LAYER_SCALE
    recipe = Recipe(
        name="one",
        fprop=Fprop(weight=forward),
        dgrad=Dgrad(grad_output=gradient, weight=None),
        wgrad=Wgrad(grad_output=other),
        grad_scale=hb.LayerGradScale() if scaled else None,
    )
    return self_test({"layer": Plan(recipe)})


def failures(tests: list[SelfTest]) -> dict[str, str]:
    """The checks that failed, with what they say."""
    return {test.check: test.detail for test in tests if not test.ok}


@pytest.mark.parametrize("spec", FORWARD, ids=str)
def test_a_sound_quantizer_passes(spec: Spec) -> None:
    """Every spec of an input or weight passes every check that applies to it."""
    found = results(forward=spec)
    assert failures(found) == {}
    assert {"formats", "packing", "nearest"} <= {test.check for test in found}


@pytest.mark.parametrize("spec", [*GRADIENTS, *UNDER_LAYER_SCALE], ids=str)
def test_a_sound_gradient_quantizer_passes(spec: Spec) -> None:
    """Every spec of a gradient passes; the stochastic ones are tested for their mean and for their seed."""
    found = results(gradient=spec)
    assert failures(found) == {}
    if spec.stochastic:
        assert {"unbiased", "seed acts"} <= {test.check for test in found}


def test_ms_eden_passes_through_its_rotation() -> None:
    """MS-EDEN is unbiased only over the random signs of its rotation, and passes the test that goes through it."""
    recipe = hb.RECIPES["quartet2"]
    found = self_test({"layer": Plan(recipe)})
    assert failures(found) == {}
    assert ("NVFP4(rounding=ms_eden)", "unbiased") in {(test.quantizer, test.check) for test in found}


def test_a_quantizer_is_tested_once() -> None:
    """Two layers under one recipe share their self-test."""
    plans = {"a": Plan(hb.RECIPES["ibm2020"]), "b": Plan(hb.RECIPES["ibm2020"])}
    found = [(test.quantizer, test.check) for test in self_test(plans)]
    assert len(found) == len(set(found))


def test_a_statistical_check_states_its_false_alarm() -> None:
    """What can fail by chance says how probable that is."""
    (test,) = [t for t in results(gradient=hb.Luq()) if t.check == "unbiased"]
    assert "false alarm 1e-09" in test.detail


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "fp4_e3m0_r4", "fp4_e3m0_r4_odd", "fp8_e4m3"])
def test_every_tie_is_among_the_chosen_numbers(name: str) -> None:
    """Each number at which rounding changes, and both of its neighbors in float32, are tried."""
    fmt = formats.get(name)
    tried = set(chosen.points(fmt, *fmt.saturate).tolist())
    borders = [threshold for threshold, _ in fmt.thresholds]
    if fmt.bits == 8:  # Of 127 levels not every one is tried.
        assert sum(float(border) in tried for border in borders) >= 15
        return
    for border in borders:
        exact = torch.tensor(float(border))
        around = (exact, exact.nextafter(torch.tensor(0.0)), exact.nextafter(torch.tensor(100.0)))
        assert {float(x) for x in (*around, *(-a for a in around))} <= tried


@pytest.mark.parametrize("name", sorted(formats.FORMATS))
def test_the_published_lists_are_those_of_our_formats(name: str) -> None:
    """Every format equals the list of its name."""
    assert published.table_error(formats.get(name)) == ""


def test_published_landmarks() -> None:
    """E4M3 ends at 448 and begins at 2^-9, E5M2 ends at 57344 and begins at 2^-16 (OCP FP8, Table 1)."""
    assert (published.LEVELS["fp8_e4m3"][-1], published.LEVELS["fp8_e4m3"][1]) == (448, 2**-9)
    assert (published.LEVELS["fp8_e5m2"][-1], published.LEVELS["fp8_e5m2"][1]) == (57344, 2**-16)
    assert [len(published.LEVELS[n]) for n in ("fp8_e4m3", "fp8_e5m2", "e8m0")] == [127, 124, 255]


# ------------------------------------------------------------------------------------------------------ lies


def test_a_wrong_table_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format whose largest value is 4 instead of 6 is not the published one."""
    values = tuple(max(min(value, 4.0), -4.0) for value in formats.fp4_e2m1.values)
    monkeypatch.setitem(vars(formats.fp4_e2m1), "values", values)
    assert "fp4_e2m1 has 13 different numbers, published are 15; [-6.0, 6.0] are in only one" in failures(
        results(forward=hb.Nearest(fmt="fp4_e2m1", scale="one"))
    )["formats"]  # fmt: skip


def test_a_table_with_too_many_codes_fails() -> None:
    """A format of 32 codes that calls itself by the name of a 4-bit one does not pass for it."""
    wide = replace(formats.logarithmic(2, exponent_bits=4), name="fp4_e3m0")
    assert published.table_error(wide).startswith("fp4_e3m0 has 31 different numbers, published are 15")


def test_packing_that_loses_codes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes whose halves are swapped on the way in give other codes on the way out."""
    real = qtensor._merge
    monkeypatch.setattr(qtensor, "_merge", lambda low, high, out: real(high, low, out))
    assert "codes of int4 do not survive packing" in failures(results(forward=hb.Sawb()))["packing"]


def scaled_before(factor: float) -> object:
    """An `encode` that rounds a multiple of what it is given."""
    real = reference.encode
    return lambda x, *args, **how: real(x * factor, *args, **how)


@pytest.mark.parametrize(
    "spec", [s for s in FORWARD if s not in (hb.MinMax(bits=1), hb.NVFP4(four_over_six=True))], ids=str
)
def test_rounding_that_is_not_nearest_fails(monkeypatch: pytest.MonkeyPatch, spec: Spec) -> None:
    """Whatever the spec, codes of numbers 5 % too large are not the nearest."""
    replace_kernel(monkeypatch, "encode", scaled_before(1.05))
    assert "nearest" in failures(results(forward=spec))


def test_ties_to_zero_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Radix 4 rounds ties away from zero; one unit in the last place less, and each tie goes to zero."""
    replace_kernel(monkeypatch, "encode", scaled_before(1 - 2.0**-24))
    found = failures(results(gradient=hb.Radix4()))["nearest"]
    assert "0.009765625 with scale 1 became 0 in fp4_e3m0_r4, the nearest is 0.015625" in found


def test_infinity_that_wraps_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinity that becomes zero instead of the last code."""
    real = reference.encode
    replace_kernel(monkeypatch, "encode", lambda x, *a, **how: real(x.nan_to_num(posinf=0, neginf=0), *a, **how))
    assert "infinities became" in failures(results(forward=hb.Sawb()))["nearest"]


def test_a_nan_that_becomes_a_number_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN that quietly becomes zero."""
    real = Quantizer.quantize_scaled
    kind = type(hb.AbsMax(bits=4).build())
    real = kind.quantize_scaled
    monkeypatch.setattr(kind, "quantize_scaled", lambda self, x, scale: real(self, x.nan_to_num(nan=0.0), scale))
    assert failures(results(forward=hb.AbsMax(bits=4)))["nearest"] == "a tensor with a NaN did not become NaN"


STOCHASTIC = [spec for spec in (*GRADIENTS, hb.Radix4(rounding="stochastic")) if not isinstance(spec, hb.BitSplit)]


def with_noise(change: object) -> object:
    """An `encode_stochastic` that changes its noise."""
    real = reference.encode_stochastic
    return lambda *args, noise, **how: real(*args, noise=change(noise), **how)  # type: ignore[operator]


@pytest.mark.parametrize("spec", STOCHASTIC, ids=str)
def test_rounding_that_only_looks_random_fails(monkeypatch: pytest.MonkeyPatch, spec: Spec) -> None:
    """Noise that is always one half is rounding to nearest: biased, and deaf to the seed."""
    replace_kernel(monkeypatch, "encode_stochastic", with_noise(lambda noise: torch.full_like(noise, 0.5)))
    found = failures(results(gradient=spec))
    assert {"unbiased", "seed acts"} <= set(found)
    assert found["seed acts"] == "two seeds give the same codes"


@pytest.mark.parametrize("spec", STOCHASTIC, ids=str)
def test_noise_beyond_the_neighbors_fails(monkeypatch: pytest.MonkeyPatch, spec: Spec) -> None:
    """Noise added before rounding, twice as wide as a gap, has the right mean and reaches beyond the neighbors."""
    real = reference.encode_stochastic

    def wide(x: Tensor, fmt: formats.Format, *, inv_scale: Tensor, noise: Tensor, **how: object) -> Tensor:
        z = x * inv_scale + (noise.view_as(x) - 0.5) * 2
        return real(z, fmt, inv_scale=torch.ones_like(inv_scale), noise=noise.flip(0), **how)  # type: ignore[arg-type]

    replace_kernel(monkeypatch, "encode_stochastic", wide)
    assert "codes are not one of the two numbers around" in failures(results(gradient=spec))["neighbors"]


def test_noise_in_one_half_of_its_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit splitting whose low part rounds up too often is not unbiased."""
    real = rng.Draw.uniform
    monkeypatch.setattr(rng.Draw, "uniform", lambda self, *args: real(self, *args) * 0.5 + 0.5)
    assert "standard errors off" in failures(results(gradient=hb.BitSplit(sampling="none")))["unbiased"]


def test_sampled_rows_without_their_weight_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are drawn and not divided by their probability make the estimate too small."""
    real = hb.BitSplit().build().parts.__func__

    def unweighted(self: object, *args: object, **how: object) -> object:
        return tuple(replace(q, block_scale=q.block_scale.sign()) for q in real(self, *args, **how))

    monkeypatch.setattr(type(hb.BitSplit().build()), "parts", unweighted)
    assert "standard errors off" in failures(results(gradient=hb.BitSplit()))["unbiased"]


def test_ms_eden_without_its_correction_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes rounded to nearest without the corrected scales shrink what they stand for."""

    def uncorrected(self: object, x: Tensor, *rest: object) -> object:
        return hb.NVFP4().build().encoded(x, *rest)

    monkeypatch.setattr(block._NvQuantizer, "_eden", uncorrected)
    found = failures(self_test({"layer": Plan(hb.RECIPES["quartet2"])}))
    assert "standard errors off" in found["unbiased"]


def test_a_scale_rule_that_is_another_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A floor that rounds up is not the floor rule."""
    real = reference.mx_scales
    replace_kernel(monkeypatch, "mx_scales", lambda amax, **how: real(amax * 2, **how))
    found = failures(results(forward=hb.MXFP4()))["scale rule"]
    assert found == "a block whose largest magnitude is 1 got the scale 2^-1; the rule gives 2^-2"


@pytest.mark.parametrize(
    "spec", [hb.AbsMax(bits=4), hb.Luq(), hb.Nearest(fmt="fp4_e2m1"), hb.Sawb(bits=2), hb.MinMax()], ids=str
)
def test_a_range_without_its_negative_end_fails(monkeypatch: pytest.MonkeyPatch, spec: Spec) -> None:
    """A scale from the largest number, as if it were the largest magnitude, is found for every spec that measures."""
    real = reference.value_range
    replace_kernel(monkeypatch, "value_range", lambda x: (real(x)[1].clamp_max(0), real(x)[1]))
    plan = {"gradient": spec} if spec.stochastic else {"forward": spec}
    if isinstance(spec, hb.Sawb):  # Its clip comes from moments: the range only says whether a NaN is there.
        assert failures(results(**plan)) == {}
        return
    assert "scale" in failures(results(**plan))


def test_a_layer_scale_without_the_negative_end_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient scale of a layer follows the largest magnitude, not the largest number."""
    real = reference.value_range
    replace_kernel(monkeypatch, "value_range", lambda x: (real(x)[1], real(x)[1]))
    assert "the scale of [-4, 1] is" in failures(results(gradient=hb.Radix4()))["scale"]


def test_two_phases_that_are_one_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even and odd phase with the same levels cancel nothing."""
    monkeypatch.setattr(hb.Radix4, "formats", property(lambda _: (formats.fp4_e3m0_r4,)))
    found = results(gradient=hb.Radix4(), other=hb.Radix4(phase=hb.Phase.ODD))
    assert "half the even one of twice it" in failures(found)["two phases"]


def test_two_phases_that_do_not_cancel_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds that lie too low make both phases round up, though the odd one is still half the even one."""
    replace_kernel(monkeypatch, "encode", scaled_before(1.3))
    found = results(gradient=hb.Radix4(), other=hb.Radix4(phase=hb.Phase.ODD))
    assert failures(found)["two phases"].startswith("both phases round up")


def test_two_sound_phases_cancel() -> None:
    """The pair of two-phase rounding is tested as a pair, and passes."""
    found = results(gradient=hb.Radix4(), other=hb.Radix4(phase=hb.Phase.ODD))
    assert failures(found) == {}
    assert [test.quantizer for test in found if test.check == "two phases"] == ["Radix4() with Radix4(phase=ODD)"]


def test_a_quantizer_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in a check is a failed check with its text."""

    def encode(*_: object, **__: object) -> Tensor:
        raise ImportError("no kernel here")

    replace_kernel(monkeypatch, "encode", encode)
    assert failures(results(forward=hb.Sawb()))["nearest"] == "it raised ImportError: no kernel here"
