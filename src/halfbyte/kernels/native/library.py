"""The compiled library: where it is, what it runs on, and how its functions become operators of torch.

This is the one place that reads the environment: ``HALFBYTE_ISA`` forces an instruction set (avx512, avx2, portable)
and ``HALFBYTE_LIBRARY`` names a library that was built elsewhere. Nothing is loaded before the first use.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ...errors import UnknownNameError, UnsupportedError
from .build import HOW_TO_GET, ISA_FLAGS, SOURCES, TARGET, fingerprint

__all__ = [
    "INT32",
    "INT64",
    "POINTER",
    "Info",
    "address",
    "available",
    "constant",
    "force_isa",
    "function",
    "info",
    "int32s",
    "isas",
    "library",
    "operator",
    "require",
    "uint32s",
    "why_not",
]

P = ParamSpec("P")
R = TypeVar("R")

INT32, INT64, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
"""The types of the C functions' arguments."""


@dataclass(frozen=True)
class Info:
    """What `halfbyte info` prints about the native backend.

    Attributes:
        available: whether the library could be loaded.
        isa: the instruction set in use; None without a library.
        isas: those that this machine and this build have.
        threads: how many threads of torch's pool it uses; 1 where it cannot use them.
        serial: why it cannot use torch's threads; None if it does, or without a library.
        build: compiler, target and fingerprint of the sources; None without a library.
        path: where the library is, or would be.
        problem: why there is none, and how to get one; None if there is one.
    """

    available: bool
    isa: str | None
    isas: tuple[str, ...]
    threads: int
    serial: str | None
    build: str | None
    path: Path
    problem: str | None


def _path() -> Path:
    return Path(os.environ.get("HALFBYTE_LIBRARY") or TARGET)


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    path = _path()
    if not path.is_file():
        return f"{path.name} has not been built: {HOW_TO_GET}"
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded ({error}): {HOW_TO_GET}"
    for name in ("hb_isa", "hb_build"):
        getattr(loaded, name).restype = ctypes.c_char_p
    label = loaded.hb_build().decode()
    if SOURCES.is_dir() and fingerprint() not in label:
        return f"{path.name} was built from other sources than those of this version ({label}): {HOW_TO_GET}"
    for name in ("hb_has_isa", "hb_force_isa"):
        getattr(loaded, name).argtypes = [ctypes.c_char_p]
    loop = _torch_loop()
    if loop is not None and not _forked:
        loaded.hb_set_parallel_for.argtypes = [POINTER]
        loaded.hb_set_parallel_for.restype = None
        loaded.hb_set_parallel_for(ctypes.cast(loop, POINTER))
    forced = os.environ.get("HALFBYTE_ISA")
    if forced:
        _force(loaded, forced)
    return loaded


_forked: list[int] = []
"""The process, if it was forked from another one."""


def _after_fork() -> None:
    """Runs everything in the calling thread from now on.

    A forked process has its parent's memory but not its threads: OpenMP would wait for them for ever, in torch too.
    """
    _forked.append(os.getpid())
    if _load.cache_info().currsize and available():
        library().hb_set_parallel_for(None)


os.register_at_fork(after_in_child=_after_fork)


@cache
def _torch_loop() -> Any:
    """torch's own parallel loop, a plain C function since torch 2.10; None in an older one, where all runs serially."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).is_file():
            return getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
    return None


def available() -> bool:
    """Whether the native backend can be used."""
    return not isinstance(_load(), str)


def why_not() -> str | None:
    """One line that says why there is no native backend and how to get it; None if there is one."""
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """The library, with torch's loop handed over and the instruction set chosen.

    Raises:
        UnsupportedError: if there is none; the text says how to get it.
    """
    found = _load()
    if isinstance(found, str):
        raise UnsupportedError(f"The native backend is absent: {found}. backend='reference' needs no library.")
    return found


def require() -> None:
    """Makes sure that there is a native backend.

    Raises:
        UnsupportedError: if there is none; the text says why, and how to get it.
    """
    library()


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine and this build have, the best first; empty without a library."""
    found = _load()
    return () if isinstance(found, str) else tuple(name for name in ISA_FLAGS if found.hb_has_isa(name.encode()))


def force_isa(name: str | None) -> None:
    """Uses that instruction set from now on, in every thread; None chooses the best.

    Raises:
        UnknownNameError: if this machine or this build does not have it.
        UnsupportedError: if there is no library.
    """
    _force(library(), name)


def _force(loaded: ctypes.CDLL, name: str | None) -> None:
    if loaded.hb_force_isa(None if name is None else name.encode()):
        here = [known for known in ISA_FLAGS if loaded.hb_has_isa(known.encode())]
        raise UnknownNameError("instruction set on this machine", str(name), here)


def info() -> Info:
    """The state of the native backend, for people. Raises nothing where it is absent."""
    found, path = _load(), _path()
    if isinstance(found, str):
        return Info(False, isa=None, isas=(), threads=0, serial=None, build=None, path=path, problem=found)
    serial = None
    if _torch_loop() is None:
        serial = f"torch {torch.__version__} offers no threads to others, torch 2.10 does"
    elif _forked:
        serial = "this process was forked, which leaves torch's threads behind; start it with 'spawn'"
    threads = 1 if serial else torch.get_num_threads()
    isa, build = found.hb_isa().decode(), found.hb_build().decode()
    return Info(True, isa, isas(), threads, serial, build, path, problem=None)


def function(name: str, *arguments: type[Any], result: type[Any] | None = None) -> Callable[..., Any]:
    """A function of the library, found when it is first called.

    Args:
        name: without the prefix ``hb_``.
        arguments: ctypes types: INT32, INT64, POINTER (an address, or None for null).
        result: type of the result; None for nothing.
    """
    bound: list[Callable[..., Any]] = []

    def call(*values: Any) -> Any:
        if not bound:
            found = getattr(library(), f"hb_{name}")
            found.argtypes, found.restype = list(arguments), result
            bound.append(found)
        return bound[0](*values)

    return call


def address(x: Tensor | None) -> int | None:
    """Where a tensor's memory starts; null for None."""
    return None if x is None else x.data_ptr()


_OPERATORS = torch.library.Library("halfbyte", "FRAGMENT")


def operator(schema: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that makes ``torch.ops.halfbyte.<name>`` of a function of tensors on the CPU.

    As an operator torch.compile sees one opaque step and does not look inside. Outside of tracing the function is
    called directly, which costs a third of the way through torch's dispatcher.

    Args:
        schema: name, arguments and result in torch's notation; the first argument is a tensor.
        fake: gives empty results of the right shape, for tracing.
    """

    def register(compute: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _OPERATORS.define(schema)
        _OPERATORS.impl(name, compute, "CPU")
        torch.library.register_fake(f"halfbyte::{name}", fake, lib=_OPERATORS)
        overload = getattr(torch.ops.halfbyte, name).default

        def call(x: Tensor, *rest: Any) -> Any:
            traced = torch.compiler.is_compiling() or type(x) is not Tensor
            return overload(x, *rest) if traced else compute(x, *rest)

        return call

    return register


def constant(compute: Callable[P, R]) -> Callable[P, R]:
    """A function of constants (formats, numbers): torch.compile takes its result and does not look inside."""
    marked: Callable[P, R] = torch.compiler.assume_constant_result(compute)
    return marked


def int32s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    """Whole numbers as an array in C."""
    return (ctypes.c_int32 * len(values))(*values)


def uint32s(values: Sequence[int]) -> ctypes.Array[ctypes.c_uint32]:
    """Unsigned words as an array in C; more than 32 bits are cut off."""
    return (ctypes.c_uint32 * len(values))(*(value & 0xFFFFFFFF for value in values))
