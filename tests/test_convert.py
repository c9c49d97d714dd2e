"""From a model to a 4-bit model and back: rules, names, ties, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.errors import ConversionError, UnknownNameError
from halfbyte.nn import plans_of
from halfbyte.recipes import LayerInfo, bottom_pointwise


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3, 1x1 convolutions."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 4 * width, 1)
        self.downsample = nn.Conv2d(inputs, 4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, 4 * width, H, W)."""
        y = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


def network() -> nn.Sequential:
    """Stem, bottleneck, depthwise convolution, norm, classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        Bottleneck(8, 4),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )


def recipes_of(model: nn.Module) -> dict[str, str]:
    """Each layer's recipe by name."""
    return {layer.fqn: layer.recipe for layer in hb.summary(model).layers}


def test_default_rules_keep_first_last_and_depthwise_layers() -> None:
    """ibm2020 leaves the first, the last and the depthwise layers alone and says why."""
    model = hb.convert(network(), "ibm2020")
    inner = dict.fromkeys(("2.conv1", "2.conv2", "2.conv3", "2.downsample"), "ibm2020")
    assert recipes_of(model) == {"0": "fp32", **inner, "3": "fp32", "6": "fp32"}
    why = {layer.fqn: layer.why for layer in hb.summary(model).layers}
    assert (why["0"], why["3"], why["6"]) == (
        "first or last layer",
        "depthwise convolution",
        "first or last layer",
    )


def test_the_article_converts_every_layer() -> None:
    """The article's recipe has no exceptions: the data themselves become INT4."""
    assert set(recipes_of(hb.convert(network(), "article")).values()) == {"article"}


def test_hybrid_recipes_give_fp8_gradients_to_the_right_pointwise_layers() -> None:
    """All 1x1 convolutions, or only those that do not widen, get FP8 gradients."""
    every = recipes_of(hb.convert(network(), "ibm2020_1x1_fp8"))
    bottom = recipes_of(hb.convert(network(), "ibm2020_bottom_1x1_fp8"))
    fp8 = "ibm2020_fp8_gradients"
    assert [n for n, r in every.items() if r == fp8] == ["2.conv1", "2.conv3", "2.downsample"]
    assert [n for n, r in bottom.items() if r == fp8] == ["2.conv1"]


def test_a_model_of_two_layers_has_no_middle_to_keep() -> None:
    """With fewer than three layers the first-and-last rule would leave nothing, so it is silent."""
    model = hb.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "ibm2020")
    assert set(recipes_of(model).values()) == {"ibm2020"}


def test_first_matching_rule_wins() -> None:
    """Rules are asked in order, the user's before the recipe's."""
    rules = [
        hb.Rule(fqn="2.conv2", recipe="article"),
        hb.Rule(type=nn.Linear, recipe="one_phase"),
        hb.Rule(fqn="2.*", recipe="int4_forward_only"),
    ]
    found = recipes_of(hb.convert(network(), "ibm2020", rules))
    assert (found["2.conv2"], found["6"], found["2.conv1"]) == ("article", "one_phase", "int4_forward_only")
    assert found["0"] == "fp32"


def test_a_rule_takes_a_predicate() -> None:
    """`when` sees the layer's name, module and place."""
    model = hb.convert(network(), "ibm2020", [hb.Rule(when=bottom_pointwise, recipe="article")])
    assert recipes_of(model)["2.conv1"] == "article"
    assert recipes_of(model)["2.conv3"] == "ibm2020"


def test_a_rule_that_matches_nothing_raises_and_lists_the_layers() -> None:
    """A pattern with a typing error is an error that shows every layer's name, and the model is left as it was."""
    model = network()
    with pytest.raises(ConversionError, match=r"(?s)matches no layer.*2\.conv1.*Conv2d"):
        hb.convert(model, "ibm2020", [hb.Rule(fqn="2.con1", recipe="article")])
    assert type(model[2].conv1) is nn.Conv2d


def test_a_rule_that_never_gets_a_turn_raises() -> None:
    """A rule whose layers earlier rules take is an error too."""
    rules = [hb.Rule(type=nn.Conv2d, recipe="article"), hb.Rule(fqn="2.conv1", recipe="fp32")]
    with pytest.raises(ConversionError, match="earlier rules take all"):
        hb.convert(network(), "ibm2020", rules)


def test_a_wrong_recipe_name_suggests_the_right_one() -> None:
    """A name with a typing error is answered with the nearest name."""
    with pytest.raises(UnknownNameError, match="Did you mean 'ibm2020'"):
        hb.convert(network(), "ibm202")


def test_a_recipe_that_would_do_nothing_raises() -> None:
    """A model all of whose layers the rules leave alone is an error with the cure in it."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(ConversionError, match=r"leave every layer in high precision.*rules="):
        hb.convert(model, "ibm2020")


def test_what_has_no_twin_is_refused_by_name_and_listed_otherwise() -> None:
    """Bilinear layers and subclasses are left alone and listed; a rule that names one raises."""

    class Own(nn.Linear):
        """A subclass, which may use its weight in its own way."""

    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"both": nn.Bilinear(8, 8, 2), "own": Own(8, 8), "proj": nn.Linear(8, 8)})

    model = hb.convert(build(), "ibm2020")
    why = {layer.fqn: layer.why for layer in hb.summary(model).layers}
    assert recipes_of(model) == {"both": "-", "own": "-", "proj": "ibm2020"}
    assert why["both"] == "not converted: no 4-bit twin of this type"
    assert why["own"] == "not converted: a subclass of Linear"
    with pytest.raises(ConversionError, match="own, a Own, which cannot be converted"):
        hb.convert(build(), "ibm2020", [hb.Rule(fqn="own", recipe="ibm2020")])
    with pytest.raises(ConversionError, match="both, a Bilinear"):
        hb.convert(build(), "ibm2020", [hb.Rule(type=nn.Bilinear, recipe="ibm2020")])


def test_a_model_without_layers_is_refused() -> None:
    """A model with nothing to convert is an error that says what could be."""
    with pytest.raises(ConversionError, match="no layer that can be converted"):
        hb.convert(nn.Sequential(nn.ReLU(), nn.Bilinear(4, 4, 4)), "ibm2020")


def language_model() -> nn.ModuleDict:
    """Embedding, LSTM, attention, output layer."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 8),
            "lstm": nn.LSTM(8, 8),
            "attn": nn.MultiheadAttention(8, 2),
            "head": nn.Linear(8, 10),
        }
    )


def test_an_embedding_counts_as_the_first_layer() -> None:
    """In a language model the embedding is first and stays, the LSTM behind it converts, the output is last."""
    found = recipes_of(hb.convert(language_model(), "ibm2020"))
    inner = ("lstm.ih_l0", "lstm.hh_l0", "attn.q", "attn.k", "attn.v", "attn.out")
    assert found == {**dict.fromkeys(inner, "ibm2020"), "attn.qk": "-", "attn.pv": "-", "head": "fp32"}
    bag = nn.Sequential(nn.EmbeddingBag(10, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert recipes_of(hb.convert(bag, "ibm2020")) == {"1": "ibm2020", "2": "fp32"}


def test_a_rule_can_name_one_weight_or_the_layer_that_has_it() -> None:
    """A pattern matches a plan's name or its layer's; a type matches the layer's class; the first that matches wins."""
    rules = [
        hb.Rule(fqn="lstm.hh_*", recipe="one_phase"),
        hb.Rule(fqn="lstm", recipe="article"),
        hb.Rule(fqn="attn.q", recipe="fp32"),
        hb.Rule(type=nn.MultiheadAttention, recipe="int8"),
        hb.Rule(fqn="h*", recipe="luq"),
    ]
    found = recipes_of(hb.convert(language_model(), "ibm2020", rules))
    assert found == {
        "lstm.ih_l0": "article",
        "lstm.hh_l0": "one_phase",
        "attn.q": "fp32",
        "attn.k": "int8",
        "attn.v": "int8",
        "attn.out": "int8",
        "attn.qk": "-",
        "attn.pv": "-",
        "head": "luq",
    }


def test_when_sees_the_plans_name_and_its_layer() -> None:
    """A predicate is asked with the plan's name, the layer's module, and the layer's place among all."""
    seen: dict[str, tuple[str, int, int]] = {}

    def look(layer: LayerInfo) -> bool:
        seen[layer.fqn] = (type(layer.module).__name__, layer.index, layer.count)
        return False

    hb.convert(
        language_model(),
        hb.Recipe(name="own", fprop=hb.Fprop(weight=hb.Sawb()), rules=(hb.Rule(recipe="fp32", when=look),)),
    )
    assert seen["lstm.hh_l0"] == seen["lstm"] == ("LSTM", 1, 4)
    assert seen["attn.out"] == ("MultiheadAttention", 2, 4)
    assert seen["head"] == ("Linear", 3, 4)
    assert not any("qk" in name for name in seen)


def test_a_model_keeps_what_it_was_promised() -> None:
    """The root holds each promised plan's recipe by name, through a copy; layers left alone are not in it."""
    model = hb.convert(language_model(), "ibm2020", [hb.Rule(fqn="attn.pv", recipe="luq")])
    promise = vars(copy.deepcopy(model))["_halfbyte_promise"]
    assert promise == {
        **dict.fromkeys(("lstm.ih_l0", "lstm.hh_l0", "attn.q", "attn.k", "attn.v", "attn.out"), "ibm2020"),
        "attn.pv_0": "luq",
        "attn.pv_1": "luq",
    }
    assert "_halfbyte_promise" not in vars(hb.restore(model))


def test_every_plan_draws_numbers_of_its_own() -> None:
    """No two plans of a model have the same number, and a rule for one layer changes no other's."""
    plans = [p for m in hb.convert(language_model(), "luq").modules() for p in plans_of(m).values()]
    assert len({plan.layer for plan in plans}) == len(plans) == 6
    other = hb.convert(language_model(), "luq", [hb.Rule(fqn="lstm", recipe="fp32"), hb.Rule(fqn="*.qk", recipe="luq")])
    numbers = {name: plan.layer for name, plan in plans_of(other["attn"]).items()}
    assert [numbers[name] for name in ("q", "k", "v", "out")] == [2, 3, 4, 5]


def test_the_listing_of_layers_names_their_plans() -> None:
    """The error for a rule that matches nothing shows the names that a rule can use, the optional ones too."""
    with pytest.raises(
        ConversionError, match=r"(?s)lstm  LSTM  \(ih_l0, hh_l0\).*\(q, k, v, out; by name only: qk, pv\)"
    ):
        hb.convert(language_model(), "ibm2020", [hb.Rule(fqn="attn.o", recipe="fp32")])


def project(x: Tensor, weight: Tensor) -> Tensor:
    """A product in a function of its own."""
    return F.linear(x, weight)


class Functional(nn.Module):
    """Multiplies in a method and in a function that its forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4) to (N, 4)."""
        return self.mix(project(x, self.weight))

    def mix(self, x: Tensor) -> Tensor:
        """A product by operator, one by method, one by name."""
        return torch.einsum("ij,jk->ik", x @ self.weight, x.mm(self.weight))


class Own(nn.Module):
    """A user's attention: no parameter of its own, two products."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each (N, L, D)."""
        return F.scaled_dot_product_attention(q, k, v) + torch.baddbmm(q, k, v)


class Tied(nn.Module):
    """A language model whose output layer is its embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N,) to (N, 10)."""
        return torch.nn.functional.linear(self.inner(self.embed(x)), self.embed.weight)


class Plain(nn.Module):
    """Names that look like products, and a matrix that is only added."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.matmul, self.conv1d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(1, 1, 1)
        self.mm = nn.ReLU()
        self.position = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(3, 4) to (3, 4)."""
        return self.mm(self.matmul(self.linear(x) + self.position)) * F.softmax(self.position, -1)

    def unused(self, x: Tensor) -> Tensor:
        """A product that forward never reaches."""
        return x @ x


def test_a_module_that_multiplies_by_itself_is_listed_with_the_cure() -> None:
    """Products in forward, in methods and in functions that it calls are found by reading, without running them."""
    model = nn.ModuleDict({"own": Own(), "functional": Functional(), "linear": nn.Linear(4, 4)})
    rows = {row.fqn: row for row in hb.summary(hb.convert(model, "article")).layers}
    assert set(rows) == {"own", "functional", "linear"}
    assert (rows["functional"].recipe, rows["functional"].formats) == ("-", {})
    why = rows["functional"].why
    assert all(text in why for text in ("not converted: ", "linear()", "einsum()", "@", "mm()", "use torch.nn.Linear"))
    assert all(f"{name}()" in rows["own"].why for name in ("scaled_dot_product_attention", "baddbmm"))
    assert "halfbyte.ops.matmul" in rows["own"].why


def test_a_tied_output_layer_is_listed() -> None:
    """F.linear on an embedding's weight, the usual way to tie an output layer, is reported for the model itself."""
    rows = {row.fqn: row.why for row in hb.summary(hb.convert(Tied(), "article")).layers}
    assert rows[""] == "not converted: linear() in its forward; use torch.nn.Linear"
    assert set(rows) == {"", "inner"}


def test_a_traced_module_and_a_patched_forward_are_read_too() -> None:
    """What torch.fx wrote out, and a forward that was set on one instance, multiply as much as any other."""
    traced = torch.fx.symbolic_trace(Tied())
    assert recipes_of(hb.convert(traced, "article")) == {"": "-", "inner": "article"}
    patched = nn.Sequential(nn.Linear(4, 4))
    patched.forward = lambda x: x @ x
    assert recipes_of(hb.convert(patched, "article")) == {"": "-", "0": "article"}


def test_plain_modules_raise_no_false_alarm() -> None:
    """Layers that are called linear or mm, a matrix that is added, and a method that is not called are no products."""
    rows = [row.fqn for row in hb.summary(hb.convert(Plain(), "article")).layers]
    assert rows == ["linear", "matmul", "conv1d"]
    assert len(hb.summary(network()).layers) == 7
    assert {row.kind for row in hb.summary(nn.Transformer(8, 2, 1, 1, 8, batch_first=True)).layers} == {
        "MultiheadAttention",
        "Linear",
    }


def test_a_matrix_in_a_module_without_source_is_listed() -> None:
    """What cannot be read is reported if it holds a matrix, and passed over if it holds none."""
    made: dict[str, type[nn.Module]] = {}
    exec(  # a class without a file
        "from torch import nn\nclass Made(nn.Module):\n    def forward(self, x):\n        return x\n", made
    )
    silent, holder = made["Made"](), made["Made"]()
    holder.matrix = nn.Parameter(torch.rand(2, 2))
    rows = {row.fqn: row.why for row in hb.summary(nn.ModuleDict({"silent": silent, "holder": holder})).layers}
    assert rows.keys() == {"holder"}
    assert "holds matrix" in rows["holder"]


def test_a_loss_that_reads_its_layers_weight_is_left_alone() -> None:
    """LinearCrossEntropyLoss never calls its Linear, so that is not converted, and the loss is listed."""
    if not hasattr(nn, "LinearCrossEntropyLoss"):
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    model = nn.ModuleDict({"loss": nn.LinearCrossEntropyLoss(4, 3), "inner": nn.Linear(4, 4)})
    assert recipes_of(hb.convert(model, "article")) == {"loss": "-", "inner": "article"}


def wrapped_in_class(name: str) -> nn.Module:
    """A module whose class has a wrapper's name and home, without the machinery of one."""
    kind = type(name, (nn.Sequential,), {"__module__": "torch.distributed.fsdp"})
    module: nn.Module = kind(nn.Linear(4, 4))
    return module


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: nn.DataParallel(nn.Linear(4, 4)), "wrapped already .DataParallel.: convert the plain model"),
        (lambda: wrapped_in_class("DistributedDataParallel"), "convert the plain model, then wrap it"),
        (lambda: wrapped_in_class("FullyShardedDataParallel"), "convert the plain model, then wrap it"),
        (lambda: wrapped_in_class("FSDPModule"), "convert the plain model, then call fully_shard"),
        (lambda: torch.compile(nn.Linear(4, 4), backend="eager"), "then call torch.compile"),
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))), "convert the plain module"),
    ],
)
def test_what_is_wrapped_already_is_refused(build: Callable[[], nn.Module], text: str) -> None:
    """Wrapped, sharded, compiled and scripted models are refused with the order that works."""
    with pytest.raises(ConversionError, match=text):
        hb.convert(build(), "ibm2020")
    with pytest.raises(ConversionError, match=text):
        hb.convert(nn.Sequential(build(), nn.Linear(4, 4)), "ibm2020")


def test_weights_that_are_no_plain_floats_are_refused() -> None:
    """Complex weights and weights of a tensor subclass raise, unless the layer is left alone."""

    class Wrapped(Tensor):
        """A subclass with operators of its own."""

        __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: args[0])

    strange = nn.Linear(4, 4)
    strange.weight = nn.Parameter(Tensor._make_subclass(Wrapped, torch.rand(4, 4)))
    for layer, text in (
        (nn.Linear(4, 4, dtype=torch.complex64), "its weight is torch.complex64"),
        (strange, "Wrapped"),
    ):
        with pytest.raises(ConversionError, match=text):
            hb.convert(nn.Sequential(layer, nn.Linear(4, 4)), "article")
        hb.convert(nn.Sequential(layer, nn.Linear(4, 4)), "article", [hb.Rule(fqn="0", recipe="fp32")])


def test_a_quantized_layer_is_refused() -> None:
    """A layer that holds quantized weights for inference is named with the cure."""
    quantized = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.modules.linear"})()
    with pytest.raises(ConversionError, match="quantized for inference; convert the model it came from"):
        hb.convert(nn.Sequential(quantized, nn.Linear(4, 4)), "ibm2020")


def test_a_parametrized_layer_is_left_alone_with_the_cure() -> None:
    """Parametrized before conversion, a layer is listed with the order that works, which a rule's error names too."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ConversionError, match="convert first, parametrize then"):
        hb.convert(model, "ibm2020", [hb.Rule(fqn="0", recipe="ibm2020")])
    why = {row.fqn: row.why for row in hb.summary(hb.convert(model, "ibm2020")).layers}
    assert why["0"] == "not converted: a parametrized Linear; convert first, parametrize then"


def test_lazy_layers_are_refused() -> None:
    """A layer without a shape yet is an error that says what to do first."""
    with pytest.raises(ConversionError, match=r"Layer 1 \(LazyLinear\) has no shape yet"):
        hb.convert(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), "ibm2020")


def test_converting_twice_raises() -> None:
    """A second conversion is an error that names restore."""
    model = hb.convert(network(), "ibm2020")
    with pytest.raises(ConversionError, match="restore"):
        hb.convert(model, "article")


def test_a_wrong_backend_raises_before_anything_changes() -> None:
    """A backend that does not exist is an error and no layer has changed."""
    model = network()
    with pytest.raises(UnknownNameError, match="backend"):
        hb.convert(model, "ibm2020", backend="cuda")
    assert type(model[2].conv1) is nn.Conv2d


def test_conversion_keeps_every_object() -> None:
    """The model, its layers, parameters and hooks are the same objects after conversion and after restoring."""
    model = network()
    calls: list[str] = []
    model[2].conv2.register_forward_hook(lambda *_: calls.append("hook"))
    layers, parameters = list(model.modules()), list(model.parameters())
    assert hb.convert(model, "ibm2020") is model
    assert all(a is b for a, b in zip(layers, [m for m in model.modules() if m in layers], strict=True))
    model(torch.rand(2, 1, 6, 6))
    assert calls == ["hook"]
    assert hb.restore(model) is model
    assert [id(m) for m in model.modules()] == [id(m) for m in layers]
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]


def test_restore_gives_plain_layers_with_the_trained_weights() -> None:
    """After training and restoring, every class is torch's own and the weights are the trained ones."""
    model = hb.convert(network(), "ibm2020")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(torch.rand(4, 1, 6, 6)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    trained = {k: v.clone() for k, v in model.state_dict().items() if ".plan." not in k}
    hb.restore(model)
    assert all(type(m).__module__.startswith("torch.") or isinstance(m, Bottleneck) for m in model.modules())
    state = model.state_dict()
    assert state.keys() == trained.keys()
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in network().modules()]
    assert all(torch.equal(state[k], trained[k]) for k in trained)
    assert network().load_state_dict(state)


def test_restoring_a_plain_model_raises() -> None:
    """There is nothing to restore in a model that was never converted."""
    with pytest.raises(ConversionError, match="without a converted layer"):
        hb.restore(network())


def test_tied_weights_stay_tied() -> None:
    """Two layers that share a parameter share it after conversion, and its gradient sums both uses."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    hb.convert(model, "ibm2020")
    assert model[2].weight is model[0].weight
    assert len([n for n, _ in model.named_parameters() if n.endswith("weight")]) == 1
    model(torch.rand(4, 8)).sum().backward()
    assert model[0].weight.grad is not None
    scales = [model[i].plan.grad_output.grad_scale for i in (0, 2)]
    assert scales[0] is not scales[1]


def test_one_module_used_twice_is_converted_once() -> None:
    """A layer registered under two names keeps one plan."""
    layer = nn.Linear(8, 8)
    model = hb.convert(nn.Sequential(layer, nn.ReLU(), layer), "ibm2020")
    assert model[0] is model[2]
    assert len(hb.summary(model).layers) == 1


def test_a_bare_layer_converts_in_place() -> None:
    """The model may itself be the layer."""
    layer = nn.Linear(8, 8)
    assert hb.convert(layer, "ibm2020") is layer
    assert "recipe=ibm2020" in repr(layer)


def test_embeddings_and_norms_are_untouched() -> None:
    """Embeddings and norms keep their class."""
    model = nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    hb.convert(model, "ibm2020", [hb.Rule(recipe="ibm2020")])
    assert (type(model[0]), type(model[1])) == (nn.Embedding, nn.LayerNorm)


def test_summary_shows_the_six_slots_and_the_sign_once_known() -> None:
    """The table names each slot's format; the activation's sign is open until the first batch has been seen."""
    model = hb.convert(network(), "ibm2020")
    before = {layer.fqn: layer.formats for layer in hb.summary(model).layers}["2.conv2"]
    assert before == {
        "fprop.input": "uint4|int4",
        "fprop.weight": "int4",
        "dgrad.grad_output": "fp4_e3m0_r4",
        "dgrad.weight": "reuse",
        "wgrad.grad_output": "fp4_e3m0_r4_odd",
        "wgrad.input": "reuse",
    }
    model(torch.rand(2, 1, 6, 6))
    after = {layer.fqn: layer.formats for layer in hb.summary(model).layers}["2.conv2"]
    assert after["fprop.input"] == "uint4"
    assert "uint4 x int4" in str(hb.summary(model))


def test_the_first_batch_decides_the_sign_of_an_activation() -> None:
    """A layer behind a ReLU gets unsigned codes, one behind a norm signed ones."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    hb.convert(model, "ibm2020", [hb.Rule(recipe="ibm2020")])
    model(torch.rand(16, 8))
    assert [model[i].plan.input.format.name for i in (0, 2, 4)] == ["uint4", "int4", "uint4"]


def test_the_sign_can_be_overridden() -> None:
    """A rule with a recipe of its own fixes the sign, whatever the first batch holds."""
    base = hb.RECIPES["ibm2020"]
    signed = replace(base, name="signed", fprop=replace(base.fprop, input=hb.Pact(signed=True)))
    layer = hb.convert(nn.Linear(8, 8), signed)
    layer(torch.rand(4, 8))
    assert layer.plan.input.format.name == "int4"


def test_loss_scale_is_one_scale_for_the_whole_model() -> None:
    """Under the global ablation all layers share one state, also after a deep copy."""
    model = hb.convert(network(), "loss_scale")
    for each in (model, copy.deepcopy(model)):
        scales = {id(m.plan.grad_output.grad_scale) for m in each.modules() if hasattr(m, "plan")}
        assert len(scales) == 1


def test_fp32_changes_nothing() -> None:
    """The fp32 recipe leaves every class as it is and says so in the summary."""
    model = hb.convert(network(), "fp32")
    assert all(type(m).__module__.startswith("torch.") or isinstance(m, Bottleneck) for m in model.modules())
    assert set(recipes_of(model).values()) == {"fp32"}


def test_a_rules_recipe_keeps_its_own_choice_of_formats() -> None:
    """A hybrid recipe named by a rule still gives its 1x1 convolutions FP8 gradients; its guards do not speak."""
    rules = [hb.Rule(fqn="2.*", recipe="ibm2020_1x1_fp8"), hb.Rule(fqn="0", recipe="ibm2020_1x1_fp8")]
    found = recipes_of(hb.convert(network(), "fp32", rules))
    assert (found["2.conv1"], found["2.conv2"], found["0"]) == (
        "ibm2020_fp8_gradients",
        "ibm2020_1x1_fp8",
        "ibm2020_1x1_fp8",
    )


def test_a_hybrid_that_finds_no_layer_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """ibm2020_1x1_fp8 on a model without 1x1 convolutions equals ibm2020, and the log says why."""
    hb.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "ibm2020_1x1_fp8")
    assert "no layer of this model is what its rule speaks of (1x1 convolution)" in caplog.text


def test_a_seed_without_random_rounding_raises() -> None:
    """A seed that nothing draws from is an error."""
    with pytest.raises(ConversionError, match="no layer's recipe rounds at random"):
        hb.convert(network(), "ibm2020", seed=7)


def test_uneven_padding_under_min_max_raises() -> None:
    """Min-max would take the zeros of an uneven 'same' padding for data, so such a layer is refused."""
    with pytest.raises(ConversionError, match="pads unevenly"):
        hb.convert(nn.Sequential(nn.Conv2d(1, 2, 4, padding="same")), "article")


def test_a_converted_layer_that_was_parametrized_stays_in_the_summary() -> None:
    """Weight norm put on after conversion changes the class, not the table."""
    model = hb.convert(network(), "ibm2020")
    nn.utils.parametrizations.weight_norm(model[2].conv2)
    assert recipes_of(model)["2.conv2"] == "ibm2020"


def test_a_recipe_with_a_function_of_the_users_own_can_be_pickled() -> None:
    """What a layer keeps of its recipe holds no rules, so a lambda in one does not stand in the way of saving."""
    own = replace(
        hb.RECIPES["ibm2020"], name="own", rules=(hb.Rule(recipe="fp32", when=lambda layer: layer.index == 0),)
    )
    model = hb.convert(network(), own)
    assert recipes_of(pickle.loads(pickle.dumps(model)))["2.conv2"] == "own"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: hb.convert(network(), "ibm2020", hb.Rule(recipe="fp32")), "a list of Rule is possible"),
        (lambda: hb.convert(network(), None), "no recipe named 'None'"),
        (lambda: hb.Rule(recipe="fp32", type="Linear"), "a class such as torch.nn.Linear"),
        (lambda: hb.Rule(recipe="fp32", fqn=3), "a pattern such as"),
        (lambda: hb.convert(nn.Linear(4, 4), "ibm2020")(torch.rand(2, 5)), "last dimension must be 4"),
        (lambda: hb.convert(nn.Linear(4, 4), "ibm2020")(torch.tensor(1.0)), "last dimension must be 4"),
    ],
)
def test_a_callers_mistake_is_answered_in_our_own_words(call: Callable[[], object], text: str) -> None:
    """Wrong types and shapes name what was asked and what is possible."""
    with pytest.raises(ValueError, match=text):
        call()
