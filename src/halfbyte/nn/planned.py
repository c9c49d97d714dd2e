"""What all twins share: where their plans live, how they print, and how a fused path of torch's is kept away from them.

A twin with one GEMM weight has ``plan``. A twin with several (recurrent layers, attention) has ``plans``, by name; a
name that has no plan there computes in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import UnsupportedError
from ..ops import Plan

__all__ = ["Planned", "PlannedMany", "Unit", "eagerly", "refuse_nested", "stand_in_fast_path"]

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A place for one plan in a layer.

    Attributes:
        name: its key in ``plans``; empty where the layer has one plan.
        opt_in: whether only a rule that names it converts it: a product without a weight.
        bounded: whether its input lies in -1 to 1, so that a learned clip can start at 1 without seeing a batch.
        over_steps: whether it is multiplied step by step, with one wgrad for all steps.
    """

    name: str = ""
    opt_in: bool = False
    bounded: bool = False
    over_steps: bool = False


class Planned(nn.Module):
    """A twin with one plan. `plan` is a submodule, so its state is in the layer's ``state_dict``."""

    plan: Plan
    why: str

    @staticmethod
    def units(module: nn.Module) -> tuple[Unit, ...]:
        """The places for plans in a layer of torch's that this class is the twin of (or in the twin itself)."""
        return (Unit(),)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self.plan)}"


class PlannedMany(nn.Module):
    """A twin with several plans by name, each with its reason; a unit without a plan has a reason only."""

    plans: nn.ModuleDict
    whys: dict[str, str]

    @staticmethod
    def units(module: nn.Module) -> tuple[Unit, ...]:
        """The places for plans in a layer of torch's that this class is the twin of (or in the twin itself)."""
        raise NotImplementedError

    def find_plan(self, name: str) -> Plan | None:
        """The plan of that name, or None where that unit computes in floating point."""
        if name not in self.plans:
            return None
        plan = self.plans[name]
        assert isinstance(plan, Plan)
        return plan

    def product(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias`` under the plan of that name, or in floating point if there is none."""
        plan = self.find_plan(name)
        return F.linear(x, weight, bias) if plan is None else ops.linear(x, weight, bias, plan)

    def extra_repr(self) -> str:
        rows = [f"{name}: {describe(plan)}" for name, plan in self.plans.items() if isinstance(plan, Plan)]
        return "\n".join(filter(None, [super().extra_repr(), *rows]))


def describe(plan: Plan) -> str:
    """A plan's recipe and the formats of its slots, in one line."""
    slots = ", ".join(f"{name}={fmt}" for name, fmt in plan.formats.items())
    return f"recipe={plan.recipe.name}, {slots}"


def eagerly(function: Callable[..., Result], *args: Any) -> Result:
    """Calls a function outside any graph that is being compiled: a loop over steps would break it at each of them."""
    if torch.compiler.is_compiling():
        result: Result = torch.compiler.disable(function)(*args)
        return result
    return function(*args)


def stand_in_fast_path(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing. Its presence on a plan is what counts.

    In evaluation `torch.nn.TransformerEncoderLayer` hands its children's weights to one fused operator and calls no
    child, which would leave out every converted layer in it. It does not do so where a module in it has a hook.
    """


def refuse_nested(kind: str, tensors: Iterator[Tensor] | tuple[Tensor, ...]) -> None:
    """Raises for nested tensors, which have no rectangular shape to quantize.

    Raises:
        UnsupportedError: if one of the tensors is nested.
    """
    if any(t.is_nested for t in tensors):
        raise UnsupportedError(
            f"{kind}: a nested tensor was given; a padded tensor is possible. torch.nn.TransformerEncoder makes nested "
            "tensors from padding masks in evaluation: set its use_nested_tensor to False (converting the whole model "
            "does that), or call nested.to_padded_tensor(0.0)."
        )
