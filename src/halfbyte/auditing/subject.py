"""A quantizer on trial."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..qtensor import QTensor
from ..quantizers import MXFP4, NVFP4, BitSplit, Spec

__all__ = ["Subject"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A quantizer to be tested.

    Attributes:
        spec: what it is built from.
        backend: who makes its codes.
        device: where.
    """

    spec: Spec
    backend: str
    device: torch.device

    def codes(self, x: Tensor, *, scale: float | None = None, seed: int = 0) -> QTensor:
        """The codes of a tensor, as a fresh quantizer makes them."""
        quantizer = self.spec.build(device=self.device, backend=self.backend)
        quantizer.seed = seed if self.spec.stochastic else None
        if scale is None:
            return quantizer.quantize(x.to(self.device)).q
        step = torch.tensor(scale, dtype=torch.float32, device=self.device)
        return quantizer.quantize_scaled(x.to(self.device), step)

    @property
    def takes_scale(self) -> bool:
        """Whether a scale can be given: not to a block format, which finds its own."""
        return not isinstance(self.spec, MXFP4 | NVFP4 | BitSplit)
