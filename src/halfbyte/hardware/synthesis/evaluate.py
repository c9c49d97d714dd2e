"""A netlist as straight-line NumPy code: 64 input vectors a machine word, thousands of words a call.

What is compiled is the netlist that synthesis made, gate by gate, from the cells' own logic functions. What it computes
is therefore a statement about the synthesized circuit, not about its source.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import HalfbyteError
from .logic import And, Constant, Expression, Not, Or, Pin, Xor, pins
from .netlist import Bit, Gate, Netlist
from .planes import Planes, Words, from_planes, to_planes

__all__ = ["Evaluator", "Program", "compile_program"]

WORDS = 2048
"""Machine words evaluated at once: 16 KiB a wire, so that the live wires of a unit stay in a core's cache."""


@dataclass(frozen=True)
class Program:
    """Code from some wires to others.

    Attributes:
        sources: the wires that are given.
        slots: which row of the workspace holds each wire at the end.
        rows: how many rows the workspace has.
        code: takes the workspace, of shape (rows, words), with the sources in its first rows and a row of zeros and one
            of ones behind them.
    """

    sources: tuple[int, ...]
    slots: Mapping[Bit, int]
    rows: int
    code: Callable[[Planes], None]

    def workspace(self, words: int) -> Planes:
        """A workspace with its constants."""
        space = np.zeros((self.rows, words), np.uint64)
        space[len(self.sources) + 1] = ~np.uint64(0)
        return space


class _Writer:
    """Writes the code and hands out rows, a row again as soon as its wire has been read for the last time."""

    def __init__(self, sources: Sequence[int], uses: dict[Bit, int], keep: bool) -> None:
        self.slots: dict[Bit, int] = {"0": len(sources), "1": len(sources) + 1}
        self.slots |= {bit: i for i, bit in enumerate(sources)}
        self.fixed = self.rows = len(sources) + 2
        self.uses, self.keep = uses, keep
        self.free = list[int]()
        self.lines = list[str]()

    def take(self) -> int:
        if self.free:
            return self.free.pop()
        self.rows += 1
        return self.rows - 1

    def give(self, row: int) -> None:
        if row >= self.fixed:
            self.free.append(row)

    def emit(self, operation: str, *rows: int) -> None:
        self.lines.append(f"{operation}({', '.join(f'r{row}' for row in rows)})")

    def value(self, expression: Expression, wires: Mapping[str, Bit]) -> tuple[int, bool]:
        """The row that holds an expression, and whether it is a temporary one that may be written to."""
        match expression:
            case Pin(name):
                return self.slots[wires[name]], False
            case Constant(value):
                return self.slots["1" if value else "0"], False
            case Not(a):
                row, temporary = self.value(a, wires)
                target = row if temporary else self.take()
                self.emit("inv", row, target)
                return target, True
            case And(a, b) | Or(a, b) | Xor(a, b):
                (left, mine), (right, also) = self.value(a, wires), self.value(b, wires)
                target = left if mine else right if also else self.take()
                self.emit({And: "both", Or: "any_", Xor: "differ"}[type(expression)], left, right, target)
                if mine and also:
                    self.free.append(right)
                return target, True

    def gate(self, gate: Gate, functions: Mapping[str, Expression]) -> None:
        """All outputs of a gate, then the rows of inputs that nobody reads any more."""
        pin: str
        bit: Bit
        for pin, bit in gate.outputs.items():
            row, temporary = self.value(functions[pin], gate.inputs)
            target = row if temporary else self.take()
            if not temporary:
                self.lines.append(f"r{target}[:] = r{row}")
            self.slots[bit] = target
        if self.keep:
            return
        for bit in _reads(gate, functions):
            self.uses[bit] -= 1
            if self.uses[bit] == 0:
                self.give(self.slots[bit])
        for bit in gate.outputs.values():
            if not self.uses.get(bit):
                self.give(self.slots[bit])


def _functions(gate: Gate) -> dict[str, Expression]:
    """The outputs' functions of the input pins; of a flip-flop, what its next state makes of them."""
    flip_flop = gate.cell.flip_flop
    if flip_flop is None:
        return {pin: output.function for pin, output in gate.cell.outputs.items()}
    stored = {flip_flop.state[0]: flip_flop.next_state, flip_flop.state[1]: Not(flip_flop.next_state)}
    return {pin: _substitute(output.function, stored) for pin, output in gate.cell.outputs.items()}


def _reads(gate: Gate, functions: Mapping[str, Expression]) -> set[Bit]:
    """The wires that a gate's functions read: all of its inputs but a flip-flop's clock."""
    return {gate.inputs[pin] for function in functions.values() for pin in pins(function)}


def _substitute(expression: Expression, values: Mapping[str, Expression]) -> Expression:
    match expression:
        case Pin(name):
            return values.get(name, expression)
        case Not(a):
            return Not(_substitute(a, values))
        case And(a, b) | Or(a, b) | Xor(a, b):
            return type(expression)(_substitute(a, values), _substitute(b, values))
        case _:
            return expression


def compile_program(
    netlist: Netlist,
    sources: Sequence[int],
    targets: Collection[Bit],
    transparent: Collection[Gate],
    keep: bool = False,
) -> Program:
    """Compiles a netlist.

    Args:
        netlist: what to compile.
        sources: the wires that will be given.
        targets: the wires that are wanted.
        transparent: flip-flops that count as wires.
        keep: give every wire a row of its own, so that all can be looked at.
    """
    order = [(gate, _functions(gate)) for gate in netlist.ordered(transparent)]
    uses: dict[Bit, int] = dict.fromkeys(targets, 1)
    for gate, functions in order:
        for bit in _reads(gate, functions):
            uses[bit] = uses.get(bit, 0) + 1
    writer = _Writer(sources, uses, keep)
    for gate, functions in order:
        writer.gate(gate, functions)
    names = [f"    r{i} = space[{i}]" for i in range(writer.rows)]
    text = "\n".join(["def code(space):", *names, *(f"    {line}" for line in writer.lines), ""])
    scope: dict[str, Callable[..., None]] = {
        "both": np.bitwise_and,
        "any_": np.bitwise_or,
        "differ": np.bitwise_xor,
        "inv": np.invert,
    }
    exec(compile(text, f"<{netlist.name}>", "exec"), scope)
    return Program(tuple(sources), writer.slots, writer.rows, scope["code"])


class Evaluator:
    """One clock cycle of a netlist, for any number of input vectors at once.

    Registers named as state are cut: their value is given, and their next value comes out. All others are transparent:
    they count as wires, so operands need no cycle to get in. That is the circuit's function without its latency.

    Args:
        netlist: what to evaluate.
        state: names of registers.

    Raises:
        HalfbyteError: if the netlist has a loop through a register that is not named.
        UnknownNameError: if there is no such register.
    """

    def __init__(self, netlist: Netlist, state: Sequence[str] = ()) -> None:
        self.netlist = netlist
        self.inputs: dict[str, tuple[Bit, ...]] = dict(netlist.inputs)
        self.outputs: dict[str, tuple[Bit, ...]] = dict(netlist.outputs)
        held: dict[int, Gate] = {b: gate for gate in netlist.flip_flops for b in gate.outputs.values()}
        cut = []
        for name in state:
            wires = netlist.register(name)
            self.inputs[name] = wires
            cut += [held[bit] for bit in wires]
        gone = {id(gate) for gate in cut}
        transparent = [gate for gate in netlist.flip_flops if id(gate) not in gone]
        sources = [bit for bits in self.inputs.values() for bit in bits if isinstance(bit, int)]
        self.next = {name: tuple(_data(held[bit]) for bit in netlist.register(name)) for name in state}
        targets = {bit for bits in (*self.outputs.values(), *self.next.values()) for bit in bits}
        self.program = compile_program(netlist, sources, targets, transparent)
        self._space: NDArray[np.uint64] | None = None

    def planes(self, given: Mapping[str, Planes]) -> dict[str, Planes]:
        """Evaluates bit planes.

        Args:
            given: for each input port and each state register its planes, of shape (width, words).

        Returns:
            For each output port its planes, and for each state register those of its next value.
        """
        if set(given) != set(self.inputs):
            raise HalfbyteError(
                f"{self.netlist.name} was given {', '.join(sorted(given))}; it takes {', '.join(sorted(self.inputs))}."
            )
        words = next(iter(given.values())).shape[1]
        wanted = {**self.outputs, **self.next}
        result = {name: np.empty((len(bits), words), np.uint64) for name, bits in wanted.items()}
        for start in range(0, words, WORDS):
            stop = min(start + WORDS, words)
            space = self._workspace(stop - start)
            row = 0
            for name, bits in self.inputs.items():
                for k, bit in enumerate(bits):
                    if isinstance(bit, int):
                        space[row] = given[name][k, start:stop]
                        row += 1
            self.program.code(space)
            for name, bits in wanted.items():
                for k, bit in enumerate(bits):
                    result[name][k, start:stop] = space[self.program.slots[bit]]
        return result

    def __call__(self, **given: Words) -> dict[str, NDArray[np.int64]]:
        """Evaluates integers.

        Args:
            given: for each input port and each state register n integers; negative ones in two's complement.

        Returns:
            For each output port, and for each state register's next value, n integers, unsigned.
        """
        n = len(next(iter(given.values())))
        planes = {name: to_planes(np.asarray(v), len(self.inputs.get(name, (0,)))) for name, v in given.items()}
        return {name: from_planes(p, n) for name, p in self.planes(planes).items()}

    def _workspace(self, words: int) -> Planes:
        if self._space is None or self._space.shape[1] != words:
            self._space = self.program.workspace(words)
        return self._space


def _data(flip_flop: Gate) -> Bit:
    """The wire that a plain flip-flop stores."""
    assert flip_flop.cell.flip_flop is not None
    stored = flip_flop.cell.flip_flop.next_state
    (pin,) = set(pins(stored))
    if stored != Pin(pin):
        raise HalfbyteError(f"{flip_flop.cell.name} does not store a pin as it is; it cannot be cut.")
    return flip_flop.inputs[pin]
