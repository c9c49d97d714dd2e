"""Probes: what quantization does to each operand of each layer, step by step, while a model trains.

    probe = halfbyte.probes.attach(model)
    ...                                     # some steps of an ordinary loop
    print(probe)                            # a table of the latest step
    probe.detach()

A probe looks and changes nothing: a run with one ends in the same bits. It costs a few passes over every operand;
``attach(model, every=100)`` looks at one step in a hundred.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn

from .errors import ConversionError, SpecError
from .kernels import Gemm, Geometry
from .ops import Plan
from .qtensor import QTensor
from .watching import Tally, Watch, gain_of, named_plans, spec_of, watch

__all__ = ["Probe", "ProbeRow", "attach"]


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """What happened to one operand of one layer in one step.

    Where a layer quantizes an operand several times in a step (a recurrent layer, a layer that is used twice), the row
    is over all of them. An operand that a backward GEMM takes over from fprop has no row of its own.

    Attributes:
        step: number of the layer's training forward pass.
        layer: the layer's fully qualified name; empty for the model itself.
        slot: the operand, for example ``"dgrad.grad_output"``.
        direction: ``"forward"`` or ``"backward"``.
        formats: name of the format of each part; one part, but for specs that split a number in two.
        histogram: for each part how often each code was used, counted from the packed bytes.
        underflow_rate: share of the numbers other than zero that became zero.
        saturation_rate: share of all numbers that lay beyond the last code on their side.
        bias: mean error in the direction of the number over the mean magnitude; below zero where numbers shrink.
        sqnr_db: signal to quantization noise, in decibels.
        cosine: cosine of the angle to the operand before quantization.
        log2_scale: by how many octaves the operand was raised: minus log2 of its scale.
        gradient_to_noise: norm over sqrt(3) times the norm of the quantization noise, for gradients, else None. Below
            1, four-bit training stops being effective (FP4 All the Way, arXiv 2505.19115).
    """

    step: int
    layer: str
    slot: str
    direction: Literal["forward", "backward"]
    formats: tuple[str, ...]
    histogram: tuple[tuple[int, ...], ...]
    underflow_rate: float
    saturation_rate: float
    bias: float
    sqnr_db: float
    cosine: float
    log2_scale: float
    gradient_to_noise: float | None


class Probe:
    """What `attach` returns. As a context manager it detaches itself at the end."""

    def __init__(self, model: nn.Module, every: int) -> None:
        self._recorder = _Recorder(model, every)
        self._watch: Watch = watch(model, self._recorder)

    def detach(self) -> None:
        """Stops looking. What was seen stays; other probes go on."""
        self._watch.remove()

    @property
    def rows(self) -> list[ProbeRow]:
        """Everything seen so far: step by step, in the order in which it happened."""
        order = sorted(self._recorder.tallies.items(), key=lambda item: item[0][0])
        return [_row(step, layer, slot, tally) for (step, layer, slot), tally in order]

    @property
    def seconds(self) -> float:
        """How long looking has taken so far, by the clock of the process that trains."""
        return self._recorder.seconds

    def to_json(self) -> str:
        """All rows as a JSON list of objects; what is NaN or infinite is a string: "nan", "inf", "-inf"."""
        return json.dumps([_plain(asdict(row)) for row in self.rows], allow_nan=False)

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __str__(self) -> str:
        rows = self.rows
        if not rows:
            return "No training step has been seen yet."
        last = max(row.step for row in rows)
        latest = [row for row in rows if row.step == last]
        header = [f"step {last} (→ forward, ← backward)", "", "format", "codes", "underflow", "saturated"]
        header += ["bias", "SQNR dB", "cosine", "log2_scale", "|g| / √3|noise|"]
        lines = [header, *([_mark(row), row.slot, *_cells(row)] for row in latest)]
        return _aligned(lines)


def attach(model: nn.Module, *, every: int = 1) -> Probe:
    """Begins to look at every converted layer of a model.

    Args:
        model: a converted model; its plans at this moment are the ones looked at.
        every: look at the first training step from now on, and then at each `every`-th; the others cost
            next to nothing.

    Returns:
        A probe, which can be detached; several can be attached at once.

    Raises:
        ConversionError: if the model has no converted layer.
        SpecError: if `every` is below 1.
    """
    if every < 1:
        raise SpecError(f"attach(every={every}) was asked for; 1 or more is possible.")
    if not named_plans(model):
        raise ConversionError(
            "A probe was asked for on a model without a converted layer, where nothing is quantized. "
            "Call halfbyte.convert(model, recipe=...) first."
        )
    return Probe(model, every)


class _Recorder:
    """The watcher behind a probe: one tally for each (step, layer, slot)."""

    def __init__(self, model: nn.Module, every: int) -> None:
        self._names = {id(plan): name for name, plan in named_plans(model).items()}
        self._every = every
        self._first: dict[str, int] = {}
        self.tallies: dict[tuple[int, str, str], Tally] = {}
        self.seconds = 0.0

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        yield

    def operand(self, plan: Plan, slot: str, x: Tensor, parts: tuple[QTensor | Tensor, ...]) -> None:
        name = self._names.get(id(plan))
        if name is None or not plan.training:
            return
        step = int(plan.step)
        if (step - self._first.setdefault(name, step)) % self._every:
            return
        started = time.perf_counter()
        if any(isinstance(part, QTensor) for part in parts):
            self.tallies.setdefault((step, name, slot), Tally()).add(
                x, parts, spec_of(plan.recipe, slot), gain_of(plan.recipe, slot)
            )
        self.seconds += time.perf_counter() - started

    def product(
        self,
        plan: Plan,
        which: Gemm,
        a: tuple[QTensor | Tensor, ...],
        b: QTensor | Tensor,
        geometry: Geometry,
        result: Tensor,
    ) -> None:
        pass


def _row(step: int, layer: str, slot: str, tally: Tally) -> ProbeRow:
    gradient = slot.endswith("grad_output")
    return ProbeRow(
        step=step,
        layer=layer,
        slot=slot,
        direction="forward" if slot.startswith("fprop") else "backward",
        formats=tuple(tally.formats),
        histogram=tuple(tuple(int(n) for n in counts.tolist()) for counts in tally.codes),
        underflow_rate=tally.underflow_rate,
        saturation_rate=tally.saturation_rate,
        bias=tally.bias,
        sqnr_db=tally.sqnr_db,
        cosine=tally.cosine,
        log2_scale=tally.log2_scale,
        gradient_to_noise=tally.gradient_to_noise if gradient else None,
    )


def _mark(row: ProbeRow) -> str:
    return f"{'→' if row.direction == 'forward' else '←'} {row.layer or '(model)'}"


def _cells(row: ProbeRow) -> list[str]:
    """A row of the table, without the layer and the slot."""
    used = "+".join(str(sum(count > 0 for count in counts)) for counts in row.histogram)
    ratio = "" if row.gradient_to_noise is None else f"{row.gradient_to_noise:.2f}"
    shares = [f"{100 * value:.1f} %" for value in (row.underflow_rate, row.saturation_rate)]
    measures = [f"{row.bias:+.3f}", f"{row.sqnr_db:.1f}", f"{row.cosine:.3f}", f"{row.log2_scale:.1f}"]
    return ["+".join(row.formats), used, *shares, *measures, ratio]


def _aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text: names to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(row.rstrip() for row in rows)


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
