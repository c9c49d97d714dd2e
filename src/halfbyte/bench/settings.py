"""How large and how long: the two sizes of the benchmark, and what a case is."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .timing import Clock, Ratio, Rounds, ratio

__all__ = ["FULL", "QUICK", "Case", "Row", "Size", "faster", "matching"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large everything is.

    Attributes:
        name: ``"quick"`` or ``"full"``.
        rounds: of the parts of a layer and of single layers.
        network_rounds: of whole networks.
        tokens: rows of a linear layer.
        images: batch of a single convolution.
        numbers: elements of a tensor that is quantized.
        resnet_batch: images in a step of ResNet-18.
        gpt_batch: sequences of 256 symbols in a step of the GPT.
        weighed: by how much more is in a batch that is weighed than in one that is timed, so that its activations
            outweigh the weights.
        recorded_steps: training steps of the networks whose gradients are recorded.
        late_steps: training steps, on a quarter of a batch, before a whole network is timed as late.
        peers: whether other packages have rows.
    """

    name: str
    rounds: Rounds
    network_rounds: Rounds
    tokens: int
    images: int
    numbers: int
    resnet_batch: int
    gpt_batch: int
    weighed: int
    recorded_steps: int
    late_steps: int
    peers: bool


FULL = Size(
    name="full",
    rounds=Rounds(budget_s=4.0, least=5, most=25),
    network_rounds=Rounds(budget_s=50.0, least=5, most=9),
    tokens=8192,
    images=128,
    numbers=1 << 24,
    resnet_batch=128,
    gpt_batch=16,
    weighed=1,
    recorded_steps=150,
    late_steps=60,
    peers=True,
)
QUICK = Size(
    name="quick",
    rounds=Rounds(budget_s=0.3, least=3, most=9),
    network_rounds=Rounds(budget_s=1.0, least=3, most=5),
    tokens=2048,
    images=16,
    numbers=1 << 21,
    resnet_batch=8,
    gpt_batch=2,
    weighed=4,
    recorded_steps=30,
    late_steps=3,
    peers=False,
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: for example ``"gemm/conv-64@32/dgrad/late"``.
        detail: its size, in words.
        vs_fp32: how many times faster than float32; None where that is not compared.
        vs_bf16: how many times faster than bfloat16.
        others: other numbers by name; a `Ratio` has a spread, like the two above.
    """

    name: str
    detail: str
    vs_fp32: Ratio | None = None
    vs_bf16: Ratio | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def to_json(self, threads: int) -> dict[str, Any]:
        """The row as JSON has it: ratios of medians, and under ``spread`` the middle half of the rounds' own."""
        compared = {"vs_fp32": self.vs_fp32, "vs_bf16": self.vs_bf16} | self.others
        spread = {
            name: [_short(found.low), _short(found.high)]
            for name, found in compared.items()
            if isinstance(found, Ratio)
        }
        plain = {name: _short(v.value) if isinstance(v, Ratio) else v for name, v in compared.items()}
        return {"name": self.name, "threads": threads, "detail": self.detail, **plain, "spread": spread}


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows that are measured together, because they are compared with the same sides.

    Attributes:
        rows: the names of the rows that it can make.
        measure: makes those that are asked for.
        threads: whether they differ by the number of threads.
    """

    rows: tuple[str, ...]
    measure: Callable[[Sequence[str], Size, Clock], list[Row]]
    threads: bool = True


def matching(cases: Sequence[Case], pattern: str) -> list[tuple[Case, tuple[str, ...]]]:
    """The cases that have rows of such names, with these names.

    Args:
        cases: all cases.
        pattern: a part of the names, in which ``*`` stands for anything and ``?`` for one character.
    """
    kept = [(case, tuple(n for n in case.rows if fnmatch.fnmatchcase(n, f"*{pattern}*"))) for case in cases]
    return [(case, names) for case, names in kept if names]


def faster(times: dict[str, list[float]], ours: str, theirs: Sequence[str]) -> tuple[Ratio | None, str | None]:
    """How many times faster ours is than the fastest of several sides, and which that was; None if there is none."""
    there = [name for name in theirs if name in times]
    if not there:
        return None, None
    return min(((ratio(times[ours], times[name]), name) for name in there), key=lambda pair: pair[0].value)
