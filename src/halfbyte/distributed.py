"""What the ranks of a distributed run agree on: a layer's first clip, and the votes on its gradient scale.

Everything else is averaged by whoever wraps the model (DDP, FSDP2). Outside a distributed run all of this does nothing.
The collectives run in a training forward pass, in the order of the layers, so every rank must run the same layers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["least_of_ranks", "mean_of_ranks", "most_of_ranks", "rank", "ranks", "sum_of_ranks"]


def ranks() -> int:
    """How many processes train together; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 outside a distributed run."""
    return dist.get_rank() if ranks() > 1 else 0


def _reduced(x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    if ranks() == 1:
        return x
    with torch.no_grad():
        result = x.detach().clone()
        dist.all_reduce(result, how)
    return result


def sum_of_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks, elementwise."""
    return _reduced(x, dist.ReduceOp.SUM)


def mean_of_ranks(x: Tensor) -> Tensor:
    """The mean over all ranks, elementwise."""
    return sum_of_ranks(x) / ranks() if ranks() > 1 else x


def least_of_ranks(x: Tensor) -> Tensor:
    """The smallest over all ranks, elementwise."""
    return _reduced(x, dist.ReduceOp.MIN)


def most_of_ranks(x: Tensor) -> Tensor:
    """The largest over all ranks, elementwise."""
    return _reduced(x, dist.ReduceOp.MAX)
