"""What surrounds a run: a known state of torch's generators, signals that wait for a checkpoint, a pair of scales."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor, nn

__all__ = ["last_words", "reproducible", "signals", "weighing"]

_LAST_WORDS_S = 5.0  # torchrun waits for 30 s before it kills.


@contextlib.contextmanager
def reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch and asks for deterministic kernels; afterwards the caller's generators and choice are back."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def signals(*, heard: bool) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one has its usual effect.

    Args:
        heard: whether to collect at all; a run that keeps nothing has nothing to save.

    Yields:
        The list of signals received so far.
    """
    received: list[int] = []
    if not heard or threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
        received.append(number)
        restore()

    for number in numbers:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """Lets SIGTERM end this process some seconds late, and after an error for as long as the process lives.

    torchrun sends it to those that are left when one has died, and what has happened is still to be told.
    """
    before = signal.signal(signal.SIGTERM, _end_soon)
    yield
    signal.signal(signal.SIGTERM, before)  # Not after an error, which the command tells when it has left this.


def _end_soon(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
    """Ends this process in a while, if it has not come to its end by then."""
    end = threading.Timer(_LAST_WORDS_S, os._exit, [128 + number])
    end.daemon = True  # It does not keep a process that is done.
    end.start()


@contextlib.contextmanager
def weighing(network: nn.Module) -> Iterator[list[int]]:
    """Weighs what a network's forward pass inside keeps for the backward pass; a loss after it does not count.

    Args:
        network: its parameters do not count.

    Yields:
        A list, empty until the context ends: then the bytes of each storage that was kept.
    """
    kept: list[Tensor] = []
    found: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.detach())  # Detached: a node that held its own output would never be freed.
        return kept[-1]

    scales = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    hooks = [
        network.register_forward_pre_hook(lambda *_: scales.__enter__()),
        network.register_forward_hook(lambda *_: scales.__exit__(), always_call=True),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    found.extend(nbytes for at, nbytes in storages.items() if at not in own)
