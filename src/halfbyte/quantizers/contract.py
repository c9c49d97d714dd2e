"""What a quantizer is: a frozen `Spec` that describes it and a `Quantizer` that holds its state.

A `Spec` lives in a recipe: a frozen, keyword-only dataclass, checked at birth, free of tensors. ``spec.build()`` makes
the `Quantizer`, a module whose state (a learned clip, a statistic) is parameters and buffers, so ``state_dict``,
distributed training and resuming work as for any layer. State moves only in a training forward pass: not under
``no_grad``, not in ``eval``, and not when activation checkpointing runs a forward pass again.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import NonFiniteWarning, SpecError
from ..formats import Format
from ..qtensor import QTensor

__all__ = ["Quantized", "Quantizer", "Spec", "in_backward", "quantize"]


@dataclass(frozen=True, kw_only=True)
class Spec(abc.ABC):
    """What one operand of one GEMM becomes. Subclasses are frozen, keyword-only and hashable."""

    @property
    @abc.abstractmethod
    def formats(self) -> tuple[Format, ...]:
        """The formats that codes may be in; more than one where the first batch decides."""

    @abc.abstractmethod
    def build(self, *, device: torch.device | None = None, backend: str = "reference") -> Quantizer:
        """A new quantizer with fresh state.

        Args:
            device: where its parameters and buffers live.
            backend: a name in `halfbyte.kernels.BACKENDS`.
        """

    def __str__(self) -> str:
        shown = {
            name: value for name, value in vars(self).items() if value != type(self).__dataclass_fields__[name].default
        }
        arguments = ", ".join(f"{k}={getattr(v, 'name', v)}" for k, v in shown.items())
        return f"{type(self).__name__}({arguments})"


class Quantized(NamedTuple):
    """The result of `Quantizer.quantize`.

    Attributes:
        q: the codes.
        saved: what `Quantizer.backward` needs besides: packed bits, or nothing.
    """

    q: QTensor
    saved: tuple[Tensor | None, ...] = ()


class Stateful(nn.Module):
    """A module whose state keeps its types: ``model.half()`` moves it to another device, but rounds no statistic."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        moved: Self = super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
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
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64, device=device))

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


class Quantizer(NonFiniteCounter, abc.ABC):
    """Turns a tensor into a `QTensor` and carries gradients back through that step.

    Attributes:
        spec: what it was built from.
        clip: the learned clip, or None.
        seed: what random rounding outside a layer draws from, or None.
    """

    spec: Spec
    clip: nn.Parameter | None
    seed: int | None = None

    def __init__(self, spec: Spec, *, device: torch.device | None = None, backend: str = "reference") -> None:
        super().__init__(device=device, backend=backend)
        self.spec = spec
        self.register_parameter("clip", None)

    @property
    def format(self) -> Format | None:
        """The format of the codes; None while the first batch has not decided it."""
        found = self.spec.formats
        return found[0] if len(found) == 1 else None

    @abc.abstractmethod
    def quantize(self, x: Tensor, *, observe: bool = False, differentiable: bool = False) -> Quantized:
        """The codes of x.

        Args:
            x: any floating type and shape.
            observe: whether state may move; decided by `halfbyte.ops.Plan.begin`.
            differentiable: whether `backward` will be called.
        """

    @abc.abstractmethod
    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        """The codes of x with a given scale instead of the quantizer's own.

        Args:
            x: any floating type and shape.
            scale: float32 of shape (), above zero.
        """

    def backward(self, grad: Tensor, q: QTensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        """From the gradient of the dequantized tensor, those of x and of `clip`. May overwrite `grad`.

        The default is the straight-through estimator: the gradient passes unchanged.
        """
        return grad, None

    def extra_repr(self) -> str:
        return str(self.spec)


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass inside one is activation checkpointing's second."""
    return torch._C._current_graph_task_id() != -1


def require(condition: bool, asked: object, possible: str) -> None:
    """Raises `SpecError` naming what was asked and what is possible, unless the condition holds."""
    if not condition:
        raise SpecError(f"{asked} was asked for; {possible}.")


def quantize(x: Tensor, spec: Spec, scale: float | Tensor | None = None, *, seed: int | None = None) -> QTensor:
    """One tensor to codes, without a model.

    Args:
        x: any floating type and shape, contiguous or not; 16-bit types are widened, float64 is computed in float64.
        spec: for example ``MinMax(bits=4)``, ``Sawb()``, ``Pact(clip=6.0)`` or ``Radix4()``.
        scale: a step to use instead of what the spec would measure, 2^-126 to 2^126; rounded to float32. With a given
            or fixed scale infinities saturate, except under `MinMax`, whose range they break. NaN anywhere makes the
            scale NaN.
        seed: for a spec that rounds at random, and only for one; equal seeds give equal codes.

    Returns:
        Codes with ``x_hat = scale * (value - zero_point)``.

    Raises:
        TypeError: if x is not a floating tensor, or the spec no `Spec`.
        SpecError: if the scale is not one number in that range, or a seed is missing or would do nothing.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"quantize takes a floating torch.Tensor; got {kind}. Convert it with .float().")
    if not isinstance(spec, Spec):
        raise TypeError(f"quantize takes a spec such as MinMax(bits=4) or Radix4(); got {spec!r}.")
    random = getattr(spec, "stochastic", False)
    require(seed is None or random, f"seed={seed} with {spec}", "a seed is for a spec that rounds at random")
    quantizer = spec.build(device=x.device)
    quantizer.seed = seed
    if scale is None:
        return quantizer.quantize(x.detach()).q
    step = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    possible = "a scale is one number from 2^-126 to 2^126, above zero"
    require(step.numel() == 1 and bool(2.0**-126 <= step.min() <= 2.0**126), f"scale={step.tolist()}", possible)
    return quantizer.quantize_scaled(x.detach(), step.reshape(()))


def without_nan(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """x with 0 in the place of NaN, and the scale, or NaN if there was one.

    For scales that do not depend on the data: there an infinity stays and saturates, as every format does.
    """
    broken = low.isnan() | high.isnan()
    return torch.where(x.isnan(), 0.0, x), torch.where(broken, torch.nan, scale)
