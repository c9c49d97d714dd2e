"""Cell libraries in the Liberty format: as much of a file as area, logic function and toggle energy need.

A Liberty file is nested groups, ``name (arguments) { ... }``, of attributes ``name : value;`` and lists
``name (values);``. `parse` reads such a file into `Group`; `Library` keeps the cells that logic can be mapped to.

    >>> library = Library.load()
    >>> library.cells["NAND2"].area, library.cells["NAND2"].outputs["Y"].function
    (1.0, Not(And(Pin('A'), Pin('B'))))
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from ...errors import HalfbyteError
from .logic import Expression, evaluate, parse_function, pins

__all__ = ["UNIT_GATE", "Cell", "FlipFlop", "Group", "Library", "Output", "parse"]

UNIT_GATE = Path(__file__).with_name("unit_gate.lib")
"""Our own library: areas are transistors divided by four, every delay is one."""

_TOKEN = re.compile(r'/\*.*?\*/|"((?:[^"\\]|\\.)*)"|([^\s:;(){},"\\]+)|([:;(){}])|[\s,\\]+', re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass
class Group:
    """One group of a Liberty file.

    Attributes:
        kind: its name, such as ``"cell"``.
        arguments: what stands in the parentheses.
        attributes: the value of each simple attribute, and of each list its values in one string.
        groups: the groups inside, in the order of the file.
    """

    kind: str
    arguments: tuple[str, ...]
    attributes: dict[str, str] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)

    def inside(self, kind: str) -> Iterator[Group]:
        """The groups of one kind directly inside."""
        return (group for group in self.groups if group.kind == kind)

    def number(self, name: str, default: float = 0.0) -> float:
        """An attribute as a number."""
        return float(self.attributes[name]) if name in self.attributes else default


class _Reader:
    """A recursive reader of one file's tokens."""

    def __init__(self, text: str) -> None:
        # A token is its text and whether it is punctuation: a quoted ";" is a word.
        self.tokens = [
            (m[1] if m[1] is not None else m[2] or m[3], m[3] is not None) for m in _TOKEN.finditer(text) if m.lastindex
        ]
        self.position = 0

    def next_is(self, punctuation: str) -> bool:
        return self.position < len(self.tokens) and self.tokens[self.position] == (punctuation, True)

    def words_until(self, *ends: str) -> list[str]:
        """The tokens up to one of some punctuation marks, which stays unread."""
        start = self.position
        while not any(self.next_is(end) for end in ends):
            self.position += 1
            if self.position > len(self.tokens):
                raise EOFError
        return [token for token, _ in self.tokens[start : self.position]]

    def body(self, group: Group) -> None:
        """Reads attributes and groups up to the brace that closes `group`."""
        while not self.next_is("}"):
            if self.position >= len(self.tokens):
                raise EOFError
            name, punctuation = self.tokens[self.position]
            self.position += 1
            if punctuation:
                continue  # The semicolon behind an attribute, or behind a group, where some files have one.
            if self.next_is(":"):
                self.position += 1
                group.attributes[name] = " ".join(self.words_until(";", "}"))
            elif self.next_is("("):
                self.position += 1
                arguments = self.words_until(")")
                self.position += 1
                if self.next_is("{"):
                    self.position += 1
                    inner = Group(name, tuple(arguments))
                    self.body(inner)
                    self.position += 1
                    group.groups.append(inner)
                else:
                    group.attributes[name] = " ".join(arguments)


def parse(text: str, name: str = "the text") -> Group:
    """The `library` group of a Liberty file.

    Args:
        text: the file's contents.
        name: what to call it in an error.

    Raises:
        HalfbyteError: if the text is not one whole group named `library`.
    """
    reader, root = _Reader(text + "}"), Group("", ())
    try:
        reader.body(root)
    except EOFError:
        root.groups.clear()
    if len(root.groups) != 1 or root.groups[0].kind != "library":
        raise HalfbyteError(
            f"{name} is no Liberty file: one whole group `library (name) {{ ... }}` was expected. "
            "Give the path of a .lib file in plain text."
        )
    return root.groups[0]


@dataclass(frozen=True, kw_only=True)
class Output:
    """An output pin.

    Attributes:
        function: its value, from the cell's input pins or, in a flip-flop, from its two state variables.
        edge_energy: energy of the cell's inner nodes at one edge of the output, load excluded, in the library's unit
            (capacitance times voltage squared): the mean over both edges, all arcs and all entries of their tables.
    """

    function: Expression
    edge_energy: float


@dataclass(frozen=True, kw_only=True)
class FlipFlop:
    """An edge-triggered cell.

    Attributes:
        state: the names of the stored bit and of its complement, which the outputs' functions read.
        next_state: what is stored at the clock's edge.
        clocked_on: the clock, possibly inverted.
        asynchronous: conditions that override the clock (clear and preset); a netlist must tie them to false.
        clock_energy: energy of the cell's inner nodes in one cycle, both edges of the clock, with nothing changing.
    """

    state: tuple[str, str]
    next_state: Expression
    clocked_on: Expression
    asynchronous: tuple[Expression, ...]
    clock_energy: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell that logic can be mapped to.

    Attributes:
        name: its name in the library.
        area: in the library's unit.
        capacitance: of each input pin, in the library's unit.
        input_energy: energy inside at one edge of each input pin but a clock, output and load excluded; see `Output`.
        outputs: by pin.
        flip_flop: what it stores; None for a gate.
    """

    name: str
    area: float
    capacitance: dict[str, float]
    input_energy: dict[str, float]
    outputs: dict[str, Output]
    flip_flop: FlipFlop | None = None


def _edge_energy(pin: Group) -> float:
    """The mean over all entries of all tables of a pin's internal_power."""
    arcs = []
    for power in pin.inside("internal_power"):
        tables = [t for kind in ("rise_power", "fall_power", "power") for t in power.inside(kind)]
        arcs += [fmean(map(float, _NUMBER.findall(t.attributes["values"]))) for t in tables]
    return fmean(arcs) if arcs else 0.0


def _read_cell(group: Group) -> Cell | None:
    """A cell, or None where it is a kind that evaluation does not know: a latch, a tristate, a pad."""
    if any(g.kind in ("latch", "statetable", "bus", "bundle", "ff_bank", "latch_bank") for g in group.groups):
        return None
    inputs, outputs = {}, {}
    energy = {}
    for pin in group.inside("pin"):
        direction = pin.attributes.get("direction")
        for name in pin.arguments:
            energy[name] = _edge_energy(pin)
            if direction == "input":
                inputs[name] = pin.number("capacitance")
            elif direction == "output" and "function" in pin.attributes and "three_state" not in pin.attributes:
                function = parse_function(pin.attributes["function"])
                outputs[name] = Output(function=function, edge_energy=energy[name])
    flip_flop = next((_read_flip_flop(ff, energy) for ff in group.inside("ff")), None)
    known = {*inputs, *(flip_flop.state if flip_flop else ())}
    if not outputs or not inputs or not all(known.issuperset(pins(output.function)) for output in outputs.values()):
        return None
    clock = set(pins(flip_flop.clocked_on)) if flip_flop else set()
    return Cell(
        name=group.arguments[0],
        area=group.number("area"),
        capacitance=inputs,
        input_energy={pin: 0.0 if pin in clock else energy[pin] for pin in inputs},
        outputs=outputs,
        flip_flop=flip_flop,
    )


def _cell(group: Group, path: Path) -> Cell | None:
    """`_read_cell`, with what is wrong in a file said of the cell where it is."""
    try:
        return _read_cell(group)
    except (ValueError, LookupError) as error:
        raise HalfbyteError(
            f"The cell {' '.join(group.arguments) or 'without a name'} of {path} cannot be read "
            f"({type(error).__name__}: {error}). A number, a table's values, a flip-flop's next_state or clocked_on is "
            "missing or malformed there: mend the file or give another one."
        ) from error


def _read_flip_flop(group: Group, energy: dict[str, float]) -> FlipFlop:
    clocked_on = parse_function(group.attributes["clocked_on"])
    return FlipFlop(
        state=(group.arguments[0], group.arguments[1] if len(group.arguments) > 1 else ""),
        next_state=parse_function(group.attributes["next_state"]),
        clocked_on=clocked_on,
        asynchronous=tuple(parse_function(group.attributes[k]) for k in ("clear", "preset") if k in group.attributes),
        clock_energy=2 * sum(energy.get(pin, 0.0) for pin in pins(clocked_on)),
    )


@dataclass(frozen=True, kw_only=True)
class Library:
    """The cells of a Liberty file.

    Attributes:
        name: the library's own name.
        path: the file.
        cells: by name.
        gate_area: the area of the smallest two-input NAND, which is one gate equivalent.
        voltage: nominal, in volts.
    """

    name: str
    path: Path
    cells: dict[str, Cell]
    gate_area: float
    voltage: float

    @classmethod
    def load(cls, path: Path = UNIT_GATE) -> Library:
        """Reads a library.

        Args:
            path: a Liberty file; our own by default.

        Raises:
            HalfbyteError: if there is no such file, it is no Liberty file, a cell cannot be read, or there is no
                two-input NAND with an area or no flip-flop.
        """
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise HalfbyteError(
                f"The cell library {path} cannot be read ({error.strerror}). Give the path of a Liberty file (.lib)."
            ) from error
        group = parse(text, str(path))
        found = [cell for cell in (_cell(inner, path) for inner in group.inside("cell")) if cell is not None]
        nands = [cell.area for cell in found if cell.flip_flop is None and _is_nand2(cell)]
        if not nands or not 0 < min(nands) < math.inf:
            raise HalfbyteError(
                f"The cell library {path} has two-input NANDs of the areas {nands}; at least one is needed, and all "
                "must be above zero: its area is one gate equivalent. Give a standard-cell library with areas."
            )
        if not any(cell.flip_flop for cell in found):
            raise HalfbyteError(
                f"The cell library {path} has {len(found)} cells that logic can be mapped to, but no flip-flop among "
                "them; one is needed. Give a standard-cell library."
            )
        try:
            voltage = group.number("nom_voltage", 1.0)
        except ValueError as error:
            raise HalfbyteError(
                f"The nom_voltage of the cell library {path} is no number ({error}). Mend it."
            ) from error
        return cls(
            name=group.arguments[0] if group.arguments else path.stem,
            path=path,
            cells={cell.name: cell for cell in found},
            gate_area=min(nands),
            voltage=voltage,
        )


def _is_nand2(cell: Cell) -> bool:
    """Whether a gate has the truth table of !(A & B), however the file writes it."""
    functions = [output.function for output in cell.outputs.values()]
    if len(functions) != 1 or len(cell.capacitance) != 2:
        return False
    first, second = cell.capacitance
    rows = [(False, False), (False, True), (True, False), (True, True)]
    return [evaluate(functions[0], {first: a, second: b}) for a, b in rows] == [True, True, True, False]
