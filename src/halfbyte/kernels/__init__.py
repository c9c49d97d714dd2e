"""The table of backends: who turns tensors into codes and multiplies codes.

Every backend is a module with the functions of `Backend`, and every one equals `reference` bit for bit: codes, masks,
statistics, and the exact integer sums of the three GEMMs. `reference` computes on codes in plain PyTorch; training on
it shows what four bits do to accuracy and is called *emulation*, not 4-bit execution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..errors import UnknownNameError
from ..formats import Format
from ..qtensor import Blocks, QTensor
from ..rng import Draw
from . import native, reference
from .geometry import Batched, Conv, ConvTranspose, Gemm, Geometry, Linear, Reduction
from .reference.gemm import Accumulate
from .stash import StashKernels

__all__ = [
    "BACKENDS",
    "Accumulate",
    "Backend",
    "Batched",
    "Conv",
    "ConvTranspose",
    "Gemm",
    "Geometry",
    "Linear",
    "Reduction",
    "StashKernels",
    "describe",
    "get",
    "resolve",
]


class Backend(StashKernels, Protocol):
    """What a backend can do. The functions of `halfbyte.kernels.reference` say what each means."""

    def value_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest element."""
        ...

    def has_nonfinite(self, low: Tensor, high: Tensor) -> Tensor:
        """Whether a tensor of that range held a NaN or an infinity."""
        ...

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The means of |x| and of x^2."""
        ...

    def stable_sum(self, x: Tensor) -> Tensor:
        """A sum that does not depend on the number of threads."""
        ...

    def encode(
        self,
        x: Tensor,
        fmt: Format,
        *,
        inv_scale: Tensor,
        low: Tensor | None = None,
        offset: int = 0,
        code_range: tuple[int, int] | None = None,
    ) -> Tensor:
        """Packed codes."""
        ...

    def encode_each(self, x: Tensor, fmts: Sequence[Format], *, inv_scale: Tensor) -> tuple[Tensor, ...]:
        """Packed codes in several formats."""
        ...

    def encode_stochastic(
        self,
        x: Tensor,
        fmt: Format,
        *,
        inv_scale: Tensor,
        noise: Tensor,
        code_range: tuple[int, int] | None = None,
    ) -> Tensor:
        """Packed codes, rounded at random."""
        ...

    def encode_each_with_range(
        self, x: Tensor, fmts: Sequence[Format], *, inv_scale: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """`encode_each` and `value_range` together."""
        ...

    def encode_drawn(
        self,
        x: Tensor,
        fmt: Format,
        *,
        inv_scale: Tensor,
        draw: Draw,
        part: int = 0,
        code_range: tuple[int, int] | None = None,
    ) -> Tensor:
        """Packed codes, rounded at random by a draw's numbers."""
        ...

    def uniform(self, numel: int, draw: Draw, part: int = 0) -> Tensor:
        """A draw's numbers."""
        ...

    def encode_clipped(
        self, x: Tensor, fmt: Format, *, clip: Tensor, code_range: tuple[int, int], mask: bool = True
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
        """`encode`, `value_range` and `clip_bits` together, for a learned clip."""
        ...

    def block_amax(self, x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """The largest magnitude of each block, and of all."""
        ...

    def nv_scales(self, amax: Tensor, *, limit: float, largest: float) -> tuple[Tensor, Tensor, Tensor]:
        """NVFP4's scales: the tensor's, the blocks' codes, and what their numbers are multiplied by."""
        ...

    def mx_scales(self, amax: Tensor, *, rule: str, factor: float) -> tuple[Tensor, Tensor]:
        """MXFP4's scales: the blocks' codes, and what their numbers are multiplied by."""
        ...

    def encode_blocks(
        self, x: Tensor, inverse: Tensor, blocks: Blocks, *, draw: Draw | None = None, part: int = 0
    ) -> Tensor:
        """Packed E2M1 codes of numbers times one of each block."""
        ...

    def rotate(self, x: Tensor, view: Reduction, size: int, signs: Tensor | None, *, back: bool = False) -> Tensor:
        """A tensor rotated along the reduction of a GEMM, or back."""
        ...

    def clip_bits(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Packed bits: inside a clip, and exactly at it."""
        ...

    def clip_backward(self, grad: Tensor, q: QTensor, inside: Tensor, ties: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of a clipped tensor and of its clip."""
        ...

    def accumulators(self, which: Gemm, a: QTensor, b: QTensor, geometry: Geometry) -> Tensor:
        """The exact sums of products of the codes' integers, in float64: what every backend must agree on."""
        ...

    def prepare(self, b: QTensor) -> QTensor:
        """The same second operand, ready for many products."""
        ...

    def computed_by(
        self, which: Gemm, a: QTensor | Tensor, b: QTensor | Tensor, geometry: Geometry, accumulate: Accumulate, /
    ) -> str:
        """The name of the backend that computes a product: this one, or the one that it hands it to."""
        ...

    def gemm(
        self,
        which: Gemm,
        a: QTensor | Tensor,
        b: QTensor | Tensor,
        geometry: Geometry,
        *,
        accumulate: Accumulate = "exact",
    ) -> Tensor:
        """One of a layer's three GEMMs."""
        ...


BACKENDS: dict[str, Backend] = {"reference": reference, "native": native}


def resolve(name: str) -> str:
    """The name itself; for ``"auto"`` that of the fastest backend that this machine has."""
    if name != "auto":
        return name
    return "native" if native.available() else "reference"


def describe(name: str) -> str:
    """A backend's name, with the instruction set in use where it has one."""
    return f"native ({native.info().isa})" if name == "native" else name


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UnknownNameError: if there is none.
        UnsupportedError: if it is absent here; the text says why, and how to get it.
    """
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, BACKENDS)
    if name == "native":
        native.require()
    return BACKENDS[name]
