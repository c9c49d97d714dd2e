"""What a rule's `when` can ask of a layer, and the guards that most recipes share."""

from __future__ import annotations

from .schema import LayerInfo, Rule

__all__ = ["HIGH_PRECISION", "bottom_pointwise", "depthwise", "first_or_last", "pointwise"]


def first_or_last(layer: LayerInfo) -> bool:
    """The model's first or last layer. A model of fewer than three has no layer between, so the rule is silent."""
    return layer.count > 2 and layer.index in (0, layer.count - 1)


def depthwise(layer: LayerInfo) -> bool:
    """A convolution whose groups have one input channel each."""
    groups = getattr(layer.module, "groups", 1)
    return groups > 1 and groups == getattr(layer.module, "in_channels", 0)


def pointwise(layer: LayerInfo) -> bool:
    """A convolution of kernel size 1."""
    kernel = getattr(layer.module, "kernel_size", None)
    return isinstance(kernel, tuple) and all(k == 1 for k in kernel)


def bottom_pointwise(layer: LayerInfo) -> bool:
    """A 1x1 convolution that does not widen: the first, reducing one of a bottleneck block."""
    module = layer.module
    return pointwise(layer) and int(getattr(module, "out_channels", 0)) <= int(getattr(module, "in_channels", 0))


HIGH_PRECISION: tuple[Rule, ...] = (
    Rule(recipe="fp32", when=first_or_last, why="first or last layer"),
    Rule(recipe="fp32", when=depthwise, why="depthwise convolution"),
)
"""The layers that the papers leave in 16 or 32 bits."""
