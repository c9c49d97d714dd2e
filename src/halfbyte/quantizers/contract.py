"""What a quantizer is: a frozen `Spec` that describes it and a `Quantizer` that holds its state.

A `Spec` lives in a recipe: a frozen, keyword-only dataclass, checked at birth, free of tensors. ``spec.build()`` makes
the `Quantizer`, a module whose state (a learned clip, a statistic) is parameters and buffers, so ``state_dict``,
distributed training and resuming work as for any layer. State moves only in a training forward pass: not under
``no_grad``, not in ``eval``, and not when activation checkpointing runs a forward pass again.

What a tensor is quantized for is told by a `Use`: block formats lay their blocks along that GEMM's reduction, random
rounding draws numbers of its own for each operand.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed import ranks
from ..errors import SpecError, UnsupportedError
from ..formats import Format
from ..kernels import Gemm, Geometry, Reduction
from ..qtensor import QTensor
from ..rng import Draw
from .state import NonFiniteCounter

__all__ = ["Quantized", "Quantizer", "Spec", "Use", "in_backward", "quantize"]


def repr_as_before(value: Any, field: str, default: object) -> str:
    """A dataclass's repr, without a field that came later while that has its default.

    Checkpoints hold this text: those of before the field agree with what they were.
    """
    shown = ", ".join(f"{k}={v!r}" for k, v in vars(value).items() if k != field or v != default)
    return f"{type(value).__name__}({shown})"


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

    @property
    def stochastic(self) -> bool:
        """Whether rounding draws random numbers."""
        return False

    @property
    def along_reduction(self) -> bool:
        """Whether codes depend on the GEMM that the tensor goes to, because blocks run along its reduction."""
        return False

    @property
    def blocks(self) -> bool:
        """Whether there is more than one scale for a tensor."""
        return False

    @property
    def affine(self) -> bool:
        """Whether codes have a zero point."""
        return False

    @property
    def learns(self) -> bool:
        """Whether the optimizer moves a part of it, which therefore needs a gradient."""
        return False

    @property
    def for_gradients(self) -> bool:
        """Whether a grad_output slot may hold it."""
        return False

    @property
    def splits(self) -> bool:
        """Whether it makes several tensors of one, which only a grad_output slot can take."""
        return False

    def __str__(self) -> str:
        shown = {
            name: value for name, value in vars(self).items() if value != type(self).__dataclass_fields__[name].default
        }
        arguments = ", ".join(f"{k}={getattr(v, 'name', v)}" for k, v in shown.items())
        return f"{type(self).__name__}({arguments})"


@dataclass(frozen=True, eq=False, kw_only=True)
class Use:
    """What a tensor is quantized for.

    Attributes:
        gemm: the GEMM that it goes to.
        operand: its place there, 0 or 1.
        geometry: the layer's shape.
        draw: where random numbers come from.
        partner: the other operand, where it is known already.
        sample: which of several independent quantizations of one tensor this is.
    """

    gemm: Gemm
    operand: int
    geometry: Geometry
    draw: Draw
    partner: QTensor | Tensor | None = None
    sample: int = 0

    @property
    def view(self) -> Reduction:
        """How the tensor lies along the reduction."""
        return self.geometry.reduction_view(self.gemm, self.operand)

    def source(self, purpose: int = 0) -> tuple[Draw, int]:
        """The draw and which of its sets of numbers to take; another for each purpose (below 4) and sample."""
        return self.draw, 4 * self.sample + purpose


class Quantized(NamedTuple):
    """The result of `Quantizer.quantize`.

    Attributes:
        q: the codes.
        saved: what `Quantizer.backward` needs besides: packed bits, or nothing.
    """

    q: QTensor
    saved: tuple[Tensor | None, ...] = ()


class Quantizer(NonFiniteCounter, abc.ABC):
    """Turns a tensor into a `QTensor` and carries gradients back through that step.

    Attributes:
        spec: what it was built from.
        seed: what random rounding outside a layer draws from, or None.
    """

    spec: Spec
    seed: int | None = None

    def __init__(self, spec: Spec, *, device: torch.device | None = None, backend: str = "reference") -> None:
        super().__init__(device=device, backend=backend)
        self.spec = spec
        self._first_value: float | None = None
        self._was_kept = False

    @property
    def learned(self) -> nn.Parameter | None:
        """What the optimizer moves (a clip, a step), of shape (1,); None where nothing is learned."""
        return None

    def set_first(self, value: Tensor) -> None:
        """Sets what is learned to what the data chose; float of shape ()."""
        assert self.learned is not None
        self.learned.data.fill_(value)
        self._first_value = None if self._was_kept else value.item()

    def check_first(self) -> None:
        """Makes sure, at a later batch, that what an earlier one chose was kept; once it was, it is not asked again.

        Within a tenth of 1 an optimizer's step looks like a loss, so a choice there shows nothing.

        Raises:
            UnsupportedError: if the parameter is back near the 1 that it is made with. Sharded training does that: it
                lends a layer a whole copy of its parameters for a forward pass and throws it away.
        """
        if self._first_value is None or self.learned is None:
            return
        first, now = self._first_value, self.learned.item()
        self._first_value = None
        if abs(first - 1.0) < 0.1:
            return
        self._was_kept = True
        if ranks() > 1 and abs(now - 1.0) < 0.1 * abs(first - 1.0):
            raise UnsupportedError(
                f"{self.spec}: the first batch set the learned number to {first:.4g}, but it is {now:.4g} again. Are "
                "the parameters sharded (FSDP)? Run one training forward pass before fully_shard(), or load a "
                "checkpoint, or give the first value and let it not settle: Pact(clip=..., settle=0)."
            )

    def begin_pass(self) -> None:
        """A training forward pass begins, before its first tensor; decided by `halfbyte.ops.Plan.begin`."""

    @property
    def shown(self) -> str:
        """The learned number for people; "sharded" where this process does not hold it whole."""
        if self.learned is None or hasattr(self.learned, "full_tensor"):
            return "sharded"
        return f"{self.learned.item():.4g}"

    @property
    def format(self) -> Format | None:
        """The format of the codes; None while the first batch has not decided it."""
        found = self.spec.formats
        return found[0] if len(found) == 1 else None

    @abc.abstractmethod
    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        """The codes of x.

        Args:
            x: any floating type and shape.
            observe: whether state may move; decided by `halfbyte.ops.Plan.begin`.
            differentiable: whether `backward` will be called.
            use: what it is for; None outside a layer, where blocks run along the last dimension and random numbers
                come from `seed`.
        """

    def parts(self, x: Tensor, *, use: Use, observe: bool = False) -> tuple[QTensor, ...]:
        """The tensors whose sum stands for x: one, but for specs that split a number in two.

        Args:
            x: any floating type and shape.
            use: what it is for.
            observe: whether state may move.
        """
        return (self.quantize(x, observe=observe, use=use).q,)

    @abc.abstractmethod
    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        """The codes of x with a given scale instead of the quantizer's own.

        Args:
            x: any floating type and shape.
            scale: float32 of shape (), above zero.
        """

    def backward(self, grad: Tensor, q: QTensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        """From the gradient of the dequantized tensor, those of x and of `learned`. May overwrite `grad`.

        The default is the straight-through estimator: the gradient passes unchanged.
        """
        return grad, None

    def noise(self, x: Tensor, use: Use | None) -> Tensor:
        """Random numbers in [0, 1) for each element, float32 of shape (x.numel(),).

        Raises:
            SpecError: if there is neither a use nor a seed to draw from.
        """
        return self.kernels.uniform(x.numel(), *self.source(x, use))

    def source(self, x: Tensor, use: Use | None) -> tuple[Draw, int]:
        """Where random numbers for x come from: the draw, and which of its sets.

        Raises:
            SpecError: if there is neither a use nor a seed to draw from.
        """
        if use is not None:
            return use.source()
        require(self.seed is not None, f"{self.spec} without a seed", "quantize(x, spec, seed=...) gives one")
        assert self.seed is not None
        first = torch.zeros((), dtype=torch.int64, device=x.device)
        return Draw(seed=self.seed, layer=0, step=first, operand=0), 0

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
            Blocks of a block format run along its last dimension.
        spec: for example ``MinMax(bits=4)``, ``Sawb()``, ``Pact(clip=6.0)``, ``Radix4()`` or ``NVFP4()``.
        scale: a step to use instead of what the spec would measure, 2^-126 to 2^126; rounded to float32. With a given
            or fixed scale infinities saturate, except under `MinMax`, whose range they break. NaN anywhere makes the
            scale NaN.
        seed: for a spec that rounds at random, and only for one; equal seeds give equal codes.

    Returns:
        Codes with ``x_hat = scale * (value - zero_point)``.

    Raises:
        TypeError: if x is not a floating tensor, or the spec no `Spec`.
        SpecError: if the scale is not one number in that range, a seed is missing or would do nothing, or the spec does
            not make one tensor of one.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"quantize takes a floating torch.Tensor; got {kind}. Convert it with .float().")
    if not isinstance(spec, Spec):
        raise TypeError(f"quantize takes a spec such as MinMax(bits=4) or Radix4(); got {spec!r}.")
    require(seed is None or spec.stochastic, f"seed={seed} with {spec}", "a seed is for a spec that rounds at random")
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
