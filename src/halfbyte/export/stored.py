"""A weight's quantizer that gives codes which it was handed: what a model has after it came back from a file."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import UnsupportedError
from ..formats import Format
from ..qtensor import QTensor
from ..quantizers import Quantized, Quantizer, Use

__all__ = ["Stored"]


class Stored(Quantizer):
    """Stands in the place of a weight's quantizer, with its state under the same names, and gives stored codes.

    Quantizing again what codes stand for need not give the same codes: Quartet's scale of a block is found from its
    standard deviation, which rounding has moved. These are the codes that were trained.
    """

    def __init__(self, before: Quantizer, q: QTensor) -> None:
        """Takes over another's place.

        Args:
            before: the quantizer, whose parameters and buffers become this one's.
            q: the codes.
        """
        super().__init__(before.spec, backend=before.backend)
        for name, parameter in before.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in before.named_buffers(recurse=False):
            self._buffers.pop(name, None)
            self.register_buffer(name, buffer)
        for name, child in before.named_children():
            self.register_module(name, child)
        self._q = q
        self.training = False

    def quantize(
        self, x: Tensor, *, observe: bool = False, differentiable: bool = False, use: Use | None = None
    ) -> Quantized:
        if self.training:
            raise UnsupportedError(
                "A training forward pass was asked of a model with packed weights; it computes in evaluation, with the "
                "codes of its file. Call model.eval(), or train on from what they stand for: halfbyte.restore(model), "
                "then halfbyte.convert(model, recipe)."
            )
        if self._q.qdata.device != x.device:
            self._q = self._q.to(x.device)
        return Quantized(self._q)

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        raise UnsupportedError(
            "load_state_dict was asked of a model with packed weights, which would go on multiplying the codes of its "
            "file. Make the model plain before, halfbyte.restore(model), or build it anew."
        )

    @property
    def q(self) -> QTensor:
        """The codes."""
        return self._q

    @property
    def format(self) -> Format:
        return self._q.format

    def quantize_scaled(self, x: Tensor, scale: Tensor) -> QTensor:
        raise UnsupportedError("Stored codes have the scale that they were trained with; another was asked for.")

    def extra_repr(self) -> str:
        return f"{self.spec}, {self._q.nbytes} bytes of stored codes, scale={self._q.scale.item():.4g}"
