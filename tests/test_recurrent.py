"""Recurrent layers and cells: torch's semantics in every configuration, one wgrad for all steps, clips from 1."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import halfbyte as hb
from halfbyte.errors import ConversionError, UnsupportedError
from layer_checks import FLOAT_ROUNDING, IDENTITY, Recorder, everywhere, flat, hat, on_the_grid, passed, same_as_torch

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
CELLS = {"LSTMCell": nn.LSTMCell, "GRUCell": nn.GRUCell, "RNNCell": nn.RNNCell}
INPUTS, HIDDEN, STEPS, BATCH = 4, 5, 4, 3


def layer(kind: str, **options: object) -> nn.Module:
    """A recurrent layer of 4 inputs and 5 hidden features."""
    return KINDS[kind](INPUTS, HIDDEN, **options)


def data(module: nn.Module, *, batched: bool = True, state: bool = True) -> list[Tensor]:
    """An input in the module's layout, and its first states if asked."""
    lead = (BATCH, STEPS) if module.batch_first else (STEPS, BATCH)
    x = torch.randn(*lead, INPUTS) if batched else torch.randn(STEPS, INPUTS)
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or HIDDEN, HIDDEN)[: 2 if isinstance(module, nn.LSTM) else 1]
    shape = (count, BATCH) if batched else (count,)
    return [x, *(torch.randn(*shape, size) for size in sizes)] if state else [x]


def run(module: nn.Module, x: Tensor | PackedSequence, *states: Tensor) -> object:
    """The module with a state in the form that it takes."""
    if not states:
        return module(x)
    return module(x, states if isinstance(module, nn.LSTM | nn.LSTMCell) else states[0])


def packed(lengths: list[int], *, in_order: bool) -> Callable[..., object]:
    """A call that packs its input."""

    def call(module: nn.Module, x: Tensor, *states: Tensor) -> object:
        sequence = pack_padded_sequence(
            x, torch.tensor(lengths), batch_first=module.batch_first, enforce_sorted=in_order
        )
        return run(module, sequence, *states)

    return call


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_sequences_are_torchs_in_every_configuration(kind: str, bidirectional: bool) -> None:
    """Layers, bias, batch_first, batch or none, a state or none, projection, nonlinearity: all as in torch."""
    extra = {"LSTM": [{}, {"proj_size": 3}], "GRU": [{}], "RNN": [{}, {"nonlinearity": "relu"}]}[kind]
    for options, layers, bias, first, batched, state in itertools.product(
        extra, (1, 2), (True, False), (False, True), (True, False), (True, False)
    ):
        module = layer(kind, num_layers=layers, bias=bias, batch_first=first, bidirectional=bidirectional, **options)
        same_as_torch(module, data(module, batched=batched, state=state), run)


@pytest.mark.parametrize("lengths", [[4, 2, 1], [4, 4, 4], [2, 4, 1], [1, 3, 3]])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_torchs(kind: str, lengths: list[int]) -> None:
    """Sequences of several lengths, in order or not, in one direction and two, give torch's numbers and states."""
    in_order = lengths == sorted(lengths, reverse=True)
    for bidirectional, layers, first, state in itertools.product((False, True), (1, 2), (False, True), (True, False)):
        module = layer(kind, num_layers=layers, bidirectional=bidirectional, batch_first=first)
        same_as_torch(module, data(module, state=state), packed(lengths, in_order=in_order))


def test_a_packed_result_unpacks_like_torchs() -> None:
    """Batch sizes and both orders of the packed output are those of torch's layer."""
    module = on_the_grid(layer("LSTM", bidirectional=True))
    sequence = pack_padded_sequence(torch.randn(4, 3, 4), torch.tensor([2, 4, 1]), enforce_sorted=False)
    wanted = pad_packed_sequence(module(sequence)[0])
    found = pad_packed_sequence(everywhere(module, IDENTITY)(sequence)[0])
    assert torch.equal(found[1], wanted[1])
    assert (found[0] - wanted[0]).abs().max() <= FLOAT_ROUNDING


@settings(max_examples=25)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    inputs=st.integers(1, 9),
    hidden=st.integers(2, 9),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    bidirectional=st.booleans(),
)
def test_any_shape_is_torchs(kind: str, inputs: int, hidden: int, lengths: list[int], bidirectional: bool) -> None:
    """Any number of inputs, features and lengths gives torch's numbers."""
    module = KINDS[kind](inputs, hidden, bidirectional=bidirectional)
    x = torch.randn(max(lengths), len(lengths), inputs)
    same_as_torch(module, [x], packed(lengths, in_order=False))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_lies_between_layers_and_is_torchs(kind: str) -> None:
    """With the same generator the same elements are dropped between layers, in training only."""
    module = layer(kind, num_layers=3, dropout=0.5, bidirectional=True)
    same_as_torch(module, data(module), run)
    x = data(module, state=False)[0]
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_torchs(kind: str, bias: bool) -> None:
    """With and without batch, bias and state, a cell gives torch's next state and gradients."""
    for batched, state, options in itertools.product(
        (True, False), (True, False), [{}] + [{"nonlinearity": "relu"}] * (kind == "RNNCell")
    ):
        cell = CELLS[kind](INPUTS, HIDDEN, bias=bias, **options)
        lead = (BATCH,) if batched else ()
        states = [torch.randn(*lead, HIDDEN) for _ in range(2 if kind == "LSTMCell" else 1)] if state else []
        same_as_torch(cell, [torch.randn(*lead, INPUTS), *states], run)


def test_only_steps_that_matter_get_a_gradient() -> None:
    """A loss on the first two steps of four gives torch's gradients: steps that backward does not reach add nothing."""
    module = layer("LSTM", bidirectional=True)
    same_as_torch(module, data(module), lambda m, *given: run(m, *given)[0][:2])


def test_two_sequences_before_one_backward() -> None:
    """Gradients of two forward passes add up, each with its own wgrad."""
    module = on_the_grid(layer("GRU"))
    a, b = torch.randn(2, STEPS, BATCH, INPUTS)
    wanted = passed(copy.deepcopy(module), [a, b], lambda m, x, y: (m(x), m(y)))
    converted = everywhere(module, IDENTITY)
    recorder = Recorder.attach(converted)
    found = passed(converted, [a, b], lambda m, x, y: (m(x), m(y)))
    assert all((found[k] - wanted[k]).abs().max() <= 4 * FLOAT_ROUNDING for k in wanted)
    assert recorder.counts()["hh_l0"]["wgrad"] == 2


@pytest.mark.parametrize("recipe", ["ibm2020", "article", "luq", "nvfp4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_inputs_product_is_one_gemm_and_so_is_each_wgrad(kind: str, recipe: str) -> None:
    """Over T steps: one fprop for all inputs, T for the state, T dgrads that the steps before wait for, one wgrad."""
    module = layer(kind, bidirectional=True)
    converted = everywhere(module, recipe)
    recorder = Recorder.attach(converted)
    passed(converted, data(module), run)
    counts = recorder.counts()
    for name in ("ih_l0", "ih_l0_reverse"):
        assert counts[name] == {"fprop": 1, "dgrad": 1, "wgrad": 1}
    # A zero point for each step (article) makes one sum a step; they are added up.
    for name in ("hh_l0", "hh_l0_reverse"):
        assert counts[name] == {"fprop": STEPS, "dgrad": STEPS, "wgrad": STEPS if recipe == "article" else 1}
    rows = [p.geometry.rows for p in recorder.products if p.plan == "ih_l0"]
    assert rows == [STEPS * BATCH] * 3


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 2, 1]])
@pytest.mark.parametrize("recipe", ["ibm2020", "int8", "fp8", "int4_forward_only"])
def test_the_one_wgrad_is_the_sum_of_the_steps_on_the_same_codes(recipe: str, lengths: list[int]) -> None:
    """wgrad multiplies the very codes of every step's fprop, and equals the float64 sum of the steps' products."""
    module = layer("LSTM", bidirectional=True)
    converted = everywhere(module, recipe)
    recorder = Recorder.attach(converted)
    passed(converted, data(module), packed(lengths, in_order=True))
    for plan in ("hh_l0", "hh_l0_reverse"):
        steps = [p.a[0] for p in recorder.products if (p.plan, p.which) == (plan, "fprop")]
        (wgrad,) = [p for p in recorder.products if (p.plan, p.which) == (plan, "wgrad")]
        assert torch.equal(hat(wgrad.b), torch.cat([hat(x) for x in steps]))
        grads = sum(hat(part) for part in wgrad.a).split([x.shape[0] for x in steps])
        wanted = sum(g.t() @ hat(x) for g, x in zip(grads, steps, strict=True))
        assert ((wgrad.result.double() - wanted).abs() <= 2.0**-22 * (wanted.abs() + wanted.abs().max())).all()


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 3, 1]])
def test_gates_and_state_are_float_between_products_on_codes(lengths: list[int]) -> None:
    """An LSTM's output is what float64 makes of the same codes: gates, biases and state see nothing but products."""
    module = layer("LSTM")
    converted = everywhere(module, "ibm2020")
    recorder = Recorder.attach(converted)
    x, h0, c0 = data(module)
    packed_x = pack_padded_sequence(x, torch.tensor(lengths))
    y, _ = converted(packed_x, (h0, c0))
    sizes = packed_x.batch_sizes.tolist()
    given, *steps = [p.in_float64() for p in recorder.products]
    assert len(steps) == len(sizes)
    bias = (module.bias_ih_l0 + module.bias_hh_l0).double()
    c, outputs = c0[0].double(), []
    for part, hidden, size in zip(given.split(sizes), steps, sizes, strict=True):
        i, f, g, o = (part + hidden + bias).chunk(4, -1)
        c = f.sigmoid() * c[:size] + i.sigmoid() * g.tanh()
        outputs.append(o.sigmoid() * c.tanh())
    assert (y.data.double() - torch.cat(outputs)).abs().max() <= 2.0**-20
    states = [seen for _, slot, seen, _ in recorder.operands if slot == "fprop.input"][2:]
    for seen, before in zip(states, outputs, strict=False):
        assert (seen.double() - before[: len(seen)]).abs().max() <= 2.0**-20


def test_the_state_of_a_sixteen_bit_layer_is_kept_in_float32() -> None:
    """A cell state of 1 takes in 64 additions of 2^-11, each of which bfloat16 would round away."""
    module = layer("LSTM").to(torch.bfloat16)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    module.bias_ih_l0.data[HIDDEN : 2 * HIDDEN] = 40.0  # the forget gate is open: sigmoid(40) is 1 in float32
    module.bias_ih_l0.data[2 * HIDDEN : 3 * HIDDEN] = 2.0**-10  # the input gate is half open: adds 2^-11 a step
    converted = everywhere(module, "ibm2020")
    start = torch.ones(1, BATCH, HIDDEN, dtype=torch.bfloat16)
    _, (_, c) = converted(torch.ones(64, BATCH, INPUTS, dtype=torch.bfloat16), (start, start))
    assert c.dtype == torch.bfloat16
    assert torch.equal(c, torch.full_like(c, 1.0 + 64 * 2.0**-11))


def test_both_directions_and_every_weight_have_a_plan_of_their_own() -> None:
    """Plans are named like torch's weights, and each has its own number to draw from."""
    module = everywhere(layer("LSTM", num_layers=2, bidirectional=True, proj_size=2), "luq")
    names = [n.removeprefix("weight_") for n, _ in module.named_parameters() if n.startswith("weight_")]
    assert list(module.plans) == names
    assert "hr_l1_reverse" in names
    assert len({plan.layer for plan in module.plans.values()}) == len(names)


def test_a_learned_clip_of_a_bounded_state_starts_at_one() -> None:
    """The state's clip starts at 1 and signed, so that a first state of zeros decides nothing; the input's waits."""
    for module in (layer("LSTM", proj_size=3), layer("GRU"), layer("RNN"), *(c(4, 5) for c in CELLS.values())):
        plans = everywhere(module, "ibm2020").plans
        for name, plan in plans.items():
            if name.startswith("ih"):
                assert plan.input.format is None
            else:
                assert (plan.input.format.name, plan.input.clip.item()) == ("int4", 1.0)
    for module in (layer("RNN", nonlinearity="relu"), nn.RNNCell(4, 5, nonlinearity="relu")):
        assert all(plan.input.format is None for plan in everywhere(module, "ibm2020").plans.values())


def test_a_clip_that_a_recipe_gives_is_kept() -> None:
    """Only a clip that would wait for the first batch is replaced, and a sign that is given stays."""
    base = hb.RECIPES["ibm2020"]
    given = replace(base, name="given", fprop=replace(base.fprop, input=hb.Pact(clip=0.5, signed=True)))
    assert everywhere(layer("GRU"), given).plans["hh_l0"].input.clip.item() == 0.5
    half = replace(base, name="half", fprop=replace(base.fprop, input=hb.Pact(signed=False)))
    assert everywhere(layer("GRU"), half).plans["hh_l0"].input.format.name == "uint4"


def test_one_weight_can_stay_in_floating_point() -> None:
    """A rule that names one weight leaves that one alone; its product is torch's and its gradient arrives."""
    module = layer("LSTM")
    converted = hb.convert(module, "ibm2020", [hb.Rule(fqn="ih_l0", recipe="fp32"), hb.Rule(recipe="ibm2020")])
    recorder = Recorder.attach(converted)
    passed(converted, data(module), run)
    assert set(recorder.counts()) == {"hh_l0"}
    assert converted.weight_ih_l0.grad is not None
    rows = {row.fqn: row.recipe for row in hb.summary(converted).layers}
    assert rows == {"ih_l0": "fp32", "hh_l0": "ibm2020"}
    only_ih = hb.convert(layer("GRU"), "ibm2020", [hb.Rule(fqn="hh_*", recipe="fp32"), hb.Rule(recipe="ibm2020")])
    recorder = Recorder.attach(only_ih)
    passed(only_ih, data(only_ih), run)
    assert set(recorder.counts()) == {"ih_l0"}


def test_starting_anew_leaves_clips_alone() -> None:
    """reset_parameters draws weights and biases as torch does, and touches no learned clip."""
    for module in (layer("LSTM"), nn.GRUCell(4, 5)):
        plain = copy.deepcopy(module)
        converted = everywhere(module, "ibm2020")
        for each in (plain, converted):
            torch.manual_seed(5)
            each.reset_parameters()
        own = dict(converted.named_parameters())
        assert all(torch.equal(own[name], p) for name, p in plain.named_parameters())
        assert next(p for n, p in own.items() if n.endswith("clip") and "hh" in n).item() == 1.0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    """A recurrent layer inside a checkpoint gives the outputs and gradients that it gives outside, also at random."""
    results = []
    for through in (lambda m, x: m(x)[0], lambda m, x: checkpoint(lambda t: m(t)[0], x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        module = everywhere(nn.LSTM(INPUTS, HIDDEN, bidirectional=True), "luq")
        x = torch.randn(STEPS, BATCH, INPUTS)
        for _ in range(2):
            module.zero_grad()
            found = passed(module, [x], through)
        results.append(found)
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_gives_the_same_bits() -> None:
    """torch.compile around a recurrent layer breaks its graph there and changes nothing."""
    module = everywhere(layer("GRU"), "ibm2020")
    x = torch.randn(STEPS, BATCH, INPUTS)
    module(x)
    wanted = module.eval()(x)
    found = torch.compile(module, backend="eager")(x)
    assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(wanted), strict=True))


def test_an_empty_batch_passes() -> None:
    """No sequences in, none out, as in torch."""
    module = everywhere(layer("GRU"), "ibm2020")
    y, h = module(torch.randn(STEPS, 0, INPUTS))
    assert (y.shape, h.shape) == ((STEPS, 0, HIDDEN), (1, 0, HIDDEN))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m(torch.randn(4, 3, 7)), r"shape \(4, 3, 7\) was given; .* input_size=4"),
        (lambda m: m(torch.randn(1, 4, 3, 4)), r"shape \(1, 4, 3, 4\) was given"),
        (lambda m: m(torch.randn(4, 3, 4).double()), r"torch.float64 was given to weights of torch.float32"),
        (lambda m: m(torch.randn(0, 3, 4)), "0 steps"),
        (lambda m: m(torch.randn(4, 4), torch.randn(1, 3, 5)), "both have a batch dimension, or neither"),
        (lambda m: nn.GRUCell(4, 5).forward, None),
    ],
)
def test_a_callers_mistake_is_answered(call: Callable[[nn.Module], object], text: str | None) -> None:
    """Wrong shapes and types say what was given and what is possible."""
    module = everywhere(layer("GRU"), "ibm2020")
    if text is None:
        cell = everywhere(nn.GRUCell(4, 5), "ibm2020")
        with pytest.raises(ValueError, match=r"state of shape \(1, 5\) was given; \(3, 5\) is possible"):
            cell(torch.randn(3, 4), torch.randn(1, 5))
        with pytest.raises(ValueError, match=r"shape \(1, 3, 4\) was given"):
            cell(torch.randn(1, 3, 4))
        return
    with pytest.raises(ValueError, match=text):
        call(module)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_with_the_cure() -> None:
    """A nested tensor has no rectangle to quantize: the error says what makes them and what to do."""
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)])
    for module in (layer("GRU"), nn.GRUCell(4, 5), nn.Linear(4, 5)):
        with pytest.raises(UnsupportedError, match="use_nested_tensor"):
            everywhere(module, "ibm2020")(nested)


def test_what_one_wgrad_cannot_sum_is_refused_at_conversion() -> None:
    """An input with a zero point for each step and a gradient in blocks over steps have no common wgrad."""
    base = hb.RECIPES["nvfp4"]
    recipe = replace(
        base,
        name="mixed",
        fprop=hb.Fprop(input=hb.MinMax(), weight=hb.Sawb()),
        dgrad=hb.Dgrad(grad_output=hb.NVFP4()),
        wgrad=hb.Wgrad(grad_output=hb.NVFP4()),
    )
    with pytest.raises(ConversionError, match=r"hh_l0.*zero point.*blocks"):
        everywhere(layer("GRU"), recipe)
    everywhere(nn.Linear(4, 5), recipe)


def test_a_walk_through_part_of_the_graph_leaves_nothing_behind():
    """After a gradient of the first state alone, the weight's gradient is what it would have been without that."""
    found = []
    for partial in (False, True):
        torch.manual_seed(0)
        weight = torch.randn(6, 6, requires_grad=True)
        sequence = hb.ops.Recurrence(weight, hb.ops.Plan(hb.RECIPES["fp8"]))
        first = torch.rand(3, 6, requires_grad=True)
        outs = [sequence(first)]
        for _ in range(2):
            outs.append(sequence(outs[-1].tanh()))
        if partial:
            torch.autograd.grad(outs[2].sum(), first, retain_graph=True)
        found.append(torch.autograd.grad(outs[0].sum(), weight)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"fprop": hb.Fprop(input=hb.NVFP4(square=True), weight=hb.Sawb())}, r"hh_l0.*a scale for each block"),
        (
            {"fprop": hb.Fprop(input=hb.Sawb(), weight=hb.Sawb()), "accumulate": "fp16_chunk64"},
            r"hh_l0.*another scale at each step.*Pact",
        ),
    ],
)
def test_codes_that_steps_cannot_share_are_refused_at_conversion(fields, text):
    """What could not be one operand of the wgrad of all steps is an error before anything has run."""
    with pytest.raises(ConversionError, match=text):
        hb.convert(layer("LSTM"), hb.Recipe(name="mine", **fields))
