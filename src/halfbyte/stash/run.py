"""One forward pass under the stash: every tensor that autograd saves comes by here and is kept as little as it can be.

Floats become codes, masks bits, indices the smallest integers that hold them; what must stay as it is stays. A tensor
that several operations save is kept once. Hooks of somebody else's around the forward pass see what is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import UnsupportedError
from ..kernels import StashKernels
from ..qtensor import pack_bits, unpack_bits
from ..rng import Draw

__all__ = [
    "LEAST_BYTES",
    "OPERAND",
    "Kept",
    "Ledger",
    "Run",
    "in_memory_order",
    "is_dense",
    "refuse_graph",
    "squeeze",
    "unsqueeze",
]

LEAST_BYTES = 4096
"""Smaller tensors are kept as they are."""

OPERAND = 255
"""The operand's number in `halfbyte.rng` under which the stash draws; layers use small ones."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.uint8, torch.int16, torch.int32)


@dataclass
class Ledger:
    """What one forward pass kept.

    Attributes:
        rows: for each operation and kind of keeping the tensors, their bytes, and the bytes that are kept.
    """

    rows: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def add(self, operation: str, kind: str, before: int, after: int) -> None:
        """Notes one tensor."""
        row = self.rows.setdefault((operation, kind), [0, 0, 0])
        for place, more in enumerate((1, before, after)):
            row[place] += more


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of one stretch of memory.

    Attributes:
        parts: tensors, or what hooks of somebody else's made of them.
        opened: makes the tensor, in the order of memory, of the parts.
        rounded: whether it is not the very tensor that was saved.
    """

    parts: tuple[Any, ...]
    opened: Callable[..., Tensor]
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class _View:
    """How a saved tensor lies in what is kept; `version` where that is the saved memory itself."""

    kept: Kept
    size: torch.Size
    stride: tuple[int, ...]
    version: int | None


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def in_memory_order(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The elements as they lie in memory, (n,), and the strides to see them in the shape of x again.

    A tensor with gaps or repetitions is copied into row-major order.
    """
    x = x if is_dense(x) else x.contiguous()
    return x.as_strided((x.numel(),), (1,)), x.stride()


def refuse_graph() -> None:
    """Raises `UnsupportedError` in a backward pass that builds a graph."""
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "A second derivative through tensors that are kept as codes was asked for (create_graph=True); rounding "
            "has none. Leave create_graph out, or convert with stash=None."
        )


def _key(x: Tensor) -> int:
    """A number of a tensor's memory, its own as long as somebody refers to it, if only weakly."""
    return int(x.untyped_storage()._cdata)


class Run:
    """The state of one forward pass.

    Attributes:
        kernels: the backend's functions.
        ledger: what was kept so far.
        operation: name of the function that runs.
        followed: for each sequence that runs now, the ids of the running means of norms that a ReLU follows.
        rectified: a norm's result that went through its ReLU already; the ReLU has still to be called.
    """

    def __init__(
        self, kernels: StashKernels, bits: int, draw: Draw, own: Iterable[Tensor], inputs: Iterable[Tensor]
    ) -> None:
        """Starts a forward pass.

        Args:
            kernels: the backend's functions.
            bits: of a code where nothing else is asked for.
            draw: seed, rank and step of the random numbers.
            own: parameters and buffers: kept as they are, as the model holds them anyway.
            inputs: the same, as the caller holds them.
        """
        self.kernels, self.ledger, self.operation = kernels, Ledger(), "layer"
        self._bits: int | None = bits
        self._least, self._noted = 0, False
        self._weights: tuple[torch.Size, ...] = ()
        self._draw, self._count = draw, 0
        self._own = {_key(x) for x in own if _is_plain(x)}
        self._inputs = {_key(x) for x in inputs if _is_plain(x)}
        self._seen: dict[tuple[Any, ...], Kept] = {}
        self._storages: dict[int, StorageWeakRef] = {}
        self._outer: tuple[Callable[..., Any], Callable[..., Any]] | None = _top_hooks()
        self._hook = self.pack
        self.followed: list[frozenset[int]] = []
        self.rectified: Tensor | None = None

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Everything saved inside comes to this run."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._hook, self.unpack):
                yield
        finally:
            # What is kept belongs to the graph; nothing here may hold it longer.
            self._seen.clear()
            self._storages.clear()

    def leave(self) -> None:
        """A sequence is over."""
        self.followed.pop()
        self.rectified = None

    @property
    def on_top(self) -> bool:
        """Whether what is saved now comes here: not inside hooks of somebody else's, as of activation checkpointing."""
        top = _top_hooks()
        return top is not None and top[0] is self._hook

    @property
    def bits(self) -> int:
        """Of a code, outside any `scope`."""
        assert self._bits is not None
        return self._bits

    @contextlib.contextmanager
    def scope(self, bits: int | None, *, least: int = 0, weights: tuple[torch.Size, ...] = ()) -> Iterator[None]:
        """What else holds for the floats that are saved inside.

        Args:
            bits: of a code; None keeps them as they are.
            least: a tensor of fewer elements is kept as it is.
            weights: shapes of tensors that are kept as they are.
        """
        before = self._bits, self._least, self._weights
        self._bits, self._least, self._weights = bits, least, weights
        try:
            yield
        finally:
            self._bits, self._least, self._weights = before

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """What is saved inside is kept as it is, and in the ledger already."""
        before, self._bits, self._noted = (self._bits, self._noted), None, True
        try:
            yield
        finally:
            self._bits, self._noted = before

    def draw(self) -> Draw:
        """Where the random numbers of the next tensor come from."""
        self._count += 1
        return Draw(
            seed=self._draw.seed, layer=self._count, step=self._draw.step, operand=OPERAND, rank=self._draw.rank
        )

    def pack(self, x: Tensor) -> _View | Tensor:
        """The hook that autograd calls with what it saves."""
        x = x.detach()  # A node that held its own output would never be freed.
        if not _is_plain(x):
            return x
        key = _key(x)
        if key in self._own:
            return self._view(x, Kept(self._shown((x,)), _same), x.stride())
        # Held weakly, the number of a storage is not given to another when this one is gone.
        self._storages.setdefault(key, StorageWeakRef(x.untyped_storage()))
        keep = self._choose(x, key)
        lies = None if keep is not None and is_dense(x) else (x.size(), x.stride())
        place = (key, x._version, x.storage_offset(), x.numel(), x.dtype, keep, lies)
        flat, stride = (x, x.stride()) if keep is None else in_memory_order(x)
        kept = self._seen.get(place)
        if kept is None:
            kept = keep(flat) if keep is not None else None
            if kept is None:
                return self._view(x, self._keep("as it is", x, (x,), _same), x.stride())
            self._seen[place] = kept
        return self._view(x, kept, stride)

    def _view(self, x: Tensor, kept: Kept, stride: tuple[int, ...]) -> _View:
        return _View(kept, x.size(), stride, x._version if kept.opened is _same and self._outer is None else None)

    def unpack(self, view: _View | Tensor) -> Tensor:
        """The hook that autograd calls with what `pack` gave it."""
        if isinstance(view, Tensor):
            return view
        kept = view.kept
        if kept.rounded:
            refuse_graph()
        found = kept.opened(*(kept.parts if self._outer is None else map(self._outer[1], kept.parts)))
        if kept.opened is not _same:
            return found.as_strided(view.size, view.stride)
        if view.version is not None and found._version != view.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(found.shape)} is at version {found._version}; expected version "
                f"{view.version} instead."
            )
        return found

    def _choose(self, x: Tensor, key: int) -> Callable[[Tensor], Kept | None] | None:
        """How to keep a tensor; None is as it is."""
        if self._noted or key in self._inputs or x.numel() * x.element_size() < LEAST_BYTES:
            return None
        if x.dtype is torch.uint8:
            return self._as_gaps
        if x.dtype in _FLOATS:
            exact = self._bits is None or x.numel() < self._least or x.size() in self._weights
            return None if exact else self._as_codes
        if x.dtype is torch.bool:
            return self._as_bits
        return self._as_small if x.dtype in (torch.int64, torch.int32) else None

    def _as_codes(self, x: Tensor) -> Kept | None:
        """Codes of floats; None if one is infinite or NaN, as such have no place among codes."""
        bits, dtype, numel, decode = self.bits, x.dtype, x.numel(), self.kernels.stash_decode
        codes, steps, finite = self.kernels.stash_encode(x, bits, self.draw())
        if not finite:
            return None
        parts = codes, steps
        return self._keep(
            f"int{bits}", x, parts, lambda *kept: decode(kept[0], kept[1], numel, bits).to(dtype), rounded=True
        )

    def _as_bits(self, x: Tensor) -> Kept:
        numel = x.numel()
        return self._keep("1 bit", x, (pack_bits(x),), lambda bits: unpack_bits(bits, numel))

    def _as_small(self, x: Tensor) -> Kept:
        low, high = (int(end) for end in torch.aminmax(x))
        fits = (t for t in _INTEGERS if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)
        dtype, small = x.dtype, next(fits, x.dtype)
        return self._keep(str(small).removeprefix("torch."), x, (x.to(small),), lambda kept: kept.to(dtype))

    def _as_gaps(self, x: Tensor) -> Kept | None:
        """Bytes that are mostly 255, as the bits of a clip are that cuts little off; None if they are not."""
        found = squeeze(x)
        numel = x.numel()
        return None if found is None else self._keep("gaps", x, found, lambda *kept: unsqueeze(kept, numel))

    def _keep(
        self, kind: str, x: Tensor, parts: tuple[Tensor, ...], opened: Callable[..., Tensor], *, rounded: bool = False
    ) -> Kept:
        after = sum(part.numel() * part.element_size() for part in parts)
        if not self._noted:
            operation = "a layer's codes" if x.dtype is torch.uint8 else self.operation
            self.ledger.add(operation, kind, x.numel() * x.element_size(), after)
        return Kept(self._shown(parts), opened, rounded)

    def _shown(self, parts: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The parts as hooks of somebody else's give them back."""
        return parts if self._outer is None else tuple(map(self._outer[0], parts))


def squeeze(x: Tensor) -> tuple[Tensor, ...] | None:
    """Bytes that are mostly 255 in less room: which are, as bits that are squeezed in their turn, and the others.

    Args:
        x: uint8 of shape (n,).

    Returns:
        The others of each round, and last the bits of the last; None if fewer than three in four of the first few are
        255.
    """
    if x.numel() < LEAST_BYTES // 8 or (x[:LEAST_BYTES] == 255).sum() * 4 < 3 * x[:LEAST_BYTES].numel():
        return None
    full = x == 255
    bits = pack_bits(full)
    return (x[~full], *(squeeze(bits) or (bits,)))


def unsqueeze(parts: Sequence[Tensor], numel: int) -> Tensor:
    """The bytes that `squeeze` made the parts of."""
    others, *rest = parts
    bits = rest[0] if len(rest) == 1 else unsqueeze(rest, (numel + 7) // 8)
    full = unpack_bits(bits, numel)
    return torch.full_like(full, 255, dtype=torch.uint8).masked_scatter_(~full, others)


def _same(x: Tensor) -> Tensor:
    return x


def _is_plain(x: Tensor) -> bool:
    """Whether it is strided memory with numbers in it that anybody may read."""
    kinds = (Tensor, torch.nn.Parameter)
    plain = type(x) in kinds and x.layout is torch.strided and not (x.is_meta or x.is_nested or x.is_quantized)
    return plain and not isinstance(x, FakeTensor) and not x.is_inference()


def _top_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The innermost hooks for saved tensors."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
