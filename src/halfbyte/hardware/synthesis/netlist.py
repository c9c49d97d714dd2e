"""The gates that synthesis made, read from Yosys' JSON: a graph of library cells with areas and a depth.

Yosys numbers the wires of a flattened module, and a cell names the number at each pin. Everything here is in those
numbers; `evaluate` turns them into machine words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ...errors import HalfbyteError, UnknownNameError
from .liberty import Cell, Library
from .logic import Expression, evaluate, pins

__all__ = ["Bit", "Gate", "Netlist"]

Bit = int | Literal["0", "1"]
"""A wire's number, or a constant."""


@dataclass(frozen=True)
class Gate:
    """A library cell in a netlist.

    Attributes:
        name: of the instance.
        cell: what it is.
        inputs: the wire at each input pin.
        outputs: the wire at each output pin that leads anywhere.
    """

    name: str
    cell: Cell
    inputs: Mapping[str, Bit]
    outputs: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Netlist:
    """A flattened module of library cells.

    Attributes:
        name: of the unit.
        library: where the cells come from.
        inputs: bits of each input port but the clock, lowest first.
        outputs: bits of each output port, lowest first.
        gates: all cells without a state.
        flip_flops: all cells with one.
        named: bits of every wire that has a name in the source.
        clock: the clock's wire; None in a unit without flip-flops.
    """

    name: str
    library: Library
    inputs: Mapping[str, tuple[Bit, ...]]
    outputs: Mapping[str, tuple[Bit, ...]]
    gates: tuple[Gate, ...]
    flip_flops: tuple[Gate, ...]
    named: Mapping[str, tuple[Bit, ...]] = field(repr=False)
    clock: int | None = None

    @classmethod
    def from_json(cls, design: Mapping[str, Any], library: Library, name: str) -> Netlist:
        """Reads what Yosys' `write_json` wrote after mapping.

        Args:
            design: the JSON.
            library: the library that the module is mapped to.
            name: what to call the netlist.

        Raises:
            HalfbyteError: if the module is not fully mapped, or a flip-flop uses a clear or preset input.
        """
        module = next(m for m in design["modules"].values() if "top" in m["attributes"])
        cells = [_gate(instance, data, library) for instance, data in module["cells"].items()]
        flip_flops = tuple(gate for gate in cells if gate.cell.flip_flop)
        clock = _clock(flip_flops)
        ports = {p: (data["direction"], tuple(map(_bit, data["bits"]))) for p, data in module["ports"].items()}
        return cls(
            name=name,
            library=library,
            inputs={p: bits for p, (way, bits) in ports.items() if way == "input" and bits != (clock,)},
            outputs={p: bits for p, (way, bits) in ports.items() if way == "output"},
            gates=tuple(gate for gate in cells if not gate.cell.flip_flop),
            flip_flops=flip_flops,
            named={n: tuple(map(_bit, d["bits"])) for n, d in module["netnames"].items() if not d["hide_name"]},
            clock=clock,
        )

    @property
    def area(self) -> float:
        """Sum of the cells' areas, in the library's unit."""
        return sum(gate.cell.area for gate in (*self.gates, *self.flip_flops))

    @property
    def area_ge(self) -> float:
        """The area in gate equivalents: how many two-input NANDs take as much."""
        return self.area / self.library.gate_area

    @property
    def cells(self) -> Counter[str]:
        """How often each cell is used."""
        return Counter(gate.cell.name for gate in (*self.gates, *self.flip_flops))

    @cached_property
    def depth(self) -> int:
        """The most cells in a row between two registers or ports."""
        levels: dict[Bit, int] = {}
        for gate in self.ordered(transparent=()):
            level = 1 + max((levels.get(bit, 0) for bit in gate.inputs.values()), default=0)
            levels.update(dict.fromkeys(gate.outputs.values(), level))
        return max(levels.values(), default=0)

    def register(self, name: str) -> tuple[int, ...]:
        """The flip-flops' output wires behind a register's name, lowest bit first.

        Raises:
            UnknownNameError: if no wire of that name is a register.
            HalfbyteError: if synthesis merged or removed some of its bits, so that it cannot hold every value.
        """
        stored = {bit for gate in self.flip_flops for bit in gate.outputs.values()}
        if not set(self.named.get(name, ())) & stored:
            found = [n for n, bits in self.named.items() if set(bits) <= stored]
            raise UnknownNameError("register", name, found)
        bits = tuple(bit for bit in self.named[name] if isinstance(bit, int))
        if len(set(bits) & stored) != len(self.named[name]):
            raise HalfbyteError(
                f"The register {name!r} of {self.name} has {len(self.named[name])} bits, of which synthesis kept "
                f"{len(set(bits) & stored)}; only a register that kept all of them can be set."
            )
        return bits

    def ordered(self, transparent: Collection[Gate]) -> list[Gate]:
        """The gates so that each comes after those that it reads.

        Args:
            transparent: flip-flops to take along as if they were wires.

        Raises:
            HalfbyteError: if they form a loop.
        """
        gates = [*self.gates, *transparent]
        source = {bit: i for i, gate in enumerate(gates) for bit in gate.outputs.values()}
        waits = [{source[b] for b in gate.inputs.values() if b in source} for gate in gates]
        readers: dict[int, list[int]] = {}
        for i, before in enumerate(waits):
            for j in before:
                readers.setdefault(j, []).append(i)
        ready = [i for i, before in enumerate(waits) if not before]
        missing = [len(before) for before in waits]
        order = []
        while ready:
            i = ready.pop()
            order.append(gates[i])
            for j in readers.get(i, ()):
                missing[j] -= 1
                if not missing[j]:
                    ready.append(j)
        if len(order) != len(gates):
            raise HalfbyteError(
                f"{len(gates) - len(order)} cells of {self.name} form a loop. A register that feeds itself must be "
                "named as state."
            )
        return order

    def loads(self) -> dict[int, float]:
        """For each wire the capacitance of all input pins on it, in the library's unit. The clock is left out."""
        total: dict[int, float] = {}
        for gate in (*self.gates, *self.flip_flops):
            for pin, bit in gate.inputs.items():
                if isinstance(bit, int) and bit != self.clock:
                    total[bit] = total.get(bit, 0.0) + gate.cell.capacitance[pin]
        return total


def _bit(bit: object) -> Bit:
    if isinstance(bit, int):
        return bit
    # Nothing depends on an unknown or unconnected bit after mapping; zero is as good as one.
    return "1" if bit == "1" else "0"


def _gate(instance: str, data: Mapping[str, Any], library: Library) -> Gate:
    """A cell of the JSON, with its pins sorted by direction."""
    cell = library.cells.get(data["type"])
    if cell is None:
        raise HalfbyteError(
            f"The cell {instance} is a {data['type']}, which {library.name} lacks. The module is not fully mapped; "
            "a library needs at least NAND2, INV and a rising-edge flip-flop."
        )
    if not cell.area > 0:
        raise HalfbyteError(
            f"The netlist uses {cell.name}, to which {library.name} gives the area {cell.area:g}; an area is above "
            "zero. Mend the library or give another one."
        )
    wires = {pin: _bit(bits[0]) for pin, bits in data["connections"].items() if bits}
    outputs = {pin: bit for pin, bit in wires.items() if pin in cell.outputs and isinstance(bit, int)}
    gate = Gate(instance, cell, {pin: bit for pin, bit in wires.items() if pin in cell.capacitance}, outputs)
    if cell.flip_flop and not all(_is_false(e, gate) for e in cell.flip_flop.asynchronous):
        raise HalfbyteError(f"The flip-flop {instance} has an active clear or preset; units are evaluated without.")
    return gate


def _is_false(expression: Expression, gate: Gate) -> bool:
    """Whether an expression over constant pins is false; anything else counts as not."""
    values = {pin: gate.inputs.get(pin) for pin in pins(expression)}
    if any(value not in ("0", "1") for value in values.values()):
        return False
    return not evaluate(expression, {pin: value == "1" for pin, value in values.items()})


def _clock(flip_flops: Iterable[Gate]) -> int | None:
    """The one wire that clocks all flip-flops."""
    clocks = set()
    for gate in flip_flops:
        assert gate.cell.flip_flop is not None
        clocks |= {gate.inputs[pin] for pin in pins(gate.cell.flip_flop.clocked_on)}
    if len(clocks) > 1:
        raise HalfbyteError(f"{len(clocks)} clocks drive the flip-flops; a unit has one.")
    clock = next(iter(clocks), None)
    return clock if isinstance(clock, int) else None
