"""What a trace sees: sizes worked by hand, published totals, formats by rule, and what a real step does."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import halfbyte
from halfbyte.convert import summary
from halfbyte.errors import ConversionError, HalfbyteError, UnknownNameError
from halfbyte.hardware.tracing import trace
from halfbyte.hardware.tracing.quantizing import cost_of
from halfbyte.hardware.tracing.stand_in import plain_operators
from halfbyte.lab.models import (
    alexnet,
    densenet,
    digits,
    fashion,
    googlenet,
    language,
    mobilenet,
    resnet,
    sentence,
    speech,
    translation,
    vgg,
)
from halfbyte.nn import plans_of
from halfbyte.ops import Plan
from halfbyte.quantizers import Pact, Sawb
from halfbyte.recipes import RECIPES, Recipe, Rule

EVEN, ODD = "fp4_e3m0_r4", "fp4_e3m0_r4_odd"


def empty(*shape, dtype=torch.float32):
    """A tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def sizes(workload, layer=None):
    """Phase, m, n, k and groups of each GEMM of a layer, or of all."""
    return [(g.phase, g.m, g.n, g.k, g.groups) for g in workload.gemms if layer in (None, g.layer)]


def counts(workload, layer):
    """By phase the elements of both operands and of the result."""
    return {g.phase: (g.a_elements, g.b_elements, g.out_elements) for g in workload.gemms if g.layer == layer}


def formats(workload, layer):
    """By phase the formats of both operands."""
    return {g.phase: (g.a_format, g.b_format) for g in workload.gemms if g.layer == layer}


def work(workload, layer, name, phase):
    """The entries of that work: elements, flops, bytes read and written, and whether it can ride along."""
    return [
        (v.elements, v.flops, v.read_bytes, v.written_bytes, v.fusible)
        for v in workload.vector_ops
        if (v.layer, v.name, v.phase) == (layer, name, phase)
    ]


class Functional(nn.Module):
    """A module of somebody's own: a function of itself and its inputs, with parameters and layers by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.randn(part)) if isinstance(part, tuple) else part)

    def forward(self, *args):
        """What the function gives."""
        return self.function(self, *args)


class Tied(nn.Module):
    """A language model whose embedding is its last matrix."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, symbols):
        """Logits."""
        return F.linear(self.body(self.embedding(symbols)), self.embedding.weight)


def relu_half(x):
    """ReLU in place on the first columns alone."""
    x[:, :2].relu_()
    return x


def three(kind=nn.Linear, **others):
    """A layer between two others, so that recipes convert it: 4 to 6 features after a ReLU."""
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), kind(4, 6, **others), nn.Sigmoid(), nn.Linear(6, 4))


# Published totals ---------------------------------------------------------------------------------------------------


def test_resnet18_has_the_published_work():
    """ResNet-18 has 1.814 GMAC an image; the backward GEMMs as many each, but for dgrad of the first layer.

    The first convolution has 112 * 112 * 64 * 7 * 7 * 3 = 118,013,952. The image needs no gradient.
    """
    net = trace(resnet.resnet18(1000, stem="imagenet"), empty(2, 3, 224, 224), "ibm2020", optimizer=None)
    assert net.macs("fprop") == net.macs("wgrad") == 2 * 1_814_073_344
    assert net.macs("dgrad") == 2 * (1_814_073_344 - 118_013_952)
    assert not [g for g in net.gemms if g.layer == "stem.0" and g.phase == "dgrad"]
    assert (net.batch, net.name, net.recipe) == (2, "ResNet", "ibm2020")


def test_resnet50_in_both_variants():
    """ResNet-50 has 4.089 GMAC with the stride in a block's 3x3 convolution (v1.5), 3.858 in its first 1x1 one (v1)."""
    model = resnet.resnet50(1000, stem="imagenet")
    image = empty(1, 3, 224, 224)
    assert trace(model, image, "fp16", optimizer=None).macs("fprop") == 4_089_184_256
    for block in (m for m in model.modules() if hasattr(m, "conv3")):
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    assert trace(model, image, "fp16", optimizer=None).macs("fprop") == 3_857_973_248


# Sizes worked by hand -----------------------------------------------------------------------------------------------


def test_linear_by_hand():
    """A linear layer from 4 to 6 on 2 x 5 vectors: ten rows.

    fprop 10 x 6 over 4; dgrad 10 x 4 over 6; wgrad 6 x 4 over 10. Input 40, weight 24, output 60 elements.
    """
    net = trace(nn.Linear(4, 6), empty(2, 5, 4).requires_grad_(), "fp16")
    assert sizes(net) == [("fprop", 10, 6, 4, 1), ("dgrad", 10, 4, 6, 1), ("wgrad", 6, 4, 10, 1)]
    assert counts(net, "") == {"fprop": (40, 24, 60), "dgrad": (60, 24, 40), "wgrad": (60, 40, 24)}


def test_strided_convolution_by_hand():
    """A 3x3 convolution of stride 2 from 4 to 8 channels, two images of 6x6 to 3x3: 18 rows and nine taps.

    fprop 18 x 8 over 4 * 9; dgrad 18 x 4 over 8 * 9, as many multiply-accumulates; wgrad 8 x 36 over 18.
    Stored are an input of 2 * 4 * 36 = 288 elements, not the 18 * 36 of its unfolding, and an output of 2 * 8 * 9.
    """
    net = trace(nn.Conv2d(4, 8, 3, stride=2, padding=1), empty(2, 4, 6, 6).requires_grad_(), "fp16")
    assert sizes(net) == [("fprop", 18, 8, 36, 1), ("dgrad", 18, 4, 72, 1), ("wgrad", 8, 36, 18, 1)]
    assert counts(net, "") == {"fprop": (288, 288, 144), "dgrad": (144, 288, 288), "wgrad": (144, 288, 288)}


def test_a_stride_passes_over_elements():
    """A 1x1 convolution of stride 2 multiplies a quarter of its 2 * 4 * 36 inputs and gives a gradient to all."""
    net = trace(nn.Conv2d(4, 8, 1, stride=2), empty(2, 4, 6, 6).requires_grad_(), "fp16")
    assert counts(net, "") == {"fprop": (72, 32, 144), "dgrad": (144, 32, 288), "wgrad": (144, 72, 32)}


def test_grouped_convolution_by_hand():
    """A convolution of three taps from 4 to 6 channels in two groups: each 2 to 3 channels, on 2 x 5 positions.

    fprop 10 x 3 over 2 * 3; dgrad 10 x 2 over 3 * 3; wgrad 3 x 6 over 10; two of each.
    """
    net = trace(nn.Conv1d(4, 6, 3, padding=1, groups=2), empty(2, 4, 5).requires_grad_(), "fp16")
    assert sizes(net) == [("fprop", 10, 3, 6, 2), ("dgrad", 10, 2, 9, 2), ("wgrad", 3, 6, 10, 2)]
    assert counts(net, "")["fprop"] == (40, 36, 60)


def test_depthwise_convolution_by_hand():
    """A depthwise 3x3 convolution of four channels is four products of one column over nine taps."""
    net = trace(nn.Conv2d(4, 4, 3, groups=4), empty(2, 4, 5, 5).requires_grad_(), "fp16")
    assert sizes(net) == [("fprop", 18, 1, 9, 4), ("dgrad", 18, 1, 9, 4), ("wgrad", 1, 9, 18, 4)]


def test_transposed_convolution_by_hand():
    """A transposed convolution multiplies each of its inputs, here 2 * 5, with all taps of all its outputs.

    From 4 to 6 channels with three taps: fprop 10 x 6 over 4 * 3, dgrad 10 x 4 over 6 * 3; wgrad unfolds grad_output:
    6 * 3 x 4 over 10.
    """
    net = trace(nn.ConvTranspose1d(4, 6, 3, stride=2), empty(2, 4, 5).requires_grad_(), "fp16")
    assert sizes(net) == [("fprop", 10, 6, 12, 1), ("dgrad", 10, 4, 18, 1), ("wgrad", 18, 4, 10, 1)]
    assert counts(net, "")["fprop"] == (40, 72, 2 * 6 * 11)


def test_volume_convolution_by_hand():
    """A 2x2x2 convolution from 1 to 3 channels on a cube of 3x3x3 has eight positions and eight taps."""
    assert sizes(trace(nn.Conv3d(1, 3, 2), empty(1, 1, 3, 3, 3), "fp16"), "")[0] == ("fprop", 8, 3, 8, 1)


def test_lstm_by_hand():
    """An LSTM from 3 to 4 over three steps of five sequences: one product for all inputs, one a step for the state.

    ih: 3 * 5 rows x 16 gates over 3. hh: three times 5 x 16 over 4. Backward: the state's dgrad at two steps (the first
    state is a constant); one wgrad each for all steps: 16 x 3 and 16 x 4 over 15. The inputs need no gradient.
    """
    net = trace(nn.LSTM(3, 4), empty(3, 5, 3), "fp16", batch=5)
    assert sizes(net, "ih_l0") == [("fprop", 15, 16, 3, 1), ("wgrad", 16, 3, 15, 1)]
    steps = [("fprop", 5, 16, 4, 1)] * 3 + [("dgrad", 5, 4, 16, 1)] * 2
    assert sizes(net, "hh_l0") == [*steps, ("wgrad", 16, 4, 15, 1)]
    assert counts(net, "hh_l0")["wgrad"] == (3 * 80, 3 * 20, 64)
    assert {g.kind for g in net.gemms} == {"LSTM"}
    assert net.batch == 5


def test_two_passes_of_one_lstm_are_two_sequences():
    """An LSTM that is called twice has a wgrad for each call, as two converted calls have."""
    net = trace(Functional(lambda s, x: s.lstm(s.lstm(x)[0])[0], lstm=nn.LSTM(4, 4)), empty(3, 5, 4), "fp16")
    assert sizes(net, "lstm.hh_l0").count(("wgrad", 16, 4, 15, 1)) == 2


def attention(**options):
    """Attention of width 8 and two heads to itself, between linear layers."""
    parts = {"first": nn.Linear(8, 8), "attn": nn.MultiheadAttention(8, 2, batch_first=True), "last": nn.Linear(8, 5)}

    def run(self, x):
        h = self.first(x)
        return self.last(self.attn(h, h, h, **options)[0])

    return Functional(run, **parts)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_by_hand(need_weights):
    """Attention of width 8, two heads, three sentences of six words: 18 rows, and 3 * 2 products of heads.

    Each of the four projections: 18 x 8 over 8. Scores: 6 x 6 over 4; values: 6 x 4 over 6. Backward each gives both
    its operands a gradient: the scores 6 x 4 over 6 twice; the values' dgrad 6 x 6 over 4 and wgrad 4 x 6 over 6.
    """
    net = trace(attention(need_weights=need_weights), empty(3, 6, 8), "fp16")
    for name in ("q", "k", "v", "out"):
        assert sorted(sizes(net, f"attn.{name}")) == [(p, 8 if p == "wgrad" else 18, 8, 18 if p == "wgrad" else 8, 1)
                                                      for p in ("dgrad", "fprop", "wgrad")]  # fmt: skip
        assert counts(net, f"attn.{name}")["fprop"] == (144, 64, 144)
    assert sorted(sizes(net, "attn.qk")) == [("dgrad", 6, 4, 6, 6), ("fprop", 6, 6, 4, 6), ("wgrad", 6, 4, 6, 6)]
    assert sorted(sizes(net, "attn.pv")) == [("dgrad", 6, 6, 4, 6), ("fprop", 6, 4, 6, 6), ("wgrad", 4, 6, 6, 6)]
    assert counts(net, "attn.qk")["fprop"] == (144, 144, 216)


def test_weights_are_found_by_identity():
    """A weight is found where it stands first, in an einsum, in a view, and behind an operation on nothing else."""
    model = Functional(
        lambda s, x: torch.einsum("ijk,kl->ijl", (s.first @ x).transpose(1, 2), s.second) @ s.third.mT.clone()[:, :2],
        first=(6, 4),
        second=(6, 5),
        third=(3, 5),
    )
    net = trace(model, empty(2, 4, 3).requires_grad_(), "fp16")
    assert set(sizes(net, "first")) == {("fprop", 6, 6, 4, 1), ("dgrad", 6, 4, 6, 1), ("wgrad", 6, 4, 6, 1)}
    assert Counter(g.layer for g in net.gemms) == {"first": 3, "second": 3, "third": 3}
    assert {g.kind for g in net.gemms} == {"Functional"}


def test_a_weight_that_stands_first_is_the_second():
    """A weight of 6 x 4 times five columns is the product of a layer from 4 to 6 on five rows."""
    net = trace(Functional(lambda s, x: s.mix @ x, mix=(6, 4)), empty(4, 5).requires_grad_(), "fp16")
    assert set(sizes(net)) == {("fprop", 5, 6, 4, 1), ("dgrad", 5, 4, 6, 1), ("wgrad", 6, 4, 5, 1)}
    assert counts(net, "mix")["fprop"] == (20, 24, 30)


def test_both_operands_of_a_free_product_have_gradients():
    """A product of two activations has dgrad for its first and wgrad for its second, also where they are one tensor."""
    net = trace(Functional(lambda s, x: (lambda y: y @ y.T)(s.linear(x)), linear=nn.Linear(3, 4)), empty(4, 3), "fp16")
    assert Counter((g.layer, g.phase) for g in net.gemms) == {
        ("linear", "fprop"): 1,
        ("linear", "wgrad"): 1,
        **{("", phase): 1 for phase in ("fprop", "dgrad", "wgrad")},
    }
    assert {g.kind for g in net.gemms if not g.layer} == {"matmul"}


def test_a_shared_layer_works_twice():
    """A layer that is called twice has two of each GEMM under its one name, and their weight gradients are added."""
    linear = nn.Linear(4, 4)
    net = trace(nn.Sequential(linear, nn.ReLU(), linear), empty(3, 4).requires_grad_(), "fp16")
    assert Counter((g.layer, g.phase) for g in net.gemms) == {("0", p): 2 for p in ("fprop", "dgrad", "wgrad")}
    assert work(net, "0", "add", "wgrad") == [(16, 16, 32, 32, True)]


def test_checkpointing_computes_again():
    """A forward pass that checkpointing runs again counts again; the backward GEMMs stay those of the layers."""
    parts = {"a": nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU()), "b": nn.Linear(4, 3)}
    model = Functional(lambda s, x: s.b(checkpoint(s.a, x, use_reentrant=False)), **parts)
    found = Counter((g.layer, g.phase) for g in trace(model, empty(3, 4), "fp16").gemms)
    expected = {("a.0", "fprop"): 2, ("a.0", "wgrad"): 1, ("a.2", "fprop"): 2, ("a.2", "dgrad"): 1, ("a.2", "wgrad"): 1}
    assert found == expected | {("b", p): 1 for p in ("fprop", "dgrad", "wgrad")}


class _Product(torch.autograd.Function):
    """A linear layer with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        """x @ weight^T."""
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        """Both gradients."""
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


def test_a_function_of_ones_own():
    """The products of a custom autograd function are told apart by what they multiply."""
    model = Functional(lambda s, x: _Product.apply(s.linear(x), s.mix), linear=nn.Linear(4, 4), mix=(5, 4))
    net = trace(model, empty(3, 4), "fp16")
    assert sizes(net, "mix") == [("fprop", 3, 5, 4, 1), ("dgrad", 3, 4, 5, 1), ("wgrad", 5, 4, 3, 1)]


def test_frozen_layers_have_no_wgrad():
    """A frozen layer has neither wgrad nor update, and nothing before it has a backward pass."""
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.ReLU(), nn.Linear(4, 3))
    net = trace(model, empty(2, 4), "fp16")
    assert [g.phase for g in net.gemms] == ["fprop", "fprop", "wgrad"]
    assert [v.layer for v in net.vector_ops if v.phase == "update"] == ["2"]


# The same operators as a real step ----------------------------------------------------------------------------------


def ids(*shape):
    """Symbols of a vocabulary of twenty."""
    return torch.randint(0, 20, shape)


REAL = {
    "cnn": lambda: (digits.cnn(8), torch.randn(2, 1, 8, 8)),
    "lstm": lambda: (language.LSTMModel(20, width=6, dropout=0.1), ids(2, 4)),
    "gpt": lambda: (language.GPT(20, width=8, heads=2, context=8, layers=1), ids(2, 5)),
    "translation": lambda: (
        translation.Transformer(20, pad=0, width=8, heads=2, inner=6, layers=1),
        (ids(2, 4), ids(2, 3)),
    ),
    "gru": lambda: (nn.GRU(3, 4, bidirectional=True), torch.randn(3, 2, 3)),
    "cell": lambda: (nn.LSTMCell(3, 4), torch.randn(2, 3)),
    "normalized": lambda: (Functional(lambda s, x: F.normalize(x) @ F.normalize(s.w), w=(4, 5)), torch.randn(2, 4)),
    "weight_norm": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), torch.randn(2, 4)),
    "embedding": lambda: (Functional(lambda s, i: F.linear(s.e(i), s.e.weight), e=nn.Embedding(20, 4)), ids(2, 3)),
    "encoder": lambda: (nn.TransformerEncoderLayer(8, 2, 6), torch.randn(2, 3, 8)),
    "sdpa": lambda: (
        Functional(
            lambda s, x: F.scaled_dot_product_attention(x @ s.q, x @ s.k, x @ s.v, is_causal=True),
            q=(8, 8),
            k=(8, 8),
            v=(8, 8),
        ),
        torch.randn(2, 5, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_sees_what_a_real_step_does(name):
    """A trace's multiply-accumulates are those that torch's own counter sees in a real forward and backward pass."""
    model, inputs = REAL[name]()
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    net = trace(model, inputs, "fp32", optimizer=None)
    with plain_operators(), FlopCounterMode(display=False) as counter:
        out = model(*args)
        (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
    assert 2 * net.macs() == counter.get_total_flops() > 0


class _Spy:
    """A watcher that writes down every product: phase, formats of both operands, and the sizes of the GEMM."""

    def __init__(self):
        self.seen = []

    def inside(self):
        """Nothing to enter."""
        return contextlib.nullcontext()

    def operand(self, plan, slot, x, parts):
        """Not of interest."""

    def product(self, plan, which, a, b, geometry, result):
        """One GEMM, or the sum of some."""
        names = ["fp16" if isinstance(t, torch.Tensor) else t.format.name for t in (a[0], b)]
        drawn = len(a) == 2 and plan.recipe.name == "int4_hq_lss"
        self.seen += [(which, *names)] * (1 if drawn else len(a))


CONVERTED = {
    "cnn": lambda: (digits.cnn(8), torch.randn(4, 1, 8, 8)),
    "mobile": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU6(), nn.Conv2d(4, 6, 1),
            nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, stride=2), nn.ReLU(), nn.MaxPool2d(1), nn.Dropout(), nn.Flatten(),
            nn.Linear(4, 4), nn.Linear(4, 2),
        ),
        torch.randn(4, 3, 6, 6),
    ),
    "lstm": lambda: (language.LSTMModel(20, width=6), ids(3, 4)),
    "gpt": lambda: (language.GPT(20, width=8, heads=2, context=8, layers=1), ids(3, 5)),
}  # fmt: skip


FEW, MANY = ("ibm2020", "nvfp4"), ("ibm2020_1x1_fp8", "int4_forward_only", "luq_smp2", "int4_hq_lss", "fp8")


@pytest.mark.parametrize(("name", "recipe"), [(n, r) for n in CONVERTED for r in FEW] + [("mobile", r) for r in MANY])
def test_formats_are_those_of_a_converted_layer(name, recipe):
    """Each converted layer's GEMMs, their number and their formats, signs and all, are what it really multiplies.

    BitSplit's two parts, of which half the rows are drawn, are one product here.
    """
    model, inputs = CONVERTED[name]()
    net = trace(model, inputs, recipe, optimizer=None)
    halfbyte.convert(model, recipe, backend="reference")
    spies = {}
    for fqn, module in model.named_modules():
        for unit, plan in plans_of(module).items():
            plan.watcher = spies[".".join(filter(None, (fqn, unit)))] = _Spy()
    out = model(inputs)
    (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
    expected = {layer: Counter(spy.seen) for layer, spy in spies.items()}
    found = {
        layer: Counter((g.phase, g.a_format, g.b_format) for g in net.gemms if g.layer == layer) for layer in expected
    }
    assert found == expected
    assert all(expected.values())


# Formats by rule ----------------------------------------------------------------------------------------------------

RULED = {
    "ibm2020": {"fprop": ("uint4", "int4"), "dgrad": (EVEN, "int4"), "wgrad": (ODD, "uint4")},
    "ibm2020_dw_fp8": {"fprop": ("uint4", "int4"), "dgrad": (EVEN, "int4"), "wgrad": ("fp8_e5m2", "uint4")},
    "int4_forward_only": {"fprop": ("uint4", "int4"), "dgrad": ("fp16", "int4"), "wgrad": ("fp16", "uint4")},
    "nvfp4": dict.fromkeys(("fprop", "dgrad", "wgrad"), ("fp4_e2m1", "fp4_e2m1")),
    "luq": {"fprop": ("int4", "int4"), "dgrad": ("fp4_e3m0", "int4"), "wgrad": ("fp4_e3m0", "int4")},
    "fp8": {
        "fprop": ("fp8_e4m3", "fp8_e4m3"),
        "dgrad": ("fp8_e5m2", "fp8_e4m3"),
        "wgrad": ("fp8_e5m2", "fp8_e4m3"),
    },
}


@pytest.mark.parametrize("recipe", RULED)
def test_formats_by_recipe(recipe):
    """The layer between gets the recipe's formats in each GEMM; the first and the last are FP16, with the reason."""
    net = trace(three(), empty(2, 4), recipe)
    assert formats(net, "2") == RULED[recipe]
    for layer in ("0", "4"):
        assert set(formats(net, layer).values()) == {("fp16", "fp16")}
        assert {(g.recipe, g.why) for g in net.gemms if g.layer == layer} == {("fp16", "first or last layer")}
    assert {(g.recipe, g.why) for g in net.gemms if g.layer == "2"} == {(recipe, f"recipe {recipe}")}


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("fp32", "bf16")])
def test_every_recipe_can_be_traced(recipe):
    """Every recipe gives the middle layer formats of eight bits and less in at least one GEMM."""
    net = trace(three(), empty(2, 4), recipe, optimizer=None)
    assert {"fprop", "dgrad", "wgrad"} == {g.phase for g in net.gemms if g.layer == "2"}
    assert any(f[0].startswith(("int", "uint", "fp4", "fp8")) for f in formats(net, "2").values())


def test_pointwise_convolutions_keep_fp8_gradients():
    """ibm2020_1x1_fp8 gives FP8 gradients to 1x1 convolutions and FP4 ones to the others, each with its reason."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(1, 3, 6, 6))
    net = trace(model, empty(1, 3, 6, 6), "ibm2020_1x1_fp8")
    assert formats(net, "1") == {
        "fprop": ("int4", "int4"),
        "dgrad": ("fp8_e5m2", "int4"),
        "wgrad": ("fp8_e5m2", "int4"),
    }
    assert formats(net, "2")["dgrad"] == (EVEN, "int4")
    assert next(g.why for g in net.gemms if g.layer == "1") == "1x1 convolution"


def test_depthwise_convolutions_stay_in_high_precision():
    """A depthwise convolution under a 4-bit recipe is FP16, and says why."""
    model, inputs = CONVERTED["mobile"]()
    net = trace(model, inputs, "ibm2020")
    assert set(formats(net, "2").values()) == {("fp16", "fp16")}
    assert {g.why for g in net.gemms if g.layer == "2"} == {"depthwise convolution"}


@pytest.mark.parametrize(
    ("before", "signed"),
    [
        (nn.Sequential(nn.ReLU()), False),
        (nn.Sequential(nn.ReLU(inplace=True)), False),
        (nn.Sequential(nn.ReLU6(), nn.Dropout(), nn.Identity()), False),
        (nn.Sequential(nn.Softmax(-1), nn.Unflatten(1, (1, 4)), nn.AvgPool1d(1), nn.Flatten()), False),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), True),
        (nn.Sequential(nn.Hardtanh(-1, 1)), True),
        (nn.Sequential(nn.GELU()), True),
        (nn.Sequential(nn.Identity()), True),
        (Functional(lambda s, x: F.relu(x) + F.relu(-x)), False),
        (Functional(lambda s, x: F.relu(x) - F.relu(-x)), True),
        (Functional(lambda s, x: torch.cat([F.relu(x[:, :2]), x[:, 2:]], 1)), True),
        (Functional(lambda s, x: torch.cat([F.relu(x[:, :2]), x[:, 2:].abs()], 1)), False),
        (Functional(lambda s, x: F.relu(x) * -1.0), True),
        (Functional(lambda s, x: torch.add(F.relu(x), F.relu(-x), alpha=-1)), True),
        (Functional(lambda s, x: torch.cat([F.relu(x[:, :2]), x[:, 2:] ** 2], -1)), False),
        (Functional(lambda s, x: relu_half(x * 1.0)), True),
        (Functional(lambda s, x: x.clamp(max=1.0)), True),
        (Functional(lambda s, x: x.clamp(0.0, 1.0)), False),
        (Functional(lambda s, x: F.pad(F.relu(x[:, :2]), (1, 1))), False),
        (Functional(lambda s, x: F.pad(F.relu(x[:, :2]), (1, 1), value=-1.0)), True),
        (Functional(lambda s, x: (x - 1.0).relu_().mul(2.0).add_(x)), True),
    ],
)
def test_signs_come_from_what_was_before(before, signed):
    """PACT's input is unsigned where every operator before it vouches for that, and signed anywhere else."""
    net = trace(nn.Sequential(nn.Linear(4, 4), before, nn.Linear(4, 4), nn.Linear(4, 2)), empty(2, 4), "ibm2020")
    assert formats(net, "2")["fprop"] == ("int4" if signed else "uint4", "int4")


def test_rules_are_asked_first():
    """A user's rule decides before the recipe's own, also on one projection of an attention and on its products."""
    rules = [
        Rule(fqn="first", recipe="luq"),
        Rule(fqn="attn.k", recipe="fp8"),
        Rule(fqn="*.qk", recipe="ibm2020"),
        Rule(fqn="*.pv_1", recipe="nvfp4"),
    ]
    net = trace(attention(), empty(3, 6, 8), "ibm2020", rules)
    found = {g.layer: (g.a_format, g.b_format) for g in net.gemms if g.phase == "fprop"}
    assert found == {
        "first": ("int4", "int4"),
        "attn.q": ("int4", "int4"),
        "attn.k": ("fp8_e4m3", "fp8_e4m3"),
        "attn.v": ("int4", "int4"),
        "attn.qk": ("int4", "int4"),
        "attn.pv_0": ("fp16", "fp16"),
        "attn.pv_1": ("fp4_e2m1", "fp4_e2m1"),
        "attn.out": ("int4", "int4"),
        "last": ("fp16", "fp16"),
    }
    assert [g.groups for g in net.gemms if g.layer == "attn.pv_1"] == [3, 3, 3]


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "fp32"])
def test_baselines_are_all_in_one_format(fmt):
    """Under a baseline every product, with or without a weight, is in its format, and nothing is quantized."""
    net = trace(attention(), empty(3, 6, 8), fmt)
    assert {(g.a_format, g.b_format, g.recipe) for g in net.gemms} == {(fmt, fmt, fmt)}
    assert net.recipe == fmt
    assert not [v for v in net.vector_ops if v.name in ("quantize", "statistics", "layer_scale")]


def test_baselines_need_no_layer():
    """A module without any layer that converts has a baseline, and is refused by a recipe that would convert it."""
    model = Functional(lambda s, x: x @ s.mix, mix=(4, 5))
    assert [g.layer for g in trace(model, empty(2, 4), "bf16").gemms] == ["mix", "mix"]
    with pytest.raises(ConversionError, match="no layer that can be converted"):
        trace(model, empty(2, 4), "ibm2020")


def test_high_precision_can_be_chosen():
    """`high_precision` is what layers that are left alone are in, and the width of all other tensors."""
    narrow, wide = (trace(three(), empty(2, 4), "ibm2020", high_precision=fmt) for fmt in ("bf16", "fp32"))
    assert formats(narrow, "0")["fprop"] == ("bf16", "bf16")
    assert formats(wide, "0")["fprop"] == ("fp32", "fp32")
    assert formats(wide, "2") == RULED["ibm2020"]
    assert work(wide, "1", "relu", "fprop")[0][2] == 2 * work(narrow, "1", "relu", "fprop")[0][2] == 2 * 4 * 4


def test_a_recipe_of_a_type_says_otherwise():
    """Layers under a rule for bf16 are bf16, not the format of those that are left alone."""
    net = trace(three(), empty(2, 4), "ibm2020", [Rule(fqn="4", recipe="bf16")])
    assert formats(net, "4")["fprop"] == ("bf16", "bf16")
    assert formats(net, "0")["fprop"] == ("fp16", "fp16")


def test_why_a_product_has_no_layer():
    """A product in somebody's own forward is in high precision and says what would convert it."""
    net = trace(Tied(), empty(2, 3, dtype=torch.int64), "ibm2020")
    (decoder,) = [g for g in net.gemms if g.layer == "embedding" and g.phase == "fprop"]
    assert (decoder.m, decoder.n, decoder.k, decoder.kind, decoder.recipe) == (6, 20, 4, "Embedding", "fp16")
    assert decoder.why.startswith("not converted: linear() in its forward; use")


def test_a_learned_clip_needs_dgrad():
    """The first layer has no dgrad, but with a learned clip it has: the clip's gradient is a sum over grad_input."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    assert "dgrad" not in formats(trace(model, empty(2, 4), "luq", [Rule(fqn="0", recipe="luq")]), "0")
    assert formats(trace(model, empty(2, 4), "luq", [Rule(fqn="0", recipe="ibm2020")]), "0")["dgrad"] == (EVEN, "int4")


def test_samples_are_gemms():
    """luq_smp2 multiplies two samples of the gradient for grad_weight: two wgrads and twice the codes."""
    net = trace(three(), empty(2, 4), "luq_smp2")
    assert Counter(g.phase for g in net.gemms if g.layer == "2") == {"fprop": 1, "dgrad": 1, "wgrad": 2}
    assert work(net, "2", "quantize", "wgrad")[0][0] == 2 * 12


# Everything else ----------------------------------------------------------------------------------------------------


def test_quantizers_of_ibm2020_by_hand():
    """The middle layer, 2 x 4 inputs, 6 x 4 weights and 2 x 6 gradients, under ibm2020, in FP16 with FP32 weights.

    Input (PACT): 8 elements of 4 operations, 16 bytes to 4; it can ride along. Weight (SAWB): statistics of 4
    operations an element before any of 24 can be rounded, 96 bytes to 12. Gradient: its magnitude (2), then 4 for each
    of its two phases: 10 an element, as Sun et al. 2020, section 6, have it; 24 bytes to 6, twice. PACT's backward step
    takes 3 for each input. The scale is moved once.
    """
    net = trace(three(), empty(2, 4), "ibm2020")
    quantized = [(v.elements, v.flops, v.read_bytes, v.written_bytes, v.fusible)
                 for v in net.vector_ops if v.layer == "2" and v.name == "quantize"]  # fmt: skip
    assert quantized == [
        (8, 8 * 4, 16, 4, True),
        (24, 24 * 4, 96, 12, False),
        (12, 12 * 4, 24, 6, True),
        (12, 12 * 4, 24, 6, True),
    ]
    assert work(net, "2", "statistics", "fprop") == [(24, 24 * 4, 96, 4, True)]
    assert work(net, "2", "statistics", "dgrad") == [(12, 12 * 2, 24, 4, True)]
    assert not work(net, "2", "statistics", "wgrad")
    assert work(net, "2", "clip_gradient", "dgrad") == [(8, 8 * 3, 16, 16, True)]
    assert [v.layer for v in net.vector_ops if v.name == "layer_scale"] == ["2"]


def test_one_scale_for_the_network_moves_once():
    """A recipe with one scale for all layers takes one vote a step, one with a scale for each as many as layers."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    votes = {
        name: len([v for v in trace(model, empty(2, 4), name).vector_ops if v.name == "layer_scale"])
        for name in ("ibm2020", "loss_scale", "luq")
    }
    assert votes == {"ibm2020": 3, "loss_scale": 1, "luq": 0}


def test_first_statistics_then_rounding():
    """A learned clip can be rounded by as the numbers come; a clip that is measured must wait for all of them."""
    assert not cost_of(Pact()).first
    assert cost_of(Sawb()).first


def test_a_sequence_quantizes_its_weight_once():
    """The recurrent weight of an LSTM is quantized once for all steps, its state at each."""
    net = trace(nn.LSTM(3, 4), empty(3, 5, 3), "ibm2020", [Rule(recipe="luq")])
    elements = {(v.fusible, v.elements) for v in net.vector_ops if (v.layer, v.name) == ("hh_l0", "statistics")}
    assert elements >= {(True, 3 * 20 + 64)}


def test_transforms_are_counted():
    """NVFP4 rotates both operands of wgrad: a gradient of 12 and an input of 8, 4 additions, a product and a sign."""
    assert work(trace(three(), empty(2, 4), "nvfp4"), "2", "transform", "wgrad") == [(20, 20 * 6, 40, 40, True)]


def test_weights_are_cast_where_they_are_stored_wider():
    """A layer in FP16 whose weights are kept in FP32 casts them: 16 elements from 64 bytes to 32. Without, nothing."""
    assert work(trace(three(), empty(2, 4), "ibm2020"), "0", "cast", "fprop") == [(16, 16, 64, 32, True)]
    assert not work(trace(three(), empty(2, 4), "ibm2020", master="fp16"), "0", "cast", "fprop")


def test_residual_block_by_hand():
    """Batch norm, the sum with the shortcut, and ReLU of a tensor of 2 * 4 * 3 * 3 = 72 elements in FP16, 144 bytes.

    The norm sums x and x^2 as they pass (3 operations); then x a + b (2) goes over what was stored. The sum reads one
    operand from memory whatever rides along. ReLU's gradient reads its mask so.
    """
    parts = {"conv": nn.Conv2d(4, 4, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU()}
    net = trace(Functional(lambda s, x: s.relu(s.norm(s.conv(x)) + x), **parts), empty(2, 4, 3, 3), "fp16")
    assert work(net, "norm", "batch_norm_statistics", "fprop") == [(72, 216, 144, 0, True)]
    (norm,) = work(net, "norm", "batch_norm", "fprop")
    assert norm[:3] == (72, 144, 144)
    assert not norm[4]
    assert work(net, "", "add", "fprop") == [(72, 72, 144, 144, True)]
    assert work(net, "", "add_operand", "fprop") == [(72, 0, 144, 0, False)]
    assert work(net, "relu", "relu", "fprop") == [(72, 72, 144, 144, True)]
    assert work(net, "relu", "relu", "dgrad") == [(72, 72, 144, 144, True)]
    assert work(net, "relu", "relu_operand", "dgrad") == [(72, 0, 144, 0, False)]


def test_frozen_norms_measure_nothing():
    """A batch norm that is in eval in a model in training has no statistics and can ride along."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval())
    net = trace(model, empty(2, 3, 5, 5), "fp16")
    assert not work(net, "1", "batch_norm_statistics", "fprop")
    assert work(net, "1", "batch_norm", "fprop")[0][4]
    assert work(trace(model.eval(), empty(2, 3, 5, 5), "fp16"), "1", "batch_norm_statistics", "fprop")


def test_pooling_counts_its_window():
    """A 3x3 pooling of 2 * 4 * 5 * 5 numbers takes nine operations for each of 32 results; places take one byte."""
    pools = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(3, stride=2), nn.AvgPool2d(2))
    net = trace(pools, empty(2, 3, 5, 5), "fp16")
    assert work(net, "1", "max_pool", "fprop") == [(200, 288, 400, 32 * 3, True)]
    assert work(net, "2", "avg_pool", "fprop") == [(32, 32, 64, 16, True)]


@pytest.mark.parametrize(
    ("optimizer", "flops", "read", "written"),
    [
        ("sgd", 6, 3, 2),
        ("adam", 13, 4, 3),
        (lambda p: torch.optim.SGD(p, lr=0.1, foreach=False), 2, 2, 1),
    ],
)
def test_optimizers_by_hand(optimizer, flops, read, written):
    """One update of 4 * 6 + 6 numbers of four bytes.

    SGD: decay, momentum, step, a product and a sum each; reads weight, gradient and momentum, writes two of them.
    Adam: both averages (3 and 1 + 3), root, two divisions, epsilon, step with a product and a sum: 3 + 4 + 1 + 1 + 1 +
    3 = 13 as torch runs it; reads four, writes three. Plain SGD: a product and a sum; reads two, writes one.
    """
    net = trace(nn.Linear(4, 6), empty(2, 4), "fp16", optimizer=optimizer)
    (update,) = work(net, "", "optimizer", "update")
    assert update[0] == 30
    assert update[1] - 30 * flops in (0, 2)  # Adam also counts its steps, a number for each tensor.
    assert (update[2] - 30 * 4 * read, update[3] - 30 * 4 * written) in ((0, 0), (8, 8))
    assert not update[4]


def test_master_is_the_optimizers_format():
    """Weights kept in FP16 are half the memory of those in FP32; without an optimizer none moves."""
    half, full = (work(trace(nn.Linear(4, 6), empty(2, 4), "fp16", master=m), "", "optimizer", "update")[0][2]
                  for m in ("fp16", "fp32"))  # fmt: skip
    assert 2 * half == full == 30 * 4 * 3
    assert not [
        v for v in trace(nn.Linear(4, 6), empty(2, 4), "fp16", optimizer=None).vector_ops if v.phase == "update"
    ]


def test_the_loss_is_counted():
    """The default loss is a cross-entropy over the last dimension; another can be given, or the model returns it."""
    default = trace(nn.Linear(4, 6), empty(2, 4), "fp16")
    assert work(default, "", "loss_log_softmax", "fprop")[0][0] == 12
    own = trace(nn.Linear(4, 6), empty(2, 4), "fp16", loss=lambda y: F.mse_loss(y, torch.zeros_like(y)))
    assert {v.name for v in own.vector_ops if v.name.startswith("loss_")} >= {"loss_mse_loss"}
    itself = trace(Functional(lambda s, x: s.linear(x).exp().sum(), linear=nn.Linear(4, 6)), empty(2, 4), "fp16")
    assert not [v for v in itself.vector_ops if v.name.startswith("loss_")]
    assert default.macs() == own.macs() == itself.macs()


def test_outputs_of_any_shape():
    """The first tensor with a gradient is what the default loss takes, in tuples, dicts and objects alike."""

    class Result:
        def __init__(self, logits):
            self.mask, self.logits = torch.ones(2), logits

    for wrap in (lambda y: (torch.ones(2), y), lambda y: {"mask": torch.ones(2), "logits": y}, Result):
        model = Functional(lambda s, x, wrap=wrap: wrap(s.linear(x)), linear=nn.Linear(4, 6))
        assert len(trace(model, empty(2, 4), "fp16").gemms) == 2


def test_inputs_of_any_kind():
    """Inputs are a tensor, a tuple of arguments or a dict of keywords; the batch is the rows of the first tensor."""
    model = Functional(lambda s, x, scale=1.0: s.linear(x) * scale, linear=nn.Linear(4, 6))
    model.forward = lambda x, scale=1.0: model.linear(x) * scale
    by_name = trace(nn.Linear(4, 6), {"input": empty(2, 4)}, "fp16")
    assert by_name.gemms == trace(nn.Linear(4, 6), (empty(2, 4),), "fp16").gemms
    assert by_name.batch == 2
    assert trace(nn.Linear(4, 6), empty(2, 4), "fp16", batch=7, name="head").batch == 7
    assert trace(nn.Linear(4, 6), empty(2, 4), "fp16", name="head").name == "head"


# The laboratory's models --------------------------------------------------------------------------------------------

symbols = (2, 7)
LAB = {
    "alexnet": lambda: (alexnet.alexnet(10), empty(2, 3, 32, 32)),
    "densenet": lambda: (densenet.densenet121(10), empty(2, 3, 32, 32)),
    "digits_cnn": lambda: (digits.cnn(), empty(2, 1, 8, 8)),
    "digits_mlp": lambda: (digits.mlp(), empty(2, 1, 8, 8)),
    "fashion": lambda: (fashion.cnn(), empty(2, 1, 28, 28)),
    "googlenet": lambda: (googlenet.googlenet(), empty(2, 3, 32, 32)),
    "gpt": lambda: (language.GPT(20), empty(*symbols, dtype=torch.int64)),
    "lstm": lambda: (language.LSTMModel(20), empty(*symbols, dtype=torch.int64)),
    "mobilenet": lambda: (mobilenet.mobilenetv2(), empty(2, 3, 32, 32)),
    "resnet20": lambda: (resnet.resnet20(), empty(2, 3, 32, 32)),
    "sentence": lambda: (sentence.SentenceCNN(20), (empty(*symbols, dtype=torch.int64), empty(2, dtype=torch.int64))),
    "recognizer": lambda: (speech.Recognizer(5, 7, width=8, layers=2, dropout=0.1), empty(2, 3, 5)),
    "listener": lambda: (speech.Listener(5, 7, width=8, layers=2, dropout=0.1), empty(2, 3, 5)),
    "transformer": lambda: (
        translation.Transformer(20, pad=0, layers=1),
        (empty(*symbols, dtype=torch.int64), empty(2, 5, dtype=torch.int64)),
    ),
    "vgg": lambda: (vgg.vgg16(), empty(2, 3, 32, 32)),
}
HEAVY = ("densenet", "googlenet", "mobilenet", "transformer", "gpt", "vgg", "listener")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in LAB])
def test_the_laboratorys_models(name):
    """Every model of the laboratory is traced, and each of its layers is under the recipe that `summary` tells of."""
    model, inputs = LAB[name]()
    net = trace(model, inputs, "ibm2020", optimizer=None)
    rows = summary(halfbyte.convert(model, "ibm2020")).layers
    expected = {row.fqn: (row.recipe, row.why) for row in rows if row.recipe != "-"}
    found = {g.layer: ("fp32" if g.recipe == "fp16" else g.recipe, g.why) for g in net.gemms}
    assert {layer: found.get(layer) for layer in expected} == expected
    assert all({"fprop", "wgrad"} <= {g.phase for g in net.gemms if g.layer == layer} for layer in expected)


# The model stays as it is, and errors say what to do ----------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    """After a trace the model has its classes, numbers, modes, hooks and no gradients; nothing was drawn at random."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Dropout(), nn.LSTM(4, 4))
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    parts, state, library = [type(m) for m in model.modules()], torch.get_rng_state(), torch._C._get_mkldnn_enabled()
    trace(model, torch.randn(3, 4, device="meta"), "ibm2020", [Rule(type=nn.Linear, recipe="ibm2020")])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == parts
    assert not [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch._C._get_mkldnn_enabled() == library


def test_shapes_are_all_that_is_asked_for():
    """A model on the meta device, whose numbers do not exist, has the workload of one that has them."""
    inputs = torch.randn(2, 1, 8, 8)
    with torch.device("meta"):
        shapes = digits.cnn()
    assert trace(shapes, empty(2, 1, 8, 8), "ibm2020") == trace(digits.cnn(), inputs, "ibm2020")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Functional(lambda s, x: s.a(x) * x.sum().item(), a=nn.Linear(4, 4)), "asks a tensor for its data"),
        (Functional(lambda s, x: s.a(x) if x.sum() > 0 else x, a=nn.Linear(4, 4)), r"no \.item\(\)"),
        (Functional(lambda s, x: s.a(x)[x > 0], a=nn.Linear(4, 4)), "no boolean masks as indices"),
        (Functional(lambda s, x: s.a(x, x), a=nn.Bilinear(4, 4, 3)), "_trilinear.*write the product with torch.einsum"),
        (Functional(lambda s, x: x @ torch.linalg.inv(s.w), w=(4, 4)), "linalg_inv.*a decomposition or solver"),
        (Functional(lambda s, x: s.a(x).detach(), a=nn.Linear(4, 4)), "no tensor with a gradient"),
        (nn.Linear(4, 4).requires_grad_(False), "Are its parameters frozen"),
        (nn.DataParallel(nn.Linear(4, 4)), "wrapped already"),
        ("resnet50", "trace takes a torch.nn.Module; got str"),
    ],
)
def test_what_cannot_be_traced(model, message):
    """A model whose work a trace cannot know is refused with the reason and the cure."""
    with pytest.raises(HalfbyteError, match=message):
        trace(model, empty(2, 4), "fp16")


@torch.library.custom_op("halfbyte_tracing_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """An operator of somebody's own, of which only the shape is known."""
    return x * 2


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, grad: grad * 2)


def test_operators_of_ones_own_are_named(caplog):
    """An operator that is not torch's counts as elementwise work, and a warning says once that it is not seen into."""
    net = trace(Functional(lambda s, x: twice(twice(s.linear(x))), linear=nn.Linear(4, 4)), empty(2, 4), "fp16")
    assert work(net, "", "twice", "fprop")[0][:2] == (16, 16)
    assert [r.message for r in caplog.records if "twice" in r.message] == [
        "halfbyte_tracing_test::twice counts as one operation an element; no product in it is seen"
    ]


def test_a_fused_attention_is_refused():
    """A model that insists on a fused attention hides its products, and is told to let torch choose."""

    def fused(self, x):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            h = self.linear(x).unflatten(0, (1, 1, 2))
            return F.scaled_dot_product_attention(h, h, h)

    with pytest.raises(HalfbyteError, match="let torch choose"):
        trace(Functional(fused, linear=nn.Linear(4, 4)), empty(2, 4), "fp16")


def test_a_model_that_cannot_be_copied():
    """A model that holds what cannot be copied is refused with the reason."""
    model = nn.Linear(4, 4)
    model.log = (number for number in range(3))
    with pytest.raises(HalfbyteError, match=r"cannot be copied: .*generator.*copy\.deepcopy"):
        trace(model, empty(2, 4), "fp16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "ibm2021"}, "Did you mean 'ibm2020'"),
        ({"recipe": "fp61"}, "Did you mean 'fp16'"),
        ({"optimizer": "sdg"}, "Did you mean 'sgd'"),
        ({"high_precision": "fp15"}, "Did you mean 'fp16'"),
        ({"master": "int4"}, "no format of high precision named 'int4'"),
    ],
)
def test_names_are_known(changes, message):
    """A name that there is not is refused with the nearest one."""
    with pytest.raises(UnknownNameError, match=message):
        trace(three(), empty(2, 4), **({"recipe": "ibm2020"} | changes))


def test_what_convert_refuses_is_refused():
    """A converted model, a rule that matches nothing and a network with nothing between its ends fail as in convert."""
    converted = halfbyte.convert(three(), "ibm2020")
    assert isinstance(converted[2].plan, Plan)
    with pytest.raises(ConversionError, match=r"call restore\(model\) first"):
        trace(converted, empty(2, 4), "ibm2020")
    with pytest.raises(ConversionError, match="layer9"):
        trace(three(), empty(2, 4), "ibm2020", [Rule(fqn="layer9", recipe="luq")])
    depthwise = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Flatten())
    with pytest.raises(ConversionError, match="would leave every layer in high precision"):
        trace(depthwise, empty(2, 4, 5), "ibm2020")


def test_inputs_without_rows():
    """Inputs without a tensor that has rows are refused with what is possible."""
    with pytest.raises(HalfbyteError, match="a tuple of arguments or a dict of keyword arguments"):
        trace(nn.Linear(4, 4), {"input": 3}, "fp16")


def test_a_loss_that_is_no_loss():
    """A loss without a gradient, or of more than one number, is refused with its shape."""
    with pytest.raises(HalfbyteError, match=r"The loss is a tensor of shape \(2, 6\); one number"):
        trace(nn.Linear(4, 6), empty(2, 4), "fp16", loss=lambda y: y)


def test_a_recipe_of_ones_own():
    """A recipe that is not in the table is traced under its own name."""
    recipe = Recipe(name="mine", fprop=RECIPES["luq"].fprop)
    net = trace(three(), empty(2, 4), recipe)
    assert (net.recipe, formats(net, "0")["fprop"]) == ("mine", ("int4", "int4"))
