"""Looking on while a model trains: who watches its plans, and what a tensor lost when it was quantized.

A plan has one place for a watcher. `watch` puts several there at once, so that a probe stays where it is while an audit
runs, and takes each away alone. `Tally` is what probes and audits measure.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor, nn

from .formats import Format
from .kernels import Gemm, Geometry
from .nn import plans_of
from .ops import Plan, Watcher
from .qtensor import QTensor, pack
from .quantizers import BitSplit, Lsq, Spec
from .recipes import REUSE, Recipe, Requantize

__all__ = ["Tally", "Watch", "code_range", "gain_of", "named_plans", "spec_of", "watch"]

_SLACK = 2.0**-20
"""How far beyond the last code a number must lie, relatively, to count as cut off: scales are rounded to float32."""


def named_plans(model: nn.Module) -> dict[str, Plan]:
    """Every plan of a model by its name: the layer's, and where a layer has several, a dot and the plan's own."""
    found: dict[str, Plan] = {}
    for fqn, module in model.named_modules():
        for name, plan in plans_of(module).items():
            found[".".join(part for part in (fqn, name) if part)] = plan
    return found


class Watch:
    """A watcher in its place. It can be taken away, once, and is a context manager that does so at its end."""

    def __init__(self, plans: Sequence[Plan], watcher: Watcher) -> None:
        self._plans = plans
        self._watcher = watcher
        for plan in plans:
            if not isinstance(plan.watcher, _Several):
                plan.watcher = _Several([] if plan.watcher is None else [plan.watcher])
            plan.watcher.watchers.append(watcher)

    def remove(self) -> None:
        """Takes the watcher away; the others stay. Does nothing the second time."""
        for plan in self._plans:
            several = plan.watcher
            if isinstance(several, _Several):
                several.watchers = [w for w in several.watchers if w is not self._watcher]
                if not several.watchers:
                    plan.watcher = None
        self._plans = ()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def watch(model: nn.Module, watcher: Watcher) -> Watch:
    """Shows every plan of a model to a watcher, beside those that watch already."""
    return Watch(list(named_plans(model).values()), watcher)


class _Several:
    """The watchers of one plan. A copy of a model, or one that was saved, is watched by nobody."""

    def __init__(self, watchers: list[Watcher]) -> None:
        self.watchers = watchers

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Opens the context of each."""
        with contextlib.ExitStack() as stack:
            for watcher in self.watchers:
                stack.enter_context(watcher.inside())
            yield

    def operand(self, plan: Plan, slot: str, x: Tensor, parts: tuple[QTensor | Tensor, ...]) -> None:
        """Tells each."""
        for watcher in self.watchers:
            watcher.operand(plan, slot, x, parts)

    def product(
        self,
        plan: Plan,
        which: Gemm,
        a: tuple[QTensor | Tensor, ...],
        b: QTensor | Tensor,
        geometry: Geometry,
        result: Tensor,
    ) -> None:
        """Tells each."""
        for watcher in self.watchers:
            watcher.product(plan, which, a, b, geometry, result)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def spec_of(recipe: Recipe, slot: str) -> Spec | None:
    """The spec that makes the codes of a slot, with what is reused followed to its origin; None for floating point."""
    found = recipe.slots[slot]
    if found is REUSE:
        found = recipe.slots[f"fprop.{slot.split('.')[1]}"]
    if isinstance(found, Requantize):
        found = found.spec
    return found if isinstance(found, Spec) else None


def gain_of(recipe: Recipe, slot: str) -> float:
    """What the scale of a slot's codes was multiplied by after they were made."""
    return {"dgrad.grad_output": recipe.dgrad.gain, "wgrad.grad_output": recipe.wgrad.gain}.get(slot, 1.0)


def code_range(spec: Spec | None, fmt: Format) -> tuple[float, float]:
    """The smallest and the largest value of a format that a spec uses: INT4 of SAWB stops at -7, that of LSQ at -8."""
    if fmt.kind != "int":
        return fmt.saturate
    if isinstance(spec, BitSplit):
        return -6, 6
    bits = getattr(spec, "bits", fmt.bits)
    if not fmt.signed:
        return 0, (1 << bits) - 1
    top = (1 << (bits - 1)) - 1
    lower = spec is None or spec.affine or isinstance(spec, Lsq)
    return (-top - 1 if lower else -top), top


def dense(part: QTensor | Tensor) -> Tensor:
    """The numbers that an operand stands for, in float64."""
    return part.dequantize(torch.float64) if isinstance(part, QTensor) else part.double()


def _if_all_were(q: QTensor, value: float, spec: Spec | None) -> Tensor:
    """What a tensor would stand for if every code were that of `value`: with blocks, each element has its own."""
    codes = torch.full((q.numel,), q.format.values.index(value), dtype=torch.uint8, device=q.qdata.device)
    if isinstance(spec, BitSplit):  # Its factors are no scales but say which rows were drawn.
        q = replace(q, block_scale=None, blocks=None)
    return replace(q, qdata=pack(codes, q.format.bits)).dequantize(torch.float64)


class Tally:
    """What was lost when a slot's tensors were quantized, over all of them since it was made.

    Every number is kept as a tensor on the operand's device until it is read, so that watching does not wait for it.
    Specs that split a number in two are measured on the sum of their parts.

    Attributes:
        formats: names of the formats met, in the order of the parts.
        codes: for each format and part, how often each code was used; int64 of shape (2**bits,).
    """

    def __init__(self) -> None:
        self.formats: list[str] = []
        self.codes: list[Tensor] = []
        self._sums: Tensor | None = None
        self._log2_scale: Tensor | None = None

    def add(self, x: Tensor, parts: Sequence[QTensor | Tensor], spec: Spec | None, gain: float) -> None:
        """Measures one tensor.

        What is cut off, and the scale, are those of the moment of rounding, before the gain. Error and angle are those
        of what is multiplied.

        Args:
            x: what was quantized.
            parts: its codes; floating tensors among them are taken as they are.
            spec: what made the codes, for the range that it uses.
            gain: see `gain_of`.
        """
        coded = [part for part in parts if isinstance(part, QTensor)]
        if not coded:
            return
        # In float32, as the gain came in: then a power of two is one again.
        rounded = coded if gain == 1.0 else [replace(q, scale=q.scale / gain) for q in coded]
        for place, part in enumerate(coded):
            self._count(place, part)
        wide = x.detach().double().reshape(-1)
        x_hat = torch.stack([dense(part).reshape(-1) for part in parts]).sum(0)
        low, high = (
            torch.stack([_if_all_were(q, code_range(spec, q.format)[end], spec).reshape(-1) for q in rounded]).sum(0)
            for end in (0, 1)
        )
        beyond = (wide > high + _SLACK * high.abs()) | (wide < low - _SLACK * low.abs())
        error = x_hat - wide
        sums = (
            torch.full((), wide.numel(), dtype=torch.float64, device=wide.device),
            wide != 0,
            (wide != 0) & (x_hat == 0),
            beyond,
            ~wide.isfinite(),
            wide.square(),
            x_hat.square(),
            wide * x_hat,
            error.square(),
            error * wide.sign(),
            wide.abs(),
        )
        new = torch.stack([part.sum(dtype=torch.float64) for part in sums])
        self._sums = new if self._sums is None else self._sums + new
        # Samples are parts of a mean, each with its share of the scale; of a split number the finer part counts.
        share = 1 if isinstance(spec, BitSplit) else len(coded)
        self._log2_scale = -(rounded[-1].scale.detach().double() * share).log2()

    def _count(self, place: int, q: QTensor) -> None:
        counts = torch.bincount(q.codes().reshape(-1).int(), minlength=1 << q.format.bits)
        if place == len(self.codes):
            self.codes.append(counts)
            self.formats.append(q.format.name)
        elif self.formats[place] == q.format.name:
            self.codes[place] = self.codes[place] + counts
        else:  # A sign that the first batch decides: the last tensor's format is the one that stays.
            self.codes[place], self.formats[place] = counts, q.format.name

    @property
    def _totals(self) -> list[float]:
        return [0.0] * 11 if self._sums is None else [float(value) for value in self._sums.tolist()]

    @property
    def elements(self) -> int:
        """How many numbers were quantized."""
        return int(self._totals[0])

    @property
    def nonzero(self) -> int:
        """How many of them were not zero."""
        return int(self._totals[1])

    @property
    def underflow_rate(self) -> float:
        """Share of the numbers other than zero that became zero."""
        _, nonzero, underflowed, *_ = self._totals
        return _share(underflowed, nonzero)

    @property
    def saturation_rate(self) -> float:
        """Share of all numbers that lay beyond the last code on their side."""
        elements, _, _, beyond, *_ = self._totals
        return _share(beyond, elements)

    @property
    def nonfinite(self) -> int:
        """How many numbers were NaN or infinite."""
        return int(self._totals[4])

    @property
    def codes_used(self) -> int:
        """How many different codes were used, in the part that used most."""
        return max((int((counts > 0).sum()) for counts in self.codes), default=0)

    @property
    def vanished(self) -> bool:
        """Whether every code stands for zero although some number did not."""
        totals = self._totals
        return totals[1] > 0 and totals[1] == totals[2]

    @property
    def bias(self) -> float:
        """The mean error in the direction of the number, over the mean magnitude: below zero where numbers shrink."""
        return _share(self._totals[9], self._totals[10])

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibels: 10 log10(sum x^2 / sum (x_hat - x)^2); infinite without noise."""
        signal, noise = self._totals[5], self._totals[8]
        if signal == 0 or math.isnan(noise):
            return math.nan
        return 10 * math.log10(signal / noise) if noise > 0 else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the codes' numbers and the numbers before; 0 where all became zero."""
        signal, energy, dot = self._totals[5:8]
        if signal == 0:
            return math.nan
        return dot / math.sqrt(signal * energy) if energy > 0 else 0.0

    @property
    def gradient_to_noise(self) -> float:
        """The tensor's norm over sqrt(3) times that of its quantization noise (arXiv 2505.19115, FP4 All the Way)."""
        signal, noise = self._totals[5], self._totals[8]
        if signal == 0 or math.isnan(noise):
            return math.nan
        return math.sqrt(signal / (3 * noise)) if noise > 0 else math.inf

    @property
    def log2_scale(self) -> float:
        """Minus the logarithm of the last tensor's scale to base 2: by how many octaves it was raised to be rounded."""
        return math.nan if self._log2_scale is None else float(self._log2_scale)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
