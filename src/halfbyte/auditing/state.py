"""A step that leaves no trace: what a model is, kept and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["preserved"]

_PLAIN = (bool, int, float, str, tuple, type(None))
"""Types of attributes that are put back by value, such as the counters and flags of quantizers."""


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Puts back, at the end, what a step may change.

    That is every parameter, gradient and buffer, each module's simple attributes, and torch's generators. Tensors stay
    the same objects, and the version counters of parameters do not move.
    """
    parameters = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    attributes = [
        (module, {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)})
        for module in model.modules()
    ]
    for p, _, _ in parameters:
        p.grad = None
    devices = sorted({p.device.index or 0 for p, _, _ in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for p, value, grad in parameters:
                p.data.copy_(value)
                p.grad = grad
            for module, name, buffer, kept in buffers:
                _put_back(module, name, buffer, kept)
            for module, plain in attributes:
                vars(module).update(plain)


def _put_back(module: nn.Module, name: str, buffer: Tensor | None, kept: Tensor | None) -> None:
    """A buffer may have been written to, or replaced by another tensor."""
    module._buffers[name] = buffer
    if buffer is not None and kept is not None:
        buffer.data.copy_(kept)
