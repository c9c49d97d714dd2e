"""Uniform grids whose range comes from the data: `MinMax` and `Sawb`."""

from __future__ import annotations

import math

import pytest
import torch

from halfbyte import MinMax, QTensor, Sawb, oracle, quantize
from halfbyte.errors import NonFiniteWarning, SpecError
from halfbyte.formats import int4, int8
from halfbyte.qtensor import unpack_bits
from halfbyte.quantizers.linear import SAWB_COEFFICIENTS, SAWB_REFIT

RANGES = [(0.2, 0.9), (0.1, 0.7), (0.0, 1.0), (-1.0, 1.0), (-3.0, -1.0), (-1e-4, 3e-4), (1e6, 1e6 + 1), (-5e7, 2e8)]

# A worked example: the formulas of fms-model-optimizer (fms_mo/quant/quantizers.py) on twelve weights.
GOLDEN_W = [-1.2, -0.7, -0.31, -0.05, 0, 0.02, 0.11, 0.25, 0.4, 0.66, 0.9, 1.5]

# fms-model-optimizer's sawb_params and sawb_params_code, and our refit where they have none: levels -> (c1, c2).
COEFFICIENTS = {
    3: (2.6, -1.71),  # code 103
    4: (3.12, -2.064),
    7: (7.015, -6.367),  # section 1.5, zero-aligned 3 bits
    8: (7.509, -6.892),
    15: (12.035, -12.03),  # code 403
    16: (12.68, -12.80),
    31: (16.419, -17.084),  # section 1.5, zero-aligned 5 bits
    32: (17.74, -18.64),
    63: (21.139, -22.611),  # section 1.5
    64: (21.176, -22.645),  # section 1.5
    127: (28.24, -30.81),  # code 703
    128: (25.594, -27.827),  # section 1.5
    255: (31.76, -35.04),  # code 803
    256: (31.76, -35.04),
}


def integers(q: QTensor) -> list[int]:
    """The codes as the whole numbers that they stand for."""
    return [int(q.format.integers[c]) for c in q.codes().flatten().tolist()]


def float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).float().item()


def test_minmax_maps_the_unit_interval_to_minus_eight_to_seven():
    """The article's example: [0, 1] becomes -8...7, and 0.3 becomes -4, because 0.3 * 15 - 8 = -3.5 and 4.5 is a tie.

    In float32 0.3 is 0.300000012 and its product with 15 rounds to 4.5 exactly, which goes to the even 4: 4 - 8 = -4.
    """
    assert integers(quantize(torch.tensor([0.0, 0.3, 1.0]), MinMax())) == [-8, -4, 7]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_minmax_gives_both_ends_the_extreme_codes_and_reproduces_them(low, high):
    """The smallest element is reproduced to the bit, the largest to one float32 rounding of the scale.

    x_hat of the lowest code is scale * (low / scale) in float64. That of the highest is low + 15 * scale, and scale is
    rounded to float32: half a unit in 2^24 of the span.
    """
    x = torch.linspace(low, high, 41)
    q = quantize(x, MinMax())
    x_hat = q.dequantize(torch.float64)
    span = x.max().double() - x.min().double()
    assert (integers(q)[0], integers(q)[-1]) == (-8, 7)
    assert x_hat[0].float() == x.min()
    assert (x_hat[-1] - x.max().double()).abs() <= 2.0**-24 * span + 1e-15 * x.abs().max()


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.9), (0.1, 0.7), (0.0, 1.0), (0.0, 15.0), (1e6, 1e6 + 1)])
def test_minmax_meets_both_ends_to_the_bit(low, high):
    """The unrounded zero point makes both ends exact for the article's ranges, where a rounded one would miss them."""
    x = torch.linspace(low, high, 41)
    x_hat = quantize(x, MinMax()).dequantize()
    assert x_hat.min() == x.min()
    assert x_hat.max() == x.max()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_minmax_errs_by_half_a_step_at_most(low, high, bits):
    """Within the range |x - x_hat| <= scale / 2, and a little for three roundings to float32.

    The difference x - low, the reciprocal and the scale are rounded once each: at most 2^-24 of the span each, and the
    product may thereby fall on the other side of a tie: 4 * 2^-24 of the span covers them.
    """
    x = torch.linspace(low, high, 257)
    q = quantize(x, MinMax(bits=bits))
    span = (x.max().double() - x.min().double()).item()
    worst = (q.dequantize(torch.float64) - x.double()).abs().max().item()
    assert worst <= q.scale.item() / 2 + 4 * 2.0**-24 * span


@pytest.mark.parametrize("bits", range(1, 9))
def test_minmax_uses_every_code_of_its_width(bits):
    """A fine ramp hits all of -2^(bits-1) ... 2^(bits-1) - 1 and nothing else, in INT4 up to four bits, else INT8."""
    q = quantize(torch.linspace(-2.0, 5.0, 4099), MinMax(bits=bits))
    assert q.format is (int4 if bits <= 4 else int8)
    assert sorted(set(integers(q))) == list(range(-(1 << (bits - 1)), 1 << (bits - 1)))


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_minmax_codes_equal_the_oracle(bits):
    """Codes are clamp(rint((x - min) * inv_scale) - 2^(bits-1)) with inv_scale the rounded (2^bits - 1) / span."""
    x = torch.cat([torch.randn(300), torch.tensor([-3.5, 4.25])])
    low, high = x.min().item(), x.max().item()
    steps, bottom = (1 << bits) - 1, -(1 << (bits - 1))
    q = quantize(x, MinMax(bits=bits))
    expected = oracle.quantize(
        x.tolist(),
        q.format,
        inv_scale=float32(steps / (high - low)),
        low=low,
        offset=bottom,
        code_range=(bottom, -1 - bottom),
    )
    assert q.codes().tolist() == expected
    assert q.scale.item() == float32((high - low) / steps)


@pytest.mark.parametrize("value", [3.0, -0.1, 0.1, 1e-30, -7e20])
def test_minmax_reproduces_a_constant_tensor(value):
    """Where all elements are equal there is no span; the constant comes back to the bit."""
    x = torch.full((5,), value)
    assert torch.equal(quantize(x, MinMax()).dequantize(), x)


@pytest.mark.parametrize("spec", [MinMax(), MinMax(bits=8), Sawb(), Sawb(levels=16), Sawb(ste="clipped")], ids=str)
def test_all_zero_comes_back_as_zero(spec):
    """An all-zero tensor is reproduced, with a finite scale, under either grid."""
    q = quantize(torch.zeros(7), spec)
    assert torch.equal(q.dequantize(), torch.zeros(7))
    assert q.scale.isfinite()


@pytest.mark.parametrize("spec", [MinMax(), Sawb(), Sawb(levels=16)], ids=str)
def test_empty_tensors_keep_their_shape(spec):
    """An empty tensor gives an empty `QTensor` of its shape and no byte of codes."""
    q = quantize(torch.empty(0, 3), spec)
    assert q.dequantize().shape == (0, 3)
    assert q.qdata.numel() == 0


def test_minmax_of_one_number_reproduces_it():
    """A tensor of shape () is its own range."""
    q = quantize(torch.tensor(-0.3), MinMax())
    assert q.shape == ()
    assert q.dequantize() == torch.tensor(-0.3)


def test_minmax_eval_range_is_the_running_mean_of_the_training_ranges():
    """With momentum 0.5, [0, 1] then [-1, 3] leave [-0.5, 2], which eval cuts to and spreads over 15 steps."""
    quantizer = MinMax(momentum=0.5).build()
    quantizer.quantize(torch.tensor([0.0, 1.0]), observe=True)
    quantizer.quantize(torch.tensor([-1.0, 3.0]), observe=True)
    quantizer.eval()
    q = quantizer.quantize(torch.tensor([-9.0, -0.5, 2.0, 9.0])).q
    assert q.dequantize().tolist() == [-0.5, -0.5, 2.0, 2.0]
    assert q.scale.item() == float32(2.5 / 15)


@pytest.mark.parametrize(("momentum", "low"), [(0.0, -1.0), (0.5, -0.5), (0.75, -0.25)])
def test_minmax_momentum_weighs_the_past(momentum, low):
    """running = momentum * running + (1 - momentum) * new: after 0 and -1 it is momentum - 1; 0 keeps the last."""
    quantizer = MinMax(momentum=momentum).build()
    for batch in ([0.0, 1.0], [-1.0, 1.0]):
        quantizer.quantize(torch.tensor(batch), observe=True)
    assert quantizer.low.item() == low


def test_minmax_training_batches_use_their_own_range():
    """In training each tensor is re-scaled by its own range, whatever ran before it."""
    quantizer = MinMax().build()
    quantizer.quantize(torch.tensor([-100.0, 100.0]), observe=True)
    for observe in (True, False):
        q = quantizer.quantize(torch.tensor([0.0, 0.3, 1.0]), observe=observe).q
        assert integers(q) == [-8, -4, 7]


def test_minmax_range_moves_only_when_observed():
    """Neither eval nor an unobserved training forward changes the running range."""
    quantizer = MinMax().build()
    quantizer.quantize(torch.tensor([0.0, 1.0]), observe=True)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.quantize(torch.tensor([-7.0, 7.0]))
    quantizer.eval()
    quantizer.quantize(torch.tensor([-7.0, 7.0]))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_minmax_running_range_ignores_a_broken_batch():
    """A training batch with an infinity is counted and leaves the running range as it was."""
    quantizer = MinMax().build()
    quantizer.quantize(torch.tensor([0.0, 1.0]), observe=True)
    with pytest.warns(NonFiniteWarning):
        quantizer.quantize(torch.tensor([0.0, math.inf]), observe=True)
    assert (quantizer.low.item(), quantizer.high.item(), quantizer.nonfinite.item()) == (0.0, 1.0, 1)


def test_minmax_eval_before_any_training_uses_the_tensor_itself():
    """What training never saw is taken from the tensor."""
    quantizer = MinMax().build().eval()
    assert integers(quantizer.quantize(torch.tensor([0.0, 0.3, 1.0])).q) == [-8, -4, 7]


def test_minmax_range_survives_a_state_dict():
    """A reloaded quantizer evaluates as the saved one does."""
    quantizer, other = MinMax().build(), MinMax().build()
    quantizer.quantize(torch.tensor([-2.0, 3.0]), observe=True)
    other.load_state_dict(quantizer.state_dict())
    x = torch.linspace(-4, 4, 50)
    assert torch.equal(other.eval().quantize(x).q.dequantize(), quantizer.eval().quantize(x).q.dequantize())


@pytest.mark.parametrize("spec", [MinMax(), Sawb()], ids=str)
def test_gradient_passes_unchanged(spec):
    """The straight-through estimator hands on the very gradient, and there is no clip to learn."""
    quantizer = spec.build()
    quantized = quantizer.quantize(torch.randn(50) * 9, observe=True, differentiable=True)
    grad = torch.randn(50)
    passed, clip = quantizer.backward(grad.clone(), *quantized)
    assert torch.equal(passed, grad)
    assert clip is None
    assert quantized.saved == ()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bits": 0}, "1 to 8 bits"),
        ({"bits": 9}, "1 to 8 bits"),
        ({"momentum": 1.0}, "not 1"),
        ({"momentum": -0.1}, "0 up to"),
    ],
)
def test_minmax_refuses_what_means_nothing(fields, text):
    """Each field is checked at birth, and the text says what is possible."""
    with pytest.raises(SpecError, match=text):
        MinMax(**fields)


def test_sawb_coefficients_are_those_of_the_sources():
    """The table holds IBM's values where they exist and the refit elsewhere, no more."""
    assert SAWB_COEFFICIENTS == COEFFICIENTS
    assert sorted(SAWB_REFIT) == [7, 31, 63, 64, 128]


@pytest.mark.parametrize(
    ("levels", "clip", "expected"),
    [
        # x_hat of the worked example divided by clip / 7, and by clip / 15: -1.269865 = -4/7 of the clip, and so on.
        (15, 2.2222635333, [-4, -2, -1, 0, 0, 0, 0, 1, 1, 2, 3, 5]),
        (16, 2.2776849411, [-7, -5, -3, -1, 1, 1, 1, 1, 3, 5, 5, 9]),
    ],
)
def test_sawb_golden_levels(levels, clip, expected):
    """The worked example gives its clip, to float32, and its levels exactly."""
    quantizer = Sawb(levels=levels).build()
    q = quantizer.quantize(torch.tensor(GOLDEN_W), observe=True).q
    # Half a float32 unit at 2.2 and half a unit of the golden value's last digit.
    assert abs(quantizer.last_clip.item() - clip) <= 2.0**-23 + 5e-11
    found = integers(q) if levels == 15 else [2 * i + 1 for i in integers(q)]
    assert found == expected


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (15, [-1.269865, -0.634932, -0.317466, 0, 0, 0, 0, 0.317466, 0.317466, 0.634932, 0.952399, 1.587331]),
        (
            16,
            [-1.06292, -0.759228, -0.455537, -0.151846, *[0.151846] * 4, 0.455537, 0.759228, 0.759228, 1.366611],
        ),
    ],
)
def test_sawb_golden_dequantized_vector(levels, expected):
    """The dequantized worked example, to its six digits (and one float32 rounding)."""
    found = quantize(torch.tensor(GOLDEN_W), Sawb(levels=levels)).dequantize(torch.float64)
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 5e-7 + 2.0**-23


@pytest.mark.parametrize(
    ("bits", "levels", "clip"),
    # c1 - |c2| * sqrt(2 / pi): a unit Gaussian has the mean square 1 and the mean magnitude sqrt(2 / pi).
    [
        (2, 4, 1.473),
        (2, 3, 1.236),
        (3, 8, 2.010),
        (4, 16, 2.467),
        (4, 15, 2.436),
        (5, 32, 2.867),
        (7, 127, 3.657),
        (8, 256, 3.802),
        (8, 255, 3.802),
    ],
)
def test_sawb_clip_of_a_gaussian(bits, levels, clip):
    """On the quantiles of a unit Gaussian every IBM pair of coefficients gives c1 - |c2| * sqrt(2 / pi).

    200,000 midpoint quantiles have a mean square short of 1 by about 1e-5, which the coefficients raise to 2e-4.
    """
    w = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    quantizer = Sawb(bits=bits, levels=levels).build()
    quantizer.quantize(w, observe=True)
    assert abs(quantizer.last_clip.item() - clip) <= 5e-4 + 2e-4


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("aligned", [True, False])
def test_sawb_clip_is_not_below_the_magnitude_of_two_valued_weights(bits, aligned):
    """Weights of one magnitude c: the formula gives (c1 - |c2|) c, next to zero or below it; the clip is at least c."""
    levels = (1 << bits) - int(aligned)
    quantizer = Sawb(bits=bits, levels=levels).build()
    quantizer.quantize(torch.tensor([0.5, -0.5, -0.5, 0.5]), observe=True)
    c1, c2 = COEFFICIENTS[levels]
    expected = 0.5 * max(1.0, c1 + c2)
    assert quantizer.last_clip == torch.tensor(expected)


@pytest.mark.parametrize("bits", range(3, 9))
def test_sawb_guard_reproduces_two_valued_weights(bits):
    """Where the guard acts, weights of one magnitude come back to one float32 rounding of the scale."""
    w = torch.tensor([0.3, -0.3, -0.3])
    x_hat = quantize(w, Sawb(bits=bits, levels=1 << bits)).dequantize(torch.float64)
    assert (x_hat - w.double()).abs().max() <= 2.0**-24 * 0.3


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("aligned", [True, False])
def test_sawb_uses_as_many_levels_as_it_says(bits, aligned):
    """A fine ramp far beyond the clip hits exactly `levels` levels, symmetric about zero, with a zero if odd."""
    levels = (1 << bits) - int(aligned)
    x_hat = quantize(torch.linspace(-3, 3, 6001), Sawb(bits=bits, levels=levels), scale=4 / levels).dequantize()
    found = x_hat.unique()
    assert found.numel() == levels
    assert torch.equal(found, -found.flip(0))
    assert (0.0 in found.tolist()) is aligned


@pytest.mark.parametrize(("shifted", "expected"), [(True, [1, 1, -1, 3, -3]), (False, [0, 2, 0, 2, -2])])
def test_sawb_ties_go_as_the_option_says(shifted, expected):
    """7 w / clip at 0.5, 1.5, -0.5, 2.5, -2.5 exactly (clip 7): IBM's shifted form rounds 7.5 and 8.5 to 8, 6.5 to 6.

    As fms-model-optimizer rounds; 9.5 goes to 10 and 4.5 to 4 by the same rule.
    """
    w = torch.tensor([0.5, 1.5, -0.5, 2.5, -2.5])
    assert integers(quantize(w, Sawb(ibm_shifted=shifted), scale=1.0)) == expected


def test_sawb_shift_matters_at_ties_only():
    """Away from ties the shifted and the direct form give the same codes."""
    w = (torch.arange(-900, 900) + 0.25) / 128
    assert torch.equal(quantize(w, Sawb(ibm_shifted=True), scale=1.0).codes(), quantize(w, Sawb(), scale=1.0).codes())


def test_sawb_codes_equal_the_oracle():
    """With the stated inv_scale = 7 / clip the codes are the oracle's; the clip is the formula's in float64."""
    w = torch.randn(500) * 0.05
    clip = float32(12.035 * w.double().square().mean().sqrt().item() - 12.03 * w.double().abs().mean().item())
    q = quantize(w, Sawb())
    assert q.codes().tolist() == oracle.quantize(w.tolist(), int4, inv_scale=float32(7 / clip), code_range=(-7, 7))
    assert q.scale.item() == float32(clip / 7)


@pytest.mark.parametrize("levels", [15, 16])
def test_sawb_eval_uses_the_clip_of_the_last_training_forward(levels):
    """In eval other weights are quantized with the clip that the last observed ones had, and it does not move."""
    quantizer = Sawb(levels=levels).build()
    quantizer.quantize(torch.randn(100) * 5, observe=True)
    trained = quantizer.quantize(torch.randn(100), observe=True).q.scale
    quantizer.eval()
    first = quantizer.quantize(torch.randn(100) * 30).q.scale
    assert torch.equal(first, trained)
    assert torch.equal(quantizer.quantize(torch.randn(100) * 0.1).q.scale, trained)


def test_sawb_training_forward_uses_the_present_weights():
    """In training, observed or not, doubled weights get a doubled scale and the same codes."""
    quantizer, w = Sawb().build(), torch.randn(100)
    quantizer.quantize(w * 77, observe=True)
    first = quantizer.quantize(w, observe=True).q
    for observe in (True, False):
        second = quantizer.quantize(2 * w, observe=observe).q
        assert torch.equal(second.scale, 2 * first.scale)
        assert torch.equal(second.codes(), first.codes())


def test_sawb_clip_moves_only_when_observed():
    """An unobserved forward leaves the clip for eval alone, and so does a broken one."""
    quantizer = Sawb().build()
    quantizer.quantize(torch.randn(100), observe=True)
    clip = quantizer.last_clip.clone()
    quantizer.quantize(torch.randn(100) * 9)
    with pytest.warns(NonFiniteWarning):
        quantizer.quantize(torch.tensor([1.0, math.nan]), observe=True)
    assert torch.equal(quantizer.last_clip, clip)


def test_sawb_clipped_gradient_stops_strictly_outside():
    """ste="clipped" zeroes the gradient where |w| > clip and passes it where |w| equals the clip, of either sign."""
    quantizer = Sawb(ste="clipped").build()
    quantizer.last_clip.fill_(0.75)
    quantizer.eval()
    clip = torch.tensor(0.75)
    beyond = torch.nextafter(clip, torch.tensor(1.0))
    w = torch.stack([-beyond, -clip, torch.tensor(0.0), clip, beyond])
    quantized = quantizer.quantize(w, differentiable=True)
    assert unpack_bits(quantized.saved[0], 5).tolist() == [False, True, True, True, False]
    grad, _ = quantizer.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), *quantized)
    assert grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


def test_sawb_clipped_gradient_saves_a_bit_a_weight():
    """The mask of ste="clipped" is packed eight weights to a byte, and is not kept where no gradient is asked for."""
    quantizer = Sawb(ste="clipped").build()
    w = torch.randn(1000)
    assert quantizer.quantize(w, differentiable=True).saved[0].nbytes == 125
    assert quantizer.quantize(w).saved == ()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bits": 1}, "2 to 8 bits"),
        ({"bits": 9, "levels": None}, "2 to 8 bits"),
        ({"levels": 14}, "15 or 16 levels are possible with 4 bits"),
        ({"bits": 3, "levels": 15}, "7 or 8 levels are possible with 3 bits"),
        ({"ste": "none"}, "'identity' or 'clipped' is possible"),
        ({"levels": 16, "ibm_shifted": True}, "no ties at 0"),
    ],
)
def test_sawb_refuses_what_means_nothing(fields, text):
    """Each field is checked at birth, and the text says what is possible."""
    with pytest.raises(SpecError, match=text):
        Sawb(**fields)


@pytest.mark.parametrize("bits", range(2, 9))
def test_sawb_without_a_level_count_has_an_exact_zero(bits):
    """levels=None means 2^bits - 1."""
    assert Sawb(bits=bits, levels=None).levels == (1 << bits) - 1


@pytest.mark.parametrize("threads", [1, 2])
def test_sawb_clip_is_the_same_for_any_number_of_threads(threads):
    """The moments of a large weight are summed in a fixed order: the clip equals that of its rows summed in float64."""
    before = torch.get_num_threads()
    w = torch.randn(700_001)
    try:
        torch.set_num_threads(threads)
        first = quantize(w, Sawb()).scale
        torch.set_num_threads(3 - threads)
        assert torch.equal(quantize(w, Sawb()).scale, first)
    finally:
        torch.set_num_threads(before)


def test_sawb_takes_its_levels_from_the_bits() -> None:
    """Without a count of levels zero is one of them: 2^bits - 1."""
    assert [Sawb(bits=bits).levels for bits in (2, 3, 4, 8)] == [3, 7, 15, 255]


def test_sawb_of_a_single_weight_keeps_it() -> None:
    """A layer with one weight, or with equal ones, is not shrunk to nothing (15 levels: 12.035 - 12.03 = 0.005)."""
    assert quantize(torch.full((4,), 0.5), Sawb()).dequantize().tolist() == [0.5] * 4


def test_a_range_beyond_float32_is_broken() -> None:
    """A span that overflows float32 warns and gives NaN, not a plausible number."""
    with pytest.warns(NonFiniteWarning):
        assert quantize(torch.tensor([-3e38, 1e38, 3e38]), MinMax()).dequantize().isnan().all()
