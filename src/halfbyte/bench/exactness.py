"""Is the native backend right on this machine? A sample of every kernel, and whole steps, against the reference.

All comparisons are of bits. The tests of the project try thousands of shapes; this is what a benchmark asks before it
may say anything about speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import convert
from ..formats import fp4_e3m0, fp4_e3m0_r4, fp4_e3m0_r4_odd, int4, uint4
from ..kernels import Batched, Conv, Gemm, Geometry, Linear, native, reference
from ..ops import Plan
from ..qtensor import QTensor
from ..quantizers import Parts, Use
from ..recipes import Rule, get

__all__ = ["difference", "gradient_quantizer", "operand_shapes"]

_SEED = 2020
_N = 70_001
"""Elements of a tensor for the encoders: several pieces, and a tail."""


def difference() -> str | None:
    """The first thing in which the native backend differs from the reference, in words; None if nothing does."""
    for check in (_statistics, _encoders, _quantizers, _products, _layers):
        for what, found, wanted in check(torch.Generator().manual_seed(_SEED)):
            if not _same(found, wanted):
                return what
    return None


def _same(a: Any, b: Any) -> bool:
    """Whether two results, or tuples of results, are the same bits."""
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, QTensor):
        return isinstance(b, QTensor) and a.format == b.format and _same((a.qdata, a.scale), (b.qdata, b.scale))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a is None and b is None


_PHASES = (fp4_e3m0_r4, fp4_e3m0_r4_odd)

Check = Iterator[tuple[str, Any, Any]]
"""What was computed, the native backend's result, and the reference's."""


def _both(function: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """What a function of that name returns in the native backend and in the reference."""
    mine, theirs = getattr(native, function), getattr(reference, function)
    return mine(*arguments, **options), theirs(*arguments, **options)


def _statistics(generator: torch.Generator) -> Check:
    x = torch.randn(_N, generator=generator)
    for name in ("value_range", "moments", "stable_sum"):
        yield name, *_both(name, x)


def _encoders(generator: torch.Generator) -> Check:
    x = torch.randn(_N, generator=generator) * 30
    noise = torch.randint(0, 1 << 24, (_N,), generator=generator) * 2.0**-24
    inv_scale, low, high = torch.tensor(0.25), torch.tensor(-28.0), torch.tensor(28.0)
    bits = reference.clip_bits(x, low, high)
    for kind in (torch.float32, torch.bfloat16):
        y = x.to(kind)
        for fmt in (int4, uint4, fp4_e3m0, fp4_e3m0_r4, fp4_e3m0_r4_odd):
            yield f"encode to {fmt.name} from {kind}", *_both("encode", y, fmt, inv_scale=inv_scale)
        for fmt in (int4, fp4_e3m0, fp4_e3m0_r4):
            what = f"encode_stochastic to {fmt.name} from {kind}"
            yield what, *_both("encode_stochastic", y, fmt, inv_scale=inv_scale, noise=noise)
        yield f"both phases from {kind}", *_both("encode_each", y, _PHASES, inv_scale=inv_scale)
        yield f"clip_bits from {kind}", *_both("clip_bits", y, low, high)
    q = QTensor(reference.encode(x, int4, inv_scale=inv_scale), torch.tensor(4.0), int4, x.shape)
    found_grad, wanted_grad = (backend.clip_backward(x.clone(), q, *bits) for backend in (native, reference))
    yield "clip_backward", found_grad, wanted_grad


def _quantizers(generator: torch.Generator) -> Check:
    x = torch.randn(1, _N, generator=generator) * 3
    for recipe in ("ibm2020", "luq"):
        found, wanted = (_quantized(recipe, backend, x) for backend in ("native", "reference"))
        yield f"the quantizers of {recipe}", found, wanted


def _quantized(recipe: str, backend: str, x: Tensor) -> tuple[Any, ...]:
    """x as an input, twice, as a weight and as a gradient: these come by kernels that do several things at once."""
    plan = Plan(get(recipe), backend=backend)
    assert plan.input is not None
    assert plan.weight is not None
    inputs = tuple(plan.input.quantize(x, observe=True, differentiable=True) for _ in range(2))
    return (*inputs, plan.weight.quantize(x, observe=True), *gradient_quantizer(plan, x)().values())


def gradient_quantizer(plan: Plan, x: Tensor) -> Callable[[], dict[Gemm, Parts]]:
    """What quantizes a gradient of shape (1, n) for both GEMMs of the backward pass."""
    assert plan.grad_output is not None
    geometry = Linear(rows=1, in_features=1, out_features=x.numel())
    gemms: tuple[Gemm, Gemm] = ("dgrad", "wgrad")
    uses = {
        gemm: Use(gemm=gemm, operand=0, geometry=geometry, draw=plan.draw(plan.step, place))
        for place, gemm in enumerate(gemms)
    }
    return partial(plan.grad_output.quantize, dict.fromkeys(gemms, x), uses, observe=True)


def _products(generator: torch.Generator) -> Check:
    conv = Conv(
        input_shape=(4, 64, 16, 16),
        weight_shape=(48, 64, 3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        groups=1,
    )
    geometries: list[Geometry] = [
        Linear(rows=300, in_features=256, out_features=192),
        Batched(batch=3, rows=17, columns=9, inner=33),
        conv,
        replace(conv, input_shape=(3, 24, 9, 11), weight_shape=(10, 12, 3, 2), stride=(2, 1), groups=2),
    ]
    for geometry in geometries:
        x_shape, w_shape = operand_shapes(geometry)
        x, w = _random(x_shape, uint4, generator), _random(w_shape, int4, generator)
        flat = tuple(_random(geometry.output_shape, f, generator) for f in (fp4_e3m0_r4, fp4_e3m0_r4_odd))
        for kind, (even, odd) in {"flat": flat, "narrow": _narrow(geometry.output_shape, generator)}.items():
            for gemm, a, b in (("fprop", x, w), ("dgrad", even, w), ("wgrad", odd, x)):
                what = f"{gemm} of {geometry} with {kind} levels"
                yield f"the sums of {what}", *_both("accumulators", gemm, a, b, geometry)
                yield what, *_both("gemm", gemm, a, b, geometry)


def operand_shapes(geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of input and weight."""
    if isinstance(geometry, Linear):
        return (geometry.rows, geometry.in_features), (geometry.out_features, geometry.in_features)
    if isinstance(geometry, Batched):
        return (geometry.batch, geometry.rows, geometry.inner), (geometry.batch, geometry.columns, geometry.inner)
    assert isinstance(geometry, Conv)
    return geometry.input_shape, geometry.weight_shape


def _random(shape: tuple[int, ...], fmt: Any, generator: torch.Generator) -> QTensor:
    """Codes of which each is as frequent as the others."""
    numel = torch.Size(shape).numel()
    qdata = torch.randint(0, 256, ((numel + 1) // 2,), generator=generator, dtype=torch.uint8)
    if numel % 2:
        qdata[-1] &= 15
    return QTensor(qdata, torch.tensor(0.375), fmt, torch.Size(shape))


def _narrow(shape: tuple[int, ...], generator: torch.Generator) -> tuple[QTensor, QTensor]:
    """Both phases of a gradient most of whose codes lie within four levels, as after some training."""
    x, one = torch.randn(shape, generator=generator) * 3, torch.ones(())
    codes = reference.encode_each(x, _PHASES, inv_scale=one)
    even, odd = (QTensor(qdata, one, fmt, x.shape) for qdata, fmt in zip(codes, _PHASES, strict=True))
    return even, odd


def _layers(generator: torch.Generator) -> Check:
    layers: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
        (lambda: nn.Linear(192, 160), (260, 192)),
        (lambda: nn.Conv2d(32, 48, 3, padding=1), (4, 32, 12, 12)),
    ]
    for build, shape in layers:
        for recipe in ("ibm2020", "luq"):
            x = torch.randn(shape, generator=generator)
            found, wanted = (_steps(build, recipe, backend, x) for backend in ("native", "reference"))
            yield f"two steps of {build()} under {recipe}", found, wanted


def _steps(build: Callable[[], nn.Module], recipe: str, backend: str, x: Tensor) -> tuple[Tensor, ...]:
    """Outputs and gradients of two steps of a layer, and its parameters after them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        layer = convert(build(), recipe, [Rule(recipe=recipe)], backend=backend, seed=1 if recipe == "luq" else None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    found: list[Tensor] = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        y = layer(given)
        y.square().mean().backward()
        optimizer.step()
        assert given.grad is not None
        found += [y.detach(), given.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
        optimizer.zero_grad()
    return (*found, *(p.detach().clone() for p in layer.parameters()))
