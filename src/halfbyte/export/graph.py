"""A small builder of ONNX graphs: nodes, constants and names. onnx's own helpers make the messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..qtensor import QTensor
from .safetensors import need

__all__ = ["OPSET", "Graph"]

OPSET = 21
"""The first opset whose QuantizeLinear and DequantizeLinear know INT4 and UINT4."""

_NAMES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
}


class Graph:
    """A graph under construction. Values are known by their names, strings.

    Attributes:
        onnx: the package.
        nodes: so far, in the order of computation.
        initializers: constants so far; a graph inside another has none of its own.
        taken: names of inputs and outputs, which nothing else gets.
    """

    def __init__(self, outer: Graph | None = None) -> None:
        """An empty graph.

        Args:
            outer: the graph that this one is a body of; names and constants are shared with it.
        """
        self.onnx = need("onnx")
        self.nodes: list[Any] = []
        self.initializers: list[Any] = [] if outer is None else outer.initializers
        self._constants: dict[Any, str] = {} if outer is None else outer._constants
        self._count: list[int] = [0] if outer is None else outer._count
        self.taken: set[str] = set() if outer is None else outer.taken

    def fresh(self, stem: str) -> str:
        """A name that nothing has."""
        while True:
            self._count[0] += 1
            name = f"{stem}_{self._count[0]}"
            if name not in self.taken:
                return name

    def emit(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node.

        Args:
            op: ONNX's name of it.
            inputs: names of values; empty for an optional input that is left out.
            outputs: how many.
            attributes: of the node.

        Returns:
            The name of its output, or a list of several.
        """
        names = [self.fresh(op.lower()) for _ in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def dtype(self, dtype: torch.dtype) -> int:
        """ONNX's number of a type.

        Raises:
            UnsupportedError: if an exported graph cannot compute in it.
        """
        if dtype not in _NAMES:
            raise UnsupportedError(
                f"The model computes in {dtype}, which is not exported to ONNX; possible are "
                f"{', '.join(str(d) for d in _NAMES)}."
            )
        number: int = getattr(self.onnx.TensorProto, _NAMES[dtype])
        return number

    def constant(self, value: Tensor, stem: str = "constant") -> str:
        """A constant; equal small ones are stored once.

        Args:
            value: any tensor of a type that ONNX has here.
            stem: what its name begins with.
        """
        value = value.detach().cpu().contiguous()
        key = (value.dtype, tuple(value.shape), tuple(value.reshape(-1).tolist())) if value.numel() <= 64 else None
        if key is not None and repr(key) in self._constants:
            return self._constants[repr(key)]
        name = self.fresh(stem)
        kind = self.dtype(value.dtype)
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        self._add(name, kind, tuple(value.shape), raw)
        if key is not None:
            self._constants[repr(key)] = name
        return name

    def number(self, value: float) -> str:
        """A float32 constant of shape ()."""
        return self.constant(torch.tensor(value, dtype=torch.float32))

    def whole(self, values: Sequence[int]) -> str:
        """An int64 constant of one dimension: axes, shapes, places."""
        return self.constant(torch.tensor(list(values), dtype=torch.int64))

    def codes(self, q: QTensor, stem: str) -> str:
        """A constant of integer codes: two to a byte where they have four bits, in ONNX's order (low half first)."""
        kind = self.code_type(q.format.bits, q.format.signed)
        codes = q.codes().reshape(-1).cpu()
        if q.format.bits <= 4:
            padded = torch.cat([codes, codes.new_zeros(codes.numel() % 2)]) & 15
            codes = padded[0::2] | (padded[1::2] << 4)
        name = self.fresh(stem)
        self._add(name, kind, tuple(q.shape), codes.contiguous().numpy().tobytes())
        return name

    def zero_code(self, bits: int, signed: bool) -> str:
        """The code of zero, which tells QuantizeLinear the type of its result."""
        key = f"zero {bits} {signed}"
        if key not in self._constants:
            self._constants[key] = self.fresh("zero")
            self._add(self._constants[key], self.code_type(bits, signed), (), b"\0")
        return self._constants[key]

    def code_type(self, bits: int, signed: bool) -> int:
        """ONNX's number of the type that holds codes of that many bits."""
        number: int = getattr(self.onnx.TensorProto, f"{'' if signed else 'U'}INT{4 if bits <= 4 else 8}")
        return number

    def _add(self, name: str, kind: int, shape: tuple[int, ...], raw: bytes) -> None:
        self.initializers.append(self.onnx.TensorProto(name=name, data_type=kind, dims=shape, raw_data=raw))

    def described(self, name: str, dtype: torch.dtype, shape: Sequence[int | str | None]) -> Any:
        """A value's name, type and shape, as inputs and outputs are declared."""
        return self.onnx.helper.make_tensor_value_info(name, self.dtype(dtype), list(shape))

    def seal(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any], *, inner: bool = False) -> Any:
        """The finished graph.

        Args:
            name: of the graph.
            inputs: from `described`.
            outputs: from `described`.
            inner: whether it is the body of a node; its constants then stand in the outer graph.
        """
        own = [] if inner else self.initializers
        return self.onnx.helper.make_graph(self.nodes, name, list(inputs), list(outputs), initializer=own)
