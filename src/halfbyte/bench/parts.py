"""Rows of the parts of a layer: the three GEMMs alone, on packed codes, and the quantizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..formats import int4, uint4
from ..kernels import Conv, Gemm, Linear, native
from ..kernels.native.gemm import _product
from ..ops import Plan
from ..qtensor import QTensor
from ..recipes import get
from .exactness import gradient_quantizer, operand_shapes
from .gradients import KINDS, Kind, outside_window, phases, record
from .settings import Case, Row, Size, faster
from .single import CONVS
from .timing import Clock, interleave, ratio

__all__ = ["gemms", "quantizers"]

_FEATURES = 1024
_BF16 = ("bf16", "bf16 channels-last")
_WORDS = 3
"""The method that multiplies 16-bit words, see ``hb_matmul``."""


def gemms() -> list[Case]:
    """A case for each layer and GEMM."""
    layers: list[tuple[str, str, Callable[[Size], Linear | Conv]]] = [
        (
            f"linear-{_FEATURES}-{_FEATURES}",
            "square",
            lambda size: Linear(rows=size.tokens, in_features=_FEATURES, out_features=_FEATURES),
        )
    ]
    layers += [(f"conv-{channels}@{pixels}", "conv", partial(_conv, channels, pixels)) for channels, pixels in CONVS]
    cases = []
    for name, layer, build in layers:
        for gemm in ("fprop", "dgrad", "wgrad"):
            base = f"gemm/{name}/{gemm}"
            rows = (base,) if gemm == "fprop" else tuple(f"{base}/{kind}" for kind in KINDS)
            cases.append(Case(rows=rows, measure=partial(_gemm, gemm, layer, build)))
    return cases


def _conv(channels: int, pixels: int, size: Size) -> Conv:
    """A 3x3 convolution that keeps its shape."""
    return Conv(
        input_shape=(size.images, channels, pixels, pixels),
        weight_shape=(channels, channels, 3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        groups=1,
    )


def _gemm(
    gemm: Gemm,
    layer: str,
    build: Callable[[Size], Linear | Conv],
    names: Sequence[str],
    size: Size,
    clock: Clock,
) -> list[Row]:
    """One GEMM of a layer: float32, bfloat16 (convolutions also channels-last), and ours with each kind of gradient."""
    geometry, generator = build(size), torch.Generator().manual_seed(0)
    conv = isinstance(geometry, Conv)
    x_shape, w_shape = operand_shapes(geometry)
    x, w = torch.randn(x_shape, generator=generator), torch.randn(w_shape, generator=generator)
    g = torch.randn(geometry.output_shape, generator=generator)
    a, b = {"fprop": (x, w), "dgrad": (g, w), "wgrad": (g, x)}[gemm]
    sides: dict[str, Callable[[], object]] = {
        "fp32": partial(geometry.apply, gemm, a, b),
        "bf16": partial(geometry.apply, gemm, a.bfloat16(), b.bfloat16()),
    }
    if conv:
        last = [t.bfloat16().to(memory_format=torch.channels_last) for t in (a, b)]
        sides["bf16 channels-last"] = partial(geometry.apply, gemm, *last)
    # A convolution's input comes out of a ReLU; that of a linear layer in a Transformer has a sign.
    xq, wq = _codes(x, signed=not conv), _codes(w, signed=True)
    del x, w, g, a, b
    outside: dict[str, float] = {}
    for name in names:
        if gemm == "fprop":
            sides[name] = partial(native.gemm, gemm, xq, wq, geometry)
            continue
        kind: Kind = next(kind for kind in KINDS if name.endswith(kind))
        drawn = record(size.recorded_steps).draw(layer, kind, geometry.output_shape, generator)
        outside[name] = outside_window(drawn)
        gq, other = (phases(drawn)[0], wq) if gemm == "dgrad" else (phases(drawn)[1], xq)
        sides[name] = partial(native.gemm, gemm, gq, other, geometry)
        if kind == "flat":
            sides["int16"] = partial(_product, gemm, gq, other, geometry, scaled=True, method=_WORDS)
    times = interleave(sides, clock=clock, rounds=size.rounds)
    rows = []
    for name in names:
        vs_bf16, which = faster(times, name, _BF16)
        others: dict[str, Any] = {"bf16_side": which}
        if name in outside:
            others["outside_window"] = round(outside[name], 4)
        if name.endswith("flat"):
            others["vs_int16"] = ratio(times[name], times["int16"])
        vs_fp32 = ratio(times[name], times["fp32"])
        detail = f"{size.images} images" if conv else f"{size.tokens} rows"
        rows.append(Row(name=name, detail=detail, vs_fp32=vs_fp32, vs_bf16=vs_bf16, others=others))
    return rows


def _codes(x: Tensor, *, signed: bool) -> QTensor:
    """Codes of normal numbers of deviation 1, the middle two and a half deviations on either side."""
    scale = torch.tensor(2.5 / (7 if signed else 15))
    fmt = int4 if signed else uint4
    return QTensor(native.encode(x, fmt, inv_scale=scale.reciprocal()), scale, fmt, x.shape)


def quantizers() -> list[Case]:
    """A case for each quantizer: as a layer calls it, with its statistics, its mask, both phases."""
    makers: dict[str, Callable[[Tensor], Callable[[], object]]] = {
        "pact": _pact,
        "sawb": _sawb,
        "radix4-both-phases": partial(_gradient, "ibm2020"),
        "luq-stochastic": partial(_gradient, "luq"),
    }
    return [Case(rows=(f"quantizer/{name}",), measure=partial(_quantizer, make)) for name, make in makers.items()]


def _quantizer(
    make: Callable[[Tensor], Callable[[], object]], names: Sequence[str], size: Size, clock: Clock
) -> list[Row]:
    """A quantizer against a copy of the same tensor: the quotient of their bandwidths."""
    x = torch.randn(size.numbers, generator=torch.Generator().manual_seed(0))
    target = torch.empty_like(x)
    times = interleave({"ours": make(x), "copy": lambda: target.copy_(x)}, clock=clock, rounds=size.rounds)
    detail = f"{size.numbers >> 20} Mi numbers"
    return [Row(name=names[0], detail=detail, others={"vs_copy": ratio(times["ours"], times["copy"])})]


def _pact(x: Tensor) -> Callable[[], object]:
    """That of an activation; the first call, which chooses the clip, is over."""
    quantizer = Plan(get("ibm2020"), backend="native").input
    assert quantizer is not None
    x.relu_()
    quantizer.quantize(x, observe=True, differentiable=True)
    return partial(quantizer.quantize, x, observe=True, differentiable=True)


def _sawb(x: Tensor) -> Callable[[], object]:
    """That of a weight."""
    quantizer = Plan(get("ibm2020"), backend="native").weight
    assert quantizer is not None
    return partial(quantizer.quantize, x, observe=True)


def _gradient(recipe: str, x: Tensor) -> Callable[[], object]:
    """That of both gradient slots of a recipe."""
    return gradient_quantizer(Plan(get(recipe), backend="native"), x.view(1, -1))
