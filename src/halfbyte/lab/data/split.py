"""A data set in memory, and the order in which a run sees it.

Every run with the same seed sees the same examples in the same order, whatever its recipe: the order is a function of
(seed, epoch) alone, so a comparison of recipes compares nothing but recipes, and a run that stops in the middle of an
epoch finds its place again by counting batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import HalfbyteError

__all__ = ["Split", "batches", "count_batches"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a network learns from and what it is judged by. The two share no example.

    Attributes:
        train_inputs: shape (N, ...); first dimension counts examples.
        train_targets: shape (N, ...).
        test_inputs: shape (M, ...).
        test_targets: shape (M, ...).
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            inputs, targets = getattr(self, f"{part}_inputs"), getattr(self, f"{part}_targets")
            if len(inputs) != len(targets) or len(inputs) == 0:
                raise HalfbyteError(
                    f"The {part} part has {len(inputs)} inputs and {len(targets)} targets; "
                    f"it needs one target for each input, and at least one of both."
                )

    def to(self, device: torch.device) -> Split:
        """The same data on a device."""
        return Split(
            train_inputs=self.train_inputs.to(device),
            train_targets=self.train_targets.to(device),
            test_inputs=self.test_inputs.to(device),
            test_targets=self.test_targets.to(device),
        )


def count_batches(count: int, batch_size: int) -> int:
    """How many batches an epoch of ``count`` examples has; the last one may be smaller."""
    return -(-count // batch_size)


def batches(
    inputs: Tensor, targets: Tensor, *, batch_size: int, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled pass over the data.

    Args:
        inputs: shape (N, ...).
        targets: shape (N, ...).
        batch_size: examples in a batch; the last batch holds what is left.
        seed: seed of the run.
        epoch: number of the pass; the order depends on it and on the seed, and on nothing else.
        start: how many batches to pass over, for a run that goes on in the middle of an epoch.

    Yields:
        Pairs (inputs, targets) of at most ``batch_size`` examples.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    for rows in order.split(batch_size)[start:]:
        yield inputs[rows], targets[rows]
