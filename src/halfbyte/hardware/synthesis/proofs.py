"""The check that a synthesized netlist computes what its unit must, and the check of that check.

A netlist is evaluated 64 vectors to a machine word, so every operand of a small unit, and tens of millions of operands
of a large one, take seconds. A proof that cannot fail proves nothing: `mutants` changes one gate at a time and counts
how many such circuits the same vectors find out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .evaluate import Evaluator
from .netlist import Netlist
from .planes import to_planes
from .subjects import EXHAUSTIVE_BITS, Numbers, Subject, subject

if TYPE_CHECKING:
    from amaranth.lib.wiring import Component

__all__ = ["Proof", "mutants", "prove"]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What came of comparing a netlist with its unit's meaning.

    Attributes:
        claim: what the unit must compute.
        exhaustive: whether every operand was tried.
        vectors: how many inputs were tried.
        mismatches: for how many of them an output or the next sum was wrong.
        example: the first of them: what was given, what was expected, and what came; None if there is none.
    """

    claim: str
    exhaustive: bool
    vectors: int
    mismatches: int
    example: dict[str, dict[str, int]] | None

    def __str__(self) -> str:
        how = "every operand" if self.exhaustive else "random and edge operands"
        return f"{self.claim}: {self.vectors:,} vectors ({how}), {self.mismatches:,} wrong"


def prove(netlist: Netlist, component: Component, *, vectors: int = 1 << 24, seed: int = 2020) -> Proof:
    """Compares a netlist with what its component must compute.

    Args:
        netlist: the synthesized component.
        component: of `halfbyte.hardware.rtl`.
        vectors: how many operands to try, at least, where there are too many to try all.
        seed: of the random ones.

    Raises:
        HalfbyteError: if the component is of an unknown kind.
    """
    meant = subject(component)
    evaluator = Evaluator(netlist, [meant.state] if meant.state else [])
    tried = wrong = 0
    example = None
    for given in meant.blocks(vectors, seed):
        n = len(next(iter(given.values())))
        tried += n
        found, first = _compare(evaluator, meant, given)
        wrong += found
        example = example or first
    exhaustive = meant.bits <= EXHAUSTIVE_BITS
    return Proof(claim=meant.claim, exhaustive=exhaustive, vectors=tried, mismatches=wrong, example=example)


def _compare(evaluator: Evaluator, meant: Subject, given: Numbers) -> tuple[int, dict[str, dict[str, int]] | None]:
    """How many of some vectors come out wrong, and the first of them."""
    expected = meant.expected(given)
    got = evaluator.planes({name: to_planes(given[name], len(bits)) for name, bits in evaluator.inputs.items()})
    differs = np.zeros(next(iter(got.values())).shape[1], np.uint64)
    for name, planes in got.items():
        differs |= np.bitwise_or.reduce(planes ^ to_planes(expected[name], len(planes)), axis=0)
    wrong = int(np.bitwise_count(differs).sum())
    if not wrong:
        return 0, None
    word = int(np.flatnonzero(differs)[0])
    bits = int(differs[word])
    bit = (bits & -bits).bit_length() - 1
    i = 64 * word + bit
    came = {
        name: sum(int(p[word] >> np.uint64(bit) & np.uint64(1)) << k for k, p in enumerate(ps))
        for name, ps in got.items()
    }
    meant_codes = {name: int(expected[name][i]) & ((1 << len(ps)) - 1) for name, ps in got.items()}
    return wrong, {"given": {k: int(v[i]) for k, v in given.items()}, "expected": meant_codes, "came": came}


def _twins(netlist: Netlist) -> dict[str, list[str]]:
    """For each gate the others of the library with the same pins."""
    pins: dict[tuple[frozenset[str], frozenset[str]], list[str]] = {}
    for name, cell in netlist.library.cells.items():
        if cell.flip_flop is None:
            pins.setdefault((frozenset(cell.capacitance), frozenset(cell.outputs)), []).append(name)
    return {name: [other for other in group if other != name] for group in pins.values() for name in group}


def _mutated(netlist: Netlist, count: int, seed: int) -> Iterator[Netlist]:
    """Copies of a netlist, each with one gate replaced by another one with the same pins."""
    rng = np.random.default_rng(seed)
    twins = _twins(netlist)
    places = [i for i, gate in enumerate(netlist.gates) if twins[gate.cell.name]]
    for i in rng.choice(places, min(count, len(places)), replace=False):
        gate = netlist.gates[i]
        other = netlist.library.cells[str(rng.choice(twins[gate.cell.name]))]
        changed = dataclasses.replace(gate, cell=other)
        yield dataclasses.replace(netlist, gates=(*netlist.gates[:i], changed, *netlist.gates[i + 1 :]))


def mutants(netlist: Netlist, component: Component, *, count: int = 20, seed: int = 2020) -> tuple[int, int]:
    """How many netlists with one wrong gate are found out by one block of a proof's operands.

    A change may be one that no input can show, as where two signals are never one together; there are few such.

    Args:
        netlist: the right one.
        component: of `halfbyte.hardware.rtl`.
        count: how many gates to change, one at a time.
        seed: which gates, and which operands.

    Returns:
        How many were found out, and how many were tried.
    """
    meant = subject(component)
    given = meant.sample(seed)
    found = tried = 0
    for mutant in _mutated(netlist, count, seed):
        tried += 1
        found += _compare(Evaluator(mutant, [meant.state] if meant.state else []), meant, given)[0] > 0
    return found, tried
