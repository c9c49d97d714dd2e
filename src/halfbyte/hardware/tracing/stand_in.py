"""Copies of a model and of its inputs that have shapes and no data.

A tensor without data costs nothing to make and nothing to compute on, so a network of any size can be run to see what
it does. The model itself is never run and never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from ...errors import HalfbyteError

__all__ = ["batch_of", "plain_operators", "stand_in", "stand_in_inputs"]


def stand_in(model: nn.Module, mode: FakeTensorMode | None) -> nn.Module:
    """A copy of a model whose parameters and buffers have no data.

    Args:
        model: any module; its tensors are not read.
        mode: in whose tensors the copy can be run; None makes tensors of the meta device, on which it can be converted.

    Raises:
        HalfbyteError: if the module cannot be copied.
    """
    empty = _empty_meta if mode is None else _empty_in(mode)
    memo: dict[int, Any] = {}
    for module in model.modules():
        # A tensor that is neither parameter nor buffer is shared: operators without data do not write to it.
        memo.update({id(value): value for value in vars(module).values() if isinstance(value, Tensor)})
    for tensor in (*model.parameters(), *model.buffers()):
        made = empty(tensor)
        trained = tensor.requires_grad
        memo[id(tensor)] = nn.Parameter(made, requires_grad=trained) if isinstance(tensor, nn.Parameter) else made
    try:
        return copy.deepcopy(model, memo)
    except Exception as problem:
        raise HalfbyteError(
            f"{type(model).__name__} was given to be traced, but it cannot be copied: {problem} A model is traced on a "
            "copy without data; make copy.deepcopy(model) work (drop handles, generators and results it holds)."
        ) from problem


def stand_in_inputs(given: Any, mode: FakeTensorMode) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments without data: of a tensor, a tuple of arguments, or a mapping of them."""
    empty = _empty_in(mode)

    def one(value: Any) -> Any:
        return empty(value).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    made = tree_map(one, given)
    if isinstance(made, Mapping):
        return (), dict(made)
    return (tuple(made) if isinstance(made, list) or type(made) is tuple else (made,)), {}


def batch_of(given: Any) -> int:
    """Samples in a batch: rows of the first tensor.

    Raises:
        HalfbyteError: if there is no tensor with rows.
    """
    for value in tree_leaves(given):
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    raise HalfbyteError(
        f"example_inputs of type {type(given).__name__} hold no tensor with rows; give a tensor, a tuple of arguments "
        "or a dict of keyword arguments."
    )


@contextmanager
def plain_operators() -> Iterator[None]:
    """Recurrent layers and attention as the products that they consist of, not as one fused operator of a library."""
    # The flag's own context manager also sets what not every build of torch has, and warns of it.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _empty_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _empty_in(mode: FakeTensorMode) -> Callable[[Tensor], Tensor]:
    def empty(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    return empty
