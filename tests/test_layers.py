"""Every twin: torch's own numbers when nothing is rounded, float64's on codes else; copies, hooks, types, names."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import nn as twins
from halfbyte.recipes import Recipe
from layer_checks import Recorder, everywhere, flat, on_the_grid, passed, same_as_torch

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

FOUR_BIT = [name for name, recipe in hb.RECIPES.items() if not recipe.in_floating_point]

Build = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]

EVERY_TWIN: dict[str, Build] = {
    "Linear": (lambda: nn.Linear(24, 10), ((6, 24),)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), ((3, 4, 11),)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), ((2, 4, 7, 8),)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), ((2, 2, 4, 3, 5),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), ((3, 4, 11),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), ((2, 4, 5, 6),)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), ((2, 2, 3, 3, 2),)),
    "LSTM": (lambda: nn.LSTM(10, 12, 2, bidirectional=True, proj_size=5), ((4, 3, 10),)),
    "GRU": (lambda: nn.GRU(10, 12, 2, bidirectional=True), ((4, 3, 10),)),
    "RNN": (lambda: nn.RNN(10, 12, batch_first=True), ((3, 4, 10),)),
    "LSTMCell": (lambda: nn.LSTMCell(10, 12), ((3, 10), (3, 12), (3, 12))),
    "GRUCell": (lambda: nn.GRUCell(10, 12), ((3, 10), (3, 12))),
    "RNNCell": (lambda: nn.RNNCell(10, 12), ((3, 10), (3, 12))),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(16, 2), ((5, 3, 16),) * 3),
}


def call(module: nn.Module, *inputs: Tensor) -> object:
    """The module on its inputs; an LSTM cell takes the two parts of its state as one argument."""
    return module(inputs[0], inputs[1:]) if isinstance(module, nn.LSTMCell) else module(*inputs)


def build(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A layer and inputs for it."""
    torch.manual_seed(0)
    make, shapes = EVERY_TWIN[name]
    return make(), [torch.randn(shape) for shape in shapes]


def with_products(name: str, recipe: str | Recipe) -> tuple[hb.Rule, ...]:
    """Rules that also convert the products of attention; none for other layers."""
    rules = (hb.Rule(fqn="qk", recipe=recipe), hb.Rule(fqn="pv", recipe=recipe))
    return rules if name == "MultiheadAttention" else ()


def test_every_twin_is_tested() -> None:
    """The table of these tests holds every class that converts."""
    assert {kind.__name__ for kind in twins.TWINS} == set(EVERY_TWIN)


@pytest.mark.parametrize("name", EVERY_TWIN)
def test_under_the_identity_recipe_a_twin_is_torchs_layer(name: str) -> None:
    """Outputs, gradients of inputs and of every weight and bias are torch's own to float rounding."""
    module, inputs = build(name)
    same_as_torch(module, inputs, call)


@pytest.mark.parametrize("recipe", FOUR_BIT)
@pytest.mark.parametrize("name", EVERY_TWIN)
def test_every_product_is_float64s_on_what_the_codes_stand_for(name: str, recipe: str) -> None:
    """Under every recipe every GEMM of every layer is the float64 product of its operands, rounded twice."""
    module, inputs = build(name)
    converted = everywhere(module, recipe, *with_products(name, recipe))
    recorder = Recorder.attach(converted)
    passed(converted, inputs, call)
    recorder.assert_products_are_exact()
    assert all(set(kinds) == {"fprop", "dgrad", "wgrad"} for kinds in recorder.counts().values())


@pytest.mark.parametrize("name", EVERY_TWIN)
def test_a_weights_gradient_is_what_wgrad_gave(name: str) -> None:
    """Under int4_forward_only each weight's gradient is, to the bit, the result of its plan's one wgrad GEMM."""
    module, inputs = build(name)
    converted = everywhere(module, "int4_forward_only")
    recorder = Recorder.attach(converted)
    passed(converted, inputs, call)
    grads = {p.plan: p.result for p in recorder.products if p.which == "wgrad"}
    assert len(grads) == sum(p.which == "wgrad" for p in recorder.products) == len(recorder.names)
    if name == "MultiheadAttention":
        assert torch.equal(converted.in_proj_weight.grad, torch.cat([grads["q"], grads["k"], grads["v"]]))
        grads = {"out_proj.weight": grads["out"]}
    own = dict(converted.named_parameters())
    for plan, grad in grads.items():
        weight = own[plan if plan in own else f"weight_{plan}" if plan else "weight"]
        assert torch.equal(weight.grad, grad.view_as(weight)), plan


@pytest.mark.parametrize("dims", TRANSPOSED)
def test_transposed_convolutions_are_torchs_for_any_shape(dims: int) -> None:
    """Stride, padding, output_padding, dilation, groups, bias, with and without a batch, give torch's own numbers."""
    grid = itertools.product((1, 2, 3), (0, 1), (0, 1), (1, 2), (1, 2), (True, False), (True, False))
    for stride, padding, extra, dilation, groups, bias, batched in grid:
        if extra >= max(stride, dilation):
            continue
        kernel = (3, 2, 2)[:dims]
        layer = TRANSPOSED[dims](4, 6, kernel, stride, padding, extra, groups, bias, dilation)
        sizes = (5, 4, 3)[:dims]
        x = torch.randn((2, 4, *sizes) if batched else (4, *sizes))
        same_as_torch(layer, [x], call)


@pytest.mark.parametrize("output_size", [(9, 8), (10, 7), (2, 6, 10, 8)])
def test_output_size_chooses_among_the_sizes_that_a_stride_leaves_open(output_size: tuple[int, ...]) -> None:
    """output_size, with and without its first dimensions, does what it does in torch."""
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    converted = same_as_torch(layer, [torch.randn(2, 4, 5, 4)], lambda m, t: m(t, output_size=output_size))
    assert converted(torch.randn(4, 5, 4), output_size=output_size[-2:]).shape == (6, *output_size[-2:])
    with pytest.raises(ValueError, match="requested an output size"):
        converted(torch.randn(2, 4, 5, 4), output_size=(11, 8))


@pytest.mark.parametrize("name", ["Conv2d", "Conv3d", "ConvTranspose2d", "ConvTranspose3d"])
def test_a_channels_last_input_and_weight_give_the_same_bits(name: str) -> None:
    """Memory format is no number format, for the input and for the weight, forward and backward."""
    module, (x,) = build(name)
    results = []
    channels_last = torch.channels_last_3d if name.endswith("3d") else torch.channels_last
    for memory_format in (torch.contiguous_format, channels_last):
        converted = everywhere(copy.deepcopy(module), "ibm2020").to(memory_format=memory_format)
        results.append(passed(converted, [x.to(memory_format=memory_format)], call))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("name", EVERY_TWIN)
def test_copies_and_pickles_compute_the_same_bits(name: str) -> None:
    """A deep copy and an unpickled model give the outputs and gradients of the original, state included."""
    module, inputs = build(name)
    converted = everywhere(module, "ibm2020", *with_products(name, "ibm2020"))
    passed(converted, inputs, call)
    converted.zero_grad()
    copies = [copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))]
    wanted = passed(converted, inputs, call)
    for other in copies:
        found = passed(other, inputs, call)
        assert type(other) is type(converted)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", EVERY_TWIN)
def test_state_comes_back_from_a_state_dict(name: str) -> None:
    """A second model that loads the state computes the same bits in evaluation."""
    module, inputs = build(name)
    other = everywhere(copy.deepcopy(module), "ibm2020")
    converted = everywhere(module, "ibm2020")
    passed(converted, inputs, call)
    other.load_state_dict(converted.state_dict())
    for a, b in zip(flat(call(converted.eval(), *inputs)), flat(call(other.eval(), *inputs)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY_TWIN)
def test_hooks_still_fire(name: str) -> None:
    """Forward, pre-forward and backward hooks that were there before conversion, and new ones, are called once each."""
    module, inputs = build(name)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    converted = everywhere(module, "ibm2020")
    converted.register_full_backward_hook(lambda *_: calls.append("backward"))
    passed(converted, inputs, call)
    assert calls == ["before", "after", "backward"]


@pytest.mark.parametrize("name", EVERY_TWIN)
def test_restore_gives_torchs_layer_back(name: str) -> None:
    """After restoring, class, attributes, parameters and numbers are those of a layer that was never converted."""
    module, inputs = build(name)
    plain = copy.deepcopy(module)
    parameters = list(module.parameters())
    restored = hb.restore(everywhere(module, "ibm2020", *with_products(name, "ibm2020")))
    assert type(restored) is type(plain)
    assert vars(restored).keys() == vars(plain).keys()
    assert [id(p) for p in restored.parameters()] == [id(p) for p in parameters]
    for a, b in zip(flat(call(restored, *inputs)), flat(call(plain, *inputs)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY_TWIN)
def test_a_twin_shows_its_plans(name: str) -> None:
    """The repr names each plan's recipe and formats beside what torch shows."""
    module, _ = build(name)
    before = module.extra_repr()
    text = everywhere(module, "article").extra_repr()
    assert before in text
    assert text.count("recipe=article, fprop.input=") == len(twins.plans_of(module))
    assert all(f"{plan}: " in text for plan in twins.plans_of(module) if plan)


@pytest.mark.parametrize("name", EVERY_TWIN)
def test_sixteen_bit_layers_keep_their_type(name: str) -> None:
    """A layer in bfloat16 takes and gives bfloat16, and its weights' gradients are in bfloat16."""
    module, inputs = build(name)
    converted = everywhere(module.to(torch.bfloat16), "ibm2020")
    found = passed(converted, [x.to(torch.bfloat16) for x in inputs], call)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", EVERY_TWIN)
def test_autocast_decides_the_type_of_the_output(name: str) -> None:
    """Under autocast the outputs have autocast's type, and gradients reach float32 weights."""
    module, inputs = build(name)
    converted = everywhere(module, "ibm2020")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = flat(call(converted, *inputs))
    assert outputs[0].dtype == torch.bfloat16
    sum(y.float().sum() for y in outputs).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in on_the_grid(converted).parameters())


@pytest.mark.parametrize("name", EVERY_TWIN)
def test_functional_calls_use_the_weights_that_they_are_given(name: str) -> None:
    """torch.func.functional_call with other weights gives what a layer that holds those weights gives."""
    module, inputs = build(name)
    converted = everywhere(module, "article").eval()
    arguments = (inputs[0], tuple(inputs[1:])) if name == "LSTMCell" else tuple(inputs)
    others = {key: p.detach() * 0.5 for key, p in converted.named_parameters() if "plan" not in key}
    found = flat(torch.func.functional_call(converted, others, arguments))
    holder = copy.deepcopy(converted)
    for key, value in others.items():
        holder.get_parameter(key).data.copy_(value)
    for a, b in zip(found, flat(call(holder, *inputs)), strict=True):
        assert torch.equal(a, b)
