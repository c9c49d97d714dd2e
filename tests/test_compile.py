"""`torch.compile(fullgraph=True)` of converted models: one graph, the bits of eager, nothing kept for too long."""

from __future__ import annotations

import copy
import io
import shutil
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import halfbyte as hb
from halfbyte import ops
from halfbyte.errors import UnsupportedError
from halfbyte.kernels import native
from halfbyte.ops import Plan, operator
from halfbyte.recipes import Dgrad, Fprop, Recipe, Wgrad

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # torch's compiler warns of its own inspection of tensors

RECIPES = ["ibm2020", "luq", "nvfp4"]
BACKENDS = ["reference", *(["native"] if native.available() else [])]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of another test is in the way, or helps."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Residual(nn.Module):
    """Two convolutions with batch norm beside a strided one of one tap."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.short = nn.Conv2d(4, 6, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.norm(self.first(x)))) + self.short(x)).mean((2, 3))


class Block(nn.Module):
    """A transformer's block with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)
        self.rest = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.rest(self.norms[1](x))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3, bias=False)), (6, 20)),
    "cnn": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 3, 2, stride=2)), (3, 2, 9)),
    "residual": (Residual, (3, 4, 6, 6)),
    "transformer": (Block, (2, 5, 8)),
}


def converted(model: nn.Module, recipe: str | Recipe, backend: str = "reference") -> nn.Module:
    """The model with every layer under the recipe, the products of attention too."""
    known = hb.recipes.get(recipe)
    rules = [hb.Rule(recipe=known)]
    if isinstance(model, Block):
        rules = [hb.Rule(recipe=known, fqn=f"attention.{name}_*") for name in ("qk", "pv")] + rules
    return hb.convert(model, known, rules, backend=backend, seed=1 if known.random else None)


def made(kind: str, recipe: str, backend: str = "reference") -> nn.Module:
    torch.manual_seed(0)
    return converted(MODELS[kind][0](), recipe, backend)


def steps(kind: str, model: nn.Module, call: Callable[[Tensor], Tensor], count: int = 2) -> list[Tensor]:
    """Outputs, gradients of the input and the state after steps of an optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for step in range(count):
        x = torch.rand(MODELS[kind][1], generator=torch.Generator().manual_seed(step)).requires_grad_()
        optimizer.zero_grad()
        y = call(x)
        y.square().sum().backward()
        optimizer.step()
        found += [y.detach(), x.grad]
    return found + [value.clone() for value in model.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def layers(recipe: str, count: int = 1) -> nn.ModuleList:
    """Linear layers of one size."""
    torch.manual_seed(0)
    return converted(nn.ModuleList([nn.Linear(8, 8) for _ in range(count)]), recipe)  # type: ignore[return-value]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", MODELS)
def test_one_graph_takes_the_steps_of_eager(kind: str, recipe: str) -> None:
    """Outputs, gradients and state are eager's to the bit; one compilation serves the models of both backends."""
    counter = CompileCounterWithBackend("aot_eager")
    for backend in BACKENDS:
        eager, other = made(kind, recipe, backend), made(kind, recipe, backend)
        wanted = steps(kind, eager, eager)
        assert equal(steps(kind, other, torch.compile(other, backend=counter, fullgraph=True)), wanted)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor imports what torch itself has deprecated
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("recipe", RECIPES)
def test_inductor_takes_the_steps_of_eager(recipe: str) -> None:
    """With nothing but layers and ReLU between them, code by inductor gives eager's bits, on both backends."""
    for backend in BACKENDS:
        eager, other = made("cnn", recipe, backend), made("cnn", recipe, backend)
        wanted = steps("cnn", eager, eager)
        assert equal(steps("cnn", other, torch.compile(other, fullgraph=True)), wanted)


def test_other_batch_sizes_are_one_more_graph() -> None:
    """The second batch size makes the graph one for all sizes."""
    counter = CompileCounterWithBackend("aot_eager")
    layer = layers("ibm2020")[0]
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for rows in (3, 5, 8, 13, 21):
        x = torch.rand(rows, 8)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 2


def test_layers_of_one_shape_share_a_graph() -> None:
    """Compiled one by one, as many layers as torch would not recompile for need one graph, copies included."""
    counter = CompileCounterWithBackend("aot_eager")
    many = layers("luq", 12)
    for layer in (*many, copy.deepcopy(many[0])):
        torch.compile(layer, backend=counter, fullgraph=True)(torch.rand(4, 8)).sum().backward()
        assert layer.plan.step == 1
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_moves_its_own_state(how: str) -> None:
    """A compiled copy of a model leaves the original's state alone."""
    layer = layers("luq")[0]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = copy.deepcopy(layer) if how == "deepcopy" else torch.load(file, weights_only=False)
    torch.compile(other, backend="aot_eager", fullgraph=True)(torch.rand(4, 8))
    assert (layer.plan.step, other.plan.step) == (0, 1)


def test_what_is_kept_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a forward pass keeps goes with the backward pass, or with the output; without gradients nothing is kept."""
    kept: weakref.WeakSet[object] = weakref.WeakSet()
    real = operator._Kept

    def watched(*args: object) -> object:
        made = real(*args)  # type: ignore[arg-type]
        kept.add(made)
        return made

    monkeypatch.setattr(operator, "_Kept", watched)
    compiled = torch.compile(layers("ibm2020")[0], backend="aot_eager", fullgraph=True)
    y = compiled(torch.rand(4, 8))
    assert len(kept) == 1
    y.sum().backward()
    assert len(kept) == 0
    y = compiled(torch.rand(4, 8))
    assert len(kept) == 1
    del y
    assert len(kept) == 0
    with torch.no_grad():
        unused = compiled(torch.rand(4, 8))
    assert len(kept) == 0
    del unused


def test_two_equal_calls_are_two() -> None:
    """A layer called twice with one input is run twice, and rounds its gradient differently each time, as in eager."""
    layer = layers("luq")[0]
    other = copy.deepcopy(layer)
    x, g = torch.rand(4, 8), torch.randn(4, 8)
    compiled = torch.compile(lambda x: other(x) + other(x), backend="aot_eager", fullgraph=True)
    (wanted,) = torch.autograd.grad(layer(x) + layer(x), layer.weight, g)
    (found,) = torch.autograd.grad(compiled(x), other.weight, g)
    assert torch.equal(found, wanted)
    assert other.plan.step == 2


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("recipe", ["ibm2020", "luq"])
def test_recomputation_changes_nothing(recipe: str, inside: bool) -> None:
    """Activation checkpointing in a compiled graph, or of one, gives the steps and the state of eager without it."""
    eager, other = made("mlp", recipe), made("mlp", recipe)
    recomputed = other if inside else torch.compile(other, backend="aot_eager", fullgraph=True)

    def call(x: Tensor) -> Tensor:
        return checkpoint(recomputed, x, use_reentrant=False)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True) if inside else call
    assert equal(steps("mlp", other, compiled), steps("mlp", eager, eager))


def test_autocast_reaches_the_graph() -> None:
    """Under autocast a compiled model returns autocast's type with eager's bits, forward and backward."""
    eager, other = made("mlp", "ibm2020"), made("mlp", "ibm2020")
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)

    def cast(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(x)

        return run

    found, wanted = steps("mlp", other, cast(compiled)), steps("mlp", eager, cast(eager))
    assert found[0].dtype == torch.bfloat16
    assert equal(found, wanted)


def test_evaluation_moves_no_state() -> None:
    """In eval, under no_grad and in inference mode a compiled model computes what eager does and counts no step."""
    model = made("mlp", "luq")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x := torch.rand(6, 20))
    before = copy.deepcopy(model.state_dict())
    model.eval()
    assert torch.equal(compiled(x), model(x))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(compiled(x), model(x))
    model.train()
    with torch.no_grad():
        compiled(x)
    assert equal(list(model.state_dict().values()), list(before.values()))


def test_loaded_state_is_seen_by_the_graph() -> None:
    """State that is loaded between two calls acts, without another compilation: the graph does not hold it."""
    eager, other = made("mlp", "ibm2020"), made("mlp", "ibm2020")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, backend=counter, fullgraph=True)
    steps("mlp", other, compiled, 1)
    steps("mlp", eager, eager, 3)
    other.load_state_dict(eager.state_dict())
    assert equal(steps("mlp", other, compiled), steps("mlp", eager, eager))
    assert counter.frame_count == 1


def test_gradients_that_are_accumulated_vote_once() -> None:
    """Without a step of the optimizer the scale stands still, also where the weight is computed inside the graph."""
    weight = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    plan = Plan(hb.RECIPES["ibm2020"])

    def call(x: Tensor) -> Tensor:
        return ops.linear(x, weight * 2.0, None, plan)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    seen = []
    for size, stepped in ((1.0, True), (0.1, False), (0.1, False), (0.1, True), (0.1, False)):
        (compiled(torch.rand(4, 8)) * size).sum().backward()
        seen.append(plan.grad_scale.log2_scale.item() - seen[0] if seen else plan.grad_scale.log2_scale.item())
        if stepped:
            weight.data.mul_(1.5)
    assert seen[1:] == [0, 0, 0, 1]  # the smaller gradients vote for a larger scale


def test_tied_weights_sum_their_gradients() -> None:
    """Two compiled layers with one weight give it the gradient that they give it in eager."""
    model = layers("ibm2020", 2)
    model[1].weight = model[0].weight
    other = copy.deepcopy(model)
    compiled = torch.compile(lambda x: other[1](other[0](x)), backend="aot_eager", fullgraph=True)
    x = torch.rand(4, 8)
    model[1](model[0](x)).sum().backward()
    compiled(x).sum().backward()
    assert torch.equal(model[0].weight.grad, other[0].weight.grad)


OPERATORS = {
    "linear": ((6, 24), (10, 24), 10, []),
    "matmul": ((2, 5, 8), (2, 7, 8), None, []),
    "conv": ((2, 4, 7, 8), (6, 2, 3, 2), 6, [2, 1, 2, 1, 0, 1, 2]),
    "conv_transpose": ((2, 6, 5, 4), (6, 2, 3, 3), 4, [2, 2, 1, 1, 0, 1, 1, 1, 0]),
}
"""Shapes of input and weight, number of biases, and the steps (`operator.lay_out`)."""


def arguments(plan: Plan, kind: str) -> tuple[object, ...]:
    x_shape, weight_shape, biases, numbers = OPERATORS[kind]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(x_shape, generator=generator).requires_grad_()
    weight = torch.randn(weight_shape, generator=generator).requires_grad_()
    bias = None if biases is None else torch.randn(biases, generator=generator).requires_grad_()
    learned = [None if q is None else q.learned for q in (plan.input, plan.weight)]
    needs = [t is not None for t in (x, weight, bias, *learned)]
    return (x, weight, bias, *learned, plan.handle, kind, numbers, True, needs, torch.float32, 0)


@pytest.mark.parametrize(
    ("kind", "recipe"), [*((kind, "ibm2020") for kind in OPERATORS), ("linear", "luq"), ("conv", "nvfp4")]
)
def test_the_operator_keeps_torchs_rules(kind: str, recipe: str) -> None:
    """The layer's operator passes torch.library.opcheck: schema, autograd, shapes without numbers, dynamic tracing."""
    plan = Plan(hb.RECIPES[recipe], seed=1)
    operator_call = torch.ops.halfbyte.layer.default
    operator_call(*arguments(plan, kind))[0].sum().backward()
    plan.eval()  # opcheck calls it several times and wants one answer
    torch.library.opcheck(operator_call, arguments(plan, kind))


def test_a_copied_token_is_refused() -> None:
    """A backward pass that gets a copy of the token, as hooks on saved tensors make one, says what to do."""
    compiled = torch.compile(layers("ibm2020")[0], backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        y = compiled(torch.rand(4, 8))
    with pytest.raises(UnsupportedError, match=r"copy of the token .* leave them out"):
        y.sum().backward()


def test_the_memory_of_the_arguments_may_be_used_again() -> None:
    """Floating operands that wgrad and dgrad read are copies: the compiler writes into memory that its graph left."""
    floating = Recipe(
        name="floating",
        fprop=Fprop(input=hb.AbsMax(), weight=hb.AbsMax()),
        dgrad=Dgrad(grad_output=hb.AbsMax(), weight=None),
        wgrad=Wgrad(grad_output=hb.AbsMax(), input=None),
    )
    plan = Plan(floating)
    found = []
    for overwrite in (False, True):
        given = arguments(plan, "linear")
        x, weight = (t for t in given[:2] if isinstance(t, Tensor))
        y, _ = torch.ops.halfbyte.layer(*given)
        if overwrite:
            x.data.fill_(7.0)
            weight.data.fill_(7.0)
        found.append(torch.autograd.grad(y.sum(), (x, weight)))
    assert equal(*map(list, found))
