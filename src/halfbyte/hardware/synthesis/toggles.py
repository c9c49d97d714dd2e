"""The energy of a synthesized unit at work: which wires change, and what each change charges.

The netlist is stepped clock by clock on many streams at once, 64 to a machine word, and the changes of each wire are
counted. A change of a wire costs its load (C V^2 / 2) and what the cell behind it moves inside; every flip-flop costs
its clock in every cycle, whether it changes or not. Gates switch without delay here, so a wire changes at most once a
cycle: glitches, of which deep logic such as an FP16 unit has most, are not counted, nor are the wires' own capacitance
and leakage. So the energies are relative, and the ratios to the FP16 unit are on the careful side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import HalfbyteError
from .evaluate import compile_program
from .liberty import FlipFlop
from .logic import Not, Pin
from .netlist import Bit, Gate, Netlist
from .operands import Streams
from .planes import to_planes

__all__ = ["Energy", "toggle_energy"]

_ZERO, _ONES = np.uint64(0), ~np.uint64(0)
_SETTLING = 4
"""Cycles before counting: more than any unit has registers in a row, so that their first values do not matter."""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy a cycle, in the library's unit: its capacitance times volts squared.

    Attributes:
        load: charging the input pins that wires lead to.
        cells: inside of gates and flip-flops whose pins changed.
        clock: the flip-flops' clock pins, and inside of them.
    """

    load: float
    cells: float
    clock: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.load + self.cells + self.clock


def toggle_energy(netlist: Netlist, streams: Streams) -> Energy:
    """Runs a netlist on streams of operands and adds up what its changes cost.

    Args:
        netlist: any unit; its registers start at zero.
        streams: for each input port the codes of every cycle, shape (cycles, streams), more than 4 cycles and a
            multiple of 64 streams.

    Raises:
        HalfbyteError: if there are fewer, or a flip-flop is no plain one.
    """
    cycles, count = next(iter(streams.values())).shape
    if cycles <= _SETTLING or count < 64 or count % 64:
        raise HalfbyteError(
            f"Streams of {cycles} cycles, {count} of them, were given; more than {_SETTLING} cycles and a multiple of "
            "64 streams are possible."
        )
    words = count // 64
    stored = [(bit, *_stored(gate, pin)) for gate in netlist.flip_flops for pin, bit in gate.outputs.items()]
    ports = [
        (name, k, bit) for name, bits in netlist.inputs.items() for k, bit in enumerate(bits) if isinstance(bit, int)
    ]
    program = compile_program(netlist, [b for *_, b in ports] + [b for b, *_ in stored], (), (), keep=True)
    space = program.workspace(words)
    changes = np.zeros(program.rows, np.int64)
    before = space.copy()
    for cycle in range(cycles):
        planes = {name: to_planes(streams[name][cycle], len(bits)) for name, bits in netlist.inputs.items()}
        # The clock edge: what the last cycle computed is stored while new operands arrive.
        after = [
            ~space[program.slots[data]] if inverted else space[program.slots[data]] for _, data, inverted in stored
        ]
        for name, k, bit in ports:
            space[program.slots[bit]] = planes[name][k]
        for (bit, *_), value in zip(stored, after, strict=True):
            space[program.slots[bit]] = value
        program.code(space)
        if cycle >= _SETTLING:
            changes += np.bitwise_count(before ^ space).sum(axis=1, dtype=np.int64)
        before[:] = space
    counted = (cycles - _SETTLING) * count
    return _priced(netlist, {bit: float(changes[row]) / counted for bit, row in program.slots.items()})


def _stored(flip_flop: Gate, pin: str) -> tuple[Bit, bool]:
    """The wire that an output of a flip-flop takes at the next clock edge, and whether it is inverted."""
    kind = flip_flop.cell.flip_flop
    assert isinstance(kind, FlipFlop)
    function, data = flip_flop.cell.outputs[pin].function, kind.next_state
    inverted = function in (Pin(kind.state[1]), Not(Pin(kind.state[0])))
    if not isinstance(data, Pin) or not (inverted or function == Pin(kind.state[0])):
        raise HalfbyteError(
            f"The flip-flop {flip_flop.cell.name} does not store a pin as it is, or shows more than what it stores; "
            "such cells cannot be stepped. Give a library with a plain D flip-flop."
        )
    return flip_flop.inputs[data.name], inverted


def _priced(netlist: Netlist, changes: dict[Bit, float]) -> Energy:
    """What a cycle costs, given how often each wire changes in one."""
    square = netlist.library.voltage**2
    load = sum(changes[bit] * capacitance * square / 2 for bit, capacitance in netlist.loads().items())
    inside = clock = 0.0
    for gate in (*netlist.gates, *netlist.flip_flops):
        inside += sum(changes[bit] * gate.cell.outputs[pin].edge_energy for pin, bit in gate.outputs.items())
        moving = ((pin, bit) for pin, bit in gate.inputs.items() if bit in changes)
        inside += sum(changes[bit] * gate.cell.input_energy[pin] for pin, bit in moving)
    for gate in netlist.flip_flops:
        assert gate.cell.flip_flop is not None
        pins = [pin for pin, bit in gate.inputs.items() if bit == netlist.clock]
        clock += gate.cell.flip_flop.clock_energy + sum(gate.cell.capacitance[pin] for pin in pins) * square
    return Energy(load=load, cells=inside, clock=clock)
