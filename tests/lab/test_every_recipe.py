"""Every recipe trains the digits, through the same door as a user's."""

import dataclasses
import math
from types import MappingProxyType

import pytest

from halfbyte import RECIPES
from halfbyte.lab import tasks
from halfbyte.lab.compare import compare
from halfbyte.lab.data.source import Data, Examples


@pytest.mark.parametrize("model", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_all_recipes_train(model, monkeypatch):
    """On half of the digits every recipe learns and leaves its conventions in its record; none diverges."""
    digits = tasks.get("digits")
    whole = digits.load(None)
    train, test = (Examples(inputs=x.inputs[::2], targets=x.targets[::2]) for x in (whole.train, whole.test))
    half = Data(train=train, test=test)
    task = dataclasses.replace(digits, load=lambda _folder: half)
    monkeypatch.setattr(tasks, "TASKS", MappingProxyType({"digits": task}))
    result = compare("digits", list(RECIPES), [0], size="smoke", model=model)
    assert result.failures == ()
    assert [done.recipe for done in result.records] == list(RECIPES)
    for done in result.records:
        first, second = done.curves["train_loss"]
        assert second < first < math.log(10), done.recipe  # A guess among ten has a loss of log 10.
        assert done.conventions[done.recipe] == RECIPES[done.recipe].conventions


def test_no_two_recipes_are_one():
    """No two recipes say the same: a name that stands for another's numbers would be a control of nothing."""
    texts = [str(recipe).partition("\n  ")[2] for recipe in RECIPES.values() if not recipe.in_floating_point]
    assert len(set(texts)) == len(texts)
