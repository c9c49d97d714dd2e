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
from halfbyte.recipes import bottom_pointwise


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
    """Attention and subclasses are left alone and listed; a rule that names one raises."""

    class Own(nn.Linear):
        """A subclass, which may use its weight in its own way."""

    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "own": Own(8, 8), "proj": nn.Linear(8, 8)})

    model = hb.convert(build(), "ibm2020")
    why = {layer.fqn: layer.why for layer in hb.summary(model).layers}
    assert recipes_of(model)["proj"] == "ibm2020"
    assert why["attention"] == "not converted: no 4-bit twin of this type"
    assert why["own"] == "not converted: a subclass of Linear"
    with pytest.raises(ConversionError, match="own, a Own, which cannot be converted"):
        hb.convert(build(), "ibm2020", [hb.Rule(fqn="own", recipe="ibm2020")])
    with pytest.raises(ConversionError, match="attention, a MultiheadAttention"):
        hb.convert(build(), "ibm2020", [hb.Rule(type=nn.MultiheadAttention, recipe="ibm2020")])


def test_a_model_without_layers_is_refused() -> None:
    """A model with nothing to convert is an error that says what could be."""
    with pytest.raises(ConversionError, match="no layer that can be converted"):
        hb.convert(nn.Sequential(nn.ReLU(), nn.GRU(4, 4)), "ibm2020")


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
    """Only linear and convolution layers change class."""
    model = nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    hb.convert(model, "ibm2020")
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
