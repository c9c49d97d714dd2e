"""Batch norms whose result goes to a ReLU and nowhere else: those that it follows in a `torch.nn.Sequential`.

Norm, ReLU, its bits and the codes of the norm's input then take one read and one write of the tensor, not two of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from .run import Run

__all__ = ["fused_sequences"]


@contextlib.contextmanager
def fused_sequences(model: nn.Module, run: Run) -> Iterator[None]:
    """While one of the model's sequences runs inside, the run knows which of its norms a ReLU follows.

    A norm is known by its running mean. Elsewhere, for a norm that is called by itself, nothing changes; nor where
    somebody's hook looks at the norm or the ReLU.
    """
    handles = []
    for sequence in model.modules():
        norms = _norms_before_relu(sequence) if type(sequence) is nn.Sequential else frozenset()
        if norms and sequence is model:
            run.followed.append(norms)  # Its forward pass is what runs inside; its hooks have been called already.
        elif norms:
            handles.append(sequence.register_forward_pre_hook(lambda *_, norms=norms: run.followed.append(norms)))
            handles.append(sequence.register_forward_hook(lambda *_: run.leave(), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _norms_before_relu(sequence: nn.Sequential) -> frozenset[int]:
    """The ids of the running means. A norm of another class may do more, one that comes twice may be followed once."""
    modules = list(sequence._modules.values())
    return frozenset(
        id(norm.running_mean)
        for norm, relu in pairwise(modules)
        if type(norm) in _NORMS and norm.running_mean is not None and sum(m is norm for m in modules) == 1
        if type(relu) is nn.ReLU and not (_is_watched(norm) or _is_watched(relu))
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook sees what goes in or comes out, or another forward pass stands in the place of its own."""
    everywhere = nn.modules.module
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    of_all = (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks)
    return any(hooks) or any(of_all) or "forward" in vars(module)
