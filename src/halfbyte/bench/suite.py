"""The benchmark as a whole: the check first, then every row that was asked for, then the report."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import HalfbyteError
from ..kernels import native
from ..lab import record
from . import exactness, memory, parts, peers, steps
from .settings import Case, Row, Size, matching
from .timing import Clock

__all__ = ["Report", "all_cases", "run"]

_ENVIRONMENT = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "KMP_", "MKL_", "ONEDNN_", "HALFBYTE_ISA")
"""Beginnings of the variables that change how fast anything is."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came out.

    Attributes:
        isa: the instruction set of the native backend.
        rows: each with the number of threads that it was measured with.
        peers: other packages that have rows, with their versions.
        circumstances: commit, versions, machine and settings.
    """

    isa: str
    rows: tuple[tuple[int, Row], ...]
    peers: dict[str, str]
    circumstances: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As plain values. There is no report of a benchmark whose exactness check failed, so ``exact`` is true."""
        rows = [row.to_json(threads) for threads, row in self.rows]
        return {"exact": True, "isa": self.isa, "rows": rows, "peers": self.peers, **self.circumstances}


def all_cases(size: Size) -> list[Case]:
    """Every case of a size; those of other packages, which must be compiled first, only in the full one."""
    others = peers.cases() if size.peers else []
    return [*memory.cases(), *parts.gemms(), *parts.quantizers(), *steps.layers(), *others, *steps.networks()]


def run(
    *,
    size: Size,
    threads: Sequence[int],
    only: str = "",
    clock: Clock,
    progress: Callable[[str], None] = lambda _: None,
) -> Report | str:
    """Checks the native backend, and measures if it is right.

    Args:
        size: how large and how long.
        threads: with how many threads; each of them in turn.
        only: a part of the names of the rows that are wanted, ``*`` and ``?`` allowed; all of them if empty.
        clock: seconds since some moment, for the timings.
        progress: told what is being measured.

    Returns:
        The report; or, if the native backend differs from the reference on this machine, in what.

    Raises:
        HalfbyteError: if no row has such a name, or a number of threads cannot be.
        UnsupportedError: if there is no native backend.
    """
    native.require()
    cases = all_cases(size)
    wanted = matching(cases, only)
    if not wanted:
        beginnings = dict.fromkeys(name.partition("/")[0] + "/" for case in cases for name in case.rows)
        raise HalfbyteError(
            f"--only {only!r} was asked for, but no row has such a name. Names begin with {', '.join(beginnings)}, for "
            f"example {cases[-1].rows[0]}; a part of a name is enough, '*' stands for anything."
        )
    if not threads or min(threads) < 1:
        raise HalfbyteError(f"--threads {','.join(map(str, threads))} was asked for; 1 or more is possible.")
    circumstances = _circumstances(size, threads, only)
    logger, before = logging.getLogger("halfbyte"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.ERROR)  # What a first batch chose is no news here.
    rows: list[tuple[int, Row]] = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            progress("the exactness check")
            different = exactness.difference()
            if different is not None:
                return different
        for place, count in enumerate(threads):
            torch.set_num_threads(count)
            for case, names in wanted:
                if case.threads or place == 0:
                    progress(f"{names[0]}, {count} thread{'s' * (count > 1)}")
                    rows += [(count, row) for row in case.measure(names, size, clock)]
    finally:
        torch.set_num_threads(before)
        logger.setLevel(level)
    isa = native.info().isa
    assert isa is not None
    ran = peers.found() if any(row.name.startswith("peer/") for _, row in rows) else {}
    return Report(isa=isa, rows=tuple(rows), peers=ran, circumstances=circumstances)


def _circumstances(size: Size, threads: Sequence[int], only: str) -> dict[str, Any]:
    """Commit, versions, machine and settings. Taken first: some packages set variables when they are imported."""
    machine = {name: value for name, value in record.machine(backend="native").items() if name != "threads"}
    environment = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)}
    settings = {
        "size": size.name,
        "threads": list(threads),
        "only": only,
        "tokens": size.tokens,
        "images": size.images,
        "recipe": "ibm2020",
        "build": native.info().build,
        # A fresh tensor can cost more in page faults than the kernel that fills it; both sides run under these.
        "environment": environment,
    }
    return {"commit": record.commit(), "versions": record.versions(), "machine": machine, "settings": settings}
