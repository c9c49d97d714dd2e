"""What runs in what, and why: a row for each plan, and one for each module that multiplies without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..nn import TWINS, Unit, is_twin, plans_of, twin_of, units_of, whys_of
from ..ops import Plan
from ..quantizers import NonFiniteCounter
from ..stash import describe
from .functional import why_not_converted
from .sites import owned, plan_fqn

__all__ = ["LEFT_ALONE", "ConversionReport", "LayerReport", "opaque", "summary"]

LEFT_ALONE = "_halfbyte_left_alone"
"""Attribute of a layer none of whose units has a plan: why, by unit."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One row of `summary`.

    Attributes:
        fqn: fully qualified name of the plan: the layer's, with the weight's behind it where a layer has several
            (``lstm.hh_l0``); empty for the model itself.
        kind: class name of the torch layer.
        recipe: name of its recipe; ``"-"`` if it is not converted.
        formats: format of each of the six slots by name; empty if it is not converted.
        why: the rule that decided, or why it is not converted.
        note: the gradient's scale, the learned clip, and how many broken tensors were met.
    """

    fqn: str
    kind: str
    recipe: str
    formats: dict[str, str]
    why: str
    note: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What runs in what, and why; ``str()`` is a table.

    Attributes:
        layers: a row for each GEMM operand that could be on codes, in the order of registration.
        stash: how what autograd saves is kept; empty if that is torch's affair.
    """

    layers: tuple[LayerReport, ...]
    stash: str = ""

    def __str__(self) -> str:
        slots = ("fprop", "dgrad", "wgrad")
        header = ["layer", "type", "recipe", *slots, "why", "state"]
        rows = [header]
        for layer in self.layers:
            cells = [
                " x ".join(fmt for name, fmt in layer.formats.items() if name.startswith(slot)) or "-" for slot in slots
            ]
            rows.append([layer.fqn or "(model)", layer.kind, layer.recipe, *cells, layer.why, layer.note])
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, *filter(None, [self.stash])])


def summary(model: nn.Module) -> ConversionReport:
    """Which layer runs in what, and why, as the model stands now.

    Listed are layers that convert, each weight of them, and what multiplies matrices without a plan: layers of torch's
    without a twin, subclasses, attention's products, and modules whose own code calls a product (found by reading it).
    Formats that the first batch decides show both possibilities until then.
    """
    skipped = owned(model)
    rows: list[LayerReport] = []
    for fqn, module in model.named_modules():
        if twin_of(module) is not None and module not in skipped:
            rows += _rows(fqn, module)
        elif why := _why_opaque(module, skipped) or why_not_converted(module):
            rows.append(LayerReport(fqn=fqn, kind=type(module).__name__, recipe="-", formats={}, why=why))
    return ConversionReport(tuple(rows), describe(model))


def opaque(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with GEMMs of their own that have no twin: ``Bilinear``, and subclasses of torch's layers."""
    skipped = owned(model)
    for fqn, module in model.named_modules():
        if _why_opaque(module, skipped):
            yield fqn, module


def _why_opaque(module: nn.Module, skipped: set[nn.Module]) -> str | None:
    if twin_of(module) is not None or module in skipped:
        return None
    parents = [kind.__name__ for kind in TWINS if isinstance(module, kind)]
    if parents and nn.utils.parametrize.is_parametrized(module):
        return f"not converted: a parametrized {parents[0]}; convert first, parametrize then"
    if parents:
        return f"not converted: a subclass of {parents[0]}"
    others = [nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.modules.conv._ConvNd]
    others += filter(None, [getattr(nn, "LinearCrossEntropyLoss", None)])
    return "not converted: no 4-bit twin of this type" if isinstance(module, tuple(others)) else None


def _rows(fqn: str, module: nn.Module) -> Iterator[LayerReport]:
    """A row for each unit of a layer; the products of all heads that nobody asked for share one."""
    plans, kind = plans_of(module), type(module).__name__
    whys: dict[str, str] = whys_of(module) if is_twin(module) else getattr(module, LEFT_ALONE, {})
    silent: set[str] = set()
    for unit in units_of(module):
        name = plan_fqn(fqn, unit.name)
        if unit.name in plans:
            plan = plans[unit.name]
            yield LayerReport(
                fqn=name,
                kind=kind,
                recipe=plan.recipe.name,
                formats=plan.formats,
                why=whys.get(unit.name, ""),
                note=_note(plan),
            )
        elif unit.name in whys:
            yield LayerReport(fqn=name, kind=kind, recipe="fp32", formats={}, why=whys[unit.name])
        elif unit.opt_in:
            silent.add(_product(unit))
        else:
            yield LayerReport(fqn=name, kind=kind, recipe="-", formats={}, why="not converted")
    for product in sorted(silent, reverse=True):
        why = f"not converted: a product without a weight; Rule(fqn='*.{product}', recipe=...) asks for it"
        yield LayerReport(fqn=plan_fqn(fqn, product), kind=kind, recipe="-", formats={}, why=why)


def _product(unit: Unit) -> str:
    return unit.name.partition("_")[0]


def _note(plan: Plan) -> str:
    if plan.step.is_meta:
        return "no memory yet"
    parts = []
    if plan.input is not None and plan.input.learned is not None and plan.input.format is not None:
        name = "clip" if hasattr(plan.input, "clip") else "step"
        parts.append(f"{name} {plan.input.shown}")
    scale = None if plan.grad_output is None else plan.grad_output.grad_scale
    if scale is not None and scale.started:
        parts.append(f"log2_scale {scale.log2_scale.item()}")
    broken = sum(int(m.nonfinite) for m in plan.modules() if isinstance(m, NonFiniteCounter))
    if broken:
        parts.append(f"NaN or infinity in {broken} tensors")
    return ", ".join(parts)
