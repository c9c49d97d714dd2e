"""A converted model in an ordinary PyTorch loop: state moves once a step, and can be saved, copied and resumed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import halfbyte as hb

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def build(recipe: str = "ibm2020", seed: int = 0) -> nn.Sequential:
    """A small net with norms and pooling, some of it in four bits."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )
    return hb.convert(model, recipe)


def batch(seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images whose brightest quarter is their class."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 1, 6, 6, generator=generator)
    y = torch.randint(0, 4, (size,), generator=generator)
    for image, label in zip(x, y, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] += 1.0
    return x, y


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Plain steps; the losses."""
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's whole state."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The two states are equal to the bit."""
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k].nan_to_num(7e7), b[k].nan_to_num(7e7))] == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_works_with_any_optimizer(optimizer: str) -> None:
    """An easy task is learned in four bits under every kind of optimizer, and the layer scale follows."""
    model = build()
    losses = train(model, OPTIMIZERS[optimizer](model.parameters()), range(60))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    scale = model[3].plan.grad_output.grad_scale
    assert scale.started
    assert scale.observed >= 0


@pytest.mark.parametrize("recipe", [r for r in hb.RECIPES if r != "fp32"])
def test_every_recipe_learns(recipe: str) -> None:
    """Every recipe lowers the loss of an easy task."""
    model = build(recipe)
    losses = train(model, OPTIMIZERS["sgd"](model.parameters()), range(50))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_evaluation_moves_no_state() -> None:
    """eval, no_grad and inference passes leave every parameter and buffer of a trained model as it was."""
    model = build("article")
    train(model, OPTIMIZERS["sgd"](model.parameters()), range(3))
    model[1].eval(), model[4].eval()  # batch norms move theirs in training mode, which is torch's business
    before = state(model)
    x, _ = batch(99)
    with torch.no_grad():
        model(10 * x)
    assert_same(before, state(model))
    model.eval()
    model(10 * x).sum().backward()
    with torch.inference_mode():
        model(10 * x)
    after = state(model)
    assert_same(before, after)


def test_evaluation_uses_frozen_clips() -> None:
    """In eval a sample's result does not depend on what else is in its batch."""
    model = build("article")
    train(model, OPTIMIZERS["sgd"](model.parameters()), range(5))
    model.eval()
    x, _ = batch(7)
    together = model(torch.cat([x, 5 * x - 2]))[: len(x)]
    assert torch.equal(together, model(x))


def scales(model: nn.Module) -> list[int]:
    """The exponent of each layer's gradient scale."""
    return [int(m.plan.grad_output.grad_scale.log2_scale) for m in model.modules() if hasattr(m, "plan")]


def test_gradient_accumulation_votes_once_with_the_largest_gradient() -> None:
    """Two backward passes before one step give one vote, on the larger of the two magnitudes."""
    layer = hb.convert(nn.Linear(4, 4), "ibm2020")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)
    x = torch.rand(2, 4)

    def backward(size: float) -> None:
        layer(x).backward(torch.full((2, 4), size))

    backward(1.0)  # 2^6 brings 1.0 to 64: log2_scale 6
    optimizer.step()
    backward(2.0)
    backward(0.1)
    assert scales(layer) == [6]
    optimizer.step()
    layer(x)  # 2.0 was the largest: 128 > 64, so one octave down
    assert scales(layer) == [5]
    layer(x)
    assert scales(layer) == [5]


def test_a_scale_moves_one_octave_a_step() -> None:
    """After a jump of the gradient by 2^-10 the exponent climbs by one each step, without anyone calling anything."""
    layer = hb.convert(nn.Linear(4, 4), "ibm2020")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-9)
    x = torch.rand(2, 4)
    seen = []
    for size in [1.0] + [2.0**-10] * 13:
        layer(x).backward(torch.full((2, 4), size))
        optimizer.step()
        seen += scales(layer)
    assert seen == [6, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 16, 16]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizers_step_is_seen(optimizer: str) -> None:
    """A step of any optimizer, the fused ones included, lets the scale follow a smaller gradient by one octave."""
    layer = hb.convert(nn.Linear(4, 4), "ibm2020")
    instance = OPTIMIZERS[optimizer](layer.parameters())
    x = torch.rand(2, 4)
    for size in (1.0, 2.0**-10):
        layer(x).backward(torch.full((2, 4), size))
        instance.step()
        instance.zero_grad()
    layer(x)
    assert scales(layer) == [7]


def test_a_frozen_layer_leaves_a_shared_scale_to_the_others() -> None:
    """One loss scale over a trained and a frozen layer moves once per step of the optimizer, not once per pass."""
    model = hb.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "loss_scale", [hb.Rule(recipe="loss_scale")])
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.rand(2, 4)
    for _ in range(3):
        for _ in range(4):
            model(x).sum().backward()  # 2^16 times a gradient of 1 is far beyond 64: an overflow each time
        optimizer.step()
    model(x)
    assert scales(model) == [13, 13]


def test_a_frozen_weight_still_votes() -> None:
    """Where the weight is not trained every training forward counts as a step."""
    layer = hb.convert(nn.Linear(4, 4), "ibm2020")
    layer.weight.requires_grad_(False)
    x = torch.rand(2, 4, requires_grad=True)
    for size in (1.0, 4.0, 4.0):
        layer(x).backward(torch.full((2, 4), size))
    layer(x)
    assert scales(layer) == [4]


@pytest.mark.parametrize("recipe", ["ibm2020", "article", "loss_scale"])
def test_a_saved_run_resumes_to_the_same_bits(recipe: str) -> None:
    """Model and optimizer saved after five steps and loaded into fresh ones end where the uninterrupted run ends."""
    model = build(recipe)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    losses = train(model, optimizer, range(5, 12))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = build(recipe, seed=1)
    fresh.load_state_dict(saved["model"])
    again = OPTIMIZERS["sgd"](fresh.parameters())
    again.load_state_dict(saved["optimizer"])
    assert train(fresh, again, range(5, 12)) == losses
    assert_same(state(model), state(fresh))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_as_the_original(how: str) -> None:
    """A deep copy and a pickled copy of a model in training take the same next steps."""
    model = build()
    train(model, OPTIMIZERS["sgd"](model.parameters()), range(4))
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    plain = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    assert train(model, plain(model.parameters()), range(4, 8)) == train(twin, plain(twin.parameters()), range(4, 8))
    assert_same(state(model), state(twin))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    """A run with the middle of the net recomputed in the backward pass ends in the same bits as one without."""

    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Sequential) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            x = self.model[:3](x)
            x = checkpoint(self.model[3], x, use_reentrant=reentrant)
            return self.model[4:](x)

    plain, wrapped = build("article"), build("article")
    losses = train(plain, OPTIMIZERS["sgd"](plain.parameters()), range(8))
    assert train(Checkpointed(wrapped), OPTIMIZERS["sgd"](wrapped.parameters()), range(8)) == losses
    assert_same(state(plain), state(wrapped))


def test_amp_grad_scaler_sees_an_overflow() -> None:
    """An infinite gradient makes the weight's gradient NaN, so torch's GradScaler skips the step and says so."""
    model = build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    x, y = batch(0)
    before = model[8].weight.clone()
    with pytest.warns(hb.errors.NonFiniteWarning):
        scaler.scale(F.cross_entropy(model(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, model[8].weight)
    assert scaler.get_scale() == 0.5


def test_autocast_around_the_model_trains() -> None:
    """bfloat16 autocast around a converted model learns the easy task."""
    model = build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    losses = []
    for step in range(40):
        x, y = batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_change_of_type_leaves_the_state_as_it_is() -> None:
    """model.half() rounds the weights and no statistic, clip or scale."""
    model = build()
    train(model, OPTIMIZERS["sgd"](model.parameters()), range(3))
    before = {k: v for k, v in state(model).items() if ".plan." in k}
    model.half()
    assert model[3].weight.dtype == torch.float16
    assert_same(before, {k: v for k, v in state(model).items() if ".plan." in k})
    assert all(v.dtype == state(model)[k].dtype for k, v in before.items())


def test_a_parametrized_weight_still_votes() -> None:
    """A converted layer under weight norm trains, and its scale follows; restoring it asks to undo that first."""
    layer = hb.convert(nn.Linear(4, 4), "ibm2020")
    nn.utils.parametrizations.weight_norm(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x = torch.rand(2, 4)
    for size in (1.0, 4.0, 4.0):
        layer(x).backward(torch.full((2, 4), size))
        layer(x).backward(torch.full((2, 4), size / 8))  # the second of two micro-batches does not vote
        optimizer.step()
    layer(x)
    assert scales(layer) == [4]
    with pytest.raises(hb.errors.ConversionError, match="became a ParametrizedLinear"):
        hb.restore(layer)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's compiler warns of its own inspection of tensors
def test_compile_computes_what_eager_does() -> None:
    """A compiled converted model takes the steps that the eager one takes, to the bit."""
    eager, other = build("article"), build("article")
    compiled = torch.compile(other, backend="aot_eager")
    losses = train(eager, OPTIMIZERS["sgd"](eager.parameters()), range(4))
    assert train(compiled, OPTIMIZERS["sgd"](other.parameters()), range(4)) == losses
    assert_same(state(eager), state(other))
