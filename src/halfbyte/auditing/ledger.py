"""What happened in each converted layer during the step: the audit's watcher, and the verdict on each GEMM."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..kernels import Gemm, Geometry
from ..nn import plans_of
from ..ops import Plan
from ..qtensor import QTensor
from ..recipes import REUSE
from ..watching import Tally, gain_of, named_plans, spec_of
from .published import LEVELS
from .recompute import difference
from .report import GemmReport, OperandReport
from .rounding import judged, misrounded

__all__ = ["SLOTS", "Ledger"]

SLOTS: dict[str, tuple[str, str]] = {
    "fprop": ("fprop.input", "fprop.weight"),
    "dgrad": ("dgrad.grad_output", "dgrad.weight"),
    "wgrad": ("wgrad.grad_output", "wgrad.input"),
}
"""Both operands of each GEMM."""


@dataclass
class _Operand:
    """One operand over all calls of a GEMM: formats, or floating types, and which codes of each were met."""

    codes: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    floats: set[str] = field(default_factory=set)

    def add(self, parts: tuple[QTensor | Tensor, ...]) -> None:
        for place, part in enumerate(parts):
            if not isinstance(part, QTensor):
                self.floats.add(str(part.dtype).removeprefix("torch."))
                continue
            counts = torch.bincount(part.codes().reshape(-1).int(), minlength=1 << part.format.bits)
            key = (place, part.format.name)
            self.codes[key] = self.codes[key] + counts if key in self.codes else counts

    @property
    def formats(self) -> tuple[str, ...]:
        return (*dict.fromkeys(name for _, name in self.codes), *sorted(self.floats))

    @property
    def codes_used(self) -> int:
        return max((int((counts > 0).sum()) for counts in self.codes.values()), default=0)


@dataclass
class _Gemm:
    """One GEMM of one plan over all calls."""

    calls: int = 0
    macs: int = 0
    macs_4bit: int = 0
    backends: list[str] = field(default_factory=list)
    nonfinite: int = 0
    operands: tuple[_Operand, _Operand] = field(default_factory=lambda: (_Operand(), _Operand()))
    reasons: list[str] = field(default_factory=list)


class Ledger:
    """A watcher of every plan, and of the modules that have one.

    Attributes:
        plans: every plan by name.
    """

    def __init__(self, model: nn.Module, away: Callable[[], AbstractContextManager[None]]) -> None:
        self.plans = named_plans(model)
        self._away = away
        self._names = {id(plan): name for name, plan in self.plans.items()}
        self._gemms: dict[tuple[str, str], _Gemm] = {}
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._outputs: dict[str, list[Tensor]] = {name: [] for name in self.plans}
        self._troubles: dict[str, list[str]] = {}
        self.needs_dgrad: set[str] = set()
        self._inputs: dict[str, tuple[nn.Module, Any, Any]] = {}
        self._handles: list[Any] = []
        for fqn, module in model.named_modules():
            if "" in plans_of(module):
                self._handles.append(module.register_forward_pre_hook(self._entering(fqn), prepend=True))
                self._handles.append(module.register_forward_hook(self._leaving(fqn), prepend=True))
            if plans_of(module):
                hook = self._remembering(fqn)
                self._handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates in converted layers: all, and those on codes of at most four bits."""
        return sum(g.macs for g in self._gemms.values()), sum(g.macs_4bit for g in self._gemms.values())

    def inside(self) -> AbstractContextManager[None]:
        """See `halfbyte.ops.Watcher`."""
        return self._away()

    @torch.no_grad()
    def operand(self, plan: Plan, slot: str, x: Tensor, parts: tuple[QTensor | Tensor, ...]) -> None:
        """See `halfbyte.ops.Watcher`."""
        spec = spec_of(plan.recipe, slot)
        name = self._names[id(plan)]
        coded = tuple(part for part in parts if isinstance(part, QTensor))
        if spec is None or not coded:
            return
        tally = self._tallies.setdefault((name, slot), Tally())
        gain = gain_of(plan.recipe, slot)
        tally.add(x, parts, spec, gain)
        if judged(spec):
            for part in coded:
                # Samples are parts of a mean: each stands for its share of x. A gain came after the codes.
                if wrong := misrounded(x.double() * (gain / len(coded)), part, spec):
                    self._blame(name, slot, f"{spec}: {wrong}")

    @torch.no_grad()
    def product(
        self,
        plan: Plan,
        which: Gemm,
        a: tuple[QTensor | Tensor, ...],
        b: QTensor | Tensor,
        geometry: Geometry,
        result: Tensor,
    ) -> None:
        """See `halfbyte.ops.Watcher`."""
        name = self._names[id(plan)]
        entry = self._gemms.setdefault((name, which), _Gemm())
        entry.calls += 1
        macs = geometry.macs(which) * len(a)
        entry.macs += macs
        if all(isinstance(operand, QTensor) and operand.format.bits <= 4 for operand in (*a, b)):
            entry.macs_4bit += macs
        accumulate = plan.recipe.accumulate
        entry.backends += [plan.kernels.computed_by(which, part, b, geometry, accumulate) for part in a]
        entry.operands[0].add(a)
        entry.operands[1].add((b,))
        entry.nonfinite += int((~result.isfinite()).sum())
        if wrong := difference(which, a, b, geometry, result, accumulate):
            entry.reasons.append(wrong)
        if which == "fprop":
            self._outputs[name].append(result.detach().clone())

    def _blame(self, name: str, slot: str, reason: str) -> None:
        self._troubles.setdefault(f"{name}\n{slot}", []).append(reason)

    def _entering(self, fqn: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: Any) -> None:
            self._outputs[fqn].clear()
            if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
                self.needs_dgrad.add(fqn)

        return enter

    def _leaving(self, fqn: str) -> Callable[..., None]:
        """Holds a layer's output against its product and its bias."""

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            products = self._outputs[fqn]
            if self.plans[fqn].recipe.in_floating_point or not isinstance(output, Tensor):
                return
            if len(products) != 1:
                self._blame(fqn, "fprop", f"its forward pass multiplied codes {len(products)} times, not once")
                return
            with self._away(), torch.no_grad():
                if wrong := _not_the_sum(output, products[0], getattr(module, "bias", None)):
                    self._blame(fqn, "fprop", wrong)

        return leave

    def _remembering(self, fqn: str) -> Callable[..., None]:
        """What a layer was called with, where its output does not show its biases: no single product, or all zero."""

        def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
            bias = getattr(module, "bias", None)
            if fqn not in self.plans or (isinstance(bias, Tensor) and not bias.any()):
                self._inputs[fqn] = module, args, kwargs

        return remember

    def idle_biases(self) -> list[str]:
        """The biases that do nothing, of layers whose output did not show it. Runs each once more for every bias."""
        found = []
        for fqn, (module, args, kwargs) in self._inputs.items():
            biases = {name: p for name, p in module.named_parameters(recurse=False) if "bias" in name}
            before = _outputs(module, args, kwargs) if biases else []
            for name, bias in biases.items():
                kept = bias.detach().clone()
                bias.data.add_(1)
                after = _outputs(module, args, kwargs)
                bias.data.copy_(kept)
                if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                    found.append(f"{fqn or '(model)'}: its {name} is not added: one more in it changes no output")
        return found

    def reports(self) -> list[GemmReport]:
        """An entry for each plan and GEMM that ran, in the order of the plans."""
        return [
            self._report(name, plan, gemm)
            for name, plan in self.plans.items()
            for gemm in SLOTS
            if (name, gemm) in self._gemms
        ]

    def _report(self, name: str, plan: Plan, gemm: str) -> GemmReport:
        entry = self._gemms[name, gemm]
        operands = {
            slot: self._operand_report(name, plan, slot, seen)
            for slot, seen in zip(SLOTS[gemm], entry.operands, strict=True)
        }
        reasons = [*entry.reasons, *self._troubles.get(f"{name}\n{gemm}", [])]
        for slot in SLOTS[gemm]:
            reasons += self._broken_promises(name, plan, slot, operands[slot])
        backends, formats = dict.fromkeys(entry.backends), ("+".join(o.formats) for o in operands.values())
        return GemmReport(
            name=name,
            gemm=gemm,
            recipe=plan.recipe.name,
            executed=f"{' and '.join(backends)}: {' x '.join(formats)}",
            calls=entry.calls,
            macs=entry.macs,
            codes_used=max(o.codes_used for o in operands.values()),
            operands=operands,
            nonfinite=entry.nonfinite,
            equals_float64=not entry.reasons,
            reasons=tuple(dict.fromkeys(reasons)),
        )

    def _operand_report(self, name: str, plan: Plan, slot: str, seen: _Operand) -> OperandReport:
        tally = self._tallies.get((name, _made_at(plan, slot)))
        measured = (
            {}
            if tally is None or not seen.codes
            else {
                "underflow_rate": tally.underflow_rate,
                "saturation_rate": tally.saturation_rate,
                "nonfinite": tally.nonfinite,
            }
        )
        return OperandReport(formats=seen.formats, codes_used=seen.codes_used, **measured)  # type: ignore[arg-type]

    def _broken_promises(self, name: str, plan: Plan, slot: str, seen: OperandReport) -> list[str]:
        """What is wrong with an operand of a GEMM."""
        spec = spec_of(plan.recipe, slot)
        if spec is None:
            return []
        reasons = list(self._troubles.get(f"{name}\n{slot}", []))
        promised = {fmt.name for fmt in spec.formats}
        if not set(seen.formats) <= promised:
            reasons.append(f"{slot} ran in {' and '.join(seen.formats)}; promised is {' or '.join(sorted(promised))}")
        four_bit = any(fmt.bits <= 4 or len(LEVELS.get(fmt.name, range(99))) <= 16 for fmt in spec.formats)
        if four_bit and seen.codes_used > 16:
            reasons.append(f"{slot} uses {seen.codes_used} different codes; four bits have 16")
        tally = self._tallies.get((name, slot))
        if slot.endswith("grad_output") and tally is not None and tally.vanished:
            reasons.append(f"{slot}: every code is zero, but the gradient is not")
        return reasons


@torch.no_grad()
def _outputs(module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """What a layer gives for those arguments, with the same random numbers each time and without its hooks."""
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        leaves = tree_leaves(module.forward(*args, **kwargs))
    return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]


def _made_at(plan: Plan, slot: str) -> str:
    """The slot at which an operand was quantized: its own, or fprop's where its codes are taken over."""
    return f"fprop.{slot.split('.')[1]}" if plan.recipe.slots[slot] is REUSE else slot


def _not_the_sum(output: Tensor, product: Tensor, bias: Tensor | None) -> str:
    """How a layer's output differs from product plus bias; empty if it does not."""
    wanted = product
    if bias is not None:
        dims = product.dim() - 2
        wanted = product + bias.detach().to(product.dtype).view(-1, *(1,) * dims)
    found = output.detach().reshape(-1)
    if found.numel() != wanted.numel():
        return f"its output has {found.numel()} numbers, its product {wanted.numel()}"
    if torch.equal(found.nan_to_num(), wanted.to(found.dtype).reshape(-1).nan_to_num()):
        return ""
    if bias is not None and torch.equal(found, product.to(found.dtype).reshape(-1)):
        return "its bias is not added: the output is the product alone"
    worst = (found.double() - wanted.double().reshape(-1)).abs().max().item()
    return f"its output is not product plus bias; they differ by up to {worst:.3g}"
