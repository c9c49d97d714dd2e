"""The single layers that are timed and weighed: linear ones, 3x3 convolutions and an LSTM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .networks import Side
from .settings import Size

__all__ = ["CONVS", "LAYERS", "Layer", "step"]

CONVS = ((64, 32), (128, 16), (256, 8), (512, 4))
"""Channels in and out, and height and width, of the four stages of ResNet-18."""

LINEARS = ((512, 2048), (1024, 1024), (1024, 4096))
"""Features in and out."""

LSTM_SHAPE = (35, 20, 650)
"""Steps, sequences and width: the medium model of Zaremba et al., Recurrent Neural Network Regularization, 2014."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer, and what goes in at either end.

    Attributes:
        name: part of the names of its rows.
        build: fresh weights from torch's global generator.
        shape: of the input.
        rectified: whether the input comes out of a ReLU.
        gradients: the pool of its gradients, see `gradients.Pools`; None for normal numbers.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: Callable[[Size], tuple[int, ...]]
    rectified: bool
    gradients: str | None

    def detail(self, size: Size) -> str:
        """How large it is."""
        return "x".join(map(str, self.shape(size)))

    def input(self, size: Size) -> Tensor:
        """The same in every call."""
        x = torch.randn(self.shape(size), generator=torch.Generator().manual_seed(0))
        return x.relu_() if self.rectified else x


def _linear(inputs: int, outputs: int) -> Layer:
    return Layer(
        name=f"linear-{inputs}-{outputs}",
        build=partial(nn.Linear, inputs, outputs),
        shape=lambda size: (size.tokens, inputs),
        rectified=False,
        gradients="square" if inputs == outputs else "widening",
    )


def _conv(channels: int, pixels: int) -> Layer:
    return Layer(
        name=f"conv-{channels}@{pixels}",
        build=partial(nn.Conv2d, channels, channels, 3, padding=1, bias=False),
        shape=lambda size: (size.images, channels, pixels, pixels),
        rectified=True,
        gradients="conv",
    )


_LSTM = Layer(
    name=f"lstm-{LSTM_SHAPE[-1]}",
    build=partial(nn.LSTM, LSTM_SHAPE[-1], LSTM_SHAPE[-1]),
    shape=lambda _: LSTM_SHAPE,
    rectified=False,
    gradients=None,
)

LAYERS = (*(_linear(*sizes) for sizes in LINEARS), *(_conv(*sizes) for sizes in CONVS), _LSTM)
"""All of them."""


@dataclass(frozen=True, eq=False)
class Step:
    """Forward and backward of a layer on one side.

    Attributes:
        module: the layer.
        x: its input, which wants a gradient; bfloat16 under autocast, as it would be inside a network.
        side: who computes.
        grad: of the output; None until `backward` is wanted.
    """

    module: nn.Module
    x: Tensor
    side: Side
    grad: Tensor | None

    def forward(self) -> Tensor:
        """The output; of a recurrent layer that of all steps."""
        with self.side.context():
            y = self.module(self.x)
        result: Tensor = y[0] if isinstance(y, tuple) else y
        return result

    def __call__(self) -> None:
        self.forward().backward(self.grad)
        self.x.grad = None
        self.module.zero_grad()


def step(layer: Layer, side: Side, size: Size, grad: Tensor | None = None) -> Step:
    """A layer on one side, ready to step.

    Args:
        layer: the layer.
        side: who computes.
        size: how large its input is.
        grad: of its output; None for a layer that only goes forward.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = side.place(layer.build())

    def placed(t: Tensor) -> Tensor:
        t = t.bfloat16() if side.autocast else t
        return t.to(memory_format=torch.channels_last) if side.channels_last else t

    x = placed(layer.input(size)).detach().requires_grad_()
    return Step(module, x, side, None if grad is None else placed(grad))
