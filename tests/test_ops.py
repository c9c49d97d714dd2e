"""The three GEMMs of a layer: what they compute, what they keep, what they refuse."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import kernels
from halfbyte.errors import NonFiniteWarning, UnsupportedError
from halfbyte.kernels import reference
from halfbyte.ops import Plan, layer_pass
from halfbyte.recipes import Dgrad, Fprop, Recipe, Wgrad

EVERY_LAYER = {
    "linear": (lambda: nn.Linear(24, 10), (6, 24)),
    "linear_3d": (lambda: nn.Linear(24, 10, bias=False), (2, 5, 24)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 8)),
    "conv2d_dilated": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (2, 4, 9, 8)),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 6)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 3, 5)),
}


def everywhere(model: nn.Module, recipe: str | Recipe) -> nn.Module:
    """The model with every layer under the recipe, whatever the recipe's own rules, on the reference backend."""
    return hb.convert(model, recipe, [hb.Rule(recipe=recipe)], backend="reference")


def operands(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, both gradients, and the codes' numbers that each GEMM must have multiplied, for one pass with torch."""
    seen: dict[str, Tensor] = {}
    plan = layer.plan
    real = reference.gemm

    def spy(which: str, a: object, b: object, geometry: object, **kwargs: object) -> Tensor:
        seen[f"{which}.a"], seen[f"{which}.b"] = a, b  # type: ignore[assignment]
        return real(which, a, b, geometry, **kwargs)  # type: ignore[arg-type]

    reference.gemm = spy
    try:
        y = layer(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)) * 1e-3)
    finally:
        reference.gemm = real
    assert plan.kernels is reference
    return {"y": y.detach(), **seen}


@pytest.mark.parametrize("recipe", ["article", "ibm2020", "ibm2020_dw_fp8", "one_phase", "radix2_130", "radix2_121"])
@pytest.mark.parametrize("kind", EVERY_LAYER)
def test_gemms_equal_float64_on_the_dequantized_codes(kind: str, recipe: str) -> None:
    """Every GEMM of every layer is the float64 product of what its codes stand for, rounded twice and no more."""
    torch.manual_seed(0)
    build, shape = EVERY_LAYER[kind]
    layer = everywhere(build(), recipe)
    x = torch.rand(shape, requires_grad=True)
    seen = operands(layer, x)
    plain = hb.restore(copy.deepcopy(layer)).double()
    plain.zero_grad()
    x_hat = seen["fprop.b"], seen["fprop.a"]
    weight, given = (t.dequantize(torch.float64) for t in x_hat)
    plain.weight.data = weight.view_as(plain.weight)
    wide = given.view(shape).requires_grad_()
    y = plain(wide)
    two_roundings = 2.0**-22
    assert ((y.detach() - seen["y"].double()).abs() <= two_roundings * (y.detach().abs() + 1)).all()
    for which, grad, into in (("dgrad", x.grad, wide), ("wgrad", layer.weight.grad, plain.weight)):
        g = seen[f"{which}.a"].dequantize(torch.float64).view_as(y)
        (wanted,) = torch.autograd.grad(y, into, g, retain_graph=True)
        if which == "dgrad" and recipe != "article":
            inside = (x.detach() >= 0) & (x.detach() <= layer.plan.input.clip.detach())
            wanted = wanted * inside
        assert ((wanted - grad.double()).abs() <= two_roundings * (wanted.abs() + wanted.abs().max())).all()


def test_backward_reuses_the_codes_of_fprop() -> None:
    """dgrad multiplies the very codes of the weight that fprop made, and wgrad those of the input."""
    torch.manual_seed(0)
    layer = everywhere(nn.Linear(32, 16), "ibm2020")
    seen = operands(layer, torch.rand(8, 32, requires_grad=True))
    assert seen["dgrad.b"].qdata.data_ptr() == seen["fprop.b"].qdata.data_ptr()
    assert seen["wgrad.b"].qdata.data_ptr() == seen["fprop.a"].qdata.data_ptr()


def test_the_two_gradient_gemms_get_the_two_phases_of_one_scale() -> None:
    """dgrad gets the even and wgrad the odd phase of the same gradient under the same power of two."""
    torch.manual_seed(0)
    seen = operands(everywhere(nn.Linear(32, 16), "ibm2020"), torch.rand(8, 32, requires_grad=True))
    even, odd = seen["dgrad.a"], seen["wgrad.a"]
    assert (even.format.name, odd.format.name) == ("fp4_e3m0_r4", "fp4_e3m0_r4_odd")
    assert torch.equal(even.scale, odd.scale)
    assert torch.frexp(even.scale)[0] == 0.5


def base_recipe() -> Recipe:
    """ibm2020 without rules, with a fixed sign, so that slots can be changed one at a time."""
    return replace(hb.RECIPES["ibm2020"], name="base", rules=(), fprop=Fprop(input=hb.Pact(clip=0.8), weight=hb.Sawb()))


def pass_through(recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """(output, grad_input, grad_weight) of one fixed layer under the recipe; its forward sums are in the thousands."""
    torch.manual_seed(0)
    layer = everywhere(nn.Linear(160, 30), recipe)
    layer.weight.data.abs_()
    x = torch.rand(20, 160, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn(20, 30) * 1e-3)
    return y.detach(), x.grad, layer.weight.grad


FEEDS = {
    "fprop.input": (True, False, True),
    "fprop.weight": (True, True, False),
    "dgrad.grad_output": (False, True, False),
    "dgrad.weight": (False, True, False),
    "wgrad.grad_output": (False, False, True),
    "wgrad.input": (False, False, True),
}


@pytest.mark.parametrize("slot", FEEDS)
def test_a_slot_changes_only_the_results_that_it_feeds(slot: str) -> None:
    """A slot changed alone changes the results that it feeds and leaves the others equal to the bit."""
    base = base_recipe()
    gemm, operand = slot.split(".")
    other = hb.Nearest(fmt="fp4_e2m1") if operand == "grad_output" else hb.Sawb(levels=16)
    if slot == "fprop.input":
        other = hb.Pact(clip=0.8, bits=3)
    changed = replace(base, **{gemm: replace(getattr(base, gemm), **{operand: other})})
    if operand == "grad_output":
        # A format of another range moves the layer's scale too; a given first exponent keeps that out of the way.
        fixed = hb.LayerGradScale(log2_first=11)
        base, changed = replace(base, grad_scale=fixed), replace(changed, grad_scale=fixed)
    before, after = pass_through(base), pass_through(changed)
    assert tuple(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) == FEEDS[slot]


@pytest.mark.parametrize("gradient", [hb.Radix4(), hb.Luq(), hb.NVFP4(rounding="stochastic"), hb.BitSplit()], ids=str)
@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
def test_a_gain_multiplies_the_gradient_of_its_gemm_alone(gemm: str, gradient: hb.Spec) -> None:
    """A gain of two doubles what its GEMM gives, to the bit, and leaves the output and the other gradient alone."""
    base = base_recipe()
    scale = base.grad_scale if isinstance(gradient, hb.Radix4) else None
    slots = {"dgrad": Dgrad(grad_output=gradient, weight=hb.Sawb()), "wgrad": Wgrad(grad_output=gradient)}
    base = replace(base, **slots, grad_scale=scale)
    y, grad_input, grad_weight = pass_through(base)
    amplified = pass_through(replace(base, **{gemm: replace(slots[gemm], gain=2.0)}))
    expected = (y, 2 * grad_input, grad_weight) if gemm == "dgrad" else (y, grad_input, 2 * grad_weight)
    assert all(torch.equal(a, b) for a, b in zip(amplified, expected, strict=True))


@pytest.mark.parametrize("accumulate", ["fp32", "fp16_chunk64"])
def test_accumulate_is_a_knob_that_acts(accumulate: str) -> None:
    """float16 chunks reach all three GEMMs; float32 sums of so few small integers are still exact."""
    base = base_recipe()
    exact, other = pass_through(base), pass_through(replace(base, accumulate=accumulate))
    same = [torch.equal(a, b) for a, b in zip(exact, other, strict=True)]
    assert same == ([True] * 3 if accumulate == "fp32" else [False] * 3)


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of one layer."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        layer(x)
    return total


@pytest.mark.parametrize("recipe", ["ibm2020", "article", "ibm2020_dw_fp8", "one_phase"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(512, 512), (256, 512)),
        (lambda: nn.Conv2d(32, 32, 3, padding=1), (8, 32, 16, 16)),
        (lambda: nn.Conv1d(64, 64, 3), (8, 64, 100)),
    ],
)
def test_what_is_kept_for_backward_is_a_sixth(build: object, shape: tuple[int, ...], recipe: str) -> None:
    """A converted layer keeps at most 0.16 of the bytes that the same layer keeps in float32."""
    layer = build()  # type: ignore[operator]
    x = torch.rand(shape, requires_grad=True)
    plain = saved_bytes(layer, x)
    assert saved_bytes(everywhere(layer, recipe), x) <= 0.16 * plain


def test_no_float_operand_is_kept() -> None:
    """Between forward and backward a layer keeps bytes of codes and bits, and floats only as single numbers."""
    kept: list[Tensor] = []
    layer = everywhere(nn.Linear(64, 64), "ibm2020")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.rand(16, 64, requires_grad=True))
    assert kept
    assert all(t.dtype == torch.uint8 or t.dim() == 0 for t in kept)


def test_a_second_derivative_is_refused() -> None:
    """create_graph=True raises a text that says why and what to do."""
    layer = everywhere(nn.Linear(8, 8), "ibm2020")
    x = torch.rand(4, 8, requires_grad=True)
    with pytest.raises(UnsupportedError, match=r"second derivative .* create_graph"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_are_computed_from_the_widened_value(dtype: torch.dtype) -> None:
    """A 16-bit batch gives the codes, and up to the last rounding the results, of the same batch in float32."""
    torch.manual_seed(0)
    layer = everywhere(nn.Conv2d(4, 6, 3), "ibm2020")
    twin = copy.deepcopy(layer)
    x16 = torch.rand(2, 4, 6, 6).to(dtype).requires_grad_()
    x32 = x16.detach().float().requires_grad_()
    seen16, seen32 = operands(layer, x16), operands(twin, x32)
    assert torch.equal(seen16["fprop.a"].codes(), seen32["fprop.a"].codes())
    assert torch.equal(seen16["y"], seen32["y"].to(dtype))
    assert x16.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", [name for name, recipe in hb.RECIPES.items() if not recipe.in_floating_point])
def test_what_is_read_as_it_is_gives_the_bits_of_the_widened(
    recipe: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantizers that read 16 bits directly make what they make of a float32 copy: results, gradients, state."""
    found = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(layer_pass.Pass, "widen", lambda _, kind, x: layer_pass.wide(x))
        torch.manual_seed(0)
        layer = hb.convert(
            nn.Linear(40, 12),
            recipe,
            [hb.Rule(recipe=hb.RECIPES[recipe])],
            seed=1 if hb.RECIPES[recipe].random else None,
        )
        for _ in range(2):
            x = torch.rand(32, 40).to(dtype).requires_grad_()
            y = layer(x)
            y.backward((torch.randn(y.shape) * 1e-3).to(dtype))
            found.append([y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
        found[-1] += list(layer.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(found[0] + found[1], found[2] + found[3], strict=True))


def test_a_float64_layer_decides_in_float64() -> None:
    """An input just below the tie of codes 1 and 2 in float64, which float32 would put onto it, gets code 1."""
    layer = everywhere(nn.Linear(2, 2).double(), base_recipe())  # clip 0.8: inv_scale is 18.75, the tie at 0.08
    x = torch.tensor([[0.08 * (1 - 2.0**-40), 0.5]], dtype=torch.float64, requires_grad=True)
    seen = operands(layer, x)
    assert seen["fprop.a"].codes()[0, 0] == 1
    assert hb.quantize(x.detach().float(), hb.Pact(clip=0.8)).codes()[0, 0] == 2
    assert (seen["y"].dtype, x.grad.dtype) == (torch.float64, torch.float64)


def test_autocast_decides_the_output_type() -> None:
    """Under autocast a converted layer returns autocast's type, as torch's own does."""
    layer = everywhere(nn.Linear(8, 8), "ibm2020")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.rand(2, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_nan_and_infinity_are_counted_and_never_become_a_number(where: str, bad: float) -> None:
    """A NaN or infinity in an activation or a gradient warns, is counted, and makes the GEMM's result NaN."""
    layer = everywhere(nn.Linear(8, 8), "ibm2020")
    x = torch.rand(4, 8)
    layer(x)
    if where == "input":
        x[1, 2] = bad
        with pytest.warns(NonFiniteWarning, match="NaN or infinity"):
            assert layer(x).isnan().all()
        assert layer.plan.input.nonfinite == 1
    else:
        x.requires_grad_()
        g = torch.rand(4, 8)
        g[0, 0] = bad
        with pytest.warns(NonFiniteWarning, match="NaN or infinity"):
            layer(x).backward(g)
        assert x.grad.isnan().any()
        assert layer.weight.grad.isnan().all()
        assert layer.plan.grad_output.nonfinite == 1
    assert "NaN or infinity in 1 tensors" in str(hb.summary(layer))


def test_an_empty_batch_passes() -> None:
    """No rows in, no rows out, and gradients of zero."""
    for layer, shape in ((nn.Linear(8, 4), (0, 8)), (nn.Conv2d(2, 3, 3), (0, 2, 5, 5))):
        converted = everywhere(layer, "ibm2020")
        x = torch.rand(shape, requires_grad=True)
        y = converted(x)
        assert y.shape[0] == 0
        y.sum().backward()
        assert torch.equal(converted.weight.grad, torch.zeros_like(converted.weight))


def test_a_channels_last_input_gives_the_same_bits() -> None:
    """Memory format is no number format."""
    torch.manual_seed(0)
    layer = everywhere(nn.Conv2d(4, 6, 3, padding=1), "ibm2020")
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(layer(x), layer(x.to(memory_format=torch.channels_last)))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """Output, gradients and the learned clip's gradient are equal to the bit with one thread and with two."""
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            layer = everywhere(nn.Conv2d(8, 8, 3, padding=1), "ibm2020")
            x = torch.rand(16, 8, 48, 48, requires_grad=True)
            y = layer(x)
            y.backward(torch.randn(y.shape))
            results.append((y.detach(), x.grad, layer.weight.grad, layer.plan.input.clip.grad))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_padding_modes_are_torchs_own(mode: str, padding: int | str) -> None:
    """A layer whose quantizers are off by nothing (int8, wide clip) pads exactly as torch does."""
    torch.manual_seed(0)
    fine = Recipe(name="fine", fprop=Fprop(input=hb.Pact(clip=127.0, signed=True, bits=8)))
    layer = nn.Conv2d(2, 3, (4, 3), padding=padding, padding_mode=mode)
    for parameter in layer.parameters():
        parameter.data = torch.randint(-9, 10, parameter.shape).float()  # whole numbers, so that sums are exact
    x = torch.randint(-127, 128, (2, 2, 7, 6)).float()
    wanted = layer(x)
    assert torch.equal(everywhere(layer, fine)(x), wanted)


def test_a_convolution_takes_an_input_without_batch() -> None:
    """(C, H, W) in gives (O, H', W') out, the same numbers as in a batch of one."""
    torch.manual_seed(0)
    layer = everywhere(nn.Conv2d(2, 3, 3), "ibm2020")
    x = torch.rand(2, 5, 5)
    assert torch.equal(layer(x), layer(x.unsqueeze(0)).squeeze(0))


def test_bf16_is_torchs_own_bf16() -> None:
    """The 16-bit baseline computes what the same layer computes in bfloat16, forward and backward."""
    torch.manual_seed(0)
    plain = nn.Linear(16, 8)
    layer = everywhere(copy.deepcopy(plain), "bf16")
    x = torch.rand(4, 16)
    y = layer(x)
    y.sum().backward()
    half = copy.deepcopy(plain).to(torch.bfloat16)
    wanted = half(x.to(torch.bfloat16))
    wanted.float().sum().backward()
    assert torch.equal(y, wanted.float())
    assert torch.equal(layer.weight.grad, half.weight.grad.float())


def test_a_layer_of_constants_does_not_divide_by_zero() -> None:
    """All-zero weights, inputs and gradients go through every recipe and stay zero."""
    for name in hb.RECIPES:
        layer = everywhere(nn.Linear(8, 8, bias=False), name) if name != "fp32" else nn.Linear(8, 8, bias=False)
        nn.init.zeros_(layer.weight)
        x = torch.zeros(4, 8, requires_grad=True)
        y = layer(x)
        y.backward(torch.zeros(4, 8))
        for tensor in (y, x.grad, layer.weight.grad):
            assert torch.equal(tensor.detach(), torch.zeros_like(tensor)), name


def test_own_specs_in_the_backward_slots_are_used() -> None:
    """dgrad.weight and wgrad.input with specs of their own multiply codes of those specs."""
    recipe = replace(
        base_recipe(),
        dgrad=Dgrad(grad_output=hb.Radix4(), weight=hb.MinMax(bits=8)),
        wgrad=Wgrad(grad_output=hb.Radix4(), input=hb.MinMax(bits=3)),
    )
    seen = operands(everywhere(nn.Linear(8, 8), recipe), torch.rand(4, 8, requires_grad=True))
    assert seen["dgrad.b"].format is hb.formats.int8
    assert len(seen["wgrad.b"].codes().unique()) <= 8


def test_the_plan_knows_its_backend() -> None:
    """A backend that does not exist is refused by name."""
    with pytest.raises(hb.formats.UnknownNameError, match="no backend named 'nativ'"):
        Plan(hb.RECIPES["ibm2020"], backend="nativ")
    assert kernels.get("reference") is reference


def test_functional_accumulators_are_exposed_for_checking() -> None:
    """gemm is float32(accumulators) times the one output scale, to the bit."""
    torch.manual_seed(0)
    x, w = hb.quantize(torch.rand(5, 33), hb.Pact(clip=0.9)), hb.quantize(torch.randn(7, 33), hb.Sawb())
    geometry = kernels.Linear(rows=5, in_features=33, out_features=7)
    sums = reference.accumulators("fprop", x, w, geometry)
    scale = (x.scale.double() * w.scale.double()).float()
    assert torch.equal(reference.gemm("fprop", x, w, geometry), sums.float() * scale)
    assert torch.equal(sums, x.codes().double() @ ((w.codes() ^ 8).double() - 8).t())


def test_warnings_are_errors_here() -> None:
    """A healthy pass through a converted layer warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = everywhere(nn.Linear(8, 8), "ibm2020")
        F.mse_loss(layer(torch.rand(4, 8)), torch.rand(4, 8)).backward()


@pytest.mark.parametrize("sides", [(1, 1), (1, 7), (7, 1), (64, 1), (1, 64)])
@pytest.mark.parametrize("rows", [1, 2, 128])
def test_a_side_of_one_is_computed_as_any_other(rows: int, sides: tuple[int, int]) -> None:
    """Layers with one input or one output feature give the float64 product of their codes in all three GEMMs."""
    torch.manual_seed(0)
    layer = everywhere(nn.Linear(*sides, bias=False), "article")
    x = torch.randn(rows, sides[0], requires_grad=True)
    seen = operands(layer, x)
    hats = {name: q.dequantize(torch.float64) for name, q in seen.items() if name != "y"}
    for found, wanted in (
        (seen["y"], hats["fprop.a"] @ hats["fprop.b"].t()),
        (x.grad, hats["dgrad.a"] @ hats["dgrad.b"]),
        (layer.weight.grad, hats["wgrad.a"].t() @ hats["wgrad.b"]),
    ):
        assert ((found.double() - wanted).abs() <= 2.0**-22 * (wanted.abs() + wanted.abs().max())).all()
