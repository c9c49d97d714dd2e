"""`audit`: one training step under watch, and the verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..convert import PROMISE
from ..convert.report import LEFT_ALONE
from ..ops import Plan
from ..watching import watch
from .counting import GemmCounter, Scope
from .ledger import SLOTS, Ledger
from .report import AuditReport, FloatGemm, GemmReport, SelfTest
from .selftest import self_test
from .state import preserved

__all__ = ["audit"]

Batch = Tensor | Sequence[Any] | dict[str, Any]
Forward = Callable[[nn.Module], Tensor]
Loss = Callable[[Any, Any], Tensor]

_KNOWN = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Layers that multiply; in any other module a product is its own code's."""


def audit(model: nn.Module, batch: Batch | Forward, loss: Loss | None = None) -> AuditReport:
    """Runs one training step (forward and backward, no optimizer) and reports what really ran in four bits.

    The model is as before afterwards: parameters, gradients, buffers, statistics, mode, and torch's generators. During
    the step it is in training mode.

    The audit fails, that is `AuditReport.ok` is False with the reasons, if

    * no layer is converted, or one that `halfbyte.convert` promised did not run on codes of the promised formats;
    * a quantizer does not do what it says, in the step or in its self-test on the model's device;
    * more than 16 different codes stand in a 4-bit slot;
    * all codes of a gradient are zero and the gradient is not;
    * a product is not the float64 product of its codes, or a layer's output not that product plus its bias;
    * the step raised an error.

    Under ``fp32`` nothing is promised: the audit passes, with a share of zero.

    Args:
        model: a model that `halfbyte.convert` has seen.
        batch: the model's input; or a pair (input, targets); or a dict of keyword arguments; or a function that calls
            the model it is given and returns the loss.
        loss: from the model's output and the whole batch to a scalar; None for the mean square of all floating tensors
            in the output.

    Returns:
        The report.

    Raises:
        TypeError: if the batch is none of those.
    """
    forward = batch if callable(batch) and not isinstance(batch, Tensor) else _forward(batch, loss)
    scope = Scope(model)
    counter = GemmCounter(scope)
    ledger = Ledger(model, counter.looking_away)
    seen = _Step()
    with preserved(model), _training(model):
        try:
            with watch(model, ledger), counter:
                forward(model).backward()
            seen.graded = {name for name, p in model.named_parameters() if p.grad is not None}
        except Exception as error:  # noqa: BLE001 - that a step fails is what an audit reports
            seen.failure = f"The step raised {type(error).__name__}: {error}"
        finally:
            scope.remove()
            ledger.remove()
        seen.idle_biases = [] if seen.failure else ledger.idle_biases()
    seen.device = str(next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu")))
    return _verdict(model, ledger, counter, self_test(ledger.plans), seen)


@dataclass
class _Step:
    """What came of the step as a whole: the error that it raised, which parameters got a gradient, where it ran."""

    failure: str = ""
    graded: set[str] = field(default_factory=set)
    idle_biases: list[str] = field(default_factory=list)
    device: str = ""


def _forward(batch: Batch, loss: Loss | None) -> Forward:
    """From a model to the loss on a batch."""
    args, kwargs = _arguments(batch)

    def forward(model: nn.Module) -> Tensor:
        output = model(*args, **kwargs)
        return _mean_square(output) if loss is None else loss(output, batch)

    return forward


def _arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return (batch[0],), {}
    shown = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
    raise TypeError(
        f"audit was given {shown} as a batch; a tensor, a pair (input, targets) or a dict of keyword arguments is "
        "possible. Several inputs go into a dict."
    )


def _mean_square(output: Any) -> Tensor:
    """The loss where none is given: every floating tensor of the output takes part."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()


@contextlib.contextmanager
def _training(model: nn.Module) -> Any:
    """Training mode for the time of the step, and afterwards each module's own."""
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _verdict(model: nn.Module, ledger: Ledger, counter: GemmCounter, tests: list[SelfTest], seen: _Step) -> AuditReport:
    modules = dict(model.named_modules())
    floats = _float_gemms(modules, counter)
    layers = [*ledger.reports(), *_floating_plans(ledger.plans, floats, modules)]
    reasons = [seen.failure] if seen.failure else []
    promise = _promise(modules)
    left_alone = any(hasattr(module, LEFT_ALONE) for module in modules.values())
    if not (promise or ledger.plans or left_alone):
        reasons.append("No layer is converted: nothing in this model runs on codes. Call halfbyte.convert first.")
    if not seen.failure:
        for name, recipe in promise.items():
            layers += _skipped(name, recipe, ledger, layers, modules, seen.graded)
    reasons += [f"{entry.name or '(model)'}, {entry.gemm}: {why}" for entry in layers for why in entry.reasons]
    reasons += [*_products_in_float(ledger.plans, floats), *seen.idle_biases]
    reasons += [f"Self-test, {test.quantizer}, {test.check}: {test.detail}" for test in tests if not test.ok]
    coded, four_bit = ledger.macs
    total = coded + sum(gemm.macs for gemm in floats)
    return AuditReport(
        ok=not reasons,
        reasons=tuple(reasons),
        mac_share_4bit=four_bit / total if total else 0.0,
        macs=total,
        device=seen.device,
        layers=tuple(layers),
        float_gemms=tuple(floats),
        self_test=tuple(tests),
    )


def _promise(modules: dict[str, nn.Module]) -> dict[str, str]:
    """The recipe of each plan that `convert` promised to this model, or to a part of it before it was wrapped."""
    return {
        ".".join(part for part in (fqn, name) if part): recipe
        for fqn, module in modules.items()
        for name, recipe in vars(module).get(PROMISE, {}).items()
    }


def _float_gemms(modules: dict[str, nn.Module], counter: GemmCounter) -> list[FloatGemm]:
    return [
        FloatGemm(
            name=name,
            kind=type(modules[name]).__name__,
            op=op,
            dtype=dtype,
            direction=direction,
            calls=counted.calls,
            macs=counted.macs,
            functional=not isinstance(modules[name], _KNOWN),
        )
        for (name, op, dtype, direction), counted in counter.found.items()
    ]


def _owner(plan_name: str, modules: dict[str, nn.Module]) -> str:
    """The module that a plan's name begins with: itself, or the layer that has several plans."""
    return plan_name if plan_name in modules else plan_name.rpartition(".")[0]


def _is_weight(parameter: str, owner: str) -> bool:
    """Whether a parameter is a weight of that module itself, perhaps parametrized: no bias, no learned clip."""
    first, _, rest = parameter.removeprefix(f"{owner}." if owner else "").partition(".")
    own = parameter.startswith(f"{owner}.") or not owner
    return own and "bias" not in first + rest and (not rest or first == "parametrizations")


def _floating_plans(plans: dict[str, Plan], floats: list[FloatGemm], modules: dict[str, nn.Module]) -> list[GemmReport]:
    """Layers under a recipe that only chooses a floating type: what their module multiplied in.

    A layer with several plans has products beside theirs (those of attention), so there the type must be among those
    that ran, and multiply-accumulates are not told apart.
    """
    found = []
    for name, plan in plans.items():
        if not plan.recipe.in_floating_point:
            continue
        owner, promised = _owner(name, modules), str(plan.recipe.dtype).removeprefix("torch.")
        for direction, gemms in (("forward", ("fprop",)), ("backward", ("dgrad", "wgrad"))):
            own = [gemm for gemm in floats if gemm.name == owner and gemm.direction == direction]
            ran = sorted({gemm.dtype for gemm in own})
            kept = ran == [promised] or (owner != name and promised in ran)
            found += [
                GemmReport(
                    name=name,
                    gemm=gemm,
                    recipe=plan.recipe.name,
                    executed=promised if kept else " and ".join(ran),
                    calls=sum(g.calls for g in own),
                    macs=sum(g.macs for g in own) // len(gemms) if owner == name else 0,
                    operands={},
                    reasons=() if kept else (f"it ran in {' and '.join(ran)}; promised is {promised}",),
                )
                for gemm in gemms
                if own
            ]
    return found


def _skipped(
    name: str,
    recipe: str,
    ledger: Ledger,
    layers: list[GemmReport],
    modules: dict[str, nn.Module],
    graded: set[str],
) -> list[GemmReport]:
    """GEMMs of a promised layer that did not run on codes."""
    plan = ledger.plans.get(name)

    def missing(gemm: str, why: str) -> GemmReport:
        return GemmReport(name=name, gemm=gemm, recipe=recipe, executed="not on codes", operands={}, reasons=(why,))

    if plan is None:
        return [missing("fprop", f"recipe {recipe} was promised, but the layer is not converted")]
    if plan.recipe.name != recipe:
        return [missing("fprop", f"recipe {recipe} was promised, but the layer has {plan.recipe.name}")]
    ran = {entry.gemm for entry in layers if entry.name == name}
    if "fprop" not in ran:
        return [missing("fprop", f"recipe {recipe} was promised, but this step did not run the layer on its codes")]
    if plan.recipe.in_floating_point:
        return []
    expected = []
    if any(_is_weight(parameter, _owner(name, modules)) for parameter in graded):
        expected.append("wgrad")
    if name in ledger.needs_dgrad and expected:
        expected.append("dgrad")
    return [
        missing(gemm, f"the layer has a gradient that did not come from {' x '.join(SLOTS[gemm])}")
        for gemm in expected
        if gemm not in ran
    ]


def _products_in_float(plans: dict[str, Plan], floats: list[FloatGemm]) -> list[str]:
    """Products that a converted layer's module ran as torch operations, beside its plan."""
    coded = {name for name, plan in plans.items() if not plan.recipe.in_floating_point}
    return [
        f"{gemm.name or '(model)'}: {gemm.op} ran in {gemm.dtype} ({gemm.direction}) beside the layer's codes"
        for gemm in floats
        if gemm.name in coded
    ]
