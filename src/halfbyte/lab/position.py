"""How far a run is. A checkpoint holds this beside the weights and the generators, and a record is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Position"]


@dataclass
class Position:
    """How far a run is; with the weights and the generators, all that a checkpoint holds."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    score_sum: float = 0.0
    count: int = 0
    samples: int = 0
    train_seconds: float = 0.0
    test_seconds: float = 0.0
    threads: int = 0
    world_size: int = 1
    saved_bytes: int = 0
    sources: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)  # Empty in checkpoints from before they held them.
    curves: dict[str, list[float]] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)  # Of ordinary training, once fine-tuning has begun.
    nonfinite: dict[str, int] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)  # At the last batch of ordinary training.
