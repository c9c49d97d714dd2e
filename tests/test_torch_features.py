"""What PyTorch offers works around a converted model: recomputation, meta devices, functional calls, ties."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import halfbyte as hb
from halfbyte.errors import ConversionError

RANDOM = [name for name, recipe in hb.RECIPES.items() if recipe.random]


def network(recipe: str | hb.Recipe, seed: int = 3) -> nn.Sequential:
    """Five layers of odd sizes, three of them converted by the recipes' own rules."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3),
        nn.ReLU(),
        nn.Conv2d(5, 7, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(7, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 49, 21),
        nn.ReLU(),
        nn.Linear(21, 4),
    )
    known = hb.recipes.get(recipe)
    return hb.convert(model, known, seed=seed if known.random else None)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.rand(13, 2, 8, 8, generator=generator), torch.randint(4, (13,), generator=generator))
        for _ in range(count)
    ]


def losses(model: nn.Module, call: nn.Module | None = None, steps: int = 3) -> list[float]:
    """Plain steps with the model's parameters, through `call` if given."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for x, y in batches(steps):
        loss = F.cross_entropy((call or model)(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


class Checkpointed(nn.Module):
    """The model with its middle recomputed in the backward pass."""

    def __init__(self, model: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.model[:2](x)
        x = checkpoint(self.model[2:8], x, use_reentrant=self.reentrant)
        return self.model[8:](x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", RANDOM)
def test_recomputation_draws_the_same_numbers(recipe: str, reentrant: bool) -> None:
    """Activation checkpointing changes no loss of a run with random rounding, in either of its forms."""
    plain, wrapped = network(recipe), network(recipe)
    assert losses(wrapped, Checkpointed(wrapped, reentrant)) == losses(plain)


@pytest.mark.parametrize("recipe", RANDOM)
def test_a_resumed_run_draws_the_same_numbers(recipe: str) -> None:
    """A run that goes on from a state_dict ends in the same weights as one that was not interrupted."""
    whole = network(recipe)
    losses(whole, steps=2)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    other = network(recipe)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert losses(other) == losses(whole)


@pytest.mark.parametrize("recipe", RANDOM)
def test_the_number_of_threads_changes_nothing(recipe: str) -> None:
    """Random rounding, rotations and block scales give the same gradients on one thread and on two."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(5)
            layer = hb.convert(nn.Sequential(nn.Linear(301, 257)), recipe, [hb.Rule(recipe=recipe)], seed=1)
            x = torch.randn(513, 301, requires_grad=True)
            y = layer(x)
            y.backward(torch.randn(y.shape))
            found.append((y.detach(), x.grad, layer[0].weight.grad))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's compiler warns of its own inspection of tensors
@pytest.mark.parametrize("recipe", ["quartet2", "int4_hq_lss"])
def test_compile_computes_what_eager_does(recipe: str) -> None:
    """A compiled model takes the steps of the eager one, to the bit, with rotations and random rounding."""
    eager, other = network(recipe), network(recipe)
    assert losses(other, torch.compile(other, backend="aot_eager", fullgraph=True)) == losses(eager)


@pytest.mark.parametrize("recipe", ["ibm2020", "nvfp4", "article"])
def test_functional_call_uses_the_weights_that_it_is_given(recipe: str) -> None:
    """torch.func.functional_call computes with other weights what a model that has them computes."""
    model = network(recipe)
    x = batches(1)[0][0]
    model(x)  # the first batch settles what is to be settled
    model.eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    given = {name: parameter.detach() for name, parameter in other.named_parameters()}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, given, (x,)), other(x))
    assert not torch.equal(model(x), other(x))


@pytest.mark.parametrize("recipe", ["ibm2020", "article", "int4_hq_lss"])
def test_a_model_made_on_the_meta_device_trains_like_any(recipe: str) -> None:
    """Converted on the meta device, given memory and weights, a model takes the steps of one made directly."""
    plain = network(recipe)
    with torch.device("meta"):
        empty = network(recipe)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    # Fresh memory holds anything: fill it, so that state which is not set shows.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        empty.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    fresh = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in empty.named_parameters():
            if ".plan" not in name:
                parameter.copy_(fresh[name])
    assert losses(empty) == losses(plain)


@pytest.mark.parametrize("recipe", ["ibm2020", "quartet"])
def test_shapes_come_out_of_meta_and_fake_tensors(recipe: str) -> None:
    """A converted model gives the right shape, and no numbers, for tensors that have none."""
    model = network(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(torch.rand(3, 2, 8, 8))).shape == (3, 4)
    assert model.to("meta")(torch.empty(3, 2, 8, 8, device="meta")).shape == (3, 4)
    assert model[2].plan.step == 0 if not model[2].plan.step.is_meta else True


def test_tied_weights_stay_tied_and_sum_their_gradients() -> None:
    """Two converted layers with one weight keep it one, and its gradient is the sum of both layers'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    hb.convert(model, "ibm2020")
    assert model[1].weight is model[0].weight
    apart = copy.deepcopy(model)
    apart[1].weight = nn.Parameter(apart[1].weight.detach().clone())
    x = torch.rand(4, 6)
    for net in (model, apart):
        net(x).sum().backward()
    assert torch.equal(model[0].weight.grad, apart[1].weight.grad + apart[0].weight.grad)


def test_a_checkpoint_names_its_conventions_and_others_are_refused() -> None:
    """A state_dict holds the recipe's conventions; a model under other ones does not load it, and both are shown."""
    base = hb.RECIPES["mxfp4"]
    even = hb.MXFP4(scale_rule="even")
    other = dataclasses.replace(base, name="mine", fprop=hb.Fprop(input=even, weight=even))
    state = network(base).state_dict()
    assert bytes(state["2.plan._extra_state"].tolist()).decode() == base.conventions
    with pytest.raises(ConversionError, match=r"under other conventions[\s\S]*floor[\s\S]*even"):
        network(other).load_state_dict(state)
    network(dataclasses.replace(base, name="renamed")).load_state_dict(state)


@pytest.mark.parametrize("recipe", RANDOM)
def test_a_second_backward_pass_draws_the_same_numbers(recipe: str) -> None:
    """The numbers belong to the forward pass: going back twice through one graph gives the same gradient twice."""
    layer = hb.convert(nn.Linear(40, 24), recipe, [hb.Rule(recipe=recipe)], seed=0)
    x = torch.rand(32, 40)
    y = layer(x)
    g = torch.randn(y.shape)
    first, second = (torch.autograd.grad(y, layer.weight, g, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("recipe", RANDOM)
def test_layers_and_steps_draw_different_numbers(recipe: str) -> None:
    """Two equal layers of one model round equal gradients differently, and one layer does so from step to step."""
    model = hb.convert(nn.ModuleList([nn.Linear(40, 24), nn.Linear(40, 24)]), recipe, [hb.Rule(recipe=recipe)], seed=0)
    model[1].load_state_dict(copy.deepcopy(model[0].state_dict()))
    x, g = torch.rand(32, 40), torch.randn(32, 24)

    def gradient(layer: nn.Module) -> Tensor:
        return torch.autograd.grad(layer(x), layer.weight, g)[0]

    first, other = gradient(model[0]), gradient(model[1])
    assert not torch.equal(first, other)
    assert not torch.equal(first, gradient(model[0]))
