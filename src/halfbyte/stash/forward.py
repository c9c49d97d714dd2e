"""A model's forward pass under the stash, and how a model gets and loses it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..distributed import rank
from ..errors import ConversionError
from ..rng import Draw
from .followed import fused_sequences
from .mode import Mode
from .run import LEAST_BYTES, OPERAND, Ledger, Run

__all__ = ["BITS", "STEP", "StashReport", "StashedForward", "attach", "describe", "detach", "report"]

BITS = {"int4": 4, "int8": 8}
"""The choices of ``convert(..., stash=...)`` and the bits of their codes."""

STEP = "stash_step"
"""The buffer of the model that counts its training forward passes, from which random numbers are drawn."""


@dataclass(frozen=True)
class StashReport:
    """What the last forward pass kept for its backward pass; ``str()`` is a table.

    Attributes:
        rows: operation, kind of keeping, how many tensors, their bytes, and the bytes that are kept.
    """

    rows: tuple[tuple[str, str, int, int, int], ...]

    @property
    def saved_bytes(self) -> int:
        """Bytes that are kept, those of the model's own parameters and buffers left out."""
        return sum(row[-1] for row in self.rows)

    def __str__(self) -> str:
        cells = [["operation", "kept as", "tensors", "MiB", "kept MiB"]]
        for operation, kind, count, before, after in self.rows:
            cells.append([operation, kind, str(count), _mib(before), _mib(after)])
        cells.append(["total", "", "", _mib(sum(row[3] for row in self.rows)), _mib(self.saved_bytes)])
        widths = [max(len(row[column]) for row in cells) for column in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


class StashedForward:
    """Stands in the place of a module's ``forward``, as an attribute of that one module."""

    def __init__(self, module: nn.Module, stash: str, *, backend: str, seed: int) -> None:
        """Takes the place.

        Args:
            module: whose forward pass it is.
            stash: a key of `BITS`.
            backend: a name in `halfbyte.kernels.BACKENDS`.
            seed: what random numbers are drawn from.
        """
        self.module, self.stash, self.backend, self.seed = module, stash, backend, seed
        self.before = vars(module).get("forward")
        self.ledger = Ledger()

    @property
    def plain(self) -> Any:
        """The forward pass without a stash."""
        return self.before if self.before is not None else type(self.module).forward.__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward pass; where a gradient can be asked for, under the stash."""
        if not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._eagerly)(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _eagerly(self, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            f"{type(self.module).__name__} was converted with stash={self.stash!r}, so torch.compile runs its training "
            "forward pass eagerly. Convert with stash=None to have it compiled.",
            stacklevel=2,
        )
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        step: Tensor = getattr(module, STEP)
        if module.training:
            step += 1
        run = Run(
            kernels.get(self.backend),
            BITS[self.stash],
            Draw(seed=self.seed, layer=0, step=step.clone(), operand=OPERAND, rank=rank()),
            own=(*module.parameters(), *module.buffers()),
            inputs=_tensors((args, kwargs)),
        )
        self.ledger = run.ledger
        with fused_sequences(module, run), run.hooks(), Mode(run):
            return self.plain(*args, **kwargs)


def _tensors(found: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from _tensors(tuple(found.values()))
    elif isinstance(found, tuple | list):
        for item in found:
            yield from _tensors(item)


def describe(model: nn.Module) -> str:
    """What the stash of a model does, for people; empty if it has none."""
    found = vars(model).get("forward")
    if not isinstance(found, StashedForward):
        return ""
    return (
        f"saved for backward: floats as {found.stash} with a minimum and a step for each 128 of them, at random; in "
        f"attention and softmax as int8; losses, statistics, weights, NaN and infinity, tensors below {LEAST_BYTES} "
        "bytes and the model's inputs as they are, but for those of batch norm; booleans, ReLU and dropout as one bit; "
        "indices as small integers"
    )


def attach(module: nn.Module, stash: str, *, backend: str, seed: int, device: torch.device) -> None:
    """Puts a module's forward pass under a stash, in place.

    Args:
        module: any module.
        stash: a key of `BITS`.
        backend: a name in `halfbyte.kernels.BACKENDS`.
        seed: what random numbers are drawn from.
        device: where the step is counted.
    """
    module.register_buffer(STEP, torch.zeros((), dtype=torch.int64, device=device))
    vars(module)["forward"] = StashedForward(module, stash, backend=backend, seed=seed)


def detach(module: nn.Module) -> None:
    """Gives a module its own forward pass back; does nothing where it has it."""
    found = vars(module).get("forward")
    if isinstance(found, StashedForward):
        del vars(module)["forward"]
        if found.before is not None:
            vars(module)["forward"] = found.before
        delattr(module, STEP)


def report(model: nn.Module) -> StashReport:
    """What the last forward pass with gradients kept, by operation, the largest first.

    Operations are torch's functions by name, converted layers all together.

    Raises:
        ConversionError: if the model has no stash.
    """
    found = vars(model).get("forward")
    if not isinstance(found, StashedForward):
        raise ConversionError(
            "report was asked for a model without a stash; convert(model, ..., stash='int4') gives it one."
        )
    rows = [(*names, count, before, after) for names, (count, before, after) in found.ledger.rows.items()]
    return StashReport(tuple(sorted(rows, key=lambda row: -row[-1])))
