"""Synthesizes the units, prints what they take, proves what they compute.

./dev synth               all units: cells, gate equivalents, depth, area, density and energy relative to FP16
./dev synth dot4_fp4      some of them (fma_fp16 always with them: the others are compared to it)
./dev synth --prove       also check every netlist against exact arithmetic
./dev synth --write       all units, and write the results that come with the package
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import HalfbyteError, UnknownNameError
from . import yosys

if TYPE_CHECKING:
    from .flow import Synthesized
    from .proofs import Proof


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev synth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("units", nargs="*", metavar="UNIT", help="names in the catalog; all of them if none is given")
    parser.add_argument("--liberty", type=Path, metavar="PATH", help="map to this cell library instead of our own")
    parser.add_argument("--operands", type=Path, metavar="PATH", help="measure energy on the arrays of this .npz file")
    parser.add_argument("--prove", action="store_true", help="check what each netlist computes")
    parser.add_argument(
        "--vectors", type=int, default=20 << 20, metavar="N", help="operands a proof (default: 20 x 2^20)"
    )
    parser.add_argument("--write", action="store_true", help="write units.json")
    return parser.parse_args(argv)


_LEAST_FOUND = 0.8
"""Of the netlists with one wrong gate a proof must find that many: some gates make no difference that can be seen."""


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _run(arguments: argparse.Namespace) -> bool:
    """Does what was asked; whether every proof held."""
    yosys.require()
    from ..rtl.catalog import UNITS
    from .flow import synthesize_all
    from .liberty import UNIT_GATE, Library
    from .operands import Values
    from .table import REFERENCE, UNITS_PATH, measure, render, write

    if arguments.write and (arguments.units or arguments.liberty or arguments.operands):
        raise HalfbyteError(
            "--write keeps the results that come with the package: all units, our own library, our own operands. "
            "Leave out the units, --liberty and --operands."
        )
    if arguments.vectors < 64:
        raise HalfbyteError(f"--vectors {arguments.vectors} was asked for; a proof takes at least 64.")
    for name in arguments.units:
        if name not in UNITS:
            raise UnknownNameError("unit", name, UNITS)
    wanted = {n: u for n, u in UNITS.items() if not arguments.units or n in arguments.units or n == REFERENCE}
    library = Library.load(arguments.liberty or UNIT_GATE)
    values = Values.load(arguments.operands) if arguments.operands else Values.drawn()
    start = time.monotonic()
    synthesized = synthesize_all({name: unit.build for name, unit in wanted.items()}, library, _say)
    rows = measure(wanted, synthesized, values)
    _say(render(rows))
    _say(f"{len(rows)} units, {library.name}, {time.monotonic() - start:.0f} s")
    proofs: dict[str, tuple[Proof, tuple[int, int]]] = {}
    for name, made in synthesized.items() if arguments.prove else ():
        proofs[name] = _proven(name, made, arguments.vectors)
    if arguments.write:
        write(rows, library, "./dev synth --write --prove" if proofs else "./dev synth --write", proofs=proofs)
        _say(f"written: {UNITS_PATH}")
    return all(not proof.mismatches and found >= _LEAST_FOUND * tried for proof, (found, tried) in proofs.values())


def _proven(name: str, made: Synthesized, vectors: int) -> tuple[Proof, tuple[int, int]]:
    """What came of one netlist's proof, and of netlists with a wrong gate, which it also says."""
    from .proofs import mutants, prove

    start = time.monotonic()
    proof = prove(made.netlist, made.component, vectors=vectors)
    found, tried = mutants(made.netlist, made.component)
    _say(f"{name}: {proof}; {found} of {tried} wrong gates found out; {time.monotonic() - start:.1f} s")
    if proof.example:
        _say(f"  for example {proof.example}")
    return proof, (found, tried)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if all went well, 1 if a proof failed or something is missing."""
    try:
        return 0 if _run(_arguments(argv)) else 1
    except HalfbyteError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
