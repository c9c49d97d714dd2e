"""What "7.3 times" is: multiply-accumulates on an area, and a bar chart of Amdahl's law over one network.

Sun et al. (NeurIPS 2020, section 6) estimate that a unit of four INT4 x FP4 products takes 55 % of the area of an FP16
unit: 4 / 0.55 = 7.3. That number is a definition as much as a measurement. `definitions` says what it becomes when the
unit also rounds, also multiplies INT4 by INT4, adds into 32 bits, or is held against another FP16 unit.

`fig6c` redraws the paper's Fig. 6(c): the time of ResNet-50's products, each at its precision's rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import HalfbyteError, SpecError, UnknownNameError
from .presets import PAPER_ENGINE
from .units import UnitCost
from .workload import Gemm, Workload

__all__ = [
    "DEFINITIONS",
    "PAPER_RATES",
    "Bar",
    "Definition",
    "Density",
    "Fig6c",
    "Rates",
    "definitions",
    "fig6c",
]


@dataclass(frozen=True)
class Definition:
    """One way to read "times FP16".

    Attributes:
        name: in words.
        unit: the unit, by its name in the synthesis.
        baseline: what it is held against.
        paper: what Sun et al. say, where they do.
    """

    name: str
    unit: str
    baseline: str = "fma_fp16"
    paper: float | None = None


DEFINITIONS = (
    Definition("4-way INT4 x FP4, as the paper words it", "dot4_fp4", paper=7.3),
    Definition("4-way INT4 x INT4", "dot4_int4"),
    Definition("FP8 multiply-accumulate", "fma_fp8_dlf16", paper=2.0),
    Definition("activations from 0 to 15", "dot4_fp4_unsigned"),
    Definition("32-bit accumulator", "dot4_fp4_acc32"),
    Definition("with a rounder to FP16", "dot4_fp4_round"),
    Definition("one unit for INT4 x INT4 and INT4 x FP4, 4-way", "dot4_mixed"),
    Definition("the same, activations from 0 to 15", "dot4_mixed_unsigned"),
    Definition("the same, 8-way", "dot8_mixed"),
    Definition("8-way, 32-bit accumulator", "dot8_mixed_acc32"),
    Definition("4-way for both, with a rounder", "dot4_mixed_round"),
    Definition("against DLFloat16", "dot4_fp4", "fma_dlf16"),
    Definition("against FP16 that adds in FP32", "dot4_fp4", "fma_fp16_fp32"),
    Definition("against BF16 that adds in FP32", "dot4_fp4", "fma_bf16_fp32"),
    Definition("against a 4-way FP16 dot product", "dot4_fp4", "dot4_fp16"),
    Definition("against a 4-way FP16 dot product that adds in FP32", "dot4_fp4", "dot4_fp16_fp32"),
)
"""The readings, the paper's own first."""


@dataclass(frozen=True, kw_only=True)
class Density:
    """What a definition comes to.

    Attributes:
        definition: the definition.
        times: multiply-accumulates a cycle and area, relative to the baseline.
        energy_times: how many times less energy a multiply-accumulate takes, on the data that both were measured on;
            None where there are none.
    """

    definition: Definition
    times: float
    energy_times: float | None

    def to_json(self) -> dict[str, Any]:
        """As one flat row, for `json.dumps`."""
        return {**dataclasses.asdict(self.definition), "times": self.times, "energy_times": self.energy_times}


def _unit(units: Mapping[str, UnitCost], name: str) -> UnitCost:
    if name not in units:
        raise UnknownNameError("synthesized unit", name, units)
    if units[name].macs < 1:
        raise SpecError(f"The unit {name!r} multiplies nothing, so it has no density; name one whose macs are above 0.")
    return units[name]


def definitions(units: Mapping[str, UnitCost]) -> tuple[Density, ...]:
    """What each of `DEFINITIONS` comes to with the areas of a synthesis.

    Args:
        units: synthesized units by name: `halfbyte.hardware.units.load_units` reads those of the package.

    Raises:
        UnknownNameError: if a unit is missing.
        SpecError: if one multiplies nothing.
    """
    found = []
    for definition in DEFINITIONS:
        unit, baseline = _unit(units, definition.unit), _unit(units, definition.baseline)
        times, energy = unit.density / baseline.density, unit.energy_times(baseline)
        found.append(Density(definition=definition, times=times, energy_times=energy))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Multiply-accumulates in the time of one in FP16, by precision.

    Attributes:
        fp8: FP8 by FP8, and INT4 by FP8.
        int4: INT4 by INT4: the forward pass.
        fp4: INT4 by FP4: the backward pass.
        source: where they are from.
    """

    fp8: float
    int4: float
    fp4: float
    source: str

    def __post_init__(self) -> None:
        for name in ("fp8", "int4", "fp4"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise SpecError(f"Rates: {name}={value!r} was given; a number above zero is possible.")

    @classmethod
    def from_units(cls, units: Mapping[str, UnitCost], engine: Mapping[str, str] = PAPER_ENGINE) -> Rates:
        """The densities of units, relative to the one that `engine` names for FP16.

        Raises:
            UnknownNameError: if a unit is missing, or the engine lacks a precision.
            SpecError: if a unit multiplies nothing.
        """
        for precision in ("fp16", "fp8", "int4", "fp4"):
            if precision not in engine:
                raise UnknownNameError("precision in the engine", precision, engine)
        fp16 = _unit(units, engine["fp16"]).density
        fp8, int4, fp4 = (_unit(units, engine[p]).density / fp16 for p in ("fp8", "int4", "fp4"))
        names = ", ".join(f"{p} {engine[p]}" for p in ("fp16", "fp8", "int4", "fp4"))
        return cls(fp8=fp8, int4=int4, fp4=fp4, source=f"own synthesis: {names}")

    def of(self, precision: str) -> float:
        """The rate of a precision; 1 for FP16."""
        return 1.0 if precision == "fp16" else float(getattr(self, precision))


PAPER_RATES = Rates(fp8=2.0, int4=7.3, fp4=7.3, source="Sun et al., NeurIPS 2020, section 6 and Fig. 6(c)")
"""The rates that the paper states."""


@dataclass(frozen=True)
class Bar:
    """A bar of Fig. 6(c): speed relative to FP16, as published and as modeled."""

    name: str
    paper: float
    model: float


@dataclass(frozen=True, kw_only=True)
class Fig6c:
    """The figure.

    Attributes:
        bars: its eight bars, in the paper's order.
        rates: the rates they were drawn with.
        assumptions: what was assumed, in sentences.
    """

    bars: tuple[Bar, ...]
    rates: Rates
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Bars, rates and assumptions, for `json.dumps`."""
        return {
            "fig6c": [dataclasses.asdict(bar) for bar in self.bars],
            "rates": dataclasses.asdict(self.rates),
            "assumptions": list(self.assumptions),
        }


def _is_pointwise(gemm: Gemm) -> bool:
    """Whether a convolution multiplies no input element twice for one output channel: kernel size 1.

    (Or kernel and stride of one size, as when an image is cut into patches; ResNets have none.)
    """
    return gemm.kind.startswith("Conv") and gemm.a_elements >= gemm.m * gemm.k * gemm.groups


def _stride_variant(fprop: Mapping[str, Gemm]) -> str:
    """Where a bottleneck strides: its 1x1 ``conv1`` has then as many rows as the 3x3 ``conv2`` behind it, or more."""
    pairs = [(fprop[n], fprop[n.removesuffix("conv1") + "conv2"]) for n in fprop if n.endswith(".conv1")]
    if not pairs or not all(_is_pointwise(first) for first, _ in pairs):
        return "it has no bottlenecks"
    if any(first.m > second.m for first, second in pairs):
        return "stride in the 3x3 convolution of a bottleneck (v1.5)"
    return "stride in the first 1x1 convolution of a bottleneck (v1)"


def fig6c(workload: Workload, rates: Rates = PAPER_RATES, *, bottom: str = "*.conv3") -> Fig6c:
    """Fig. 6(c) of Sun et al.: the speed of eight choices of precision, from the network's products alone.

    Args:
        workload: ResNet-50, in any formats: only its fprop sizes are read.
        rates: how fast each precision is.
        bottom: names of the layers that the paper calls the 1x1 convolutions at the bottom of a block.

    Raises:
        HalfbyteError: if the workload has no fprop, or none of its 1x1 convolutions has such a name.
    """
    fprop = {gemm.layer: gemm for gemm in workload.gemms if gemm.phase == "fprop"}
    macs: dict[str, int] = {}
    for gemm in workload.gemms:
        if gemm.phase == "fprop":
            macs[gemm.layer] = macs.get(gemm.layer, 0) + gemm.macs
    pointwise = {layer for layer, gemm in fprop.items() if _is_pointwise(gemm)}
    chosen = {layer for layer in pointwise if fnmatchcase(layer, bottom)}
    if not chosen:
        raise HalfbyteError(
            f"fig6c: bottom={bottom!r} was given and no 1x1 convolution of {workload.name!r} has such a name; it has "
            f"{', '.join(sorted(pointwise)) or 'none'}. The figure is of a ResNet-50 with torchvision's names."
        )
    total = sum(macs.values())

    def bar(name: str, paper: float, forward: str, dgrad: str, wgrad: str, wide: set[str] | None = None) -> Bar:
        time = 0.0
        for layer, count in macs.items():
            backward = ("fp8", "fp8") if layer in (wide or ()) else (dgrad, wgrad)
            time += count * sum(1 / rates.of(precision) for precision in (forward, *backward))
        return Bar(name, paper, 3 * total / time)

    bars = (
        bar("forward FP16, backward FP16", 1.0, "fp16", "fp16", "fp16"),
        bar("forward FP8, backward FP8", 2.0, "fp8", "fp8", "fp8"),
        bar("forward INT4, backward FP16", 1.4, "int4", "fp16", "fp16"),
        bar("forward INT4, backward FP8", 2.7, "int4", "fp8", "fp8"),
        bar("forward INT4, backward FP4", 7.3, "int4", "fp4", "fp4"),
        bar("forward INT4, dgrad FP4, wgrad FP8", 3.9, "int4", "fp4", "fp8"),
        bar("forward INT4, backward FP4, all 1x1 FP8", 4.0, "int4", "fp4", "fp4", pointwise),
        bar("forward INT4, backward FP4, bottom 1x1 FP8", 5.2, "int4", "fp4", "fp4", chosen),
    )
    others = {name: {layer for layer in pointwise if fnmatchcase(layer, name)} for name in ("*.conv1", "*.conv3")}
    instead = [
        f"{name!r} would give {bar('', 1.0, 'int4', 'fp4', 'fp4', layers).model:.2f}"
        for name, layers in others.items()
        if layers and name != bottom
    ]
    share = 100 * sum(macs[layer] for layer in chosen) / total
    assumptions = (
        f"{workload.name}: {total / workload.batch / 1e9:.3f} GMAC forward an image; {_stride_variant(fprop)}.",
        "Only multiply-accumulates count: no tiling, no vector work, no memory.",
        "Each layer's three products count alike; the first layer's dgrad counts, though no step needs it.",
        "The first and the last layer run in four bits, though the recipe keeps them in FP16.",
        f"Times FP16: FP8 {rates.fp8:.2f}, INT4 x INT4 {rates.int4:.2f}, INT4 x FP4 {rates.fp4:.2f} ({rates.source}).",
        "All 1x1 includes the downsampling ones.",
        f"The bottom 1x1 are the {len(chosen)} layers {bottom!r}, {share:.1f} % of the multiply-accumulates: "
        f"chosen because it comes nearest to the published bar{''.join('; ' + text for text in instead)}.",
        "So was the stride (v1): in the 3x3 convolutions (v1.5) it gives 3.81 and 5.39 at the paper's rates.",
    )
    return Fig6c(bars=bars, rates=rates, assumptions=assumptions)
