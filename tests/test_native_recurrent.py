"""Recurrent layers on the native backend: the reference's bits, from panels that live no longer than a pass."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import halfbyte as hb
from halfbyte.kernels import native
from halfbyte.qtensor import QTensor
from native_library import isa, needs_library  # noqa: F401 - a fixture

pytestmark = needs_library
KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


def trained(kind: str, recipe: str, backend: str) -> dict[str, torch.Tensor]:
    """The state of a bidirectional layer, and its last gradients and outputs, after three steps over packed input."""
    torch.manual_seed(0)
    base = KINDS[kind](9, 70, bidirectional=True)
    model = hb.convert(base, recipe, [hb.Rule(recipe=recipe)], backend=backend, seed=1 if recipe == "luq" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = {}
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(6, 5, 9, requires_grad=True)
        y = model(pack_padded_sequence(x, torch.tensor([6, 6, 4, 2, 1])))[0].data
        (y * torch.randn_like(y)).sum().backward()
        optimizer.step()
        found = {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    return {**found, **{f"state.{n}": t for n, t in model.state_dict().items()}}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("kind", "recipe"), [("LSTM", "ibm2020"), ("GRU", "ibm2020"), ("RNN", "luq"), ("LSTM", "int8")]
)
def test_a_recurrent_layer_takes_the_same_steps(kind: str, recipe: str) -> None:
    """Outputs, gradients and state after three steps are the same bits on either backend."""
    wanted, found = trained(kind, recipe, "reference"), trained(kind, recipe, "native")
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_panels_are_shared_by_all_steps_and_gone_after_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass prepares the recurrent weight once, and frees it at its end although the graph stays alive."""
    prepare, made = native.prepare, []

    def watched(b: QTensor) -> QTensor:
        found = prepare(b)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(native, "prepare", watched)
    model = hb.convert(nn.LSTM(8, 16), "ibm2020", [hb.Rule(recipe="ibm2020")], backend="native")
    y, _ = model(torch.randn(7, 3, 8))
    gc.collect()
    assert [ref() for ref in made] == [None]
    for passes in (2, 3):
        y.sum().backward(retain_graph=True)
        gc.collect()
        assert [ref() for ref in made] == [None] * passes
