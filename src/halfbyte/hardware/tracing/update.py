"""What an optimizer's step costs, read from the step itself.

Operations are those that it runs. Memory is counted as one pass: whatever of a weight, its gradient and its state it
reads or writes at all is moved once, because an update in one sweep keeps everything between in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...errors import UnknownNameError
from ..workload import VectorOp
from . import lanes
from .lineage import where
from .products import distinct

__all__ = ["OptimizerLike", "optimizer_of", "update_ops"]

OptimizerLike = str | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None
"""``"sgd"``, ``"adam"``, a function from parameters to an optimizer, or None for no update."""


def optimizer_of(optimizer: OptimizerLike, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer of a copy's parameters.

    Raises:
        UnknownNameError: if there is none of that name.
    """
    if optimizer is None or callable(optimizer):
        return optimizer(parameters) if callable(optimizer) else None
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=False)
    if optimizer == "adam":
        return torch.optim.Adam(parameters, lr=1e-3, foreach=False)
    raise UnknownNameError("optimizer", str(optimizer), ("sgd", "adam", "a function from parameters to an optimizer"))


def update_ops(optimizer: torch.optim.Optimizer, model: nn.Module, master_bytes: int) -> list[VectorOp]:
    """One entry for each layer whose weights move.

    Args:
        optimizer: of the copy's parameters, which have gradients.
        model: the copy without data.
        master_bytes: of an element of a weight, its gradient and its state.
    """
    optimizer.step()  # the first step makes the state and is no step like the others
    sweep = _Sweep(optimizer, model)
    with sweep:
        optimizer.step()
    entries: dict[str, VectorOp] = {}
    for name, parameter in model.named_parameters():
        if name not in sweep.flops:
            continue
        layer = name.rpartition(".")[0]
        before = entries.get(layer)
        moved = (
            sum(map(distinct, tensors.values())) * master_bytes for tensors in (sweep.read[name], sweep.made[name])
        )
        read, written = moved
        entries[layer] = VectorOp(
            layer=layer,
            name="optimizer",
            phase="update",
            elements=parameter.numel() + (before.elements if before else 0),
            flops=sweep.flops[name] + (before.flops if before else 0),
            read_bytes=read + (before.read_bytes if before else 0),
            written_bytes=written + (before.written_bytes if before else 0),
            fusible=False,
        )
    return list(entries.values())


class _Sweep(TorchDispatchMode):
    """Adds up, for each parameter, operations and the memory that lives longer than the step."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, int] = {}
        self.read: dict[str, dict[int, Tensor]] = {}
        self.made: dict[str, dict[int, Tensor]] = {}
        self._owners: dict[int, str] = {}
        self._passing: dict[int, tuple[str, Tensor]] = {}
        for name, parameter in model.named_parameters():
            state = optimizer.state.get(parameter, {})
            for tensor in (parameter, parameter.grad, *tree_leaves(dict(state))):
                if isinstance(tensor, Tensor):
                    self._owners[where(tensor)[0]] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = lanes.mutated(func, args, kwargs)
        made = lanes.outputs_of(func, args, kwargs, out)
        owner = next((found for tensor in (*written, *given) if (found := self._owner(tensor))), None)
        for tensor in made:
            if owner is not None and where(tensor)[0] not in self._owners:
                self._passing[where(tensor)[0]] = (owner, tensor)
        if lanes.is_view(func, name) or lanes.is_fill(name):
            return out
        for group, tensors in ((self.read, given), (self.made, written)):
            for tensor in tensors:
                keeper = self._owners.get(where(tensor)[0])
                if keeper is not None:
                    group.setdefault(keeper, {})[where(tensor)[0]] = tensor
        for tensor in made:
            keeper = self._owner(tensor) or owner
            if keeper is not None and tensor.is_floating_point():
                work = lanes.per_element(name, kwargs) * distinct(tensor)
                self.flops[keeper] = self.flops.get(keeper, 0) + work
                self.read.setdefault(keeper, {})
                self.made.setdefault(keeper, {})
        return out

    def _owner(self, tensor: Tensor) -> str | None:
        memory = where(tensor)[0]
        return self._owners.get(memory) or self._passing.get(memory, (None, tensor))[0]
