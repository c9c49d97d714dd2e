"""The whole networks that are timed and weighed, and the sides on which each can stand.

ResNet-18 for 32x32 images sees handwritten digits, enlarged four times; the GPT (6 blocks, 512 wide, 256 symbols) reads
made-up text (`gradients.text`). A step is forward, backward and the optimizer, torch's fused one on every side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert import convert
from ..lab.data import digits
from ..lab.models.language import GPT
from ..lab.models.resnet import resnet18
from ..recipes import Rule
from .gradients import SYMBOLS, text

__all__ = ["NETWORKS", "SIDES", "Network", "Runner", "Side"]

_CONTEXT = 256
_PIXELS = 32
_DIGITS = 1000


@dataclass(frozen=True, kw_only=True)
class Side:
    """Who computes a step.

    Attributes:
        converted: whether the layers are in four bits.
        autocast: whether the rest (or, unconverted, everything) is under bfloat16 autocast.
        channels_last: whether images and weights lie channels-last.
        stash: what ``convert(..., stash=...)`` is given; None for nothing.
    """

    converted: bool = False
    autocast: bool = False
    channels_last: bool = False
    stash: Literal["int4"] | None = None

    def context(self) -> AbstractContextManager[Any]:
        """Around a forward pass."""
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else nullcontext()

    def place(self, module: nn.Module, rules: tuple[Rule, ...] = ()) -> nn.Module:
        """A module as this side computes it; the module itself, changed."""
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.converted:
            convert(module, "ibm2020", rules, backend="native", stash=self.stash)
        return module


SIDES: Mapping[str, Side] = {
    "fp32": Side(),
    "bf16": Side(autocast=True),
    "bf16 channels-last": Side(autocast=True, channels_last=True),
    "ours": Side(converted=True),
    "ours, bf16": Side(converted=True, autocast=True),
    "ours, int4": Side(converted=True, stash="int4"),
}
"""By name. Those of ours are converted under ibm2020."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network with its data.

    Attributes:
        build: fresh weights from torch's global generator.
        batch: (examples, seed) to inputs and targets.
        optimizer: from parameters.
        rules: which layers are left alone beside those of the recipe.
        unit: what an example is called.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[Tensor, Tensor]]
    optimizer: Callable[..., torch.optim.Optimizer]
    rules: tuple[Rule, ...]
    unit: str


@functools.cache
def _enlarged() -> tuple[Tensor, Tensor]:
    """The digits as color images of 32x32, and their classes."""
    batch = next(digits.load().train.batches(_DIGITS))
    images = F.interpolate(batch.inputs[0], size=(_PIXELS, _PIXELS), mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1).contiguous(), batch.targets[0]


def _images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    images, classes = _enlarged()
    rows = torch.randint(len(images), (count,), generator=torch.Generator().manual_seed(seed))
    return images[rows], classes[rows]


def _symbols(count: int, seed: int) -> tuple[Tensor, Tensor]:
    symbols = text(count, _CONTEXT + 1, seed)
    return symbols[:, :-1], symbols[:, 1:]


NETWORKS: Mapping[str, Network] = {
    "resnet18": Network(
        build=resnet18,
        batch=_images,
        optimizer=functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
        rules=(),
        unit="images",
    ),
    "gpt": Network(
        build=functools.partial(GPT, SYMBOLS, width=512, layers=6, heads=8, context=_CONTEXT),
        batch=_symbols,
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-4, fused=True),
        rules=(
            Rule(fqn="head", recipe="fp32", why="output layer"),
            # The first layer of a GPT is the embedding, which multiplies nothing.
            Rule(recipe="ibm2020", why="every layer but the output"),
        ),
        unit="sequences of 256",
    ),
}


class Runner:
    """A network on one side, ready to step.

    Attributes:
        model: the network.
        state: its weights, and what its quantizers know.
    """

    def __init__(self, name: str, side: Side, examples: int, *, state: Mapping[str, Any] | None = None) -> None:
        self.network, self.side = NETWORKS[name], side
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = side.place(self.network.build(), self.network.rules)
        if state is not None:
            # A stash has state of its own, which that of another side lacks.
            self.model.load_state_dict({**self.model.state_dict(), **state})
        self.optimizer = self.network.optimizer(self.model.parameters())
        self.batches = [self.network.batch(examples, seed) for seed in range(4)]
        if side.channels_last:
            self.batches = [(x.to(memory_format=torch.channels_last), y) for x, y in self.batches]
        self.steps = 0

    def loss(self) -> Tensor:
        """The loss on the next of four batches."""
        x, y = self.batches[self.steps % len(self.batches)]
        with self.side.context():
            logits = self.model(x)
            return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def __call__(self) -> None:
        """One step of training."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
