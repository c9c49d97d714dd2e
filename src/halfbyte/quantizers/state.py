"""What a quantizer's state is made of: buffers and parameters that keep their types, and a count of broken tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import NonFiniteWarning
from .number import Number, choose, finite, read

__all__ = ["NonFiniteCounter", "Stateful"]


class Stateful(nn.Module):
    """A module whose state keeps its types: ``model.half()`` moves it to another device, but rounds no statistic.

    State that was declared on the meta device starts when it gets memory (``model.to_empty(device=...)``).
    """

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[str, tuple[Any, torch.dtype]] = {}

    def declare(
        self, name: str, value: Any, dtype: torch.dtype, *, device: torch.device | None, persistent: bool = True
    ) -> None:
        """Registers a buffer.

        Args:
            name: of the attribute.
            value: what it starts with: a number, or a list of numbers.
            dtype: its type, which it keeps.
            device: where it lives.
            persistent: whether it is in the ``state_dict``.
        """
        self._first[name] = value, dtype
        self.register_buffer(name, torch.tensor(value, dtype=dtype, device=device), persistent=persistent)

    def declare_parameter(self, name: str, value: float, *, device: torch.device | None) -> None:
        """Registers a float32 parameter of shape (1,): sharded training refuses parameters without a dimension."""
        self._first[name] = [value], torch.float32
        self.register_parameter(name, nn.Parameter(torch.tensor([value], device=device)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        unborn = {name for name in self._first if getattr(self, name).is_meta}
        moved: Self = super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        for name in unborn:
            tensor = getattr(self, name)
            if not tensor.is_meta:
                value, dtype = self._first[name]
                tensor.data.copy_(torch.tensor(value, dtype=dtype))
        return moved


class NonFiniteCounter(Stateful):
    """What every quantizer has: a backend, and a count of the broken tensors that reached it.

    Attributes:
        backend: a name in `halfbyte.kernels.BACKENDS`.
        nonfinite: how many training tensors held a NaN or an infinity; int64 of shape ().
    """

    nonfinite: Tensor

    def __init__(self, *, device: torch.device | None, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.declare("nonfinite", 0, torch.int64, device=device)

    @property
    def kernels(self) -> kernels.Backend:
        """The backend's functions."""
        return kernels.get(self.backend)

    def range_of(self, x: Tensor) -> tuple[Number, Number]:
        """The smallest and the largest element, to compute with."""
        low, high = self.kernels.value_range(x)
        return read(low), read(high)

    def marked(self, scale: Tensor, low: Number, high: Number, *, observe: bool) -> Tensor:
        """The scale of a tensor, or NaN if that held NaN or infinities, so that nothing plausible comes of it.

        A NaN as the scale makes every product NaN. Such a tensor is counted and reported; on devices other than the CPU
        it is counted without a warning, which would have to wait for the device.

        Args:
            scale: float32 of shape ().
            low: the tensor's smallest element.
            high: its largest.
            observe: whether to count.
        """
        sound = finite(low) & finite(high)
        if not isinstance(sound, Tensor):
            if sound:
                return scale
            warnings.warn(
                f"{self.extra_repr()}: a tensor with NaN or infinity was quantized; the result is NaN.",
                NonFiniteWarning,
                stacklevel=4,
            )
        if observe:
            self.nonfinite += choose(sound, 0, 1)
        return torch.full_like(scale, torch.nan) if sound is False else torch.where(sound, scale, torch.nan)

    def screen(self, x: Tensor, scale: Tensor, low: Number, high: Number, *, observe: bool) -> tuple[Tensor, Tensor]:
        """`marked`, and x with numbers in the place of NaN and infinity.

        Args:
            x: the tensor.
            scale: its scale, float32 of shape ().
            low: its smallest element.
            high: its largest.
            observe: whether to count.
        """
        kept = self.marked(scale, low, high, observe=observe)
        return x if kept is scale else x.nan_to_num(nan=0.0), kept
