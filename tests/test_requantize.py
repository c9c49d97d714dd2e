"""Layers under the recipes that followed the paper: what each slot gets, what each GEMM gives, what is drawn."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

import halfbyte as hb
import papers
import shapes
from halfbyte import MXFP4, NVFP4, BitSplit, Dgrad, Fprop, Hadamard, Lsq, Luq, Recipe, Requantize, Sawb, Wgrad
from halfbyte.errors import SpecError
from halfbyte.kernels import Batched, Conv, Linear
from halfbyte.ops import Plan, conv, conv_transpose, linear, matmul
from halfbyte.qtensor import QTensor
from halfbyte.quantizers import Spec

RECIPES = [
    "luq",
    "luq_smp2",
    "nvfp4",
    "mxfp4",
    "mxfp4_backward_only",
    "int4_hq_lss",
    "quartet",
    "quartet2",
    "fp8",
    "int8",
]
LAYERS = ["linear_odd", "conv1d", "conv2d_dilated", "conv2d_grouped", "conv_transpose_grouped", "batched"]


class Seen:
    """A watcher that keeps what it is shown."""

    def __init__(self):
        self.operands, self.products, self.opened = {}, {}, 0

    def inside(self):
        """Counts how often a layer began to compute."""
        self.opened += 1
        return contextlib.nullcontext()

    def operand(self, plan, slot, x, parts):
        """Keeps a slot's tensor and its codes."""
        self.operands[slot] = x.detach().clone(), parts

    def product(self, plan, which, a, b, geometry, result):
        """Keeps a GEMM."""
        self.products[which] = a, b, geometry, result.clone()


def call(geometry, x, weight, plan):
    """The layer of that geometry, by its function."""
    if isinstance(geometry, Linear):
        return linear(x, weight, None, plan)
    if isinstance(geometry, Batched):
        return matmul(x, weight, plan)
    if isinstance(geometry, Conv):
        return conv(
            x,
            weight,
            None,
            plan,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
        )
    c = geometry.conv
    plain = [
        (size - 1) * step - 2 * pad + dil * (kernel - 1) + 1
        for size, step, pad, dil, kernel in zip(
            c.output_shape[2:], c.stride, c.padding, c.dilation, c.weight_shape[2:], strict=True
        )
    ]
    return conv_transpose(
        x,
        weight,
        None,
        plan,
        stride=c.stride,
        padding=c.padding,
        output_padding=tuple(a - b for a, b in zip(c.input_shape[2:], plain, strict=True)),
        dilation=c.dilation,
        groups=c.groups,
    )


def train(recipe, geometry, *, seed=0, layer=0, steps=1, data=0):
    """(watcher, plan, x, weight, y, g) of a layer's last training pass of several on the same data."""
    if isinstance(geometry, str):
        geometry = shapes.GEOMETRIES[geometry]
    recipe = hb.RECIPES[recipe] if isinstance(recipe, str) else recipe
    generator = torch.Generator().manual_seed(data)
    x, weight, g = (torch.randn(shape, generator=generator) for shape in shapes.tensors(geometry))
    x.requires_grad_()
    weight.requires_grad_()
    plan, seen = Plan(recipe, seed=seed, layer=layer), Seen()
    for _ in range(steps):
        x.grad = weight.grad = None
        plan.watcher = seen
        y = call(geometry, x, weight, plan)
        y.backward(g * 1e-3)
    return seen, plan, x, weight, y.detach(), g * 1e-3


def total(parts):
    """What an operand stands for, in float64."""
    parts = parts if isinstance(parts, tuple) else (parts,)
    return sum(p.dequantize(torch.float64) if isinstance(p, QTensor) else p.double() for p in parts)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_gemms_equal_float64_on_the_dequantized_operands(recipe, name):
    """All three GEMMs are torch's own layer in float64 on what their codes stand for, within two roundings a part."""
    seen, *_ = train(recipe, name)
    assert set(seen.products) == set(shapes.GEMMS)
    assert seen.opened == 2
    for which, (a, b, geometry, result) in seen.products.items():
        wanted = shapes.product(geometry, which, total(a), total(b))
        found = result.double().view(wanted.shape)
        parts = [shapes.product(geometry, which, total(part), total(b)).abs() for part in a]
        bound = 2.0**-22 * sum(parts) + 1e-12 * wanted.abs().max()
        if not all(isinstance(q, QTensor) for q in (*a, b)):
            # A floating operand: an ordinary float32 product, rounded as the library pleases.
            bound = 1e-5 * wanted.abs().max()
        assert ((found - wanted).abs() <= bound).all()


def masks(seen, plan, slot):
    """Where the gradient of fprop's operand passes its quantizer."""
    x, (q,) = seen.operands[slot]
    quantizer = plan.input if slot == "fprop.input" else plan.weight
    if isinstance(quantizer.spec, Lsq):
        v = x.double() / quantizer.learned.detach().double().abs()
        return (v >= -8) & (v <= 7)
    if isinstance(quantizer.spec, MXFP4) and quantizer.spec.scale_rule == "quest":
        return x.double().abs() < 6 * q.block_factors()
    return torch.ones(x.shape, dtype=torch.bool)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "mxfp4_backward_only"])
def test_results_are_the_products_masked_and_rotated_back(recipe, name):
    """The output is fprop's product; a gradient is its GEMM's, zero where fprop cut, then rotated back."""
    seen, plan, x, weight, y, _ = train(recipe, name)
    geometry = shapes.GEOMETRIES[name]
    assert torch.equal(y.view(-1), seen.products["fprop"][3].view(-1))
    turn = plan.recipe.fprop.transform
    for which, leaf, slot, place in (("dgrad", x, "fprop.input", 0), ("wgrad", weight, "fprop.weight", 1)):
        wanted = seen.products[which][3].view(leaf.shape) * masks(seen, plan, slot).view(leaf.shape)
        if turn is not None:
            wanted = turn.rotate_back(wanted, geometry.reduction_view("fprop", place), None)
        assert torch.equal(leaf.grad, wanted)


SOURCES = {
    "fprop.input": ("fprop", 0),
    "fprop.weight": ("fprop", 1),
    "dgrad.grad_output": ("dgrad", 0),
    "dgrad.weight": ("dgrad", 1),
    "wgrad.grad_output": ("wgrad", 0),
    "wgrad.input": ("wgrad", 1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_slots_get_the_rotated_tensor(recipe, name):
    """What a slot quantizes is the tensor, or fprop's numbers under Requantize, rotated along that GEMM's reduction.

    Rotations change no norm, so where the signs are random the two are compared by the norms of their groups.
    """
    seen, plan, x, weight, _, g = train(recipe, name)
    geometry = shapes.GEOMETRIES[name]
    for slot, (found, _) in seen.operands.items():
        gemm, place = SOURCES[slot]
        origin = {"input": x, "weight": weight, "grad_output": g}[slot.split(".")[1]].detach()
        if isinstance(plan.recipe.slots[slot], Requantize):
            origin = total(seen.operands[f"fprop.{slot.split('.')[1]}"][1]).float()
        turn, view = plan.recipe.transforms[gemm], geometry.reduction_view(gemm, place)
        if turn is None:
            assert torch.equal(found.reshape(-1), origin.reshape(-1))
        elif turn.signs != "random":
            signs = None if turn.signs == "none" else torch.tensor(NVIDIA_SIGNS)
            assert torch.equal(found, turn.rotate(origin.view(found.shape), view, signs))
        else:
            norms = [t.reshape(view.shape).square().sum(view.axis) for t in (found, origin)]
            assert torch.allclose(*norms, rtol=1e-4, atol=1e-12)
            assert view.shape[view.axis] == 1 or not torch.equal(found, origin.view(found.shape))


NVIDIA_SIGNS = [1.0, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4", "quartet", "quartet2"])
def test_nearest_slots_hold_what_quantize_makes_by_hand(recipe, name):
    """Where nothing is drawn the codes of a slot are those of `quantize` with the reduction as the last dimension."""
    seen, plan, *_ = train(recipe, name)
    geometry, checked = shapes.GEOMETRIES[name], 0
    for slot, (x, parts) in seen.operands.items():
        spec = plan.recipe.slots[slot]
        spec = spec.spec if isinstance(spec, Requantize) else spec
        if isinstance(spec, Spec) and not spec.stochastic:
            (q,) = parts
            assert torch.equal(
                q.dequantize(torch.float64), shapes.by_hand(x, spec, geometry.reduction_view(*SOURCES[slot]))
            )
            checked += 1
    assert checked >= 2


REQUANTIZED = Recipe(
    name="requantized",
    fprop=Fprop(input=NVFP4(), weight=Sawb(levels=16)),
    dgrad=Dgrad(grad_output=MXFP4(), weight=Requantize(spec=MXFP4(scale_rule="rceil"))),
    wgrad=Wgrad(grad_output=MXFP4(), input=Requantize(spec=NVFP4()), transform=Hadamard(size=16)),
)


def test_requantize_by_hand():
    """dgrad multiplies the weight's codes, dequantized and quantized along O; wgrad the input's, rotated, along N."""
    seen, _, x, weight, _, _ = train(REQUANTIZED, "linear_odd")
    w_hat = hb.quantize(weight.detach(), Sawb(levels=16)).dequantize()
    wanted = hb.quantize(w_hat.t().contiguous(), MXFP4(scale_rule="rceil")).dequantize().t()
    assert torch.equal(seen.products["dgrad"][1].dequantize(), wanted)
    x_hat = hb.quantize(x.detach(), NVFP4()).dequantize()
    h = torch.block_diag(*(torch.from_numpy(papers.sylvester(n)) for n in papers.pieces(37, 16)))
    turned = (h @ x_hat.double()).float()
    found = seen.products["wgrad"][1].dequantize()
    assert torch.allclose(seen.operands["wgrad.input"][0], turned, rtol=0, atol=1e-6)
    wanted = hb.quantize(seen.operands["wgrad.input"][0].t().contiguous(), NVFP4()).dequantize().t()
    assert torch.equal(found, wanted)


def test_requantize_starts_from_fprop_s_numbers_and_not_from_the_tensor():
    """A spec in the slot quantizes the tensor itself; Requantize what fprop multiplied. They differ."""
    direct = replace(REQUANTIZED, dgrad=Dgrad(grad_output=MXFP4(), weight=MXFP4(scale_rule="rceil")))
    one, other = (train(r, "linear_odd")[0] for r in (REQUANTIZED, direct))
    assert not torch.equal(total(one.products["dgrad"][1]), total(other.products["dgrad"][1]))
    assert torch.equal(one.products["wgrad"][3], other.products["wgrad"][3])


def test_requantize_keeps_only_the_codes_of_fprop():
    """Between the passes a layer under quartet2 keeps half a byte a number and block scales, no float tensor."""
    geometry = Linear(rows=64, in_features=256, out_features=128)
    kept = []
    x, weight = torch.randn(64, 256, requires_grad=True), torch.randn(128, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(geometry, x, weight, Plan(hb.RECIPES["quartet2"]))
    numel = x.numel() + weight.numel()
    assert sum(t.nbytes for t in kept) <= numel / 2 + numel / 16 + 64


def gradients(recipe, draws, *, name="linear_odd"):
    """grad_input and grad_weight of many seeds, (draws, ...) each in float64."""
    found = []
    for seed in range(draws):
        _, _, x, weight, *_ = train(recipe, name, seed=seed)
        found.append((x.grad.double(), weight.grad.double()))
    return tuple(torch.stack(g) for g in zip(*found, strict=True))


def test_two_samples_are_averaged():
    """luq_smp2 multiplies two independent draws, each with half the scale; their mean is the gradient's operand."""
    seen, *_ = train("luq_smp2", "linear_odd")
    one, *_ = train("luq", "linear_odd")
    first, second = seen.products["wgrad"][0]
    assert torch.equal(2 * first.scale, one.products["wgrad"][0][0].scale)
    assert torch.equal(first.scale, second.scale)
    assert not torch.equal(first.codes(), second.codes())
    assert len(seen.products["dgrad"][0]) == 1


def test_two_samples_halve_the_variance():
    """Over 200 seeds the variance of grad_weight under luq is twice that under luq_smp2, within 10 %.

    The variance of each of 1575 elements is known to 10 %, their sum to about 1 %.
    """
    one, two = (gradients(recipe, 200)[1].var(0).sum() for recipe in ("luq", "luq_smp2"))
    assert (one / two).item() == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("samples", [2, 4, 8])
def test_samples_divide_the_variance(samples):
    """n samples in dgrad have n parts, each with 1 / n of the scale, and 1 / n of the variance (within 15 %)."""
    recipe = replace(hb.RECIPES["luq"], dgrad=Dgrad(grad_output=Luq(), samples=samples))
    assert len(train(recipe, "linear_odd")[0].products["dgrad"][0]) == samples
    one, many = (gradients(r, 100)[0].var(0).sum() for r in ("luq", recipe))
    assert (one / many).item() == pytest.approx(samples, rel=0.15)


@pytest.mark.parametrize("name", ["linear_odd", "conv2d_grouped"])
@pytest.mark.parametrize("recipe", ["mxfp4_backward_only", "luq", "luq_smp2", "int8"])
def test_gradients_are_unbiased(recipe, name):
    """The mean of a layer's gradients over n seeds tends to the float gradient on fprop's operands, as 1 / n.

    From 2 seeds to 32 the squared error falls to a 16th, within 25 %.
    """
    seen, *_, g = train(recipe, name)
    _, _, x, weight, *_ = train(recipe, name)
    x_hat, w_hat = (total(seen.operands[f"fprop.{kind}"][1]) for kind in ("input", "weight"))
    geometry = shapes.GEOMETRIES[name]
    dgrad = shapes.product(geometry, "dgrad", g, w_hat.view(weight.shape))
    wgrad = shapes.product(geometry, "wgrad", g, x_hat.view(x.shape))
    found = gradients(recipe, 128, name=name)
    assert papers.variance_ratio(found[0], dgrad, 2, 32) == pytest.approx(1 / 16, rel=0.25)
    assert papers.variance_ratio(found[1], wgrad, 2, 32) == pytest.approx(1 / 16, rel=0.25)


def test_quartet2_gradients_are_unbiased():
    """MS-EDEN: over random rotations and scales the mean tends to the gradient on fprop's operands.

    With 256 numbers along either reduction, whole groups of 128, the squared error falls to a 16th from 4 to 64 seeds.
    """
    geometry = Linear(rows=128, in_features=16, out_features=128)
    recipe = hb.RECIPES["quartet2"]
    seen, *_, g = train(recipe, geometry)
    wanted = (
        shapes.product(geometry, "dgrad", g, total(seen.operands["fprop.weight"][1])),
        shapes.product(geometry, "wgrad", g, total(seen.operands["fprop.input"][1])),
    )
    for found, mean in zip(gradients(recipe, 128, name=geometry), wanted, strict=True):
        assert papers.variance_ratio(found, mean, 4, 64) == pytest.approx(1 / 16, rel=0.25)


RANDOM = ["luq", "luq_smp2", "nvfp4", "mxfp4", "mxfp4_backward_only", "int4_hq_lss", "quartet", "quartet2", "int8"]


@pytest.mark.parametrize("recipe", RANDOM)
def test_what_is_drawn_follows_seed_layer_and_step(recipe):
    """Equal seeds, layers and steps give equal gradients; another of each gives others. The output is never drawn."""
    base = train(recipe, "linear_odd")
    again = train(recipe, "linear_odd")
    assert torch.equal(base[2].grad, again[2].grad)
    assert torch.equal(base[3].grad, again[3].grad)
    for other in ({"seed": 1}, {"layer": 1}, {"steps": 2}):
        found = train(recipe, "linear_odd", **other)
        assert torch.equal(found[4], base[4])
        assert not torch.equal(found[2].grad, base[2].grad)
        assert not torch.equal(found[3].grad, base[3].grad)


@pytest.mark.parametrize("recipe", RANDOM)
def test_ranks_draw_different_numbers(recipe, monkeypatch):
    """Another process of a distributed run draws others, on purpose: their errors average out."""
    base = train(recipe, "linear_odd")
    monkeypatch.setattr("halfbyte.ops.plan.rank", lambda: 1)
    other = train(recipe, "linear_odd")
    assert torch.equal(base[4], other[4])
    assert not torch.equal(base[3].grad, other[3].grad)


def test_operands_of_one_layer_draw_different_numbers():
    """The gradient in dgrad and in wgrad, and the weight and the input, have noise of their own.

    All four tensors are one 32x32 matrix whose rows and columns have one largest number, 3, so all blocks have one
    scale along either dimension, and equal noise would give equal codes.
    """
    spec = MXFP4(rounding="stochastic", headroom=True)
    recipe = Recipe(
        name="four",
        fprop=Fprop(input=Sawb(), weight=Sawb()),
        dgrad=Dgrad(grad_output=spec, weight=spec),
        wgrad=Wgrad(grad_output=spec, input=spec),
    )
    square = torch.randn(32, 32).clamp(-2, 2).fill_diagonal_(3.0)
    plan, seen = Plan(recipe), Seen()
    plan.watcher = seen
    x, w = square.clone().requires_grad_(), square.clone().requires_grad_()
    linear(x, w, None, plan).backward(square)
    codes = [seen.operands[s][1][0].codes() for s in ("dgrad.grad_output", "dgrad.weight")]
    codes += [seen.operands[s][1][0].codes() for s in ("wgrad.grad_output", "wgrad.input")]
    for i, one in enumerate(codes):
        for other in codes[:i]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "mxfp4_backward_only"])
def test_a_layer_does_not_depend_on_the_number_of_threads(recipe):
    """Output and both gradients are the same to the bit on one thread and on four.

    Where a recipe leaves fprop in floating point its product is torch's own, which promises no such thing.
    """
    geometry = Linear(rows=130, in_features=257, out_features=96)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 4):
            torch.set_num_threads(n)
            found.append(train(recipe, geometry))
    finally:
        torch.set_num_threads(threads)
    one, four = found
    assert torch.equal(one[4], four[4])
    assert torch.equal(one[2].grad, four[2].grad)
    assert torch.equal(one[3].grad, four[3].grad)


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_draws_nothing_and_moves_nothing(recipe):
    """In eval and under no_grad the same input gives the same output, and no buffer or parameter changes."""
    geometry = shapes.GEOMETRIES["linear_odd"]
    _, plan, x, weight, *_ = train(recipe, "linear_odd")
    before = {k: v.clone() for k, v in plan.state_dict().items()}
    plan.eval()
    with torch.no_grad():
        first, second = (call(geometry, x, weight, plan) for _ in range(2))
    assert torch.equal(first, second)
    after = plan.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def turned(recipe, **changes):
    """A recipe with fields of its GEMMs changed: ``dgrad={"samples": 2}``."""
    return replace(recipe, **{gemm: replace(getattr(recipe, gemm), **fields) for gemm, fields in changes.items()})


MX = Recipe(
    name="mx",
    fprop=Fprop(input=MXFP4(), weight=MXFP4()),
    dgrad=Dgrad(grad_output=MXFP4(), weight=MXFP4()),
    wgrad=Wgrad(grad_output=MXFP4(), input=MXFP4()),
)
CHANGES = {
    "dgrad.transform": ({"dgrad": {"transform": Hadamard(size=16)}}, (False, True, False)),
    "wgrad.transform": ({"wgrad": {"transform": Hadamard(size=16, signs="nvidia")}}, (False, False, True)),
    "dgrad.weight": ({"dgrad": {"weight": Requantize(spec=MXFP4())}}, (False, True, False)),
    "wgrad.input": ({"wgrad": {"input": Requantize(spec=MXFP4())}}, (False, False, True)),
    "dgrad.weight rule": ({"dgrad": {"weight": MXFP4(scale_rule="ceil")}}, (False, True, False)),
    "wgrad.grad_output": ({"wgrad": {"grad_output": NVFP4()}}, (False, False, True)),
    "dgrad.grad_output": ({"dgrad": {"grad_output": BitSplit()}}, (False, True, False)),
    "fprop.input": ({"fprop": {"input": MXFP4(scale_rule="even")}}, (True, False, False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_slot_and_transform_acts_on_its_gemm_alone(change):
    """A change to one GEMM changes its result and leaves the other two equal to the bit."""
    fields, expected = CHANGES[change]
    base, other = (train(r, "linear_odd") for r in (MX, turned(MX, **fields)))
    same = [torch.equal(base[4], other[4]), torch.equal(base[2].grad, other[2].grad)]
    same.append(torch.equal(base[3].grad, other[3].grad))
    assert tuple(not s for s in same) == expected


def test_a_transform_on_fprop_acts():
    """Rotating fprop's operands changes the output and, through the reused codes, both gradients."""
    plain = Recipe(
        name="plain",
        fprop=Fprop(input=Lsq(), weight=Lsq()),
        dgrad=Dgrad(grad_output=Luq()),
        wgrad=Wgrad(grad_output=Luq()),
    )
    base, other = (train(r, "linear_odd") for r in (plain, turned(plain, fprop={"transform": Hadamard()})))
    assert not torch.equal(base[4], other[4])
    assert not torch.equal(base[2].grad, other[2].grad)
    assert not torch.equal(base[3].grad, other[3].grad)


REFUSED = {
    "random signs in fprop": (
        lambda: turned(hb.RECIPES["quartet"], fprop={"transform": Hadamard(signs="random")}),
        "evaluation must not depend on a draw",
    ),
    "codes cannot be rotated": (
        lambda: turned(hb.RECIPES["luq"], wgrad={"transform": Hadamard()}),
        "Requantize",
    ),
    "a transform of floats": (
        lambda: Recipe(name="x", fprop=Fprop(transform=Hadamard())),
        "it cannot act",
    ),
    "reused blocks": (
        lambda: Recipe(name="x", fprop=Fprop(weight=NVFP4()), dgrad=Dgrad(grad_output=Luq())),
        "along fprop's reduction",
    ),
    "requantized nothing": (
        lambda: Recipe(name="x", dgrad=Dgrad(grad_output=Luq(), weight=Requantize(spec=NVFP4()))),
        "codes of fprop",
    ),
    "samples of a rounding without chance": (
        lambda: Recipe(name="x", dgrad=Dgrad(grad_output=NVFP4(), samples=2)),
        "not rounded at random",
    ),
    "three samples": (
        lambda: Recipe(name="x", dgrad=Dgrad(grad_output=Luq(), samples=3)),
        "1, 2, 4 or 8",
    ),
    "split weights": (
        lambda: Recipe(name="x", fprop=Fprop(input=Sawb(), weight=BitSplit())),
        "only a grad_output slot",
    ),
    "random rounding in fprop": (
        lambda: Recipe(name="x", fprop=Fprop(input=MXFP4(rounding="stochastic"))),
        "slots of dgrad and wgrad",
    ),
    "a learned step in backward": (
        lambda: Recipe(name="x", fprop=Fprop(weight=Sawb()), dgrad=Dgrad(weight=Lsq())),
        "gets no gradient",
    ),
    "quest for a gradient": (
        lambda: Recipe(name="x", dgrad=Dgrad(grad_output=MXFP4(scale_rule="quest"))),
        "a spec for gradients",
    ),
    "fp16 chunks of blocks": (
        lambda: replace(MX, accumulate="fp16_chunk64"),
        "a scale for each block",
    ),
    "a gradient scale beside its own": (
        lambda: replace(hb.RECIPES["luq"], grad_scale=hb.LayerGradScale()),
        "leave grad_scale out",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_what_cannot_act(what):
    """A combination that would do nothing, or something else than it says, raises with a text that says why."""
    make, text = REFUSED[what]
    with pytest.raises(SpecError, match=text):
        make()


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_empty_batch_passes(recipe):
    """No rows give no output and zero or absent gradients, and nothing breaks."""
    plan = Plan(hb.RECIPES[recipe])
    x, weight = torch.empty(0, 40, requires_grad=True), torch.randn(24, 40, requires_grad=True)
    y = linear(x, weight, None, plan)
    y.backward(torch.empty(0, 24))
    assert y.shape == (0, 24)
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(24, 40))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_zero_gradient_stays_zero(recipe):
    """An all-zero grad_output gives zero gradients, not NaN."""
    plan = Plan(hb.RECIPES[recipe])
    x, weight = torch.randn(20, 40, requires_grad=True), torch.randn(24, 40, requires_grad=True)
    linear(x, weight, None, plan).backward(torch.zeros(20, 24))
    assert torch.equal(x.grad, torch.zeros(20, 40))
    assert torch.equal(weight.grad, torch.zeros(24, 40))
