"""Rows of other packages, where they are installed, measured next to the same step of ours.

torchao has no training step in integers for a CPU, but a forward pass: activations in INT8, scaled for each row as they
come, times INT8 weights, compiled as its documentation advises. So what is compared is the forward pass of one linear
layer without gradients.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .networks import SIDES
from .settings import Case, Row, Size, faster
from .single import LAYERS, step
from .timing import Clock, interleave, ratio

__all__ = ["cases", "found"]

_LAYER = next(layer for layer in LAYERS if layer.name == "linear-1024-4096")
_THEIRS = f"peer/torchao-int8-forward/{_LAYER.name}"
_OURS = f"peer/ours-forward/{_LAYER.name}"


def found() -> dict[str, str]:
    """The packages that have rows and are installed, with their versions."""
    names = ["torchao"] if importlib.util.find_spec("torchao") else []
    return {name: importlib.metadata.version(name) for name in names}


def cases() -> list[Case]:
    """A case for each package that is there."""
    return [Case(rows=(_THEIRS, _OURS), measure=_torchao)] if found() else []


def _torchao(names: Sequence[str], size: Size, clock: Clock) -> list[Row]:
    sides: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        for name in ("fp32", "bf16"):
            sides[name] = step(_LAYER, SIDES[name], size).forward
        if _OURS in names:
            ours = step(_LAYER, SIDES["ours"], size)
            ours.module.eval()
            sides[_OURS] = ours.forward
        if _THEIRS in names:
            sides[_THEIRS] = _compiled(size)
        times = interleave(sides, clock=clock, rounds=size.rounds)
    rows = []
    for name in names:
        vs_bf16, _ = faster(times, name, ["bf16"])
        vs_fp32 = ratio(times[name], times["fp32"])
        rows.append(Row(name=name, detail=_LAYER.detail(size), vs_fp32=vs_fp32, vs_bf16=vs_bf16))
    return rows


def _compiled(size: Size) -> Callable[[], object]:
    """The layer as torchao has it."""
    logging.disable(logging.WARNING)  # It tells of the kernels for other devices that it does not find.
    try:
        from torchao.quantization import (  # type: ignore[import-untyped]
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )
    finally:
        logging.disable(logging.NOTSET)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(_LAYER.build()).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    torch.compiler.reset()  # Code for another number of threads, perhaps.
    compiled: Any = torch.compile(model)
    x = _LAYER.input(size)
    return lambda: compiled(x)
