"""What a quantizer's state is made of: buffers and parameters that keep their types, and a count of broken tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import NonFiniteWarning

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

    def screen(self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, observe: bool) -> tuple[Tensor, Tensor]:
        """Counts and reports a tensor with NaN or infinities, and makes sure that nothing plausible comes of it.

        Its scale becomes NaN, which makes every product NaN. On devices other than the CPU it is counted without a
        warning, which would have to wait for the device.

        Args:
            x: the tensor.
            scale: its scale, float32 of shape ().
            low: its smallest element.
            high: its largest.
            observe: whether to count.

        Returns:
            x with numbers in the place of NaN and infinity, and the scale or NaN.
        """
        bad = self.kernels.has_nonfinite(low, high)
        if bad.device.type == "cpu":
            if not bad:
                return x, scale
            warnings.warn(
                f"{self.extra_repr()}: a tensor with NaN or infinity was quantized; the result is NaN.",
                NonFiniteWarning,
                stacklevel=3,
            )
        if observe:
            self.nonfinite += bad
        return x.nan_to_num(nan=0.0), torch.where(bad, torch.full_like(scale, torch.nan), scale)
