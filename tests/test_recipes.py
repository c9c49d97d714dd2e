"""Recipes: the named ones, what a recipe refuses, how rules choose, and that every field acts."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte import (
    MXFP4,
    NVFP4,
    RECIPES,
    REUSE,
    BitSplit,
    Hadamard,
    LayerGradScale,
    Lsq,
    Luq,
    MinMax,
    Nearest,
    Pact,
    Phase,
    Radix4,
    Recipe,
    Requantize,
    Rule,
    Sawb,
    convert,
    quantize,
    restore,
    summary,
)
from halfbyte.errors import SpecError, UnknownNameError
from halfbyte.quantizers import ExactGradScale, LossScale
from halfbyte.recipes import (
    Dgrad,
    Fprop,
    LayerInfo,
    Wgrad,
    bottom_pointwise,
    depthwise,
    first_or_last,
    get,
    pointwise,
)

EVEN, ODD = "fp4_e3m0_r4", "fp4_e3m0_r4_odd"


def in_words(part: object) -> str:
    """A name for a part of a test's parameters, the same in every process: a set has no order."""
    return "+".join(sorted(part)) if isinstance(part, set) else str(part)


ACTIVATION = "uint4|int4"

# Every recipe by name; slots as Sun et al. 2020, Fig. 4b, section 4.2 and Table 1 give them: fprop input and
# weight, the two grad_output slots, and the scale. The other two slots reuse the forward codes.
SLOTS: dict[str, tuple[str, str, str, str, type | None]] = {
    "fp32": ("float", "float", "float", "float", None),
    "bf16": ("float", "float", "float", "float", None),
    "article": ("int4", "int4", EVEN, ODD, LayerGradScale),
    "ibm2020": (ACTIVATION, "int4", EVEN, ODD, LayerGradScale),
    "ibm2020_dw_fp8": (ACTIVATION, "int4", EVEN, "fp8_e5m2", LayerGradScale),
    "ibm2020_gain": (ACTIVATION, "int4", EVEN, ODD, LayerGradScale),
    "ibm2020_1x1_fp8": (ACTIVATION, "int4", EVEN, ODD, LayerGradScale),
    "ibm2020_bottom_1x1_fp8": (ACTIVATION, "int4", EVEN, ODD, LayerGradScale),
    "int4_forward_only": (ACTIVATION, "int4", "float", "float", None),
    "one_phase": (ACTIVATION, "int4", EVEN, EVEN, LayerGradScale),
    "loss_scale": (ACTIVATION, "int4", EVEN, ODD, LossScale),
    "exact_scale": (ACTIVATION, "int4", EVEN, ODD, ExactGradScale),
    "radix2_130": (ACTIVATION, "int4", "fp4_e3m0", "fp8_e5m2", LossScale),
    "radix2_121": (ACTIVATION, "int4", "fp4_e2m1", "fp8_e5m2", LossScale),
}
IBM_FAMILY = [name for name in SLOTS if name not in ("fp32", "bf16", "article")]


def shown(slot: Any) -> str:
    if slot is None:
        return "float"
    spec = slot.spec if isinstance(slot, Requantize) else slot
    return "reuse" if spec is REUSE else "|".join(fmt.name for fmt in spec.formats)


# The recipes that followed, by their sources: fprop input and weight, dgrad's two operands, wgrad's two.
FOLLOWERS: dict[str, tuple[str, str, str, str, str, str]] = {
    "luq": ("int4", "int4", "fp4_e3m0", "reuse", "fp4_e3m0", "reuse"),
    "luq_smp2": ("int4", "int4", "fp4_e3m0", "reuse", "fp4_e3m0", "reuse"),
    "int4_hq_lss": ("int4", "int4", "int4", "reuse", "int4", "reuse"),
    "mxfp4": ("fp4_e2m1",) * 6,
    "mxfp4_backward_only": ("float", "float", "fp4_e2m1", "fp4_e2m1", "fp4_e2m1", "fp4_e2m1"),
    "nvfp4": ("fp4_e2m1", "fp4_e2m1", "fp4_e2m1", "reuse", "fp4_e2m1", "fp4_e2m1"),
    "quartet": ("fp4_e2m1",) * 6,
    "quartet2": ("fp4_e2m1",) * 6,
    "fp8": ("fp8_e4m3", "fp8_e4m3", "fp8_e5m2", "reuse", "fp8_e5m2", "reuse"),
    "int8": ("int8", "int8", "int8", "reuse", "int8", "reuse"),
}


def test_the_table_holds_the_known_recipes_and_no_other():
    """The table holds the paper's family and those that followed, each under its own name."""
    assert set(RECIPES) == {*SLOTS, *FOLLOWERS}
    assert all(recipe.name == name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", SLOTS)
def test_slots_of_every_recipe(name):
    """Each recipe's six slots hold the formats that its source gives."""
    x, w, dgrad, wgrad, grad_scale = SLOTS[name]
    recipe = RECIPES[name]
    found = {slot: shown(spec) for slot, spec in recipe.slots.items()}
    assert found == {
        "fprop.input": x,
        "fprop.weight": w,
        "dgrad.grad_output": dgrad,
        "dgrad.weight": "reuse",
        "wgrad.grad_output": wgrad,
        "wgrad.input": "reuse",
    }
    assert type(recipe.grad_scale) is (grad_scale or type(None))
    assert recipe.accumulate == "exact"
    assert recipe.dtype is (torch.bfloat16 if name == "bf16" else None)


@pytest.mark.parametrize("name", FOLLOWERS)
def test_slots_of_every_follower(name):
    """The six slots of each later recipe hold the formats that its source gives."""
    assert tuple(shown(slot) for slot in RECIPES[name].slots.values()) == FOLLOWERS[name]


@pytest.mark.parametrize(
    ("name", "random"), [("ibm2020", False), ("luq", True), ("quartet", True), ("nvfp4", True), ("fp8", False)]
)
def test_a_recipe_says_whether_it_draws(name, random):
    """`random` is true where rounding or the signs of a rotation are drawn, which is where a seed acts."""
    assert RECIPES[name].random is random


def test_a_gain_is_shown_and_belongs_to_the_conventions_only_where_there_is_one():
    """Checkpoints from before there was `gain` are read on: without one the text is what it was."""
    assert "gain" not in RECIPES["ibm2020"].conventions
    assert "gain=1.155" in RECIPES["ibm2020_gain"].conventions
    assert [line.split() for line in str(RECIPES["ibm2020_gain"]).splitlines() if ".gain" in line] == [
        ["dgrad.gain", "1.15525"],
        ["wgrad.gain", "1.15525"],
    ]


def test_whole_numbers_are_gains_of_the_same_text():
    """Equal slots have equal texts, which checkpoints are held against."""
    assert repr(Dgrad(grad_output=Radix4(), gain=2)) == repr(Dgrad(grad_output=Radix4(), gain=2.0))


@pytest.mark.parametrize("phase", [Phase.EVEN, Phase.ODD])
def test_the_recipes_gain_undoes_the_mean_shrinkage_of_radix_4(phase):
    """On numbers that are uniform on a logarithmic axis over whole periods, the mean of q / x times the gain is one."""
    x = 4.0 ** (torch.arange(200_000, dtype=torch.float64) / 100_000 - 1)
    mean = (quantize(x, Radix4(phase=phase)).dequantize(torch.float64) / x).mean().item()
    assert round(mean * RECIPES["ibm2020_gain"].dgrad.gain, 4) == 1.0


def test_conventions_name_every_field():
    """Two recipes that differ in one field of one spec have other conventions; the name is none of them."""
    base = RECIPES["mxfp4"]
    other = dataclasses.replace(base, fprop=Fprop(input=MXFP4(scale_rule="even"), weight=MXFP4()))
    assert "scale_rule='floor'" in base.conventions
    assert other.conventions != base.conventions
    assert dataclasses.replace(base, name="mine", description="Mine.").conventions == base.conventions


@pytest.mark.parametrize("name", RECIPES)
def test_text_of_a_recipe_names_its_slots(name):
    """str() names the recipe and its source, and all six slots where something is quantized."""
    recipe = RECIPES[name]
    text = str(recipe)
    assert text.startswith(f"{name}: {recipe.description}")
    assert recipe.description
    assert recipe.source in text
    assert all(slot in text for slot in recipe.slots) is not recipe.in_floating_point
    assert all(str(rule) in text for rule in recipe.rules)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_frozen_and_hashable_values(name):
    """A recipe cannot be mutated, is equal to its copy, hashes alike, and survives pickling."""
    recipe = RECIPES[name]
    copy = dataclasses.replace(recipe)
    assert copy == recipe
    assert hash(copy) == hash(recipe)
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.accumulate = "fp32"


@pytest.mark.parametrize("kind", [Recipe, Rule, Fprop, Dgrad, Wgrad, LayerInfo, LayerGradScale, Sawb, Pact, MinMax])
def test_parts_take_keywords_only(kind):
    """No field can be given by position, so none can be mistaken for another."""
    with pytest.raises(TypeError, match="positional"):
        kind("x")


def test_replace_makes_a_variant():
    """dataclasses.replace changes one field, is checked at birth, and leaves the original."""
    variant = dataclasses.replace(RECIPES["ibm2020"], name="mine", fprop=Fprop(input=Pact(clip=6.0), weight=MinMax()))
    assert shown(variant.slots["fprop.weight"]) == "int4"
    assert variant.slots["fprop.weight"] == MinMax()
    assert RECIPES["ibm2020"].fprop.weight == Sawb()
    with pytest.raises(SpecError, match="leave grad_scale out"):
        dataclasses.replace(variant, dgrad=Dgrad(), wgrad=Wgrad())


GRADIENTS: dict[str, Any] = {
    "dgrad": Dgrad(grad_output=Radix4()),
    "wgrad": Wgrad(grad_output=Radix4(phase=Phase.ODD)),
    "grad_scale": ExactGradScale(),
}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"fprop": Fprop(input="int4")}, r"fprop\.input='int4' was given; a Spec or None"),
        ({"fprop": Fprop(weight=REUSE)}, r"fprop\.weight=.* was given; a Spec or None"),
        ({"dgrad": Dgrad(grad_output=Sawb())}, r"dgrad\.grad_output=.*; a spec for gradients such as Radix4"),
        ({"wgrad": Wgrad(grad_output=REUSE)}, r"wgrad\.grad_output=.*; a spec for gradients such as Radix4"),
        ({"wgrad": Wgrad(grad_output=MXFP4(scale_rule="quest"))}, r"wgrad\.grad_output=.*; a spec for gradients"),
        ({"fprop": Fprop(weight=Radix4(rounding="stochastic"))}, "random rounding is for the slots of dgrad and wgrad"),
        ({"fprop": Fprop(input=NVFP4(rounding="ms_eden"))}, "random rounding is for the slots of dgrad and wgrad"),
        ({"fprop": Fprop(input=BitSplit())}, "two tensors of one, which only a grad_output slot can take"),
        ({"dgrad": Dgrad(weight=BitSplit())}, "two tensors of one, which only a grad_output slot can take"),
        ({"dgrad": Dgrad(weight=4)}, r"dgrad\.weight=4 was given; a Spec, REUSE, Requantize or None"),
        ({"wgrad": Wgrad(input=False)}, r"wgrad\.input=False was given; a Spec, REUSE, Requantize or None"),
        ({"wgrad": Wgrad(input=Requantize(spec="int4"))}, "Requantize takes a Spec"),
        ({"wgrad": Wgrad(input=Requantize(spec=MinMax()))}, "it needs codes of fprop, whose slot is None"),
        ({"wgrad": Wgrad(input=Requantize(spec=Lsq())), "fprop": Fprop(input=MinMax())}, "a learned clip or step"),
        (
            {"fprop": Fprop(input=NVFP4()), "wgrad": Wgrad(grad_output=Luq())},
            "the blocks of NVFP4.* run along fprop's reduction",
        ),
        (
            {"fprop": Fprop(weight=MXFP4()), "dgrad": Dgrad(grad_output=Luq())},
            "the blocks of MXFP4.* run along fprop's",
        ),
        ({"wgrad": Wgrad(samples=3, grad_output=Luq())}, r"wgrad\.samples=3 was given; 1, 2, 4 or 8 is possible"),
        (
            {**GRADIENTS, "dgrad": Dgrad(grad_output=Radix4(), gain=0.0)},
            r"dgrad\.gain=0\.0 was given; a number from 0\.25",
        ),
        ({**GRADIENTS, "wgrad": Wgrad(grad_output=Radix4(), gain=True)}, r"wgrad\.gain=True was given; a number from"),
        ({"dgrad": Dgrad(gain=2.0)}, r"dgrad\.gain=2\.0 was given; it cannot act, because dgrad\.grad_output is not"),
        ({**GRADIENTS, "dgrad": Dgrad(grad_output=Radix4(), samples=2)}, r"dgrad\.samples=2 .* not rounded at random"),
        ({"wgrad": Wgrad(samples=2)}, "not rounded at random"),
        ({"dgrad": Dgrad(transform=Hadamard(), weight=None)}, "cancels between two operands in floating point"),
        ({"dgrad": Dgrad(transform="hadamard")}, "a Hadamard or None is possible"),
        ({"dgrad": Dgrad(grad_output=Luq(), transform=Hadamard())}, "codes cannot be rotated: give dgrad a spec"),
        (
            {**GRADIENTS, "wgrad": Wgrad(grad_output=Radix4(), input=MinMax(), transform=Hadamard())},
            "use a spec with its own scale",
        ),
        (
            {"fprop": Fprop(input=Sawb(), weight=Sawb(), transform=Hadamard()), "dgrad": Dgrad(weight=MinMax())},
            "backward slots hold REUSE or Requantize then",
        ),
        (
            {"fprop": Fprop(input=Sawb(), weight=Sawb(), transform=Hadamard(signs="random"))},
            "evaluation must not depend on a draw",
        ),
        (
            {"fprop": Fprop(input=Sawb(), weight=Sawb()), "dgrad": Dgrad(grad_output=Luq()), "grad_scale": LossScale()},
            "leave grad_scale out",
        ),
        (
            {
                "fprop": Fprop(input=Sawb(), weight=NVFP4(square=True)),
                "accumulate": "fp16_chunk64",
            },
            "has a scale for each block, and its codes are not summed as integers",
        ),
        ({"dgrad": GRADIENTS["dgrad"]}, r"give grad_scale=LayerGradScale\(\)"),
        ({"wgrad": GRADIENTS["wgrad"]}, r"give grad_scale=LayerGradScale\(\)"),
        ({"grad_scale": LayerGradScale()}, "leave grad_scale out"),
        ({"fprop": Fprop(weight=Sawb()), "dtype": torch.bfloat16}, "whose six slots are all None"),
        ({"accumulate": "fp64"}, "exact, fp32 and fp16_chunk64 are possible"),
        ({"accumulate": "fp32"}, "it cannot act: no GEMM has two quantized operands"),
        (
            {"fprop": Fprop(input=Pact(clip=6.0)), "accumulate": "fp32"},
            "it cannot act: no GEMM has two quantized operands",
        ),
        ({"dtype": "bfloat16"}, r"dtype='bfloat16' was given; torch\.bfloat16"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8 was given; torch\.bfloat16"),
        ({"rules": [Rule(recipe="fp32")]}, "a tuple of Rule is possible"),
        ({"dgrad": GRADIENTS["dgrad"], "grad_scale": "exact"}, r"give grad_scale=LayerGradScale\(\)"),
        ({"wgrad": Wgrad(input=Pact(clip=1.0))}, "a learned clip or step gets no gradient in a backward slot"),
        (
            {**GRADIENTS, "fprop": Fprop(input=MinMax(), weight=Sawb()), "accumulate": "fp32"},
            r"fprop\.input has a zero point",
        ),
        (
            {**GRADIENTS, "fprop": Fprop(input=Pact(), weight=Sawb(levels=16)), "accumulate": "fp16_chunk64"},
            r"fprop\.weight has a zero point",
        ),
    ],
)
def test_refuses_what_cannot_act(fields, text):
    """Each field is checked at birth; the text names the recipe, the field, and what is possible."""
    with pytest.raises(SpecError, match=text) as raised:
        Recipe(name="mine", **fields)
    assert "Recipe 'mine'" in str(raised.value)


@pytest.mark.parametrize(
    ("asked", "nearest"), [("ibm2002", "ibm2020"), ("articel", "article"), ("FP32", None), ("radix2_12", "radix2_121")]
)
def test_unknown_recipe_suggests_the_nearest(asked, nearest):
    """A wrong name is answered with the nearest right one, if any is near, and with the whole list."""
    with pytest.raises(UnknownNameError) as raised:
        get(asked)
    text = str(raised.value)
    assert text.startswith(f"There is no recipe named {asked!r}.")
    assert (f"Did you mean {nearest!r}?" in text) is (nearest is not None)
    assert all(name in text for name in SLOTS)


def test_get_returns_a_recipe_as_it_is():
    """A `Recipe` needs no name in the table."""
    recipe = Recipe(name="mine", fprop=Fprop(weight=Sawb()))
    assert get(recipe) is recipe
    assert get("ibm2020") is RECIPES["ibm2020"]


class Bottleneck(nn.Module):
    """ResNet's bottleneck: reduce, 3x3, expand, and a widening shortcut."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * channels, 1)
        self.downsample = nn.Conv2d(channels, 2 * channels, 1)


class Network(nn.Module):
    """A stem, a bottleneck, a depthwise convolution and its linear projection, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = Bottleneck(8, 4)
        self.dw = nn.Conv2d(16, 16, 3, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 10)


def chosen(model: nn.Module) -> dict[str, str]:
    return {layer.fqn: layer.recipe for layer in summary(model).layers}


FP8 = "ibm2020_fp8_gradients"
LAYERS = ["stem", "block.conv1", "block.conv2", "block.conv3", "block.downsample", "dw", "project", "fc"]


@pytest.mark.parametrize("name", IBM_FAMILY)
def test_paper_s_rules_keep_first_last_and_depthwise_in_high_precision(name):
    """Every recipe of the paper's family leaves stem, classifier and depthwise convolution alone (section 5)."""
    found = chosen(convert(Network(), name))
    assert {fqn for fqn, recipe in found.items() if recipe == "fp32"} == {"stem", "dw", "fc"}


@pytest.mark.parametrize(
    ("name", "fp8"),
    [
        ("ibm2020", set()),
        ("ibm2020_1x1_fp8", {"block.conv1", "block.conv3", "block.downsample", "project"}),
        # The reducing 1x1 (conv1), and MobileNet's projection, which narrows too.
        ("ibm2020_bottom_1x1_fp8", {"block.conv1", "project"}),
    ],
)
def test_which_pointwise_convolutions_get_fp8_gradients(name, fp8):
    """The hybrids put 1x1 convolutions, all or the reducing ones, under INT4 forward and FP8 gradients."""
    model = convert(Network(), name)
    found = chosen(model)
    assert {fqn for fqn, recipe in found.items() if recipe == FP8} == fp8
    assert found["block.conv2"] == name
    for fqn in fp8:
        formats = model.get_submodule(fqn).plan.formats
        assert formats["fprop.weight"] == "int4"
        assert formats["dgrad.grad_output"] == formats["wgrad.grad_output"] == "fp8_e5m2"


@pytest.mark.parametrize("name", ["article", "bf16"])
def test_recipes_without_rules_take_every_layer(name):
    """The article's account and the bf16 baseline make no exceptions."""
    assert chosen(convert(Network(), name)) == dict.fromkeys(LAYERS, name)


def info(module: nn.Module, index: int = 1, count: int = 9) -> LayerInfo:
    return LayerInfo(fqn="layer", module=module, index=index, count=count)


@pytest.mark.parametrize(
    ("index", "count", "expected"),
    [
        (0, 3, True),
        (1, 3, False),
        (2, 3, True),
        (7, 9, False),
        (8, 9, True),
        (0, 2, False),
        (1, 2, False),
        (0, 1, False),
    ],
)
def test_first_or_last(index, count, expected):
    """The first and the last of three layers or more; with fewer there is nothing between them to convert."""
    assert first_or_last(info(nn.Linear(2, 2), index, count)) is expected


@pytest.mark.parametrize(
    ("module", "is_depthwise", "is_pointwise", "is_bottom"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), True, False, False),
        (nn.Conv2d(8, 16, 3, groups=8), True, False, False),
        (nn.Conv1d(4, 4, 5, groups=4), True, False, False),
        (nn.Conv2d(8, 8, 3, groups=4), False, False, False),
        (nn.Conv2d(1, 1, 3), False, False, False),
        (nn.Conv2d(1, 8, 1), False, True, False),
        (nn.Conv2d(256, 64, 1), False, True, True),
        (nn.Conv2d(64, 64, 1), False, True, True),
        (nn.Conv2d(64, 256, 1), False, True, False),
        (nn.Conv2d(64, 32, (1, 3)), False, False, False),
        (nn.Conv1d(8, 4, 1), False, True, True),
        (nn.Conv3d(4, 8, 1), False, True, False),
        (nn.Linear(8, 4), False, False, False),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_layer_predicates(module, is_depthwise, is_pointwise, is_bottom):
    """Depthwise: one input channel a group; pointwise: kernel 1 in every dimension; bottom: one that does not widen."""
    layer = info(module)
    assert (depthwise(layer), pointwise(layer), bottom_pointwise(layer)) == (is_depthwise, is_pointwise, is_bottom)


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        (Rule(recipe="fp32"), set(LAYERS)),
        (Rule(recipe="fp32", fqn="block.*"), {"block.conv1", "block.conv2", "block.conv3", "block.downsample"}),
        (Rule(recipe="fp32", fqn="*.conv[13]"), {"block.conv1", "block.conv3"}),
        (Rule(recipe="fp32", fqn="block.conv?"), {"block.conv1", "block.conv2", "block.conv3"}),
        (Rule(recipe="fp32", fqn="conv1"), set()),
        (Rule(recipe="fp32", fqn="BLOCK.*"), set()),
        (Rule(recipe="fp32", type=nn.Linear), {"fc"}),
        (Rule(recipe="fp32", type=(nn.Linear, nn.Conv1d)), {"fc"}),
        (Rule(recipe="fp32", when=pointwise), {"block.conv1", "block.conv3", "block.downsample", "project"}),
        (Rule(recipe="fp32", fqn="block.*", type=nn.Conv2d, when=bottom_pointwise), {"block.conv1"}),
    ],
    ids=in_words,
)
def test_rule_matches_where_all_its_conditions_hold(rule, matched):
    """fqn is a case-sensitive pattern for the whole name, type one class or several, when a function; all must hold."""
    network = Network()
    layers = [
        LayerInfo(fqn=fqn, module=network.get_submodule(fqn), index=i, count=len(LAYERS))
        for i, fqn in enumerate(LAYERS)
    ]
    assert {layer.fqn for layer in layers if rule.matches(layer)} == matched


def test_first_match_wins_and_the_user_s_rules_come_first():
    """Rules are asked in order, the given ones before the recipe's own; what none takes gets the recipe itself."""
    rules = [
        Rule(recipe="bf16", fqn="block.conv1"),
        Rule(recipe="article", fqn="block.conv*"),
        Rule(recipe="int4_forward_only", fqn="stem"),
    ]
    found = chosen(convert(Network(), "ibm2020", rules=rules))
    assert found == {
        "stem": "int4_forward_only",
        "block.conv1": "bf16",
        "block.conv2": "article",
        "block.conv3": "article",
        "block.downsample": "ibm2020",
        "dw": "fp32",
        "project": "ibm2020",
        "fc": "fp32",
    }


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule(recipe="fp32"), "rule: every layer"),
        (Rule(recipe="fp32", fqn="a.*"), "rule: fqn a.*"),
        (Rule(recipe="fp32", type=(nn.Linear, nn.Conv2d), when=pointwise), "rule: type Linear or Conv2d, pointwise"),
        (Rule(recipe="fp32", fqn="a", why="because"), "because"),
    ],
)
def test_text_of_a_rule(rule, text):
    """A rule explains itself by its conditions, unless it says why."""
    assert str(rule) == text


# Every field acts. All six slots hold a spec of their own here, so that a change cannot reach another by REUSE; both
# gradient formats have the limit 64, so that it cannot reach another by the shared scale.
APART = Recipe(
    name="apart",
    fprop=Fprop(input=MinMax(), weight=Sawb()),
    dgrad=Dgrad(grad_output=Radix4(), weight=Sawb()),
    wgrad=Wgrad(grad_output=Radix4(phase=Phase.ODD), input=MinMax()),
    grad_scale=ExactGradScale(),
)
SHARED = dataclasses.replace(APART, name="shared", dgrad=Dgrad(grad_output=Radix4()), wgrad=GRADIENTS["wgrad"])


def results(recipe: Recipe, make: str) -> dict[str, Tensor]:
    """The three results of one training step of a small layer that is converted under the recipe."""
    torch.manual_seed(1)
    if make == "linear":
        layer: nn.Module = nn.Linear(12, 7)
        x = torch.randn(9, 12, requires_grad=True)
    else:
        layer = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        x = torch.randn(3, 4, 6, 6, requires_grad=True)
    convert(layer, recipe)
    output = layer(x)
    output.backward(torch.randn_like(output))
    return {"output": output.detach(), "grad_input": x.grad, "grad_weight": layer.weight.grad}


def changed(before: Recipe, after: Recipe, make: str) -> set[str]:
    a, b = results(before, make), results(after, make)
    return {name for name in a if not torch.equal(a[name], b[name])}


def with_slot(recipe: Recipe, slot: str, spec: Any) -> Recipe:
    gemm, operand = slot.split(".")
    return dataclasses.replace(recipe, **{gemm: dataclasses.replace(getattr(recipe, gemm), **{operand: spec})})


on_both_layers = pytest.mark.parametrize("make", ["linear", "conv"])


@on_both_layers
@pytest.mark.parametrize(
    ("slot", "spec", "fed"),
    [
        ("fprop.input", MinMax(bits=3), {"output"}),
        ("fprop.input", None, {"output"}),
        ("fprop.weight", Sawb(levels=16), {"output"}),
        ("fprop.weight", None, {"output"}),
        ("dgrad.grad_output", Radix4(phase=Phase.ODD), {"grad_input"}),
        ("dgrad.grad_output", None, {"grad_input"}),
        ("dgrad.grad_output", Radix4(rounding="stochastic"), {"grad_input"}),
        ("dgrad.weight", MinMax(bits=3), {"grad_input"}),
        ("dgrad.weight", None, {"grad_input"}),
        ("wgrad.grad_output", Radix4(), {"grad_weight"}),
        ("wgrad.grad_output", Nearest(fmt="fp8_e5m2"), {"grad_weight"}),
        ("wgrad.grad_output", None, {"grad_weight"}),
        ("wgrad.input", None, {"grad_weight"}),
    ],
    ids=str,
)
def test_changing_a_slot_changes_what_it_feeds_and_nothing_else(make, slot, spec, fed):
    """Each of the six slots changes the result of its own GEMM and leaves the other two as they were, bit for bit."""
    assert changed(APART, with_slot(APART, slot, spec), make) == fed


@on_both_layers
@pytest.mark.parametrize(
    ("slot", "spec", "fed"),
    [
        ("fprop.input", MinMax(bits=3), {"output", "grad_weight"}),
        ("fprop.weight", MinMax(), {"output", "grad_input"}),
        ("dgrad.weight", MinMax(bits=3), {"grad_input"}),
        ("wgrad.input", MinMax(bits=3), {"grad_weight"}),
    ],
    ids=in_words,
)
def test_reused_codes_feed_two_gemms(make, slot, spec, fed):
    """Where a backward slot reuses the forward codes, a change of them reaches both results, and not the third."""
    assert changed(SHARED, with_slot(SHARED, slot, spec), make) == fed


@on_both_layers
def test_reuse_is_the_forward_codes(make):
    """REUSE gives the bits that the same spec in its own slot gives."""
    assert changed(SHARED, APART, make) == set()


@on_both_layers
def test_grad_scale_acts(make):
    """Another way to the scale changes both gradients and not the output."""
    other = dataclasses.replace(APART, grad_scale=LayerGradScale(log2_first=-3))
    assert changed(APART, other, make) == {"grad_input", "grad_weight"}


def accumulated(accumulate: str, x: Tensor, grad: Tensor) -> Tensor:
    """grad_weight of a linear layer without zero points, whose sums run over the rows of x."""
    recipe = dataclasses.replace(
        SHARED,
        fprop=Fprop(input=Pact(clip=2.0, signed=True), weight=Sawb()),
        wgrad=Wgrad(grad_output=Radix4()),
        accumulate=accumulate,
    )
    layer = nn.Linear(x.shape[1], grad.shape[1], bias=False)
    convert(layer, recipe)(x).backward(grad)
    assert layer.weight.grad is not None
    return layer.weight.grad


def test_accumulate_fp32_acts():
    """Float32 sums differ from the exact ones where these pass 2^24, and only by their rounding.

    65536 products of positive numbers up to 4096 * 7 do; each of as many additions errs by half a unit, 2^-24.
    """
    x, grad = torch.rand(65536, 12), torch.rand(65536, 7) ** 6
    exact, other = accumulated("exact", x, grad), accumulated("fp32", x, grad)
    assert not torch.equal(other, exact)
    assert torch.allclose(other, exact, rtol=65536 * 2.0**-24, atol=0)


def test_accumulate_fp16_acts():
    """Chunks added in float16 differ from the exact sums."""
    x, grad = torch.randn(8192, 12), torch.randn(8192, 7)
    assert not torch.equal(accumulated("fp16_chunk64", x, grad), accumulated("exact", x, grad))


def test_dtype_acts():
    """dtype=bfloat16 is exactly the layer computed in bfloat16."""
    torch.manual_seed(1)
    layer, x = nn.Linear(12, 7), torch.randn(9, 12)
    plain = layer(x)
    expected = nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()
    found = convert(layer, Recipe(name="mine", dtype=torch.bfloat16))(x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_rules_act():
    """A recipe's own rules give a layer another recipe, and with it other numbers."""
    recipe = dataclasses.replace(APART, rules=(Rule(recipe="fp32", fqn="1"),))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    x = torch.randn(4, 6)
    ruled = convert(model, recipe)(x)
    assert chosen(model) == {"0": "apart", "1": "fp32"}
    restore(model)
    assert not torch.equal(convert(model, APART)(x), ruled)


def test_name_and_description_act():
    """A recipe's name is what `summary` and `repr` show, its description and source what `str` does."""
    recipe = dataclasses.replace(APART, name="mine", description="An example.", source="Nowhere, 2020")
    layer = convert(nn.Linear(3, 3), recipe)
    assert summary(layer).layers[0].recipe == "mine"
    assert "recipe=mine" in repr(layer)
    assert str(recipe).splitlines()[:2] == ["mine: An example.", "source: Nowhere, 2020"]


ALIKE_WITHOUT_RULES = {"ibm2020", "ibm2020_1x1_fp8", "ibm2020_bottom_1x1_fp8", "exact_scale"}
"""Those that differ in their rules alone, and in the second step: the first gradient's scale is always its own."""


@on_both_layers
def test_every_recipe_computes_something_of_its_own(make):
    """No two recipes give the same three results in one step, but for those of which that is known."""
    found = {name: results(dataclasses.replace(recipe, rules=()), make) for name, recipe in RECIPES.items()}
    for first, second in itertools.combinations(found, 2):
        alike = all(torch.equal(found[first][k], found[second][k]) for k in found[first])
        assert alike is ({first, second} <= ALIKE_WITHOUT_RULES), (first, second)


def test_exact_scale_follows_a_gradient_that_jumps():
    """A gradient 2^10 times the one before gives 2^10 times its results, to the bit; under ibm2020 it is cut."""
    followed = {}
    for name in ("exact_scale", "ibm2020"):
        torch.manual_seed(1)
        layer = convert(nn.Linear(12, 7), dataclasses.replace(RECIPES[name], rules=()))
        x, grad = torch.randn(9, 12, requires_grad=True), torch.randn(9, 7)
        found = []
        for factor in (1.0, 1024.0):
            x.grad = layer.weight.grad = None
            layer(x).backward(factor * grad)
            found.append((x.grad / factor, layer.weight.grad / factor))
        followed[name] = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert followed == {"exact_scale": True, "ibm2020": False}


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_float16_accumulation_differs_by_rounding_only(kind):
    """Chunked float16 sums of all three GEMMs lie within 1 % of the exact ones: units and scales are counted once."""
    base = Recipe(name="mine", fprop=Fprop(input=Pact(clip=2.0, signed=True), weight=Sawb()), **GRADIENTS)
    found = []
    for accumulate in ("exact", "fp16_chunk64"):
        torch.manual_seed(1)
        layer = nn.Linear(12, 7) if kind == "linear" else nn.Conv2d(3, 5, 3, padding=1)
        x = torch.randn((256, 12) if kind == "linear" else (4, 3, 8, 8), requires_grad=True)
        y = convert(layer, dataclasses.replace(base, accumulate=accumulate))(x)
        y.backward(torch.randn(y.shape))
        found.append((y.detach(), x.grad, layer.weight.grad))
    for exact, other in zip(*found, strict=True):
        assert (exact - other).abs().max() <= 0.01 * exact.abs().max()
