"""The stash: what autograd saves is kept as codes or bits, exactly where that is free, and a training run repeats."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import halfbyte as hb
from halfbyte import stash
from halfbyte.errors import ConversionError, UnknownNameError, UnsupportedError
from halfbyte.kernels import reference
from halfbyte.rng import Draw
from halfbyte.stash.run import squeeze, unsqueeze

CPU = torch.device("cpu")


def draw(layer: int = 1, step: int = 1, seed: int = 0) -> Draw:
    """Where the stash's random numbers come from: the layer-th tensor that is packed in the step-th forward pass."""
    return Draw(seed=seed, layer=layer, step=torch.tensor(step), operand=255)


def rounded(x: Tensor, bits: int = 4, **where: int) -> Tensor:
    """What comes back of a contiguous tensor that was packed."""
    codes, steps, _ = reference.stash_encode(x.detach().reshape(-1), bits, draw(**where))
    return reference.stash_decode(codes, steps, x.numel(), bits).view(x.shape)


class Apply(nn.Module):
    """A module that calls a function; with a parameter, so that it is somewhere."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        """The function's result."""
        return self.function(*args)


def under(function: Callable[..., Any], kind: str = "int4") -> Apply:
    """The function under a stash."""
    module = Apply(function)
    stash.attach(module, kind, backend="reference", seed=0, device=CPU)
    return module


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The function's result, and the gradients of its inputs for a fixed gradient of the result."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(1)  # what dropout draws
    y = function(*(leaf * 1.0 for leaf in leaves))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether two tuples hold the same numbers, NaN included."""
    return all(torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30)) for a, b in zip(one, other, strict=True))


# ---- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_number_moves_by_less_than_a_step(bits: int) -> None:
    """What comes back lies less than a step away; a step is the block's range over the last code, at most 2 % more."""
    x = torch.randn(128 * 50 + 9)
    codes, steps, finite = reference.stash_encode(x, bits, draw())
    step = steps[:, 1].float().repeat_interleave(128)[: len(x)]
    error = (reference.stash_decode(codes, steps, len(x), bits) - x).abs()
    assert finite
    assert (error < step * (1 + 1e-5)).all()
    spread = x[:6400].view(50, 128).aminmax(dim=1)
    low = spread.min.abs() * 2.0**-7
    assert (steps[:50, 1].float() <= (spread.max - spread.min + low) / (2**bits - 1) * 1.02).all()


def test_the_mean_over_draws_is_the_number() -> None:
    """Rounding has no bias: over 1,500 draws the mean lies within 5 standard errors of each of 128 numbers."""
    x = torch.randn(128)
    found = torch.stack([rounded(x, step=step) for step in range(1500)]).double()
    error = (found.mean(0) - x).abs()
    assert (error <= 5 * found.std(0) / math.sqrt(1500) + 1e-5).all()
    assert found.std(0).max() > 0


def test_other_steps_tensors_ranks_and_seeds_draw_other_numbers() -> None:
    """No two tensors of a run share noise."""
    blocks = torch.arange(3)
    others = [
        draw(),
        draw(layer=2),
        draw(step=2),
        draw(seed=1),
        Draw(seed=0, layer=1, step=torch.tensor(1), operand=255, rank=1),
    ]
    found = [reference.stash.stash_noise(blocks, where) for where in others]
    assert all(not torch.equal(a, b) for n, a in enumerate(found) for b in found[:n])
    assert not torch.equal(found[0][0], found[0][1])


# ---- what is exact ---------------------------------------------------------------------------------------------------

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu method": lambda x: x.relu(),
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu_": lambda x: x.relu_(),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7, inplace=True),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout in place": lambda x: F.dropout(x, 0.3, inplace=True),
    "dropout of nothing": lambda x: F.dropout(x, 0.3, training=False),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "mask": lambda x: x.masked_fill(x > 0.3, 2.0),
    "a view": lambda x: torch.relu(x[:, :, 1:, ::2]),
    "channels last": lambda x: torch.relu(x.contiguous(memory_format=torch.channels_last)),
    "transposed": lambda x: F.dropout(torch.relu(x.permute(3, 1, 0, 2)), 0.5),
}


@pytest.mark.parametrize("name", EXACT)
def test_masks_and_indices_are_exact(name: str) -> None:
    """ReLU and its kin, dropout, max pooling and masks give torch's results and gradients to the bit."""
    x = torch.randn(4, 6, 16, 16)
    x[0, 0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    assert same(gradients(under(EXACT[name]), x), gradients(EXACT[name], x))


def test_masks_take_a_bit_and_indices_the_least() -> None:
    """ReLU, dropout and booleans keep one bit an element, indices below 2^15 two bytes."""
    x = torch.randn(2, 8, 64, 64, requires_grad=True)
    module = under(lambda x: F.max_pool2d(F.dropout(torch.relu(x), 0.5), 2).masked_fill(torch.ones(32, 32).bool(), 0.0))
    module(x)
    rows = {row[:2]: row[2:] for row in stash.report(module).rows}
    n = x.numel()
    assert rows["relu", "1 bit"] == (1, 4 * n, n // 8)
    assert rows["dropout", "1 bit"] == (1, 4 * n, n // 8)
    assert rows["max_pool2d", "int16"] == (1, n // 4 * 8, n // 4 * 2)
    assert stash.report(module).saved_bytes == sum(row[-1] for row in stash.report(module).rows)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.2])
def test_bytes_that_are_mostly_full_come_back(share: float) -> None:
    """Bits that are nearly all set take less room, and come back to the bit; codes are left alone."""
    for length in (4096, 4099, 40_003):
        x = torch.where(torch.rand(length) < share, torch.randint(256, (length,)), 255).to(torch.uint8)
        parts = squeeze(x)
        assert parts is not None
        assert torch.equal(unsqueeze(parts, length), x)
        assert sum(part.numel() for part in parts) <= (0.13 + 1.1 * share) * length + 100
        assert squeeze(torch.randint(256, (length,), dtype=torch.uint8)) is None


def test_broken_numbers_are_kept_as_they_are() -> None:
    """A tensor with a NaN or an infinity is not packed: gradients are those of floating point."""
    for broken in (math.nan, math.inf):
        x = torch.rand(3000) + 0.1
        x[1234] = broken
        assert same(gradients(under(torch.sqrt), x), gradients(torch.sqrt, x))


def test_losses_and_statistics_are_exact() -> None:
    """The probabilities of a loss, and the means and deviations of a norm, are not rounded."""
    x = torch.randn(2048, 16)
    assert same(gradients(under(lambda x: F.log_softmax(x, -1)), x), gradients(lambda x: F.log_softmax(x, -1), x))
    module = under(lambda x: F.layer_norm(x * 1.0, (16,)))
    module(x.requires_grad_())
    assert {row[:3] for row in stash.report(module).rows} == {("layer_norm", "int4", 1), ("layer_norm", "as it is", 2)}


# ---- what is rounded -------------------------------------------------------------------------------------------------


def test_a_gradient_is_that_of_the_rounded_tensor() -> None:
    """grad_weight of a float linear layer is the product with the decoded input, grad_input that with the weight."""
    x, grad = torch.randn(64, 40), torch.randn(64, 30)
    model = nn.Sequential(nn.Identity(), nn.Linear(40, 30))
    stash.attach(model, "int4", backend="reference", seed=0, device=CPU)
    leaf = x.clone().requires_grad_()
    (model(leaf * 1.0)).backward(grad)  # an input is kept as it is
    assert torch.equal(model[1].weight.grad, grad.t() @ x)
    model.zero_grad()
    inner = under(lambda x: F.gelu(x * 2.0))
    y = inner(leaf := x.clone().requires_grad_())
    y.backward(torch.ones_like(y))
    again = rounded(x * 2.0, layer=1, step=1).requires_grad_()
    F.gelu(again).backward(torch.ones_like(again))
    assert torch.equal(leaf.grad, again.grad * 2.0)


@pytest.mark.parametrize("layout", ["rows", "columns", "channels last", "gaps", "repeated"])
def test_strides_come_back(layout: str) -> None:
    """A saved tensor comes back with its elements in their places, in whatever order they lie in memory."""
    whole = torch.randn(8, 12, 10, 6)
    x = {
        "rows": whole,
        "columns": whole.permute(2, 0, 3, 1),
        "channels last": whole.contiguous(memory_format=torch.channels_last),
        "gaps": whole[:, ::2, 1:],
        "repeated": whole[:, :1].expand(8, 12, 10, 6),
    }[layout]
    y = under(lambda leaf: x * leaf, "int8")(torch.ones((), requires_grad=True))
    with torch.no_grad():
        saved = y.grad_fn._saved_self  # type: ignore[union-attr]
    assert saved.shape == x.shape
    assert 0 < (saved - x).abs().max() < 12 / 255


def test_one_tensor_is_packed_once() -> None:
    """A tensor that three operations save, two of them as a view, is kept once, and again after it changed."""
    module = under(lambda x: (y := x * 1.5).sin() + y.cos() + (y.view(-1) ** 3).view_as(x))
    module(torch.randn(50, 50, requires_grad=True))
    assert [row[2] for row in stash.report(module).rows if row[1] == "int4"] == [1]

    def changing(x: Tensor) -> Tensor:
        y = x * 1.5
        z = y.sin()
        y += 1.0
        return z + y.sin()

    x = torch.randn(50, 50)
    found, wanted = (
        gradients(f, x)[1] for f in (under(changing, "int8"), lambda x: (1.5 * x).sin() + (1.5 * x + 1).sin())
    )
    assert (found - wanted).abs().max() < 0.3


def test_memory_that_is_used_again_is_another_tensor() -> None:
    """Tensors that follow each other in the same memory are told apart."""

    def function(x: Tensor) -> Tensor:
        return torch.stack([(torch.full((5000,), float(n)) * x).sum() for n in range(50)]).sum()

    x = torch.ones((), requires_grad=True)
    under(function)(x).backward()
    assert x.grad == 5000 * sum(range(50))


def test_attention_keeps_eight_bits() -> None:
    """Queries, keys, values and the output of attention are kept in eight bits, what belongs to the softmax exactly."""
    module = under(lambda q, k, v: F.scaled_dot_product_attention(q * 1.0, k * 1.0, v * 1.0, is_causal=True))
    x = [torch.randn(2, 4, 320, 16) for _ in range(3)]
    found, wanted = gradients(module, *x), gradients(F.scaled_dot_product_attention, *x)
    assert [row[2] for row in stash.report(module).rows if row[1] == "int8"] == [4]
    assert {row[1] for row in stash.report(module).rows} == {"int8", "as it is"}
    causal = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *x)
    for a, b in zip(found, causal, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()
    assert not torch.allclose(found[0], wanted[0])


# ---- batch norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torch_s_but_for_the_codes(dims: int, affine: bool) -> None:
    """Results and running statistics are torch's within float32, and gradients with int8 are close."""
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    x = torch.randn(16, 6, *(8,) * dims) * 3 + 5
    plain = kind(6, affine=affine)
    if affine:
        nn.init.uniform_(plain.weight, 0.5, 2.0)
    kept = copy.deepcopy(plain)
    stash.attach(kept, "int8", backend="reference", seed=0, device=CPU)
    results = []
    for module in (plain, kept):
        leaf = x.clone().requires_grad_()
        y = module(leaf * 1.0)
        y.backward(torch.sin(x * 7))
        results.append((y, leaf.grad, *([module.bias.grad] if affine else [])))
    for wanted, found in zip(*results, strict=True):
        assert torch.allclose(wanted, found, atol=0.02, rtol=0.02)
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(plain.running_mean, kept.running_mean)
    assert torch.allclose(plain.running_var, kept.running_var)
    assert plain.num_batches_tracked == kept.num_batches_tracked


def test_batch_norm_s_gradient_is_that_of_the_decoded_input() -> None:
    """With the forward pass's statistics, the formula of the gradient holds in float64 with the decoded input."""
    x, grad = torch.randn(8, 4, 12, 12) * 2 + 1, torch.randn(8, 4, 12, 12)
    model = nn.BatchNorm2d(4)
    stash.attach(model, "int4", backend="reference", seed=0, device=CPU)
    leaf = x.clone().requires_grad_()
    model(leaf).backward(grad)
    wide, g = x.double(), grad.double()
    over = (0, 2, 3)
    mean, var = wide.mean(over, keepdim=True), wide.var(over, unbiased=False, keepdim=True)
    u = (rounded(x).double() - mean) / (var + model.eps).sqrt()
    wanted = (g - g.mean(over, keepdim=True) - u * (g * u).mean(over, keepdim=True)) / (var + model.eps).sqrt()
    assert torch.allclose(leaf.grad.double(), wanted, atol=1e-6)
    assert torch.allclose(model.weight.grad.double(), (g * u).sum(over), atol=1e-4)
    assert torch.allclose(model.bias.grad.double(), g.sum(over), atol=1e-5)


def test_batch_norm_leaves_the_rest_to_torch() -> None:
    """Evaluation, float64, one value a channel, and NaN are torch's own: results, statistics and errors."""
    for dtype, training in ((torch.float32, False), (torch.float64, True)):
        plain = nn.BatchNorm2d(3).to(dtype).train(training)
        kept = copy.deepcopy(plain)
        stash.attach(kept, "int4", backend="reference", seed=0, device=CPU)
        x = torch.randn(8, 3, 9, 9, dtype=dtype, requires_grad=True)
        assert torch.equal(plain(x), kept(x))
    kept = nn.BatchNorm1d(3)
    stash.attach(kept, "int4", backend="reference", seed=0, device=CPU)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kept(torch.randn(1, 3, requires_grad=True))
    broken = torch.randn(500, 3)
    broken[7, 1] = math.nan
    found = kept(broken.requires_grad_())
    assert found[:, 1].isnan().all()
    assert found[:, 0].isfinite().all()
    assert kept.running_mean.isnan().tolist() == [False, True, False]


def conv_norm_relu(hooked: bool) -> nn.Sequential:
    """Two stacks of convolution, norm and ReLU; a hook on the norms keeps them from being fused."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers)
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.bias)
        if hooked:
            norm.register_forward_hook(lambda *_: None)
    return hb.convert(model, "fp32", stash="int4")


def test_norm_and_relu_in_one_pass_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sequence a norm takes its ReLU along: output, every gradient and the statistics are the same bits."""
    found = []
    real = stash.functions.batch_norm
    monkeypatch.setattr(
        stash.functions, "batch_norm", lambda *args, **how: (found.append(how["with_relu"]), real(*args, **how))[1]
    )
    results = []
    for hooked in (True, False):
        model, x = conv_norm_relu(hooked), torch.randn(8, 3, 20, 20, generator=torch.Generator().manual_seed(1))
        y = model(x.requires_grad_())
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert found == [False, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Negated(nn.BatchNorm2d):
    """A norm that does more than its base class."""

    def forward(self, input: Tensor) -> Tensor:
        """The norm with the other sign."""
        return -super().forward(input)


@pytest.mark.parametrize("twice", [False, True])
def test_other_norms_are_not_fused(twice: bool) -> None:
    """A subclass may do more after the norm, and a norm that comes twice may have a ReLU once: both go to the ReLU."""
    norm = nn.BatchNorm2d(3) if twice else Negated(3)
    plain = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(3, 3, 1), *([norm] if twice else []))
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = plain(x)
    kept = hb.convert(copy.deepcopy(plain), "fp32", stash="int8")
    torch.testing.assert_close(kept(x), expected, atol=1e-5, rtol=1e-5)


def test_dropout_by_its_other_name() -> None:
    """torch.dropout names its last argument otherwise than the function of torch.nn.functional."""
    y = under(lambda x: torch.dropout(x, p=0.5, train=True))(torch.ones(4000, requires_grad=True))
    assert set(y.tolist()) == {0.0, 2.0}


def test_a_norm_called_by_itself_has_no_relu() -> None:
    """Only while its own sequence runs does a norm take the ReLU along: elsewhere its result keeps its sign."""

    class Piecewise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
            self.inner = nn.Sequential(nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.both[0](self.inner(x)), self.both(x)

    model = hb.convert(Piecewise(), "fp32", stash="int4")
    alone, rectified = model(torch.randn(4, 3, 16, 16))
    assert alone.min() < 0
    assert rectified.min() == 0


def test_channels_last_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm's result lies in memory as its input does, and its numbers do not depend on that."""
    x = torch.randn(4, 8, 6, 6)
    results = []
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        model = nn.BatchNorm2d(8)
        stash.attach(model, "int4", backend="reference", seed=0, device=CPU)
        y = model(given.requires_grad_())
        assert y.stride() == given.stride()
        results.append(y)
    assert torch.equal(*results)


# ---- around it -------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """Convolutions, norms, activations, pooling and linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16 * 36, 20),
        nn.GELU(),
        nn.Linear(20, 5),
    )


def converted(kind: Any = "int4", *, seed: int = 0, backend: str = "reference") -> nn.Sequential:
    """The network under ibm2020 and a stash."""
    return hb.convert(network(), "ibm2020", backend=backend, seed=seed, stash=kind)


def step(model: nn.Module, number: int) -> None:
    """One step of plain SGD on data that the number decides."""
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(32, 3, 12, 12, generator=generator), torch.randint(5, (32,), generator=generator)
    torch.manual_seed(number)
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.05 * p.grad)
            p.grad = None


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same state to the bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_runs_repeat_and_seeds_and_kinds_matter() -> None:
    """Equal runs end in equal bits; another seed, another kind or no stash ends in others."""

    def trained(**options: Any) -> nn.Module:
        model = converted(**options)
        for n in range(3):
            step(model, n)
        return model

    first = trained()
    assert equal(first, trained())
    for options in ({"seed": 1}, {"kind": "int8"}):
        assert not torch.equal(first[9].weight, trained(**options)[9].weight)
    plain = hb.convert(network(), "ibm2020")
    for n in range(3):
        step(plain, n)
    assert not torch.equal(first[9].weight, plain[9].weight)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle", "save"])
def test_a_run_goes_on_from_a_copy(how: str) -> None:
    """A model that was copied or saved on the way goes on to the bits of the one that was not."""
    model = converted()
    step(model, 0)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "state_dict":
        other = converted()
        other.load_state_dict(model.state_dict())
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for each in (model, other):
        step(each, 1)
        step(each, 2)
    assert equal(model, other)
    assert vars(other)["forward"].module is other


def test_restore_takes_the_stash_away() -> None:
    """A restored model runs and saves as one that was never converted, and its forward pass is its class's."""
    model = hb.restore(converted())
    assert "forward" not in vars(model)
    assert model.state_dict().keys() == network().state_dict().keys()
    x = torch.randn(32, 3, 12, 12)
    assert torch.equal(model.eval()(x), network().eval()(x))
    with pytest.raises(ConversionError, match="without a stash"):
        stash.report(model)


def test_summary_says_what_is_kept() -> None:
    """The summary names the stash and its bits below its table, and nothing where there is none."""
    assert "saved for backward: floats as int8" in str(hb.summary(converted("int8")))
    assert "saved for backward" not in str(hb.summary(hb.convert(network(), "ibm2020")))
    assert "total" in str(stash.report(converted()))


def test_an_unknown_kind_is_an_error() -> None:
    """convert refuses a stash that there is none of, and changes nothing."""
    model = network()
    with pytest.raises(UnknownNameError, match="no stash named 'int3'"):
        hb.convert(model, "ibm2020", stash="int3")  # type: ignore[arg-type]
    assert type(model[0]) is nn.Conv2d


def test_fp32_with_a_stash() -> None:
    """A recipe that leaves every layer alone can have a stash, which restore takes away."""
    model = hb.convert(network(), "fp32", stash="int8")
    step(model, 0)
    assert any(row[1] == "int8" for row in stash.report(model).rows)
    assert "forward" not in vars(hb.restore(model))


def test_without_gradients_it_does_nothing() -> None:
    """Under no_grad the forward pass is the model's own, and no random numbers are used up."""
    model = converted().eval()
    with torch.no_grad():
        model(torch.randn(32, 3, 12, 12))
    assert model.stash_step == 0
    assert stash.report(model).rows == ()


def test_outer_hooks_see_what_is_kept() -> None:
    """Hooks around the forward pass see the packed tensors, what they give back is used, and their bytes are few."""
    model, plain = converted(), network()
    x = torch.randn(32, 3, 12, 12)
    sizes = []
    grads = []
    for each in (plain, model, copy.deepcopy(model)):
        kept: dict[int, Tensor] = {}
        own = {t.untyped_storage().data_ptr() for t in (*each.parameters(), *each.buffers())}

        def pack(t: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.detach()
            return t.detach().clone()

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = each(x)
        y.sum().backward()
        grads.append(each[0].weight.grad)
        sizes.append(sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own))
    assert sizes[1] == stash.report(model).saved_bytes
    assert sizes[1] < 0.25 * sizes[0]
    assert torch.equal(grads[1], grads[2])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_activation_checkpointing(whole: bool, reentrant: bool) -> None:
    """A model that is checkpointed, or that checkpoints a part of itself, trains."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            x = self.body[:3](x)
            x = checkpoint(self.body[3:7], x, use_reentrant=reentrant)
            return self.body[7:](x)

    model = hb.convert(network() if whole else Part(), "ibm2020", stash="int4")
    x = torch.randn(32, 3, 12, 12, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=reentrant) if whole else model(x)
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_what_was_changed_since_is_an_error() -> None:
    """A parameter that changes between forward and backward raises, as without a stash."""
    weight = torch.randn(3000, requires_grad=True)
    module = Apply(lambda x: x * module.weight)
    module.weight = nn.Parameter(weight)
    stash.attach(module, "int4", backend="reference", seed=0, device=CPU)
    y = module(torch.randn(3000, requires_grad=True))
    with torch.no_grad():
        module.weight += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("function", [F.gelu, torch.relu, lambda x: F.batch_norm(x, None, None, training=True)])
def test_a_second_derivative_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    """create_graph=True raises with the cure instead of differentiating rounded numbers."""
    x = torch.randn(60, 60, requires_grad=True)
    y = under(lambda x: function(x * 1.0))(x)
    with pytest.raises(UnsupportedError, match="Leave create_graph out"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_compiled_model_says_that_it_runs_eagerly() -> None:
    """torch.compile of a model with a stash warns, and gives the same result."""
    model, other = converted(), converted()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(32, 3, 12, 12)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="runs its training forward pass eagerly"):
        found = compiled(x)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(found, other(x))


def test_native_trains_to_the_same_bits() -> None:
    """Three steps with a stash end in the same state on either backend."""
    from halfbyte.kernels import native

    if not native.available():
        pytest.skip("no native backend")
    models = [converted(backend=backend) for backend in ("reference", "native")]
    for model in models:
        for n in range(3):
            step(model, n)
    assert equal(*models)
