"""Layers that run under a `Plan`: torch's own classes with another `forward`, and the plans in their `repr`.

A layer is converted by changing its class, not by replacing it: its parameters, hooks, and every reference to it stay.
`TWINS` is the table from torch's class to ours; only exact classes are in it, because a subclass may use its weight
in ways of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import ConversionError
from ..ops import Plan
from .attention import MultiheadAttention
from .cells import GRUCell, LSTMCell, RNNCell
from .dense import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear
from .planned import Planned, PlannedMany, Unit, stand_in_fast_path
from .recurrent import GRU, LSTM, RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "TWINS",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "MultiheadAttention",
    "Planned",
    "PlannedMany",
    "RNNCell",
    "Unit",
    "adopt",
    "is_twin",
    "plans_of",
    "register",
    "release",
    "twin_of",
    "units_of",
    "whys_of",
]

TWINS: dict[type[nn.Module], type[Planned] | type[PlannedMany]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
    nn.MultiheadAttention: MultiheadAttention,
}
"""torch's class to ours. `register` adds to it."""

_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in TWINS.items()}


def register(original: type[nn.Module], twin: type[Planned] | type[PlannedMany]) -> None:
    """Makes layers of a class of yours convertible.

    Args:
        original: the class; only layers of exactly this class are converted.
        twin: what they become: a subclass of `Planned` (one weight) or `PlannedMany`, and of the original.

    Raises:
        ConversionError: if the twin is no subclass of both, or the class has another twin already.
    """
    if not (issubclass(twin, original) and issubclass(twin, Planned | PlannedMany)):
        raise ConversionError(
            f"register({original.__name__}, {twin.__name__}) was asked for; a twin derives from Planned or PlannedMany "
            f"and from {original.__name__}: class {twin.__name__}(Planned, {original.__name__})."
        )
    if TWINS.get(original, twin) is not twin:
        raise ConversionError(
            f"register({original.__name__}, {twin.__name__}) was asked for, but its twin is {TWINS[original].__name__}."
        )
    TWINS[original] = twin
    _ORIGINALS[twin] = original


def is_twin(module: nn.Module) -> bool:
    """Whether a layer is converted, also where something made a subclass of it since (a parametrization, FSDP2)."""
    return isinstance(module, Planned | PlannedMany)


def twin_of(module: nn.Module) -> type[Planned] | type[PlannedMany] | None:
    """Our class for a layer: its twin, or the twin that it is already; None if it has none."""
    if is_twin(module):
        return next(kind for kind in type(module).__mro__ if kind in _ORIGINALS)  # type: ignore[return-value]
    return TWINS.get(type(module))


def units_of(module: nn.Module) -> tuple[Unit, ...]:
    """The places for plans in a layer, converted or not; none if it has no twin."""
    twin = twin_of(module)
    return () if twin is None else twin.units(module)


def plans_of(module: nn.Module) -> dict[str, Plan]:
    """A converted layer's plans by name; the name is empty where there is one for the whole layer."""
    if isinstance(module, Planned):
        return {"": module.plan}
    if isinstance(module, PlannedMany):
        return {name: plan for name, plan in module.plans.items() if isinstance(plan, Plan)}
    return {}


def whys_of(module: nn.Module) -> dict[str, str]:
    """Why each unit of a converted layer has its plan, or none."""
    if isinstance(module, Planned):
        return {"": module.why}
    return dict(module.whys) if isinstance(module, PlannedMany) else {}


def adopt(module: nn.Module, plans: Mapping[str, Plan], whys: Mapping[str, str]) -> None:
    """Turns one of torch's layers into our twin of it, in place.

    Args:
        module: a layer whose exact class is in `TWINS`.
        plans: the numerics of each of its units (`units_of`) by name; a unit that is absent computes in floating point.
        whys: for each unit the rule that decided, for `summary`.
    """
    twin = TWINS[type(module)]
    module.__class__ = twin
    for plan in plans.values():
        plan.train(module.training)
        plan.register_forward_pre_hook(stand_in_fast_path)
    if issubclass(twin, Planned):
        module.plan = plans[""]
        module.why = whys[""]  # type: ignore[assignment]
    else:
        module.plans = nn.ModuleDict(plans)
        module.plans.train(module.training)
        module.whys = dict(whys)  # type: ignore[assignment]


def release(module: nn.Module) -> None:
    """Turns our twin back into torch's layer, in place; its quantizers' state is dropped."""
    names = ("plan", "why") if isinstance(module, Planned) else ("plans", "whys")
    module.__class__ = _ORIGINALS[type(module)]
    for name in names:
        delattr(module, name)
