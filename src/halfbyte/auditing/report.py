"""What an audit found: plain values, a table for people and JSON for programs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import write_text

__all__ = ["AuditReport", "FloatGemm", "GemmReport", "OperandReport", "SelfTest"]


@dataclass(frozen=True, kw_only=True)
class OperandReport:
    """One operand of one GEMM.

    Attributes:
        formats: names of the formats of its parts, or the floating types that it ran in.
        codes_used: how many different codes were met in the packed bytes, in the part that used most; 0 without codes.
        underflow_rate: share of the numbers other than zero that became zero.
        saturation_rate: share of all numbers that lay beyond the last code on their side.
        nonfinite: how many numbers were NaN or infinite before they were quantized.
    """

    formats: tuple[str, ...]
    codes_used: int = 0
    underflow_rate: float = 0.0
    saturation_rate: float = 0.0
    nonfinite: int = 0


@dataclass(frozen=True, kw_only=True)
class GemmReport:
    """One GEMM of one layer in the step.

    Attributes:
        name: the layer's fully qualified name; with the plan's own behind a dot where the layer has several.
        gemm: ``"fprop"``, ``"dgrad"`` or ``"wgrad"``.
        recipe: name of the layer's recipe.
        executed: in what: the backend and both operands' formats, or a floating type.
        calls: how often in the step; a recurrent layer multiplies once for each time step.
        macs: multiply-accumulates.
        codes_used: the larger of both operands' numbers of different codes; at most 16 in a 4-bit slot.
        operands: both operands by slot name.
        nonfinite: how many numbers of the result were NaN or infinite.
        equals_float64: whether the result is the float64 product of what the packed codes stand for, but for the last
            roundings; None where it did not run under a plan.
        reasons: why the audit fails because of it; empty where all is well.
    """

    name: str
    gemm: str
    recipe: str
    executed: str
    calls: int = 0
    macs: int = 0
    codes_used: int = 0
    operands: dict[str, OperandReport]
    nonfinite: int = 0
    equals_float64: bool | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FloatGemm:
    """Multiplications outside the converted layers.

    Attributes:
        name: fully qualified name of the module that ran them; empty for the model itself or the loss.
        kind: class name of that module.
        op: the operation, for example ``"aten.mm"``.
        dtype: its floating type.
        direction: ``"forward"`` or ``"backward"``.
        calls: how often.
        macs: multiply-accumulates.
        functional: whether the module is no layer that `convert` knows: its own code calls the operation
            (``F.linear`` on a weight of its own, a product of two activations), and only a layer in its place could be
            converted.
    """

    name: str
    kind: str
    op: str
    dtype: str
    direction: str
    calls: int
    macs: int
    functional: bool


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """One property of one quantizer, tested on the model's device.

    Attributes:
        quantizer: its spec.
        check: what was tested, for example ``"nearest"``.
        ok: whether it holds.
        detail: what was compared and what came out.
    """

    quantizer: str
    check: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The result of `halfbyte.audit`; ``str()`` is a table.

    Attributes:
        ok: whether everything that the recipe promised is so.
        reasons: why not; empty if `ok`.
        mac_share_4bit: multiply-accumulates of GEMMs whose operands are both codes of at most four bits, over all
            multiply-accumulates of the step, forward and backward.
        macs: all multiply-accumulates of the step.
        device: where it ran.
        layers: an entry for each plan and GEMM.
        float_gemms: what was multiplied outside the converted layers.
        self_test: an entry for each quantizer in use and property.
    """

    ok: bool
    reasons: tuple[str, ...]
    mac_share_4bit: float
    macs: int
    device: str
    layers: tuple[GemmReport, ...] = ()
    float_gemms: tuple[FloatGemm, ...] = ()
    self_test: tuple[SelfTest, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values; what is NaN or infinite is a string."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def write(self, path: Path) -> None:
        """Writes the JSON; folders that are missing are made."""
        write_text(path, self.to_json() + "\n")

    def __str__(self) -> str:
        parts = [_layers_table(self.layers)] if self.layers else []
        if self.float_gemms:
            parts.append("Multiplied outside converted layers:\n" + _float_table(self.float_gemms))
        functional = sorted({gemm.name or "(model)" for gemm in self.float_gemms if gemm.functional})
        if functional:
            parts.append(
                f"Products in the code of {', '.join(functional)} itself cannot be converted. To convert one with a "
                "weight, give it a layer: torch.nn.Linear in place of F.linear."
            )
        passed = sum(test.ok for test in self.self_test)
        heading = f"Self-test on {self.device}: {passed} of {len(self.self_test)} checks hold."
        parts.append("\n".join([heading, *_tests_lines(self.self_test)]))
        parts.append(f"{100 * self.mac_share_4bit:.1f} % of {self.macs:,} multiply-accumulates ran on 4-bit codes.")
        parts.append("ok" if self.ok else "\n".join(["FAILED", *(f"* {reason}" for reason in self.reasons)]))
        return "\n\n".join(parts)


def _layers_table(layers: tuple[GemmReport, ...]) -> str:
    header = ["layer", "GEMM", "executed in", "codes", "cut off", "underflow", "not finite", "float64", "MACs"]
    rows = [header]
    for entry in layers:
        operands = entry.operands.values()
        rows.append(
            [
                entry.name or "(model)",
                entry.gemm,
                entry.executed,
                " x ".join(str(o.codes_used or "-") for o in operands) or "-",
                " x ".join(f"{100 * o.saturation_rate:.1f} %" for o in operands) or "-",
                " x ".join(f"{100 * o.underflow_rate:.1f} %" for o in operands) or "-",
                str(entry.nonfinite + sum(o.nonfinite for o in operands)),
                {True: "equal", False: "DIFFERS", None: "-"}[entry.equals_float64],
                f"{entry.macs:,}",
            ]
        )
    return _aligned(rows)


def _float_table(gemms: tuple[FloatGemm, ...]) -> str:
    rows = [["module", "type", "operation", "in", "direction", "MACs"]]
    rows += [[g.name or "(model)", g.kind, g.op, g.dtype, g.direction, f"{g.macs:,}"] for g in gemms]
    return _aligned(rows)


def _tests_lines(tests: tuple[SelfTest, ...]) -> list[str]:
    """A line for each quantizer, with its checks; those that fail in capitals."""
    checks: dict[str, list[str]] = {}
    for test in tests:
        checks.setdefault(test.quantizer, []).append(test.check if test.ok else test.check.upper())
    return [f"  {quantizer}: {', '.join(names)}" for quantizer, names in checks.items()]


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
