"""The learned clip of an activation: `Pact`, its variants, its state."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import Tensor

from halfbyte import Pact, QTensor, oracle, quantize
from halfbyte.errors import NonFiniteWarning, SpecError
from halfbyte.formats import int4, int8, uint4
from halfbyte.quantizers.pact import MIN_CLIP

# A worked example of PACT (arXiv 1805.06085, Eqs. 1-3): alpha = 6, unsigned 4 bits, g = 0.1 * [1..12].
GOLDEN_X = [-1, 0, 0.1, 0.39, 0.4, 0.5, 1, 2.5, 5.9, 6, 6.1, 9]
GOLDEN_CODES = [0, 0, 0, 1, 1, 1, 2, 6, 15, 15, 15, 15]
GOLDEN_Y = [0, 0, 0, 0.4, 0.4, 0.4, 0.8, 2.4, 6, 6, 6, 6]


def integers(q: QTensor) -> list[int]:
    """The codes as the whole numbers that they stand for."""
    return [int(q.format.integers[c]) for c in q.codes().flatten().tolist()]


def gradients(spec: Pact, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the clip."""
    quantizer = spec.build()
    quantized = quantizer.quantize(x, observe=True, differentiable=True)
    grad_x, grad_clip = quantizer.backward(grad.clone(), *quantized)
    assert grad_clip is not None
    return grad_x, grad_clip


def beyond(x: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The next number of that type further from zero."""
    value = torch.tensor(x, dtype=dtype)
    return torch.nextafter(value, value * 2)


def test_golden_codes():
    """The worked example's integers; 2.5 * 15 / 6 = 6.25 goes to 6."""
    q = quantize(torch.tensor(GOLDEN_X), Pact(clip=6.0))
    assert q.format is uint4
    assert q.codes().tolist() == GOLDEN_CODES


def test_golden_values():
    """The worked example's y: codes times 6 / 15, one float32 rounding of the scale apart."""
    found = quantize(torch.tensor(GOLDEN_X), Pact(clip=6.0)).dequantize(torch.float64)
    assert (found - torch.tensor(GOLDEN_Y, dtype=torch.float64)).abs().max() <= 6 * 2.0**-24


def test_golden_gradient_of_the_input():
    """The worked example's dx: zero outside [0, 6], unchanged inside, both ends included."""
    grad = 0.1 * torch.arange(1, 13)
    grad_x, _ = gradients(Pact(clip=6.0), torch.tensor(GOLDEN_X), grad)
    expected = grad.clone()
    expected[[0, 10, 11]] = 0.0
    assert torch.equal(grad_x, expected)


def test_golden_gradient_of_the_clip():
    """The worked example's d alpha is 1.0 + 1.1 + 1.2 = 3.3: the element at exactly 6 counts."""
    grad = 0.1 * torch.arange(1, 13)
    _, grad_clip = gradients(Pact(clip=6.0), torch.tensor(GOLDEN_X), grad)
    assert grad_clip == grad[9:].double().sum().float()
    assert grad_clip.item() == pytest.approx(3.3, rel=1e-7)


def test_signed_codes_are_symmetric():
    """Signed PACT maps [-clip, clip] to -7...7 and never uses -8."""
    q = quantize(torch.tensor([-9.0, -3.5, -0.5, 0.0, 0.5, 1.5, 3.5, 9.0]), Pact(clip=3.5, signed=True))
    assert q.format is int4
    assert integers(q) == [-7, -7, -1, 0, 1, 3, 7, 7]


def test_signed_clip_gradient_knows_the_sign():
    """d alpha = sum g sign(x) 1[|x| >= alpha]: both sides count, the lower with a minus (fms-mo omits it)."""
    x = torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, 9.0])
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    grad_x, grad_clip = gradients(Pact(clip=2.0, signed=True), x, grad)
    assert grad_x.tolist() == [0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 0.0]
    assert grad_clip.item() == 64 + 32 - 1 - 2


def test_unsigned_clip_gradient_ignores_what_lies_below_zero():
    """A negative element of an unsigned activation becomes 0 and moves nothing."""
    grad_x, grad_clip = gradients(Pact(clip=2.0), torch.tensor([-9.0, -2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0]))
    assert grad_x.tolist() == [0.0, 0.0, 0.0]
    assert grad_clip.item() == 4.0


@pytest.mark.parametrize("signed", [False, True])
def test_second_bit_plane_exists_only_for_exact_ties(signed):
    """Elements that equal the clip are marked by a second bit; without one, nothing is saved for it."""
    quantizer = Pact(clip=2.0, signed=signed).build()
    near = torch.tensor([0.5, 1.0, math.nextafter(2.0, 0.0) - 1e-6, 9.0])
    assert quantizer.quantize(near, differentiable=True).saved[1] is None
    tie = torch.tensor([0.5, 2.0])
    assert quantizer.quantize(tie, differentiable=True).saved[1] is not None
    low_tie = quantizer.quantize(-tie, differentiable=True).saved[1]
    assert (low_tie is not None) is signed


def test_zero_is_no_tie_for_an_unsigned_clip():
    """ReLU outputs are full of exact zeros; they lie inside, move nothing and cost no second bit."""
    quantizer = Pact(clip=2.0).build()
    quantized = quantizer.quantize(torch.zeros(9), differentiable=True)
    assert quantized.saved[1] is None
    grad, grad_clip = quantizer.backward(torch.ones(9), *quantized)
    assert torch.equal(grad, torch.ones(9))
    assert grad_clip == 0


def test_nothing_is_saved_where_no_gradient_is_asked_for():
    """An undifferentiated forward keeps nothing but the codes; a differentiable one a bit an element."""
    quantizer = Pact(clip=2.0).build()
    x = torch.rand(1000)
    assert quantizer.quantize(x).saved == ()
    assert quantizer.quantize(x, differentiable=True).saved[0].nbytes == 125


@pytest.mark.parametrize("n", [1, 127, 513, 262_144, 262_144 + 77, 2 * 262_144 + 1])
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_at_every_size(n, signed):
    """The masks and the clip's gradient equal the formula at sizes across the packed blocks and pieces.

    Inputs are multiples of 1/4 and gradients whole numbers, so the sum is exact.
    """
    x = torch.randint(-12, 13, (n,)) / 4
    grad = torch.randint(-9, 10, (n,)).float()
    grad_x, grad_clip = gradients(Pact(clip=2.0, signed=signed), x, grad)
    low = -2.0 if signed else 0.0
    expected = grad[x >= 2].sum() - (grad[x <= -2].sum() if signed else 0)
    assert torch.equal(grad_x, grad * ((x >= low) & (x <= 2)))
    assert grad_clip == expected


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("clip", [3.75, 1.75, 2.7, 0.31])
def test_pact_plus_equals_autograd_of_the_straight_through_form(signed, clip):
    """PACT+ gradients are autograd's of (z + (round z - z).detach()) * step, z = x / step, step = alpha / n.

    Ours takes z in float64 from a float32 reciprocal: z errs by 15 * 2^-24 at most, each weight by
    a fifteenth of it, and the sum of 400 of them by 400 |g| 2^-24; the result is rounded to float32 once.
    """
    levels = 7 if signed else 15
    x = torch.randn(400, dtype=torch.float64) * clip
    grad = torch.randn(400, dtype=torch.float64)
    grad_x, grad_clip = gradients(Pact(clip=clip, signed=signed, plus=True), x, grad)
    alpha = torch.tensor(clip, dtype=torch.float32).double().requires_grad_()
    leaf = x.clone().requires_grad_()
    clipped = torch.minimum(torch.maximum(leaf, -alpha), alpha) if signed else torch.minimum(leaf.relu(), alpha)
    step = alpha / levels
    z = clipped / step
    ((z + (z.round() - z).detach()) * step).backward(grad)
    # In float64 the form's own gradient of x is 1 to rounding: (1 / step) * step.
    assert torch.allclose(grad_x, leaf.grad, rtol=1e-15, atol=0)
    assert (grad_clip.double() - alpha.grad).abs() <= 400 * grad.abs().max() * 2.0**-24


@pytest.mark.parametrize("signed", [False, True])
def test_pact_plus_stops_the_gradient_at_the_clip_itself(signed):
    """At x = 0 and x = clip, as beyond them, PACT+ passes nothing to x, and the clip gets the whole gradient."""
    x = torch.tensor([-3.0, -2.0, 0.0, 2.0, 3.0])
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    grad_x, grad_clip = gradients(Pact(clip=2.0, signed=signed, plus=True), x, grad)
    assert grad_x.tolist() == [0.0, 0.0, 4.0 if signed else 0.0, 0.0, 0.0]
    assert grad_clip.item() == 24.0 - (3.0 if signed else 0.0)


def test_pact_plus_counts_the_rounding_error():
    """Inside the clip a weight is (round z - z) / n: with clip 15 and x = 3.25, (3 - 3.25) / 15 = -1/60."""
    _, plain = gradients(Pact(clip=15.0), torch.tensor([3.25]), torch.tensor([1.0]))
    _, plus = gradients(Pact(clip=15.0, plus=True), torch.tensor([3.25]), torch.tensor([1.0]))
    assert plain == 0
    assert plus == torch.tensor(-0.25, dtype=torch.float32) / 15


@pytest.mark.parametrize(("batch", "fmt"), [([0.0, 1.0, 2.0], uint4), ([-1e-6, 1.0, 2.0], int4)])
def test_first_batch_decides_the_sign(batch, fmt):
    """With signed=None one negative element makes the quantizer signed for good, none makes it unsigned."""
    quantizer = Pact(signed=None).build()
    assert quantizer.format is None
    quantizer.quantize(torch.tensor(batch), observe=True)
    assert quantizer.format is fmt
    quantizer.quantize(torch.tensor([0.5, 1.0]), observe=True)
    assert quantizer.format is fmt


@pytest.mark.parametrize("signed", [False, True])
def test_first_batch_chooses_the_clip_of_least_squared_error(signed):
    """The chosen clip is the best of amax * 1/64 ... 64/64 (and a 256th more), and better than not clipping at all."""
    x = torch.randn(3000) if signed else torch.randn(3000).relu()
    quantizer = Pact(signed=signed).build()
    quantizer.quantize(x, observe=True)
    levels = 7 if signed else 15
    amax = (x.abs().max() if signed else x.max()).double()

    def loss(clip: Tensor) -> float:
        step = clip / levels
        return (((x / step).round().clamp(-levels if signed else 0, levels)) * step - x).square().sum().item()

    losses = [loss(amax * (k / 64 * (1 + 2**-8))) for k in range(1, 65)]
    best = losses.index(min(losses)) + 1
    assert best < 64
    assert quantizer.clip == (amax.double() * best * ((1 + 2.0**-8) / 64)).float()


def test_first_batch_is_reported(caplog):
    """What the first batch decided is logged, once."""
    quantizer = Pact(signed=None).build()
    with caplog.at_level(logging.INFO, logger="halfbyte"):
        for _ in range(3):
            quantizer.quantize(torch.tensor([-1.0, 1.0]), observe=True)
    assert len(caplog.records) == 1
    assert "signed activation, clip" in caplog.text


def test_given_clip_is_not_replaced_by_the_first_batch():
    """With clip=6 the first batch decides the sign at most."""
    quantizer = Pact(clip=6.0, signed=None).build()
    quantizer.quantize(torch.tensor([-0.1, 0.1]), observe=True)
    assert quantizer.clip.item() == 6.0
    assert quantizer.format is int4


@pytest.mark.parametrize("batch", [torch.empty(0), torch.tensor([1.0, math.nan])])
def test_unusable_first_batch_decides_nothing(batch):
    """An empty or broken first batch leaves sign and clip to the next."""
    quantizer = Pact(signed=None).build()
    if batch.numel():
        with pytest.warns(NonFiniteWarning):
            quantizer.quantize(batch, observe=True)
    else:
        quantizer.quantize(batch, observe=True)
    assert quantizer.format is None
    quantizer.quantize(torch.tensor([-1.0, 1.0]), observe=True)
    assert quantizer.format is int4


def test_unobserved_forward_decides_nothing():
    """Under no_grad and in eval a fresh quantizer uses what the tensor suggests and remembers none of it."""
    quantizer = Pact(signed=None).build()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    assert quantizer.quantize(torch.tensor([-1.0, 1.0])).q.format is int4
    assert quantizer.eval().quantize(torch.tensor([0.0, 1.0])).q.format is uint4
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_later_batches_leave_the_clip_to_the_optimizer():
    """After the first batch forward passes do not move the clip."""
    quantizer = Pact().build()
    quantizer.quantize(torch.rand(100), observe=True)
    clip = quantizer.clip.detach().clone()
    quantizer.quantize(torch.rand(100) * 50, observe=True)
    assert torch.equal(quantizer.clip, clip)


def test_state_dict_carries_sign_and_clip():
    """A fresh quantizer with a loaded state quantizes as the saved one."""
    saved, fresh = Pact(signed=None).build(), Pact(signed=None).build()
    saved.quantize(torch.randn(100), observe=True)
    fresh.load_state_dict(saved.state_dict())
    x = torch.randn(100)
    assert fresh.format is int4
    assert torch.equal(fresh.quantize(x, observe=True).q.dequantize(), saved.quantize(x, observe=True).q.dequantize())


def test_loading_after_the_first_batch_replaces_what_it_decided():
    """A quantizer that is settled as unsigned becomes signed by loading a signed state."""
    signed, settled = Pact(signed=None).build(), Pact(signed=None).build()
    signed.quantize(torch.randn(100), observe=True)
    settled.quantize(torch.rand(100), observe=True)
    settled.quantize(torch.rand(100), observe=True)
    settled.load_state_dict(signed.state_dict())
    assert settled.format is int4
    assert torch.equal(settled.clip, signed.clip)


def test_loading_a_fresh_state_lets_the_next_batch_decide_again():
    """Loading the state of a quantizer that has seen nothing unsettles one that has."""
    settled = Pact(signed=None).build()
    fresh_state = copy.deepcopy(settled.state_dict())
    settled.quantize(torch.rand(100), observe=True)
    assert settled.format is uint4
    settled.load_state_dict(fresh_state)
    assert settled.format is None
    settled.quantize(torch.randn(100), observe=True)
    assert settled.format is int4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(copied):
    """A copy starts equal and then learns alone."""
    quantizer = Pact(signed=None).build()
    quantizer.quantize(torch.randn(100), observe=True)
    other = copied(quantizer)
    assert other.format is int4
    assert torch.equal(other.clip, quantizer.clip)
    with torch.no_grad():
        other.clip.mul_(2)
    assert not torch.equal(other.clip, quantizer.clip)


def test_negative_input_after_an_unsigned_first_batch_warns_once():
    """The text gives the number and the cure; the second such batch is quiet (warnings are errors here)."""
    quantizer = Pact(signed=None).build()
    quantizer.quantize(torch.tensor([0.0, 1.0]), observe=True)
    with pytest.warns(UserWarning, match=r"this one has -0\.5; it is cut to 0\. Give this layer Pact\(signed=True\)"):
        q = quantizer.quantize(torch.tensor([-0.5, 1.0]), observe=True).q
    assert q.dequantize()[0] == 0
    quantizer.quantize(torch.tensor([-0.5, 1.0]), observe=True)


def test_chosen_unsigned_does_not_warn_about_negative_input():
    """signed=False was the user's word: ReLU by clipping is then meant."""
    q = quantize(torch.tensor([-0.5, 1.0]), Pact(clip=1.0))
    assert q.codes().tolist() == [0, 15]


@pytest.mark.parametrize("value", [MIN_CLIP / 2, 0.0, -1.0])
def test_clip_below_the_floor_acts_as_the_floor(value):
    """A clip pushed to zero or beyond acts as 1e-3 and still gets its gradient."""
    quantizer = Pact(clip=1.0).build()
    with torch.no_grad():
        quantizer.clip.fill_(value)
    quantized = quantizer.quantize(torch.tensor([0.0005, 1.0]), differentiable=True)
    _, grad_clip = quantizer.backward(torch.ones(2), *quantized)
    assert MIN_CLIP == 1e-3
    assert quantized.q.scale == torch.tensor(1e-3).double().div(15).float()
    assert grad_clip.item() == 1.0


@pytest.mark.parametrize("plus", [False, True])
def test_clip_gradient_is_the_same_for_any_number_of_threads(plus):
    """The sum is taken in a fixed order, so one and two threads give the same bits.

    The gradients nearly cancel (1e14 each, against a sum of about 1e5), so another order would show in float32.
    """
    n = 200_000
    x = torch.rand(n, dtype=torch.float64) + 1
    before = torch.get_num_threads()
    for _ in range(5):
        large = torch.randn(n // 2, dtype=torch.float64) * 1e14
        grad = torch.cat([large, -large])[torch.randperm(n)] + torch.rand(n, dtype=torch.float64)
        found = []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(gradients(Pact(clip=1.0, plus=plus), x, grad)[1])
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plus", [False, True])
def test_sixteen_bit_inputs_equal_their_widened_values(dtype, plus):
    """Codes, input gradient and clip gradient of a 16-bit tensor are those of the same numbers in float32."""
    x = (torch.randn(300) * 2).to(dtype)
    x[:3] = torch.tensor([1.7, 2.0, -2.0]).to(dtype)
    grad = torch.randn(300)
    spec = Pact(clip=float(x[0]), signed=True, plus=plus)
    assert torch.equal(quantize(x, spec).codes(), quantize(x.float(), spec).codes())
    narrow, wide = gradients(spec, x, grad), gradients(spec, x.float(), grad)
    assert torch.equal(narrow[0], wide[0])
    # PACT+ keeps its weights in float32 for a 16-bit input, so nothing is lost there either.
    assert torch.equal(narrow[1], wide[1])


def test_float64_inputs_are_compared_in_float64():
    """A float64 number one unit beyond the clip is outside, although float32 cannot tell it from the clip."""
    inside = torch.tensor(2.0, dtype=torch.float64)
    x = torch.stack([inside, beyond(2.0, torch.float64), -beyond(2.0, torch.float64)])
    grad = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    grad_x, grad_clip = gradients(Pact(clip=2.0, signed=True), x, grad)
    assert grad_x.tolist() == [1.0, 0.0, 0.0]
    assert grad_clip.item() == 1 + 2 - 4


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_codes_equal_the_oracle_at_every_width(bits, signed):
    """codes = clamp(rint(x * n / clip)), n = 2^bits - 1 or 2^(bits-1) - 1, in INT4 or INT8 by the width."""
    x = torch.randn(200)
    q = quantize(x, Pact(clip=1.3, signed=signed, bits=bits))
    levels = (1 << (bits - int(signed))) - 1
    clip = torch.tensor(1.3).double()
    expected = oracle.quantize(
        x.tolist(), q.format, inv_scale=(levels / clip).float().item(), code_range=(-levels if signed else 0, levels)
    )
    assert q.codes().tolist() == expected
    assert q.scale == (clip / levels).float()
    assert (q.format.bits, q.format.signed) == (4 if bits <= 4 else 8, signed)


def test_eight_bit_signed_gradient_knows_the_sign():
    """Codes of eight bits have their sign in another place; the clip's gradient finds it there too."""
    x = torch.tensor([-9.0, -1.0, 0.5, 9.0])
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0])
    quantizer = Pact(clip=2.0, signed=True, bits=8).build()
    quantized = quantizer.quantize(x, differentiable=True)
    assert quantized.q.format is int8
    assert quantizer.backward(grad, *quantized)[1].item() == 8 - 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bits": 1}, "2 to 8 bits"),
        ({"bits": 9}, "2 to 8 bits"),
        ({"clip": 0.0}, "above zero"),
        ({"clip": -1.0}, "above zero"),
    ],
)
def test_refuses_what_means_nothing(fields, text):
    """Each field is checked at birth, and the text says what is possible."""
    with pytest.raises(SpecError, match=text):
        Pact(**fields)


def test_a_broken_first_batch_decides_nothing():
    """A first batch with an infinity warns of that alone; the next one still decides the sign."""
    quantizer = Pact(signed=None).build()
    with pytest.warns() as seen:
        quantizer.quantize(torch.tensor([-math.inf, 1.0]), observe=True)
    assert [w.category for w in seen] == [NonFiniteWarning]
    quantizer.quantize(torch.tensor([-1.0, 1.0]), observe=True)
    assert quantizer.format is int4
