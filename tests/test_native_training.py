"""A converted model on the native backend takes the steps that it takes on the reference backend, to the bit."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfbyte as hb
from halfbyte import kernels
from halfbyte.errors import UnsupportedError
from halfbyte.kernels import native
from native_library import isa  # noqa: F401 - a fixture

RECIPES = [
    "ibm2020", "article", "ibm2020_dw_fp8", "luq", "int8", "int4_hq_lss",
    "mxfp4", "nvfp4", "quartet", "quartet2", "fp8",
]  # fmt: skip


def network(recipe: str, backend: str) -> nn.Sequential:
    """Convolutions with stride and groups, a transposed one, linear layers; every one under the recipe."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 100, 40),
        nn.ReLU(),
        nn.Linear(40, 5),
    )
    seed = 1 if hb.RECIPES[recipe].random else None
    return hb.convert(model, recipe, [hb.Rule(recipe=recipe)], backend=backend, seed=seed)


def trained(recipe: str, backend: str) -> dict[str, torch.Tensor]:
    """The state after four steps on 35 images: blocks along them are whole ones and a short one."""
    model = network(recipe, backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.rand(35, 3, 10, 10, generator=generator)
        y = torch.randint(5, (35,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


@cache
def trained_by_reference(recipe: str) -> dict[str, torch.Tensor]:
    """`trained`, once for all instruction sets."""
    return trained(recipe, "reference")


@pytest.mark.filterwarnings("ignore:Pact:UserWarning")
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_ends_in_the_same_bits(recipe: str) -> None:
    """Four steps end in the same weights, clips, scales and statistics on either backend."""
    wanted, found = trained_by_reference(recipe), trained(recipe, "native")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_auto_is_native_where_the_library_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="auto" is settled at conversion: native with a library, reference without, and the layers say which."""
    for there, chosen in ((True, "native"), (False, "reference")):
        monkeypatch.setattr(native, "available", lambda there=there: there)
        monkeypatch.setattr(native, "require", lambda: None)
        assert kernels.resolve("auto") == chosen
        assert f"backend={chosen}" in repr(network("luq", "auto"))


def test_an_absent_library_is_an_error_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="native" without a library raises at conversion, and names the way to get one."""

    def absent() -> None:
        raise UnsupportedError("The native backend is absent. backend='reference' needs no library.")

    monkeypatch.setattr(native, "require", absent)
    with pytest.raises(UnsupportedError, match="backend='reference' needs no library"):
        network("luq", "native")
