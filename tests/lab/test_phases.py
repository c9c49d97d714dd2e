"""Fine-tuning in high precision: what a recipe becomes, what a model keeps, and how fast it learns."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.lab import phases
from halfbyte.lab.tasks import Settings
from halfbyte.recipes import REUSE, Dgrad, Fprop, Recipe, get

QUANTIZING = [recipe for recipe in hb.RECIPES.values() if not recipe.in_floating_point]
RUNNING_RANGE = Recipe(name="running", fprop=Fprop(input=hb.MinMax(), weight=hb.MinMax()))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def train_a_little(model: nn.Module) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("recipe", QUANTIZING, ids=lambda r: r.name)
def test_only_the_weight_stays_quantized(recipe):
    """In fine-tuning the weight's spec is the recipe's own, backward uses its codes, and no other slot holds a spec."""
    tuned = phases.fine_tuning(recipe)
    assert tuned.slots == {
        "fprop.input": None,
        "fprop.weight": recipe.fprop.weight,
        "dgrad.grad_output": None,
        "dgrad.weight": REUSE,
        "wgrad.grad_output": None,
        "wgrad.input": REUSE,
    }
    assert tuned.name == f"{recipe.name}_fine_tuning"


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_nothing_to_fine_tune(name):
    """A recipe that quantizes nothing keeps its formats, and a model under it is not touched."""
    recipe = hb.RECIPES[name]
    assert phases.fine_tuning(recipe) is recipe
    model = phases.prepare(network(), recipe, 0)
    layers = [type(m) for m in model.modules()]
    assert phases.switch(model, recipe, 0) is model
    assert [type(m) for m in model.modules()] == layers


def test_rules_follow():
    """The layers that a rule gives FP8 gradients have none in fine-tuning; those left alone stay alone."""
    rules = phases.fine_tuning(hb.RECIPES["ibm2020_1x1_fp8"]).rules
    by_reason = {str(rule): rule.recipe for rule in rules}
    assert by_reason["first or last layer"] == "fp32"
    pointwise = by_reason["1x1 convolution"]
    assert (pointwise.fprop.weight, pointwise.quantizes_gradient) == (hb.Sawb(), False)


def test_formats_after_the_switch():
    """After the switch the middle layer has INT4 weights and everything else in float; its neighbors are untouched."""
    model = phases.prepare(network(), hb.RECIPES["ibm2020"], 0)
    train_a_little(model)
    phases.switch(model, hb.RECIPES["ibm2020"], 0)
    first, middle, last = hb.summary(model).layers
    assert (first.recipe, middle.recipe, last.recipe) == ("fp32", "ibm2020_fine_tuning", "fp32")
    assert {slot: fmt for slot, fmt in middle.formats.items() if fmt != "float"} == {
        "fprop.weight": "int4",
        "dgrad.weight": "reuse",
        "wgrad.input": "reuse",
    }


def test_what_a_layer_computes_in_fine_tuning():
    """Output and both gradients are those of an ordinary layer whose weight is the one that the codes stand for."""
    model = phases.prepare(network().double(), hb.RECIPES["ibm2020"], 0)
    layer = phases.switch(model, hb.RECIPES["ibm2020"], 0)[2]
    weight = hb.quantize(layer.weight, hb.Sawb()).dequantize(torch.float64).requires_grad_()
    assert len(weight.unique()) <= 15
    x, bias = torch.randn(5, 16, dtype=torch.float64), layer.bias.detach()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = layer(ours)
    expected = nn.functional.linear(theirs, weight, bias)
    grad_output = torch.randn(5, 16, dtype=torch.float64)
    out.backward(grad_output)
    expected.backward(grad_output)
    for found, wanted in ((out, expected), (ours.grad, theirs.grad), (layer.weight.grad, weight.grad)):
        # Four bits in any other operand would be off by a hundredth; two orders of summing differ in the last place.
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_weights_are_kept():
    """The switch changes no parameter of the network: same objects, same bits; a learned clip of inputs is gone."""
    model = phases.prepare(network(), hb.RECIPES["ibm2020"], 0)
    train_a_little(model)
    plain = {name: p for name, p in model.named_parameters() if "plan" not in name}
    bits = {name: p.detach().clone() for name, p in plain.items()}
    assert len(list(model.parameters())) > len(plain)
    phases.switch(model, hb.RECIPES["ibm2020"], 0)
    after = dict(model.named_parameters())
    assert after.keys() == plain.keys()
    assert all(after[name] is plain[name] and torch.equal(after[name], bits[name]) for name in plain)


def test_what_a_weight_quantizer_measured_is_kept():
    """The running range of a weight is the same after the switch, and so is the layer's count of steps."""
    model = phases.prepare(network(), RUNNING_RANGE, 0)
    train_a_little(model)
    before = {name: t.clone() for name, t in model.state_dict().items() if ".plan.weight." in name or "step" in name}
    assert len(before) > 3
    phases.switch(model, RUNNING_RANGE, 0)
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert not any(".plan.input." in name for name in after)


def test_what_a_weight_learned_is_kept():
    """The learned step of a weight's quantizer is the same number after the switch."""
    model = phases.prepare(network(), hb.RECIPES["int4_hq_lss"], 0)
    train_a_little(model)
    before = model[2].plan.weight.learned.detach().clone()
    phases.switch(model, hb.RECIPES["int4_hq_lss"], 0)
    assert torch.equal(model[2].plan.weight.learned, before)


@pytest.mark.parametrize("recipe", QUANTIZING, ids=lambda r: r.name)
def test_every_recipe_can_be_fine_tuned(recipe):
    """Under every recipe a network trains before and after the switch."""
    model = phases.prepare(network(), recipe, 0)
    train_a_little(model)
    phases.switch(model, recipe, 0)
    before = [p.detach().clone() for p in model.parameters()]
    train_a_little(model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_triangle_by_hand():
    """Of five batches the third has the tip; of four the middle two are level; a single one has the tip."""
    assert [phases.triangle(k, 5) / phases.PEAK for k in range(5)] == pytest.approx([0.2, 0.6, 1, 0.6, 0.2], abs=1e-15)
    assert [phases.triangle(k, 4) / phases.PEAK for k in range(4)] == pytest.approx([0.25, 0.75, 0.75, 0.25], abs=1e-15)
    assert phases.triangle(0, 1) == phases.PEAK


def test_cosine_by_hand():
    """Half a cosine: 1 at the start, a half in the middle, 0 at the end."""
    assert [phases.cosine(k, 4) for k in (0, 2, 4)] == pytest.approx([1, 0.5, 0], abs=1e-15)


def test_random_recipes_get_the_seed():
    """The run's seed decides what a recipe draws; one that draws nothing is not given any."""
    gradient = hb.Radix4(rounding="stochastic")
    random = dataclasses.replace(hb.RECIPES["ibm2020"], name="random", dgrad=Dgrad(grad_output=gradient))

    def gradient_of(recipe: Recipe, seed: int) -> torch.Tensor:
        model = phases.prepare(network(), recipe, seed)
        torch.manual_seed(2)
        model(torch.randn(32, 8)).square().mean().backward()
        return model[0].weight.grad

    assert torch.equal(gradient_of(random, 1), gradient_of(random, 1))
    assert not torch.equal(gradient_of(random, 1), gradient_of(random, 2))
    assert torch.equal(gradient_of(hb.RECIPES["ibm2020"], 1), gradient_of(hb.RECIPES["ibm2020"], 2))


def test_conventions_name_every_recipe_of_the_run():
    """Beside the recipe's own stand those that its rules name and, where there is fine-tuning, those of that phase."""
    recipe = hb.RECIPES["ibm2020_1x1_fp8"]
    ordinary = phases.conventions(recipe, fine_tune=0)
    assert ordinary.keys() == {"ibm2020_1x1_fp8", "fp32", "ibm2020_fp8_gradients"}
    assert ordinary["ibm2020_1x1_fp8"] == recipe.conventions
    added = phases.conventions(recipe, fine_tune=1).keys() - ordinary.keys()
    assert added == {"ibm2020_1x1_fp8_fine_tuning", "ibm2020_fp8_gradients_fine_tuning"}


def test_a_convention_shows():
    """Two recipes that differ in one default alone have different conventions."""
    recipe = hb.RECIPES["ibm2020"]
    other = dataclasses.replace(recipe, fprop=dataclasses.replace(recipe.fprop, weight=hb.Sawb(levels=16)))
    assert phases.conventions(recipe, fine_tune=0) != phases.conventions(other, fine_tune=0)


def settings(**changes) -> Settings:
    return Settings(**{"epochs": 4, "batch_size": 1, "optimizer": "sgd", "learning_rate": 1.0} | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5 * (1 + math.cos(math.pi * k / 12)) for k in range(12)]),
        ({"warmup": 2}, [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10))]),
        ({"schedule": "drops", "drops": (0.5, 0.75)}, [1.0] * 6 + [0.1] * 3 + [0.1**2] * 3),
        ({"schedule": "decay", "hold": 2, "decay": 0.5}, [1.0] * 6 + [0.5] * 3 + [0.25] * 3),
        ({"schedule": "inverse_sqrt", "warmup": 4}, [0.25, 0.5, 0.75, 1.0, *(math.sqrt(4 / k) for k in range(5, 13))]),
    ],
    ids=["cosine", "warmup", "drops", "decay", "inverse_sqrt"],
)
def test_schedules(changes, expected):
    """Four epochs of three batches: the share of the learning rate at every batch."""
    shape = phases.ordinary(settings(**changes), batches_per_epoch=3)
    assert [shape(done, 12) for done in range(12)] == expected


def test_optimizers_get_their_settings():
    """The optimizer that is named gets the settings' numbers."""
    adamw = phases.optimizer(network(), settings(optimizer="adamw", betas=(0.8, 0.9), weight_decay=0.1))
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.defaults["betas"], adamw.defaults["weight_decay"]) == ((0.8, 0.9), 0.1)
    sgd = phases.optimizer(network(), settings(momentum=0.9))
    assert (type(sgd), sgd.defaults["momentum"]) == (torch.optim.SGD, 0.9)


def test_clips_have_a_rate_of_their_own():
    """`learned_rate` is that of the clips, of each of them and of nothing else."""
    model = phases.prepare(network(), get("ibm2020"), seed=0)
    clips = {name: p for name, p in model.named_parameters() if name.endswith("clip")}
    first, second = phases.optimizer(model, settings(learned_rate=0.25)).param_groups
    assert clips
    assert {id(p) for p in second["params"]} == {id(p) for p in clips.values()}
    assert len(first["params"]) == len(list(model.parameters())) - len(clips)
    assert (first["lr"], second["lr"]) == (settings().learning_rate, 0.25)


@pytest.mark.parametrize("recipe", ["fp32", "ibm2020"])
def test_without_a_rate_of_their_own_clips_are_parameters_like_others(recipe):
    """One group holds all parameters, and a model without clips has no second one."""
    model = phases.prepare(network(), get(recipe), seed=0)
    assert len(phases.optimizer(model, settings()).param_groups) == 1
    if recipe == "fp32":
        assert len(phases.optimizer(model, settings(learned_rate=0.25)).param_groups) == 1
