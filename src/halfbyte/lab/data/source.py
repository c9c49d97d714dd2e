"""A data set in memory, and the order in which a run sees it.

Every run with the same seed sees the same examples in the same order, whatever its recipe: the order is a function of
(seed, epoch) alone, and so is what augmentation draws, so a comparison of recipes compares nothing but recipes, and a
run that stops in the middle of an epoch finds its place again by counting batches.

Dimensions: N examples of a batch, T symbols or frames of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...errors import HalfbyteError

__all__ = ["Augment", "Batch", "Data", "Examples", "Prepare", "Sequences", "Source", "Stream"]

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""From a batch of inputs, and a generator on their device, to another batch of the same shape."""

Prepare = Callable[[Tensor], Tensor]
"""From a batch as it is kept to a batch as the network takes it."""


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        inputs: what the network is called with.
        targets: what its output is compared with.
        count: what the loss is a mean over: images, symbols or utterances.
    """

    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    count: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(tuple(t.to(device) for t in self.inputs), tuple(t.to(device) for t in self.targets), self.count)


class Source(Protocol):
    """One side of a data set: what is learned from, or what is judged by."""

    def count_batches(self, batch_size: int) -> int:
        """How many batches a pass has."""
        ...

    def batches(self, batch_size: int, *, seed: int | None = None, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """One pass over the data.

        Args:
            batch_size: examples in a batch; the last batch may hold fewer.
            seed: of the run; None for the data's own order and nothing drawn at random, as for judging.
            epoch: number of the pass; the order depends on it and on the seed, and on nothing else.
            start: how many batches to pass over, for a run that goes on in the middle of an epoch.
        """
        ...

    def first(self, count: int) -> Source:
        """Its first ``count`` examples (symbols, for a text)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a network learns from and what it is judged by. The two share no example. Tasks add facts of their own."""

    train: Source
    test: Source


def _generator(seed: int, epoch: int, batch: int = 0) -> torch.Generator:
    """The random numbers of an epoch (batch 0) or of one of its batches (counted from 1)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch + 7_368_787 * batch) % 2**63)


@dataclass(frozen=True, kw_only=True)
class Examples(Source):
    """Examples of one shape, shuffled in every epoch.

    Attributes:
        inputs: shape (N, ...).
        targets: shape (N, ...).
        augment: changes a batch of inputs in training; None leaves them.
        prepare: makes of a batch of inputs, augmented or not, what the network is called with, for judging too: bytes
            take a quarter of the memory of the floats that they become. None leaves them.
    """

    inputs: Tensor
    targets: Tensor
    augment: Augment | None = None
    prepare: Prepare | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or len(self.inputs) == 0:
            raise HalfbyteError(
                f"{len(self.inputs)} inputs and {len(self.targets)} targets were given; there must be one target for "
                "each input, and at least one of both."
            )

    def count_batches(self, batch_size: int) -> int:
        return -(-len(self.inputs) // batch_size)

    def batches(self, batch_size: int, *, seed: int | None = None, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        count = len(self.inputs)
        order = torch.arange(count) if seed is None else torch.randperm(count, generator=_generator(seed, epoch))
        for number, rows in enumerate(order.split(batch_size)[start:], start=start + 1):
            inputs = self.inputs[rows]
            if self.augment is not None and seed is not None:
                inputs = self.augment(inputs, _generator(seed, epoch, number))
            if self.prepare is not None:
                inputs = self.prepare(inputs)
            yield Batch((inputs,), (self.targets[rows],), len(rows))

    def first(self, count: int) -> Examples:
        return replace(self, inputs=self.inputs[:count], targets=self.targets[:count])


@dataclass(frozen=True, kw_only=True)
class Stream(Source):
    """A long text, read by N readers side by side, each its own N-th part, ``context`` symbols at a time.

    Each batch goes on where the one before stopped, so that a recurrent network can carry its state over; the last
    symbols that fill no batch are left out (Zaremba et al., arXiv 1409.2329, read so). The order is always that of the
    text, except where ``shuffled``: then every batch holds windows from anywhere, and their cuts move by the epoch.

    Attributes:
        symbols: int64 of shape (symbols of the text,).
        context: symbols that a reader sees in a batch, T.
        shuffled: whether training takes the windows in random order.
    """

    symbols: Tensor
    context: int
    shuffled: bool = False

    def __post_init__(self) -> None:
        if len(self.symbols) <= self.context:
            raise HalfbyteError(
                f"A text of {len(self.symbols)} symbols was given for windows of {self.context}; it must be longer."
            )

    def _readers(self, batch_size: int) -> int:
        """N: fewer than asked for where the text is too short for all of them."""
        return min(batch_size, (len(self.symbols) - 1) // self.context)

    def count_batches(self, batch_size: int) -> int:
        return (len(self.symbols) - 1) // self._readers(batch_size) // self.context

    def batches(self, batch_size: int, *, seed: int | None = None, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        readers, total = self._readers(batch_size), self.count_batches(batch_size)
        if self.shuffled and seed is not None:
            yield from self._windows(readers, total, _generator(seed, epoch), start)
            return
        length = (len(self.symbols) - 1) // readers
        now_NT = self.symbols[: readers * length].view(readers, length)
        next_NT = self.symbols[1 : readers * length + 1].view(readers, length)
        for number in range(start, total):
            part = slice(number * self.context, (number + 1) * self.context)
            yield Batch((now_NT[:, part],), (next_NT[:, part],), readers * self.context)

    def _windows(self, readers: int, total: int, generator: torch.Generator, start: int) -> Iterator[Batch]:
        """Windows from random places."""
        starts = torch.randint(len(self.symbols) - self.context, (total, readers, 1), generator=generator)
        for places in starts[start:]:
            rows = self.symbols[places + torch.arange(self.context + 1)]
            yield Batch((rows[:, :-1],), (rows[:, 1:],), readers * self.context)

    def first(self, count: int) -> Stream:
        return Stream(symbols=self.symbols[:count], context=self.context, shuffled=self.shuffled)


@dataclass(frozen=True, kw_only=True)
class Sequences(Source):
    """Examples of many lengths, each a tuple of tensors whose first dimension is its length.

    In training examples of like length share a batch, so that little is padded: a shuffled order is cut into stretches
    of 50 batches, each is sorted by the length of the first tensor, and the batches come in random order. For judging
    the order is that of the data.

    Attributes:
        examples: for each example its input and its target, of shape (T, ...) and (S, ...).
        pads: what fills up each of the two.
        by_target: whether a batch counts the length of its targets in the place of its examples.
        augment: changes a padded batch of inputs in training; None leaves it.
    """

    examples: Sequence[tuple[Tensor, Tensor]]
    pads: tuple[float, float]
    by_target: bool = False
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if not self.examples:
            raise HalfbyteError("No example was given; there must be at least one.")

    def count_batches(self, batch_size: int) -> int:
        return -(-len(self.examples) // batch_size)

    def batches(self, batch_size: int, *, seed: int | None = None, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """See `Source.batches`. Inputs: the padded (N, T, ...) and the lengths (N,), int64; targets likewise."""
        groups = self._groups(batch_size, seed, epoch)
        for number, rows in enumerate(groups[start:], start=start + 1):
            sides = [self._padded([self.examples[row][side] for row in rows], self.pads[side]) for side in (0, 1)]
            inputs, lengths = sides[0]
            if self.augment is not None and seed is not None:
                inputs = self.augment(inputs, _generator(seed, epoch, number))
            yield Batch((inputs, lengths), sides[1], int(sides[1][1].sum()) if self.by_target else len(rows))

    def _groups(self, batch_size: int, seed: int | None, epoch: int) -> list[list[int]]:
        """Which examples make which batch."""
        count = len(self.examples)
        if seed is None:
            return [list(range(first, min(first + batch_size, count))) for first in range(0, count, batch_size)]
        generator = _generator(seed, epoch)
        order = torch.randperm(count, generator=generator).tolist()
        stretch = 50 * batch_size
        for first in range(0, count, stretch):
            order[first : first + stretch] = sorted(
                order[first : first + stretch], key=lambda row: len(self.examples[row][0])
            )
        groups = [order[first : first + batch_size] for first in range(0, count, batch_size)]
        return [groups[place] for place in torch.randperm(len(groups), generator=generator).tolist()]

    @staticmethod
    def _padded(tensors: Sequence[Tensor], pad: float) -> tuple[Tensor, Tensor]:
        """One tensor of all, and their lengths."""
        lengths = torch.tensor([len(t) for t in tensors])
        return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=pad), lengths

    def first(self, count: int) -> Sequences:
        return replace(self, examples=self.examples[:count])
