"""The recorder: it sees every operator of a forward and backward pass and tells the ledger whose it is.

A backward operator belongs to the forward operator whose node of the graph runs it. A node gets its number when the
forward operator begins, so the newest number names it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import HalfbyteError
from ..workload import Phase
from . import lanes
from .ledger import Call, Ledger, match
from .lineage import Lineage, where
from .numerics import Numerics, part_of
from .products import MULTIPLIES, UNREADABLE, read_convolution, read_product

__all__ = ["Recorder"]

_log = logging.getLogger("halfbyte")

_newest = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
"""The number that the next node of the graph will get."""


class Recorder(TorchDispatchMode):
    """Sees what runs inside it.

    Attributes:
        phase: what is running, set from outside.
        ledger: what has been written down.
    """

    def __init__(self, model: nn.Module, numerics: Numerics, ledger: Ledger) -> None:
        """Watches a copy without data.

        Args:
            model: the copy that will run; it gets hooks.
            numerics: its places.
            ledger: where everything is written.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Literal["fprop", "loss", "backward"] = "fprop"
        self.ledger = ledger
        self._numerics = numerics
        self._lineage = Lineage(model)
        self._stack: list[tuple[str, bool]] = []
        self._products_in: dict[str, int] = {}
        self._entered: dict[str, int] = {}
        self._calls: dict[int, list[Call]] = {}
        self._nodes: dict[int, tuple[str, str]] = {}
        self._strange: set[str] = set()
        for fqn, module in model.named_modules():
            self._attach(fqn, module)

    def _attach(self, fqn: str, module: nn.Module) -> None:
        """Makes a layer of the copy say when its forward begins and ends."""
        attention = isinstance(module, nn.MultiheadAttention)

        def enter(*_: object) -> None:
            self._stack.append((fqn, attention))
            self._products_in[fqn] = 0
            self._entered[fqn] = self._entered.get(fqn, 0) + 1

        def leave(*_: object) -> None:
            self._stack.pop()

        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave, always_call=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        namespace, _, name = func._schema.name.partition("::")
        if namespace not in ("prim", "profiler"):
            self._refuse(namespace, name)
            # Inside a layer's forward it is a forward pass, also where checkpointing runs it in the backward pass.
            if self.phase == "backward" and not self._stack:
                self._backward(func, name, args, kwargs, out)
            else:
                self._forward(func, name, args, kwargs, out)
        return out

    def _refuse(self, namespace: str, name: str) -> None:
        """Raises for operators that hide products, and warns once of those that nothing is known of."""
        if namespace in ("aten", "prims"):
            for beginning, cure in UNREADABLE.items():
                if name.startswith(beginning):
                    raise HalfbyteError(
                        f"{self._layer or 'The model'} calls aten::{name}, which hides its matrix products. "
                        f"It is {cure}."
                    )
        elif name not in self._strange:
            self._strange.add(name)
            _log.warning("%s::%s counts as one operation an element; no product in it is seen", namespace, name)

    @property
    def _layer(self) -> str:
        return self._stack[-1][0] if self._stack else ""

    @property
    def _prefix(self) -> str:
        return "" if self._stack or self.phase != "loss" else "loss_"

    def _forward(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        if lanes.is_view(func, name):
            return
        # The forward pass of a custom function runs without gradients, but under a node of its own.
        node = _newest() - 1
        self._nodes.setdefault(node, (self._layer, self._prefix))
        if name in MULTIPLIES:
            call = self._read(name, args, out)
            self.ledger.forward(call)
            self._calls.setdefault(node, []).append(call)
        elif not lanes.is_fill(name):
            where_to = {"layer": self._layer, "phase": "fprop", "prefix": self._prefix}
            self.ledger.vector_ops += lanes.work_of(
                func,
                args,
                kwargs,
                out,
                high=self.ledger.high_bytes,
                **where_to,  # type: ignore[arg-type]
            )
        self._lineage.follow(name, args, kwargs, lanes.outputs_of(func, args, kwargs, out))

    def _read(self, name: str, args: Sequence[Any], out: Tensor, *, as_dgrad: bool = False) -> Call:
        """A product and whose it is.

        Args:
            name: of the operator.
            args: its arguments.
            out: its result.
            as_dgrad: whether it is a dgrad of which no forward product is known, to be described by that.
        """
        if name == "convolution":
            a, b = args[0], args[1]
            product = read_convolution(a, b, out, transposed=args[6], groups=args[8])
        else:
            product, a, b = read_product(name, args)
            if self._lineage.weight(a) is not None and self._lineage.weight(b) is None:
                product, a, b = read_product(name, args, swapped=True)
        if as_dgrad:
            product = product.before_dgrad()
        weight = self._lineage.weight(b)
        if weight is None:
            shares = self._numerics.of_product(self._layer, self._in_attention())
        else:
            rows = range(product.n * product.groups) if name == "convolution" else self._lineage.rows(b, product.n)
            shares = self._numerics.of_weight(weight[0], rows, self._layer)
        total = sum(share for _, share in shares)
        return Call(
            product=product,
            places=[(place, part_of(product, place, share, total)) for place, share in shares],
            a=where(a),
            b=where(b),
            signed=self._lineage.is_signed(a),
            weight=weight is not None,
            sequence=self._entered.get(self._layer, 0) if shares[0][0].over_steps else 0,
        )

    def _in_attention(self) -> str | None:
        """Which of the two products of one of torch's attention layers this is; None elsewhere."""
        if not self._stack or not self._stack[-1][1]:
            return None
        self._products_in[self._layer] += 1
        return {1: "qk", 2: "pv"}.get(self._products_in[self._layer])

    def _backward(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        running = torch._C._current_autograd_node()
        node = -1 if running is None else running._sequence_nr()
        calls = self._calls.get(node, [])
        if name == "convolution_backward":
            self._convolution_backward(calls, args, out)
        elif name in MULTIPLIES:
            self._product_backward(calls, name, args, out)
        elif not (lanes.is_view(func, name) or lanes.is_fill(name)):
            given = [arg for arg in args if isinstance(arg, Tensor)]
            label, _ = lanes.label_of(name)
            layer, prefix = self._nodes.get(node, ("", ""))
            weights = self._lineage.gradient_of(given) if label == "add" else None
            if weights is not None:
                # The steps of a sequence have one wgrad, and nothing to add up.
                self._lineage.mark_gradient(out, weights)
                if weights[1]:
                    return
                layer, phase = weights[0], "wgrad"
            else:
                phase = "dgrad"
            if label == "sum" and calls:
                self.ledger.bias(calls[0], given[0].numel())
                return
            self.ledger.vector_ops += lanes.work_of(
                func,
                args,
                kwargs,
                out,
                layer=layer,
                phase=phase,  # type: ignore[arg-type]
                high=self.ledger.high_bytes,
                prefix=prefix,
            )

    def _convolution_backward(self, calls: Sequence[Call], args: Sequence[Any], out: Sequence[Any]) -> None:
        grad, x, weight, mask = args[0], args[1], args[2], args[10]
        fitting = [call for call in calls if call.b == where(weight) or call.product.taps == weight[0, 0].numel()]
        call = fitting[0] if fitting else self._read("convolution", [x, weight, *args[3:10]], grad)
        phases: tuple[Phase, ...] = ("dgrad", "wgrad")
        for wanted, phase, made in zip(mask, phases, out, strict=False):
            if wanted:
                self._finish(call, phase, made)
        if mask[2]:
            self.ledger.bias(call, grad.numel())

    def _product_backward(self, calls: Sequence[Call], name: str, args: Sequence[Any], out: Tensor) -> None:
        _, a, b = read_product(name, args)
        for call in calls:
            if phase := match(call, a, b):
                self._finish(call, phase, out)
                return
        self._finish(self._read(name, args, out, as_dgrad=True), "dgrad", out)

    def _finish(self, call: Call, phase: Phase, made: Tensor) -> None:
        self.ledger.backward(call, phase)
        if phase == "wgrad" and call.weight:
            self._lineage.mark_gradient(made, (call.layer, call.sequence))
