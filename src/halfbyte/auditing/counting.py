"""Which module multiplies what: a dispatch mode that sees every product of a step, and hooks that say whose it is.

What a converted layer computes itself is reported by its plan; the counter looks away meanwhile. Everything else is an
operation of torch on floats.
"""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Counted", "GemmCounter", "Scope"]

_aten = torch.ops.aten


class Scope:
    """Which module is running, in the forward pass and, by its autograd nodes, in the backward pass.

    Every autograd node has a number that grows from one to the next. A module's nodes are those made between its start
    and its end, so a node that runs in backward leads back to its module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._stack: list[str] = []
        self._starts: list[int] = []
        self._names: list[str] = []
        self._handles: list[Any] = []
        for fqn, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(fqn), prepend=True))
            self._handles.append(module.register_forward_hook(self._leaving, prepend=True))

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    def current(self) -> tuple[str, str]:
        """(fully qualified name, "forward" or "backward"); no name outside every module."""
        node = torch._C._current_autograd_node()
        if self._stack or node is None:
            return (self._stack[-1] if self._stack else "", "forward")
        number = getattr(node, "_sequence_nr", lambda: -1)()
        place = bisect.bisect_right(self._starts, number) - 1
        return (self._names[place] if place >= 0 else "", "backward")

    def _mark(self) -> None:
        """From the next node on, nodes belong to the module on top."""
        number: int = torch._C._autograd._get_sequence_nr()
        name = self._stack[-1] if self._stack else ""
        if self._starts and self._starts[-1] == number:
            self._names[-1] = name
        else:
            self._starts.append(number)
            self._names.append(name)

    def _entering(self, fqn: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._stack.append(fqn)
            self._mark()

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()
        self._mark()


@dataclass
class Counted:
    """Products of one kind in one module."""

    calls: int = 0
    macs: int = 0


class GemmCounter(TorchDispatchMode):
    """Counts multiply-accumulates of every product outside converted layers.

    Attributes:
        found: by (module, operation, floating type, direction).
    """

    def __init__(self, scope: Scope) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scope = scope
        self._paused = 0
        self.found: dict[tuple[str, str, str, str], Counted] = {}

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """Around what a converted layer computes."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused:
            macs = _macs(func, args, kwargs, result)
            if macs:
                dtypes = [a.dtype for a in args if isinstance(a, Tensor)]
                name, direction = self._scope.current()
                dtype = str(dtypes[-1]).removeprefix("torch.")
                key = (name, str(func._overloadpacket), dtype, direction)
                entry = self.found.setdefault(key, Counted())
                entry.calls += 1
                entry.macs += macs
        return result


def _macs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Multiply-accumulates of an operation of torch; 0 for one that is no product."""
    packet = getattr(func, "_overloadpacket", None)
    if packet in _FURTHER:
        return _FURTHER[packet](*args)
    formula = flop_registry.get(_SAME.get(packet, packet))
    # A registered formula counts a multiplication and an addition as two.
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result)) // 2


def _vector(matrix: Tensor, *_: Any) -> int:
    return matrix.numel()


def _added_vector(_: Tensor, matrix: Tensor, *__: Any) -> int:
    return matrix.numel()


def _fused_recurrent(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any) -> int:
    """A layer of a recurrent network in one operation: x_TNI times both matrices."""
    return x.shape[0] * x.shape[1] * (w_input.numel() + w_hidden.numel())


def _fused_recurrent_backward(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any) -> int:
    return 2 * _fused_recurrent(x, w_input, w_hidden)


def _three_factors(a: Tensor, b: Tensor, c: Tensor, at_a: list[int], at_b: list[int], at_c: list[int], *_: Any) -> int:
    """A sum of products of three numbers, `torch.nn.Bilinear`'s: one for each point of the space that they span."""
    shapes = []
    for tensor, places in ((a, at_a), (b, at_b), (c, at_c)):
        shape = list(tensor.shape)
        for place in places:
            shape.insert(place, 1)
        shapes.append(shape)
    return math.prod(torch.broadcast_shapes(*shapes))


def _known(names: dict[str, Any]) -> dict[Any, Any]:
    """The table with operations in the place of their names; those that this torch lacks are left out."""
    return {getattr(_aten, name): value for name, value in names.items() if hasattr(_aten, name)}


_FURTHER: dict[Any, Callable[..., int]] = _known(
    {
        "mv": _vector,
        "dot": _vector,
        "addmv": _added_vector,
        "_trilinear": _three_factors,
        "mkldnn_rnn_layer": _fused_recurrent,
        "mkldnn_rnn_layer_backward": _fused_recurrent_backward,
    }
)
"""Products that torch's own table of formulas lacks."""

_SAME: dict[Any, Any] = _known(
    {
        "_scaled_dot_product_flash_attention_for_cpu": _aten._scaled_dot_product_flash_attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _aten._scaled_dot_product_flash_attention_backward,
    }
)
"""Operations that multiply as another one does, for which there is a formula."""
