"""Where one of torch's operators is translated, and what is asked of every translation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from ..errors import UnsupportedError
from .graph import Graph

__all__ = ["At", "Operator", "shape_of", "unknown"]

Operator = Callable[..., Any]
"""From the place and a node's arguments to the name of its result, or a list of them."""


class At(NamedTuple):
    """Where an operator is translated.

    Attributes:
        graph: what it is added to.
        node: of the traced graph.
    """

    graph: Graph
    node: fx.Node

    def emit(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node to the graph, see `Graph.emit`."""
        return self.graph.emit(op, *inputs, outputs=outputs, **attributes)


def shape_of(node: fx.Node) -> list[int]:
    """The shape of a node's result: -1 for the batch, if that is open.

    Raises:
        UnsupportedError: if it depends on more than the batch.
    """
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if sizes.count(-1) > 1:
        raise UnsupportedError(
            f"{node.target} gives a shape that depends on the batch in more than one place. Export a fixed batch: "
            "save_onnx(..., open_batch=False)."
        )
    return sizes


def unknown(node: fx.Node, what: str = "") -> UnsupportedError:
    """The error that says what of a traced graph has no place in an exported one.

    Args:
        node: of the traced graph.
        what: about it is impossible; empty for all.
    """
    return UnsupportedError(
        f"{node.target}{f' with {what}' if what else ''} has no place in an exported graph; possible is what the table "
        "halfbyte.export.operators.OPERATORS holds. Rewrite that part of the model, or use --format safetensors."
    )
