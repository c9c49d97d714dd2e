"""Attention: torch's semantics for every argument, products on request only, no fused path around our layers."""

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
from halfbyte.errors import ConversionError, UnsupportedError
from halfbyte.recipes import Recipe
from layer_checks import Recorder, everywhere, hat, passed, same_as_torch

QUERIES, KEYS, BATCH, HEADS, WIDTH = 3, 5, 2, 2, 8
BOTH = (hb.Rule(fqn="*qk", recipe="ibm2020"), hb.Rule(fqn="*pv", recipe="ibm2020"))

Wide = Recipe(name="float64", description="Every product in float64.", dtype=torch.float64)


def attention(**options: object) -> nn.MultiheadAttention:
    """Two heads over eight features, with biases that are not zero."""
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def data(module: nn.MultiheadAttention, *, batched: bool = True) -> list[Tensor]:
    """Query, key and value in the module's layout."""

    def one(length: int, width: int) -> Tensor:
        lead = (BATCH, length) if module.batch_first else (length, BATCH)
        return torch.randn(*lead, width) if batched else torch.randn(length, width)

    return [one(QUERIES, WIDTH), one(KEYS, module.kdim), one(KEYS, module.vdim)]


def masks(kind: str, *, batched: bool) -> dict[str, Tensor]:
    """Masks of a kind, named as the arguments are."""
    batch = BATCH if batched else 1
    numbers, hidden = torch.randn(QUERIES, KEYS), torch.rand(QUERIES, KEYS) < 0.4
    hidden[:, 0] = False
    padding = torch.zeros(batch, KEYS, dtype=torch.bool)
    padding[:, -2:] = True
    padding = padding if batched else padding[0]
    each = torch.randn(batch * HEADS, QUERIES, KEYS)
    found = {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": numbers},
        "float_each": {"attn_mask": each},
        "bool_each": {"attn_mask": (each < -0.5) & (torch.arange(KEYS) > 0)},
        "padding": {"key_padding_mask": padding},
        "float_padding": {"key_padding_mask": torch.randn(padding.shape)},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "both_float": {"attn_mask": each, "key_padding_mask": torch.randn(padding.shape)},
    }
    return found[kind]


MASKS = ("none", "bool", "float", "float_each", "bool_each", "padding", "float_padding", "both", "both_float")


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_and_layouts_are_torchs(kind: str, products: bool) -> None:
    """Every mask, layout and form of the returned weights, with torch's fused product or our own, is as in torch."""
    rules = [hb.Rule(fqn="qk", recipe=Wide), hb.Rule(fqn="pv", recipe=Wide)] if products else []
    for first, batched, need, average in itertools.product((False, True), (True, False), (True, False), (True, False)):
        module = attention(batch_first=first)
        given = masks(kind, batched=batched)
        same_as_torch(
            module,
            data(module, batched=batched),
            lambda m, *x, g=given, n=need, a=average: m(*x, need_weights=n, average_attn_weights=a, **g),
            *rules,
        )


@pytest.mark.parametrize("kind", ["none", "bool", "both_float"])
def test_what_a_module_adds_to_its_keys_is_torchs(kind: str) -> None:
    """bias_k and bias_v, a key of zeros, other widths of keys and values, and no bias, are as in torch."""
    for own, zero, wide, bias, need in itertools.product((False, True), repeat=5):
        module = attention(
            add_bias_kv=own, add_zero_attn=zero, kdim=6 if wide else None, vdim=7 if wide else None, bias=bias
        )
        given = masks(kind, batched=True)
        same_as_torch(module, data(module), lambda m, *x, g=given, n=need: m(*x, need_weights=n, **g))


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_causal_hint_is_torchs(padded: bool, need: bool) -> None:
    """is_causal with its mask gives torch's numbers, with and without weights, padding, and products of its own."""
    mask = nn.Transformer.generate_square_subsequent_mask(KEYS)
    padding = torch.zeros(BATCH, KEYS)
    padding[:, -1] = -torch.inf
    for rules in ([], [hb.Rule(fqn="qk", recipe=Wide)]):
        module = attention()
        x = torch.randn(KEYS, BATCH, WIDTH)
        options = {"attn_mask": mask, "is_causal": True, "need_weights": need}
        options |= {"key_padding_mask": padding} if padded else {}
        same_as_torch(module, [x], lambda m, t, o=options: m(t, t, t, **o), *rules)


@pytest.mark.parametrize("need", [True, False])
def test_dropout_of_the_weights_is_torchs(need: bool) -> None:
    """With the same generator the same weights are dropped, in training only."""
    module = attention(dropout=0.5)
    converted = same_as_torch(module, data(module), lambda m, *x: m(*x, need_weights=need))
    x = data(module)
    assert not torch.equal(converted(*x)[0], converted(*x)[0])
    converted.eval()
    assert torch.equal(converted(*x)[0], converted(*x)[0])


def test_products_are_converted_only_when_a_users_rule_names_them() -> None:
    """A recipe, a bare pattern and a rule for the module leave them in floating point; qk and pv, spelled out, act."""

    def converted(*rules: hb.Rule, recipe: str = "article") -> set[str]:
        model = nn.ModuleDict({"attn": attention(), "linear": nn.Linear(8, 8)})
        promise = hb.convert(model, recipe, list(rules)).__dict__["_halfbyte_promise"]
        return {name.removeprefix("attn.") for name in promise if "_" in name}

    qk, pv = {"qk_0", "qk_1"}, {"pv_0", "pv_1"}
    silent = (
        (),
        (hb.Rule(recipe="ibm2020"),),
        (hb.Rule(fqn="*", recipe="ibm2020"),),
        (hb.Rule(fqn="attn", recipe="ibm2020"),),
        (hb.Rule(fqn="attn.*", recipe="ibm2020"),),
        (hb.Rule(type=nn.MultiheadAttention, recipe="ibm2020"),),
        (hb.Rule(when=lambda layer: True, recipe="ibm2020"),),
    )
    assert [converted(*rules) for rules in silent] == [set()] * len(silent)
    assert converted(hb.Rule(fqn="*.qk", recipe="ibm2020")) == qk
    assert converted(hb.Rule(fqn="attn.pv", recipe="ibm2020")) == pv
    assert converted(hb.Rule(fqn="*qk", recipe="ibm2020"), hb.Rule(fqn="*.pv_*", recipe="luq")) == qk | pv
    assert converted(hb.Rule(fqn="attn.qk_1", recipe="ibm2020")) == {"qk_1"}
    own = hb.Recipe(name="own", fprop=hb.RECIPES["article"].fprop, rules=(hb.Rule(fqn="*.qk", recipe="ibm2020"),))
    assert converted(recipe=own) == set()


def test_the_numbers_of_other_plans_do_not_depend_on_products() -> None:
    """Asking for products changes nothing in what other plans draw: theirs come after all others."""
    models = []
    for rules in ([], list(BOTH)):
        model = nn.ModuleDict({"attn": attention(), "linear": nn.Linear(8, 8)})
        models.append(hb.convert(model, "luq", [*rules, hb.Rule(recipe="luq")]))
    plain, with_products = ({n: p.layer for n, p in m["attn"].plans.items()} for m in models)
    assert plain == {n: number for n, number in with_products.items() if n in plain}
    assert models[0]["linear"].plan.layer == models[1]["linear"].plan.layer == 4
    assert len(set(with_products.values())) == len(with_products)


def test_each_product_of_each_head_is_on_codes_of_its_own() -> None:
    """qk multiplies scaled queries with keys, pv probabilities with values, per head, and both have all three GEMMs."""
    module = attention()
    converted = everywhere(module, "ibm2020", *BOTH)
    recorder = Recorder.attach(converted)
    y, weights = converted(*data(module), average_attn_weights=False)
    y.sum().backward()
    recorder.assert_products_are_exact()
    kinds = {"fprop": 1, "dgrad": 1, "wgrad": 1}
    assert recorder.counts() == dict.fromkeys(converted.plans, kinds)
    by_plan = {p.plan: p for p in recorder.products if p.which == "fprop"}
    for head in range(HEADS):
        scores, mixed = by_plan[f"qk_{head}"], by_plan[f"pv_{head}"]
        assert scores.result.shape == (BATCH, QUERIES, KEYS)
        assert torch.equal(weights[:, head], torch.softmax(scores.result, -1))
        assert mixed.result.shape == (BATCH, QUERIES, WIDTH // HEADS)
        assert (hat(mixed.a[0]) >= 0).all()
    seen = {plan: x for plan, slot, x, _ in recorder.operands if slot == "fprop.input"}
    heads = by_plan["q"].result.view(BATCH, QUERIES, HEADS, -1) + module.in_proj_bias[:8].view(HEADS, -1)
    assert (seen["qk_1"] - heads[:, :, 1] * 0.5).abs().max() <= 1e-6
    joined = torch.stack([by_plan[f"pv_{head}"].result for head in range(HEADS)], 2).flatten(2)
    assert torch.equal(seen["out"].view(joined.shape), joined)


def test_one_head_alone_can_be_converted() -> None:
    """A rule for one head's product leaves the other head in floating point."""
    module = attention()
    converted = hb.convert(module, "fp32", [hb.Rule(fqn="qk_1", recipe="ibm2020")])
    assert set(converted.plans) == {"qk_1"}
    recorder = Recorder.attach(converted)
    passed(converted, data(module), lambda m, *x: m(*x, need_weights=False))
    assert recorder.counts() == {"qk_1": {"fprop": 1, "dgrad": 1, "wgrad": 1}}
    rows = {row.fqn: row.recipe for row in hb.summary(converted).layers}
    assert rows == {**dict.fromkeys(("q", "k", "v", "out"), "fp32"), "qk_1": "ibm2020", "qk": "-", "pv": "-"}


def test_the_output_projection_belongs_to_its_attention() -> None:
    """out_proj is converted as ``attn.out`` and nowhere else, also where somebody put a plain Linear in its place."""
    for replace in (False, True):
        model = nn.ModuleDict({"attn": attention()})
        if replace:
            model["attn"].out_proj = nn.Linear(8, 8)
        hb.convert(model, "article")
        assert set(model.__dict__["_halfbyte_promise"]) == {"attn.q", "attn.k", "attn.v", "attn.out"}
        assert not isinstance(model["attn"].out_proj, twins.Linear)
        assert len(hb.summary(model).layers) == 6
        with pytest.raises(ConversionError, match="matches no layer"):
            hb.convert(hb.restore(model), "article", [hb.Rule(fqn="attn.out_proj", recipe="ibm2020")])


def test_the_output_projection_of_a_subclass_is_left_alone() -> None:
    """A subclass of attention may read its projection's weight: neither is converted, and one row says so."""

    class Own(nn.MultiheadAttention):
        """A subclass."""

    model = nn.ModuleDict({"attn": Own(8, 2), "linear": nn.Linear(8, 8)})
    model["attn"].out_proj = nn.Linear(8, 8)
    rows = {row.fqn: row.recipe for row in hb.summary(hb.convert(model, "article")).layers}
    assert rows == {"attn": "-", "linear": "article"}


def encoder(**options: object) -> nn.TransformerEncoder:
    """Two layers that meet every condition of torch's fused operator in evaluation."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(block, 2)


PADDING = torch.tensor([[False, False, False, True], [False, False, False, False]])
CHOICES: dict[str, list[hb.Rule]] = {
    "everything": [hb.Rule(recipe="ibm2020")],
    "feed_forward_only": [hb.Rule(type=nn.Linear, recipe="ibm2020"), hb.Rule(recipe="fp32")],
    "one_linear": [hb.Rule(fqn="layers.1.linear2", recipe="ibm2020"), hb.Rule(recipe="fp32")],
    "attention_only": [hb.Rule(type=nn.MultiheadAttention, recipe="ibm2020"), hb.Rule(recipe="fp32")],
    "out_only": [hb.Rule(fqn="*.out", recipe="ibm2020"), hb.Rule(recipe="fp32")],
    "products_only": [hb.Rule(fqn="*.qk", recipe="ibm2020"), hb.Rule(recipe="fp32")],
}


def by_hand(model: nn.TransformerEncoder, x: Tensor, padding: Tensor | None) -> Tensor:
    """The encoder's sum, its children called one by one."""
    numbers = None if padding is None else torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    for block in model.layers:
        if not any(map(twins.is_twin, block.modules())):
            x = block(x, src_key_padding_mask=numbers)
        elif block.norm_first:
            x = x + block._sa_block(block.norm1(x), None, numbers)
            x = x + block._ff_block(block.norm2(x))
        else:
            x = block.norm1(x + block._sa_block(x, None, numbers))
            x = block.norm2(x + block._ff_block(x))
    return x


@pytest.mark.parametrize("copied", ["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_evaluation_runs_the_converted_layers(choice: str, norm_first: bool, padded: bool, copied: str) -> None:
    """An encoder in eval() calls every plan once, and gives to the bit what its children give one by one."""
    model = hb.convert(encoder(norm_first=norm_first), "ibm2020", CHOICES[choice])
    x, padding = torch.randn(2, 4, 8), PADDING if padded else None
    model(x, src_key_padding_mask=padding)  # the first batch sets the clips
    if copied != "itself":
        model = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    model.eval()
    with torch.inference_mode():
        wanted = by_hand(model, x, padding)
        recorder = Recorder.attach(model)
        found = model(x, src_key_padding_mask=padding)
        assert torch.equal(found, wanted)
        assert all(kinds == {"fprop": 1} for kinds in recorder.counts().values())
        plain = hb.restore(model)
        assert (plain(x, src_key_padding_mask=padding) - found)[:, :3].abs().max() > 1e-3


def test_the_trap_is_real() -> None:
    """Without the guard torch does skip a converted layer: this test fails when torch changes its mind."""
    layer = encoder().layers[0].eval()
    hb.convert(layer, "ibm2020", CHOICES["feed_forward_only"])
    recorder = Recorder.attach(layer)
    for plan in recorder.names:
        plan._forward_pre_hooks.clear()
    with torch.no_grad():
        layer(torch.randn(2, 4, 8))
    assert recorder.counts() == {"linear1": {}, "linear2": {}}


def test_a_layer_that_was_converted_by_itself_is_guarded_too() -> None:
    """Converting only a child, without its encoder, keeps the encoder's layer off the fused path all the same."""
    model = encoder().eval()
    for block in model.layers:
        everywhere(block.linear1, "ibm2020")
    recorder = Recorder.attach(model)
    with torch.no_grad():
        model(torch.randn(2, 4, 8))
    assert all(kinds == {"fprop": 1} for kinds in recorder.counts().values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_never_passes_in_silence() -> None:
    """Where an encoder that does not know of its converted layers makes nested tensors, they refuse with the cure."""
    for rules in (CHOICES["everything"], CHOICES["feed_forward_only"]):
        model = encoder().eval()
        for block in model.layers:
            hb.convert(block, "ibm2020", rules)
        with torch.no_grad(), pytest.raises((UnsupportedError, AssertionError), match=r"nested|NestedTensor"):
            model(torch.randn(2, 4, 8), src_key_padding_mask=PADDING)


def test_restoring_gives_the_fused_path_back() -> None:
    """After restoring, the encoder has its settings back and computes what it did before."""
    model = encoder().eval()
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=PADDING)
        everywhere(model, "ibm2020")
        assert not model.use_nested_tensor
        hb.restore(model)
        assert model.use_nested_tensor
        assert torch.equal(model(x, src_key_padding_mask=PADDING), wanted)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_whole_transformer_is_torchs() -> None:
    """Encoder, decoder, self- and cross-attention with a causal mask, under the identity recipe."""
    model = nn.Transformer(8, 2, 1, 2, 16, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    inputs = [torch.randn(2, 4, 8), torch.randn(2, 5, 8)]

    def call(m: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        result: Tensor = m(source, target, tgt_mask=mask, tgt_is_causal=True)
        return result

    same_as_torch(model, inputs, call)


@pytest.mark.parametrize("need", [True, False])
def test_autocast_reaches_the_products(need: bool) -> None:
    """Under autocast, with masks in float32, the output has autocast's type, with products on codes and without."""
    for rules in ([], list(BOTH)):
        module = attention()
        converted = everywhere(module, "ibm2020", *rules)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = converted(*data(module), need_weights=need, attn_mask=torch.randn(QUERIES, KEYS))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert module.in_proj_weight.grad is not None


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, q, k, v: m(q, k, v[:-1]), "as many values as keys"),
        (lambda m, q, k, v: m(q[:, :1], k, v), "one batch size for all"),
        (lambda m, q, k, v: m(q, k, v, is_causal=True), "is_causal=True was given without attn_mask"),
        (lambda m, q, k, v: m(q[..., :-1], k, v), "last dimension must be 8"),
        (lambda m, q, k, v: m(q, k, v, attn_mask=torch.randn(4, 4)), "of shape .4, 4. was given"),
        (lambda m, q, k, v: m(q, k, v, key_padding_mask=torch.randn(2, 4)), "of shape .2, 4. was given"),
    ],
)
def test_a_callers_mistake_is_answered(call: Callable[..., object], text: str) -> None:
    """Shapes that do not fit say what was given and what is possible."""
    module = attention()
    with pytest.raises(ValueError, match=text):
        call(everywhere(module, "ibm2020"), *data(module))
