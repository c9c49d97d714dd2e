"""One number's arithmetic: as Python numbers and as tensors it gives the same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte import formats
from halfbyte.kernels import Linear
from halfbyte.quantizers import (
    AbsMax,
    ExactGradScale,
    GradQuantizer,
    GradScaleSpec,
    LayerGradScale,
    LossScale,
    Lsq,
    Luq,
    MinMax,
    Nearest,
    Pact,
    Radix4,
    Sawb,
    Spec,
    Use,
    grid,
    layer_scale,
    linear,
    log,
    lsq,
    number,
    pact,
    state,
)  # fmt: skip
from halfbyte.quantizers.number import Number
from halfbyte.rng import Draw

MODULES = (grid, layer_scale, linear, log, lsq, number, pact, state)
NUMBERS = [0.0, 1.0, -1.5, 1 / 3, 64.0, 1e-45, 1e-310, 3e38, 3.5e38, 1e300, math.inf, -math.inf, math.nan]


def as_tensor(x: Any) -> Number:
    """`number.read` as it is on devices other than the CPU."""
    if not isinstance(x, Tensor):
        return x
    return (x.detach().double() if x.is_floating_point() else x).reshape(()).clone()


def same(x: Number, other: Number) -> bool:
    """Whether two numbers are equal, or both NaN."""
    one, two = (v.item() if isinstance(v, Tensor) else v for v in (x, other))
    return one == two or (one != one and two != two)


ONE = {
    "stored": number.stored,
    "rounded": number.rounded,
    "finite": number.finite,
    "absolute": number.absolute,
    "clamp": lambda x: number.clamp(x, -2.0, 5.0),
    "inverse": lambda x: number.inverse(7, x),
    "root": lambda x: number.root(number.absolute(x)),
    "mantissa": lambda x: number.frexp(x)[0] if number.finite(x) else 0.0,
    "largest_log2_scale": lambda x: grid.largest_log2_scale(x, 6.0),
    "vote": lambda x: layer_scale.vote(x, 64.0),
}


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("x", NUMBERS)
def test_functions_of_one_number(name: str, x: float) -> None:
    """Python's float and a tensor of the same number have the same result."""
    assert same(ONE[name](x), ONE[name](torch.tensor(x, dtype=torch.float64)))


@pytest.mark.parametrize("x", NUMBERS)
@pytest.mark.parametrize("other", NUMBERS)
def test_the_larger_of_two(x: float, other: float) -> None:
    """The larger of two numbers, and NaN as soon as one is."""
    wide = torch.tensor([x, other], dtype=torch.float64)
    assert same(number.larger(x, other), torch.maximum(*wide))
    assert same(number.larger(*wide), torch.maximum(*wide))
    assert same(number.magnitude(x, other), torch.maximum(*wide.abs()))


def test_powers_of_two() -> None:
    """Every exponent from -126 to 127 gives the power exactly, in float32."""
    for exponent in range(-126, 128):
        found = number.power_of_two(exponent)
        assert (found.dtype, found.item()) == (torch.float32, 2.0**exponent)
        assert torch.equal(number.power_of_two(torch.tensor(exponent)), found)


def test_put_writes_what_differs() -> None:
    """A buffer holds what was put, NaN included, and keeps its type."""
    buffer = torch.tensor(3, dtype=torch.int32)
    for value in (3, 4, torch.tensor(5)):
        number.put(buffer, value)
        assert (buffer.dtype, buffer.item()) == (torch.int32, int(value))
    wide = torch.tensor(1.0)
    number.put(wide, math.nan)
    assert wide.isnan()


def batches() -> list[Tensor]:
    """Usual, tiny, huge, constant, empty of information, and broken ones."""
    x = torch.randn(20, 40)
    some = [x, x * 1e-30, x * 3e37, torch.zeros(5), torch.full((5,), -0.7), torch.rand(300), x.bfloat16(), x.double()]
    for value in (math.nan, math.inf, -math.inf):
        broken = x.clone()
        broken[1, 2] = value
        some.append(broken)
    return some


def everything(found: Any) -> list[Any]:
    """All tensors inside a result, as lists of numbers with NaN as text."""
    if isinstance(found, Tensor):
        return [str(found.dtype), [str(v) if v != v else v for v in found.reshape(-1).tolist()]]
    if isinstance(found, (tuple, list)):
        return [everything(v) for v in found]
    return [everything(v) for v in (found.qdata, found.scale, found.zero_point)] if hasattr(found, "qdata") else [found]


def run(spec: Spec) -> list[Any]:
    """All that a quantizer makes of the batches, training and in eval, and its state in between."""
    torch.manual_seed(0)
    quantizer = spec.build()
    quantizer.seed = 1 if spec.stochastic else None
    found = []
    for training in (True, False):
        quantizer.train(training)
        for x in batches():
            found += everything(tuple(quantizer.quantize(x, observe=training, differentiable=training)))
            found += everything(list(quantizer.state_dict().values()))
    return found


SPECS: list[Spec] = [
    MinMax(), MinMax(bits=8, momentum=0.5), Sawb(), Sawb(levels=16), Sawb(ste="clipped"), AbsMax(), Luq(), Lsq(),
    AbsMax(bits=4, rounding="stochastic"), Pact(clip=1.5), Pact(), Pact(signed=True, plus=True), Pact(clip=1e-5),
    Radix4(), Nearest(fmt="fp4_e2m1"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::halfbyte.errors.NonFiniteWarning")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantizers_compute_the_same_on_any_device(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors in the place of Python numbers, as on a GPU, codes, scales, masks and state are the same."""
    wanted = run(spec)
    for module in MODULES:
        monkeypatch.setattr(module, "read", as_tensor, raising=False)
    assert run(spec) == wanted


def run_gradients(spec: GradScaleSpec, *, known: bool) -> list[Any]:
    """Both phases of the batches and the layer's scale after each vote."""
    torch.manual_seed(0)
    scale = spec.build()
    if not known:
        scale.settled = lambda: None  # type: ignore[method-assign]
    phases = {"dgrad": Radix4(), "wgrad": Radix4(phase=formats.Phase.ODD, rounding="stochastic")}
    draw = Draw(seed=1, layer=2, step=torch.tensor(3), operand=0)
    geometry = Linear(rows=20, in_features=5, out_features=40)
    uses = {gemm: Use(gemm=gemm, operand=0, geometry=geometry, draw=draw) for gemm in phases}
    quantizer = GradQuantizer(phases, scale, samples={"dgrad": 1, "wgrad": 1}, gains={"dgrad": 1, "wgrad": 1})
    found = []
    for x in batches():
        found += everything(list(quantizer.quantize(dict.fromkeys(phases, x), uses, observe=True).values()))
        scale.advance()
        found += everything([*quantizer.state_dict().values(), *scale.state_dict().values()])
    return found


@pytest.mark.filterwarnings("ignore::halfbyte.errors.NonFiniteWarning")
@pytest.mark.parametrize("spec", [LayerGradScale(), ExactGradScale(), LossScale(growth_interval=2)], ids=str)
def test_gradient_scales_compute_the_same_on_any_device(spec: GradScaleSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are encoded before their range is known get the codes that they get after it, on any device."""
    wanted = run_gradients(spec, known=True)
    for module in (*MODULES, __import__("halfbyte.quantizers.gradient", fromlist=["gradient"])):
        monkeypatch.setattr(module, "read", as_tensor, raising=False)
    assert run_gradients(spec, known=False) == wanted
