"""Rows of whole steps: forward and backward of single layers, and training steps of whole networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .gradients import KINDS, Kind, outside_window, record
from .networks import NETWORKS, SIDES, Runner
from .settings import Case, Row, Size, faster
from .single import LAYERS, Layer, step
from .timing import Clock, interleave, ratio

__all__ = ["layers", "networks"]

_BF16 = ("bf16", "bf16 channels-last")
_VARIANTS = {"": "ours", "autocast": "ours, bf16", "stash-int4": "ours, int4"}
"""What stands behind a plus sign in the name of a row, and the side that this means."""


def layers() -> list[Case]:
    """A case for each single layer: with every kind of gradient, and the late ones also under autocast."""
    cases = []
    for layer in LAYERS:
        kinds = [*KINDS, "late+autocast"] if layer.gradients else [""]
        rows = tuple(f"step/{layer.name}/{kind}".rstrip("/") for kind in kinds)
        cases.append(Case(rows=rows, measure=partial(_layer, layer)))
    return cases


def _layer(layer: Layer, names: Sequence[str], size: Size, clock: Clock) -> list[Row]:
    """Forward and backward. Gradients are drawn anew for each row, those of the other sides are the first row's."""
    generator = torch.Generator().manual_seed(0)
    y = step(layer, SIDES["fp32"], size).forward()
    sides: dict[str, Callable[[], object]] = {}
    outside: dict[str, float] = {}
    for name in names:
        ending = name.rpartition("/")[2]
        if layer.gradients is None:
            grad = torch.randn(y.shape, generator=generator) * 2.0**-10
        else:
            kind: Kind = next(kind for kind in KINDS if ending.startswith(kind))
            grad = record(size.recorded_steps).draw(layer.gradients, kind, y.shape, generator)
            outside[name] = outside_window(grad)
        sides[name] = step(layer, SIDES["ours, bf16" if ending.endswith("autocast") else "ours"], size, grad)
        if name == names[0]:
            theirs = ("fp32", *(_BF16 if y.dim() == 4 else _BF16[:1]))
            sides = {side: step(layer, SIDES[side], size, grad) for side in theirs} | sides
    times = interleave(sides, clock=clock, rounds=size.rounds)
    rows = []
    for name in names:
        others = {"outside_window": round(outside[name], 4)} if name in outside else {}
        rows.append(_row(name, layer.detail(size), times, others))
    return rows


def networks() -> list[Case]:
    """A case for each network: its first steps, later ones, the same with the rest in bfloat16 or with stashes."""
    endings = ("early", "late", *(f"late+{variant}" for variant in _VARIANTS if variant))
    return [
        Case(rows=tuple(f"step/{name}/{ending}" for ending in endings), measure=partial(_network, name))
        for name in NETWORKS
    ]


def _network(name: str, names: Sequence[str], size: Size, clock: Clock) -> list[Row]:
    """Forward, backward and optimizer. The other sides do not depend on how long was trained."""
    examples = size.resnet_batch if name == "resnet18" else size.gpt_batch
    theirs = ("fp32", *(_BF16 if name == "resnet18" else _BF16[:1]))
    sides: dict[str, Callable[[], object]] = {side: Runner(name, SIDES[side], examples) for side in theirs}
    for row in names:
        ending = row.rpartition("/")[2]
        kind, _, variant = ending.partition("+")
        state = _trained(name, examples, size.late_steps) if kind == "late" else None
        sides[row] = Runner(name, SIDES[_VARIANTS[variant]], examples, state=state)
    times = interleave(sides, clock=clock, rounds=size.network_rounds)
    detail = f"{examples} {NETWORKS[name].unit}"
    return [_row(row, detail, times, {}) for row in names]


@functools.cache
def _trained(name: str, examples: int, steps: int) -> dict[str, Any]:
    """The state of a network after some steps of ours on a quarter of a batch."""
    runner = Runner(name, SIDES["ours"], max(1, examples // 4))
    for _ in range(steps):
        runner()
    return runner.model.state_dict()


def _row(name: str, detail: str, times: dict[str, list[float]], others: dict[str, Any]) -> Row:
    vs_bf16, which = faster(times, name, _BF16)
    vs_fp32 = ratio(times[name], times["fp32"])
    return Row(name=name, detail=detail, vs_fp32=vs_fp32, vs_bf16=vs_bf16, others={"bf16_side": which} | others)
