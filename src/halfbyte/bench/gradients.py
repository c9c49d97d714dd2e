"""Which gradients the benchmark feeds: real ones, recorded while two small networks train, and the worst case.

How fast dgrad and wgrad are depends on how a gradient's codes are spread over the seven levels of radix 4, so nothing
is timed on made-up normal numbers. The CNN on handwritten digits with batch norm (`lab.models.digits`) and a GPT of two
blocks on a made-up text (`text`) train for some steps in four bits, and what reaches the gradient quantizers of some of
their layers is kept, divided by the layer's own scale:

    early   the first three steps
    late    the last three

A single layer of any size is then given numbers that are drawn from such a pool with replacement; the first one is set
to 64, the format's largest, so that the layer's own scale comes out as 1 and the codes are those of the training run.
Neighboring numbers are independent then, which they are not in a network; the steps of whole networks have their own
gradients. ``flat`` is the worst case: each of the sixteen codes as often as the others.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert import convert
from ..formats import fp4_e3m0_r4, fp4_e3m0_r4_odd
from ..kernels import Gemm, Geometry, native
from ..lab.data import digits
from ..lab.models.digits import cnn
from ..lab.models.language import GPT
from ..ops import Plan
from ..qtensor import QTensor
from ..quantizers import Parts
from ..recipes import Rule
from ..watching import named_plans, watch

__all__ = ["KINDS", "SYMBOLS", "Kind", "Pools", "outside_window", "record", "text"]

Kind = Literal["early", "late", "flat"]
KINDS: tuple[Kind, ...] = ("early", "late", "flat")

SYMBOLS = 64
"""How many different symbols the made-up text has."""

_SEED = 2020
_RECORDED = 3
_MOST = 1 << 18
_LAYERS = {"conv": "body3.conv", "widening": "blocks.1.up", "square": "blocks.1.attention.out"}
"""Whose gradients stand for those of which layers."""


@dataclass(frozen=True, eq=False)
class Pools:
    """Recorded gradients in units of their layer's scale: float32 of shape (n,), by layer and by kind."""

    recorded: Mapping[tuple[str, str], Tensor]

    def draw(self, layer: str, kind: Kind, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """A gradient for a layer.

        Args:
            layer: ``"conv"``, ``"widening"`` or ``"square"``.
            kind: how its numbers are spread.
            shape: of the gradient.
            generator: what is drawn from.

        Returns:
            float32 of that shape, 64 the first.
        """
        pool = torch.tensor(fp4_e3m0_r4.values) if kind == "flat" else self.recorded[layer, kind]
        picked = pool[torch.randint(len(pool), tuple(shape), generator=generator)].clamp_(-64, 64)
        picked.view(-1)[0] = 64
        return picked


def phases(grad: Tensor) -> tuple[QTensor, QTensor]:
    """The codes of a gradient of scale 1 in both phases: what dgrad and what wgrad multiply."""
    fmts, one = (fp4_e3m0_r4, fp4_e3m0_r4_odd), torch.ones(())
    codes = native.encode_each(grad, fmts, inv_scale=one)
    even, odd = (QTensor(qdata, one, fmt, grad.shape) for qdata, fmt in zip(codes, fmts, strict=True))
    return even, odd


def outside_window(grad: Tensor) -> float:
    """The share of the codes other than zero that lie outside the best four neighboring levels, in the even phase."""
    even = phases(grad)[0]
    table = torch.tensor(even.format.values, dtype=torch.float64).abs()
    magnitudes = table[even.codes().int().flatten()]
    levels = [(magnitudes == 4.0**power).sum() for power in range(-3, 4)]
    total = int(sum(levels))
    best = max(int(sum(levels[first : first + 4])) for first in range(4))
    return 1 - best / total if total else 0.0


def text(sequences: int, length: int, seed: int) -> Tensor:
    """Made-up text in which a symbol is followed by one of four, mostly by the first: something to learn, but not all.

    Args:
        sequences: N.
        length: T.
        seed: of the text; which symbols follow which is the same for every text.

    Returns:
        int64 of shape (N, T), in 0...SYMBOLS - 1.
    """
    rules = torch.Generator().manual_seed(_SEED)
    following = torch.randint(SYMBOLS, (SYMBOLS, 4), generator=rules)
    generator = torch.Generator().manual_seed(seed)
    chance = torch.tensor([0.6, 0.2, 0.1, 0.1])
    choice = chance.multinomial(sequences * length, replacement=True, generator=generator).view(sequences, length)
    symbols = torch.empty(sequences, length, dtype=torch.int64)
    symbols[:, 0] = torch.randint(SYMBOLS, (sequences,), generator=generator)
    for t in range(1, length):
        symbols[:, t] = following[symbols[:, t - 1], choice[:, t]]
    return symbols


class _Recorder:
    """Keeps what some layers' gradient quantizers are given."""

    def __init__(self, names: Mapping[Plan, str]) -> None:
        self.names = names
        self.kept: dict[str, list[Tensor]] = {name: [] for name in names.values()}

    def inside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def operand(self, plan: Plan, slot: str, x: Tensor, parts: Parts) -> None:
        name, first = self.names.get(plan), parts[0]
        if name is None or slot != "dgrad.grad_output" or not isinstance(first, QTensor):
            return
        self.kept[name].append((x.detach() / first.scale).flatten()[:_MOST].clone())

    def product(
        self, plan: Plan, which: Gemm, a: Parts, b: QTensor | Tensor, geometry: Geometry, result: Tensor
    ) -> None:
        pass


@functools.cache
def record(steps: int) -> Pools:
    """Trains both networks for that many steps in four bits, and keeps their gradients. The same in every call."""
    pools: dict[tuple[str, str], Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        networks = _digits(steps), _language(steps)
        for model, losses in networks:
            pools |= _train(model, losses, steps)
    return Pools(pools)


def _digits(steps: int) -> tuple[nn.Module, Iterator[Tensor]]:
    """The CNN, and its loss on one batch after the other."""
    model, data = convert(cnn(), "ibm2020", backend="native"), digits.load()
    epochs = (data.train.batches(64, seed=_SEED, epoch=epoch) for epoch in itertools.count())
    taken = itertools.islice(itertools.chain.from_iterable(epochs), steps)
    return model, (F.cross_entropy(model(*batch.inputs), batch.targets[0]) for batch in taken)


def _language(steps: int) -> tuple[nn.Module, Iterator[Tensor]]:
    """The GPT, and its loss on one batch after the other."""
    rules = [Rule(fqn="head", recipe="fp32", why="output layer"), Rule(recipe="ibm2020")]
    model = convert(GPT(SYMBOLS), "ibm2020", rules, backend="native")

    def loss(seed: int) -> Tensor:
        symbols = text(16, 65, seed)
        return F.cross_entropy(model(symbols[:, :-1]).flatten(0, 1), symbols[:, 1:].flatten())

    return model, (loss(seed) for seed in range(steps))


def _train(model: nn.Module, losses: Iterator[Tensor], steps: int) -> dict[tuple[str, str], Tensor]:
    """The recorded gradients of one network."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    plans = named_plans(model)
    names = {plans[fqn]: name for name, fqn in _LAYERS.items() if fqn in plans}
    recorders = {"early": _Recorder(names), "late": _Recorder(names)}
    for step, loss in enumerate(losses):
        recorder = recorders.get("early" if step < _RECORDED else "late" if step >= steps - _RECORDED else "")
        with nullcontext() if recorder is None else watch(model, recorder):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {(name, kind): torch.cat(x) for kind, r in recorders.items() for name, x in r.kept.items()}
