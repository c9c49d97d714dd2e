"""The six operand slots of a layer's three GEMMs.

    fprop(input, weight)         -> output
    dgrad(grad_output, weight)   -> grad_input
    wgrad(grad_output, input)    -> grad_weight

A slot holds a `Spec`, or `REUSE` (the codes that fprop made), or `Requantize` (those codes quantized anew), or None
(floating point). A GEMM may have a transform, which rotates both of its operands.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from ..kernels import Gemm
from ..quantizers import Hadamard, Spec
from ..quantizers.contract import repr_as_before

__all__ = ["REUSE", "Dgrad", "Fprop", "Gemms", "Requantize", "Reuse", "Slot", "Wgrad"]


class Reuse(enum.Enum):
    """The type of `REUSE`."""

    REUSE = "reuse"

    def __str__(self) -> str:
        return "reuse"


REUSE: Final = Reuse.REUSE
"""In a backward slot: the codes that fprop made of the same tensor."""


@dataclass(frozen=True, kw_only=True)
class Requantize:
    """In a backward slot: the numbers that fprop's codes stand for, quantized anew in the backward pass.

    Only the codes of fprop are kept in between, and the gradient is one of what the forward pass really multiplied.

    Attributes:
        spec: how.
    """

    spec: Spec

    def __str__(self) -> str:
        return f"requantize {self.spec}"


Slot = Spec | Reuse | Requantize | None
"""What stands in one of the six places."""


def _with_float_gain(gemm: Dgrad | Wgrad) -> None:
    """2 and 2.0 are one gain, so they get one text, too: checkpoints are held against it."""
    if type(gemm.gain) is int:
        object.__setattr__(gemm, "gain", float(gemm.gain))


@dataclass(frozen=True, kw_only=True)
class Fprop:
    """The operands of the forward GEMM.

    Attributes:
        input: of the layer's input.
        weight: of the layer's weight.
        transform: of both, along the input features.
    """

    input: Spec | None = None
    weight: Spec | None = None
    transform: Hadamard | None = None


@dataclass(frozen=True, kw_only=True)
class Dgrad:
    """The operands of the GEMM that gives grad_input.

    Attributes:
        grad_output: of the output's gradient.
        weight: of the layer's weight.
        transform: of both, along the output features.
        samples: how many independent random quantizations of the gradient are averaged; a power of two up to 8.
        gain: what the rounded gradient is multiplied by, 0.25 to 4; it goes into its scale, after the codes. Undoes a
            mean shrinkage that is known ("Where bias comes from").
    """

    grad_output: Spec | None = None
    weight: Slot = REUSE
    transform: Hadamard | None = None
    samples: int = 1
    gain: float = 1.0

    def __post_init__(self) -> None:
        _with_float_gain(self)

    def __repr__(self) -> str:
        return repr_as_before(self, "gain", 1.0)


@dataclass(frozen=True, kw_only=True)
class Wgrad:
    """The operands of the GEMM that gives grad_weight.

    Attributes:
        grad_output: of the output's gradient.
        input: of the layer's input.
        transform: of both, along the rows (of a convolution: the images).
        samples: how many independent random quantizations of the gradient are averaged; a power of two up to 8.
        gain: what the rounded gradient is multiplied by, 0.25 to 4; it goes into its scale, after the codes. Undoes a
            mean shrinkage that is known ("Where bias comes from").
    """

    grad_output: Spec | None = None
    input: Slot = REUSE
    transform: Hadamard | None = None
    samples: int = 1
    gain: float = 1.0

    def __post_init__(self) -> None:
        _with_float_gain(self)

    def __repr__(self) -> str:
        return repr_as_before(self, "gain", 1.0)


@dataclass(frozen=True, kw_only=True)
class Gemms:
    """The three GEMMs together.

    Attributes:
        fprop: the forward one.
        dgrad: the one that gives grad_input.
        wgrad: the one that gives grad_weight.
    """

    fprop: Fprop
    dgrad: Dgrad
    wgrad: Wgrad

    def operands(self, gemm: Gemm) -> tuple[Spec | None, Spec | None]:
        """What both operands of a GEMM are rounded by, with fprop's spec in the place of `REUSE`."""
        first: Spec | None
        second: Slot
        first, second = {
            "fprop": (self.fprop.input, self.fprop.weight),
            "dgrad": (self.dgrad.grad_output, self.dgrad.weight),
            "wgrad": (self.wgrad.grad_output, self.wgrad.input),
        }[gemm]
        if isinstance(second, Reuse):
            second = self.fprop.weight if gemm == "dgrad" else self.fprop.input
        return first, second.spec if isinstance(second, Requantize) else second

    @property
    def transforms(self) -> dict[Gemm, Hadamard | None]:
        """The transform of each GEMM."""
        return {"fprop": self.fprop.transform, "dgrad": self.dgrad.transform, "wgrad": self.wgrad.transform}

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Every spec in a slot, those inside `Requantize` included."""
        found = (slot.spec if isinstance(slot, Requantize) else slot for slot in self.slots.values())
        return tuple(spec for spec in found if isinstance(spec, Spec))

    @property
    def random(self) -> bool:
        """Whether anything in it draws random numbers, so that a seed acts."""
        signs = any(transform is not None and transform.signs == "random" for transform in self.transforms.values())
        return signs or any(spec.stochastic for spec in self.specs)

    @property
    def slots(self) -> dict[str, Slot]:
        """The six slots by name, in the order of the GEMMs."""
        return {
            "fprop.input": self.fprop.input,
            "fprop.weight": self.fprop.weight,
            "dgrad.grad_output": self.dgrad.grad_output,
            "dgrad.weight": self.dgrad.weight,
            "wgrad.grad_output": self.wgrad.grad_output,
            "wgrad.input": self.wgrad.input,
        }
