"""What is known of a tensor by how it came about: that it is made of a weight, and that it holds no negative number.

Kept by memory, not by tensor, so that views share it. Nothing here looks at data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .lanes import label_of

__all__ = ["Lineage", "where"]

_NEVER_NEGATIVE = frozenset({"relu", "sigmoid", "softmax", "abs", "exp", "hardsigmoid", "softplus", "square", "sqrt"})
_KEEPS_SIGN = frozenset({
    "max_pool", "avg_pool", "mean", "sum", "amax", "max", "min", "amin", "add", "mul", "div", "copy", "dropout",
    "upsample", "gather", "index", "roll", "flip", "repeat", "maximum", "minimum", "masked_fill", "where",
    "pad",
})  # fmt: skip
_TAKES_NUMBERS = frozenset({"add", "mul", "div", "masked_fill", "where", "pad"})
"""Those whose result a negative number among their arguments can make negative; that of others is a dimension."""

_LOOKS_UP = frozenset({"embedding", "embedding_bag", "index", "gather", "index_select"})


def where(tensor: Tensor) -> tuple[int, int]:
    """A tensor's place: its memory and where in it. A transposed view has the same."""
    return int(tensor.untyped_storage()._cdata), int(tensor.storage_offset())


class Lineage:
    """What is known of every tensor that has been seen."""

    def __init__(self, model: nn.Module) -> None:
        """Begins with a model's parameters and buffers."""
        self._kept: dict[int, Any] = {}  # memory that is known stays, or its number would come back as another's
        self._weights: dict[int, tuple[str, Tensor]] = {}
        self._fixed: set[int] = set()
        self._positive: set[int] = set()
        self._gradients: dict[int, tuple[str, int]] = {}
        for name, parameter in model.named_parameters():
            self._weights[self._know(parameter)] = (name, parameter)
        self._fixed.update(map(self._know, model.buffers()))

    def _know(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._kept.setdefault(storage._cdata, storage)
        return int(storage._cdata)

    def weight(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """The parameter that a tensor is, is a view of, or is made of and nothing else that moves."""
        return self._weights.get(where(tensor)[0])

    def rows(self, tensor: Tensor, count: int) -> range:
        """Which rows of its weight a tensor of that many is a view of; the first where it is no view."""
        known = self.weight(tensor)
        assert known is not None
        parameter = known[1]
        if where(parameter)[0] != where(tensor)[0] or parameter.dim() < 2 or parameter[0].numel() == 0:
            return range(count)
        first = (tensor.storage_offset() - parameter.storage_offset()) // parameter[0].numel()
        return range(first, first + count)

    def is_signed(self, tensor: Tensor) -> bool:
        """Whether it may hold a negative number."""
        return where(tensor)[0] not in self._positive

    def mark_gradient(self, tensor: Tensor, owner: tuple[str, int]) -> None:
        """Remembers a weight's gradient: its layer, and which sequence it is a step of, 0 for none."""
        self._gradients[self._know(tensor)] = owner

    def gradient_of(self, tensors: Sequence[Tensor]) -> tuple[str, int] | None:
        """What `mark_gradient` was told of all these tensors alike; None if they are no gradients of one weight."""
        found = {self._gradients.get(where(t)[0]) for t in tensors}
        return found.pop() if len(found) == 1 else None

    def follow(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Sequence[Tensor]) -> None:
        """Learns from one call of an operator in a forward pass.

        Args:
            name: of the operator, no view.
            args: its arguments.
            kwargs: its keyword arguments.
            made: what it gave or wrote into.
        """
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        label, _ = label_of(name)
        positive = self._stays_positive(name, args, kwargs, given)
        fixed = all(where(t)[0] in self._fixed or not _is_abstract(t) for t in given)
        weights = [self._weights[where(t)[0]] for t in given if where(t)[0] in self._weights]
        of_weight = bool(weights) and label not in _LOOKS_UP
        of_weight &= all(where(t)[0] in self._weights or where(t)[0] in self._fixed for t in given)
        for tensor in made:
            whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
            memory = self._know(tensor)
            _put(self._positive, memory, positive and whole and tensor.is_floating_point())
            if memory not in self._weights:
                _put(self._fixed, memory, fixed)
                if of_weight:
                    self._weights[memory] = max(weights, key=lambda known: known[1].numel())

    def _stays_positive(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], given: Sequence[Tensor]) -> bool:
        """Whether an operator gives no negative number, by what it is or by what it is given."""
        label = "pad" if name == "constant_pad_nd" else label_of(name)[0]
        if label in _NEVER_NEGATIVE or name.startswith("bernoulli"):
            return True
        second = args[1] if len(args) > 1 else None
        if label == "clamp":  # its lower end comes second
            return isinstance(second, int | float) and second >= 0
        if label == "pow":
            return isinstance(second, int | float) and second % 2 == 0
        if label not in _KEEPS_SIGN or "bicubic" in name:
            return False
        numbers = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, int | float)]
        if label in _TAKES_NUMBERS and any(number < 0 for number in numbers):
            return False
        floats = [t for t in given if t.is_floating_point()]
        return bool(floats) and not any(map(self.is_signed, floats))


def _is_abstract(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor)


def _put(memory: set[int], item: int, holds: bool) -> None:
    change: Callable[[int], None] = memory.add if holds else memory.discard
    change(item)
