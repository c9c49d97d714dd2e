"""Runs a circuit on a million inputs at once: one bit of 64 inputs in each machine word.

Amaranth's own simulator takes milliseconds a vector, this takes microseconds. It reads what Amaranth writes (RTLIL), so
it sees the circuit that is synthesized; `test_hardware_rtl.py` compares it with the simulator. A register is cut open:
its name holds the state that is given, and its input is what it takes at the next clock edge.
"""

from __future__ import annotations

import re
from graphlib import TopologicalSorter

import numpy as np
from amaranth.back import rtlil
from amaranth.lib.wiring import Component

Plane = np.ndarray
Planes = list[Plane]
Bit = tuple[str, int] | int
ZERO, ONE = np.zeros(1, np.uint64), np.full(1, ~np.uint64(0))

TOKEN = re.compile(r"\d+'[01]+|[\\$][^ {}]+(?: \[\d+(?::\d+)?\])?")


def to_planes(values: np.ndarray, width: int) -> Planes:
    """The bits of integers, lowest first; the count of integers is padded to a multiple of 64 with zeros."""
    padded = np.zeros(-(-len(values) // 64) * 64, np.int64)
    padded[: len(values)] = values
    return [np.packbits((padded >> i & 1).astype(np.uint8), bitorder="little").view(np.uint64) for i in range(width)]


def from_planes(planes: Planes, count: int, signed: bool) -> np.ndarray:
    """The integers of planes, as int64."""
    total = np.zeros(count, np.int64)
    for i, plane in enumerate(planes):
        full = np.broadcast_to(plane, (-(-count // 64),))
        bits = np.unpackbits(np.ascontiguousarray(full).view(np.uint8), bitorder="little")[:count].astype(np.int64)
        total += -(bits << i) if signed and i == len(planes) - 1 else bits << i
    return total


def extend(planes: Planes, width: int, signed: bool) -> Planes:
    """Cut or extended to a width."""
    return (planes + [planes[-1] if signed and planes else ZERO] * (width - len(planes)))[:width]


def add(a: Planes, b: Planes, carry: Plane = ZERO) -> Planes:
    """The sum, as wide as a."""
    total = []
    for x, y in zip(a, b, strict=True):
        half = x ^ y
        total.append(half ^ carry)
        carry = (x & y) | (half & carry)
    return total


def any_of(planes: Planes) -> Plane:
    """Whether a bit is set."""
    found = ZERO
    for plane in planes:
        found = found | plane
    return found


def less(a: Planes, b: Planes, signed: bool) -> Plane:
    """Whether a < b."""
    width = max(len(a), len(b)) + 1
    return add(extend(a, width, signed), [~p for p in extend(b, width, signed)], ONE)[-1]


def multiply(a: Planes, b: Planes) -> Planes:
    """The low bits of the product, as many as a has."""
    total = [ZERO] * len(a)
    for i, digit in enumerate(b):
        total = add(total, [ZERO] * i + [p & digit for p in a[: len(a) - i]])
    return total


def shift_left(a: Planes, b: Planes, fill: Plane = ZERO) -> Planes:
    """a moved by b places."""
    for i, digit in enumerate(b):
        moved = ([fill] * min(1 << i, len(a)) + a)[: len(a)]
        a = [(p & ~digit) | (q & digit) for p, q in zip(a, moved, strict=True)]
    return a


def evaluate(kind: str, a: Planes, b: Planes, s: Planes, width: int, signed: bool) -> Planes:
    """What a cell of Yosys' library gives (its manual, chapter "Word-level cells")."""
    x, y = extend(a, width, signed), extend(b, width, signed)
    bitwise = {"$and": np.bitwise_and, "$or": np.bitwise_or, "$xor": np.bitwise_xor}
    if kind in bitwise:
        return [bitwise[kind](p, q) for p, q in zip(x, y, strict=True)]
    if kind == "$not":
        return [~p for p in x]
    if kind == "$mux":
        return [(p & ~s[0]) | (q & s[0]) for p, q in zip(a, b, strict=True)]
    if kind == "$add":
        return add(x, y)
    if kind == "$sub":
        return add(x, [~p for p in y], ONE)
    if kind == "$neg":
        return add([ZERO] * width, [~p for p in x], ONE)
    if kind == "$mul":
        return multiply(x, y)
    if kind == "$shl":
        return shift_left(x, b)
    if kind in ("$shr", "$sshr"):
        wide = extend(a, max(width, len(a)), signed)
        return shift_left(wide[::-1], b, wide[-1] if kind == "$sshr" and signed else ZERO)[::-1][:width]
    bits = {
        "$reduce_or": lambda: any_of(a),
        "$reduce_bool": lambda: any_of(a),
        "$reduce_and": lambda: ~any_of([~p for p in a]),
        "$eq": lambda: ~any_of(evaluate("$xor", a, b, [], max(len(a), len(b)), signed)),
        "$ne": lambda: any_of(evaluate("$xor", a, b, [], max(len(a), len(b)), signed)),
        "$lt": lambda: less(a, b, signed),
        "$gt": lambda: less(b, a, signed),
        "$le": lambda: ~less(b, a, signed),
        "$ge": lambda: ~less(a, b, signed),
    }
    return extend([bits[kind]()], width, False)


class Circuit:
    """A component's circuit, ready to be evaluated."""

    def __init__(self, component: Component, name: str = "top") -> None:
        text = rtlil.convert(component, name=name, emit_src=False)
        assert len(re.findall(r"^module ", text, re.M)) == 1, "a circuit of one module"
        self.width, self.cells, self.drivers, self.alias, self.next = {}, [], {}, {}, {}
        self._read(text)
        self._order()

    def _read(self, text: str) -> None:
        for width, name in re.findall(r"^  wire width (\d+).*? +([\\$]\S+)$", text, re.M):
            self.width[name] = int(width)
        assert not re.search(r"^  (process|memory)", text, re.M), "no processes and no memories"
        for kind, body in re.findall(r"^  cell (\S+) \S+\n(.*?)^  end$", text, re.M | re.S):
            ports = {p: self._bits(spec) for p, spec in re.findall(r"connect \\(\w+) (.*)", body)}
            if kind == "$dff":
                self.next |= dict(zip(ports["Q"], ports["D"], strict=True))
                continue
            signed = re.search(r"A_SIGNED (1|true|1'1)", body) is not None
            for bit in ports["Y"]:
                self.drivers[bit] = len(self.cells)
            self.cells.append((kind, ports.get("A", []), ports.get("B", []), ports.get("S", []), ports["Y"], signed))
        for left, right in re.findall(r"^(?:  )?connect (\S+(?: \[[\d:]+\])?|\{.*?\}) (.*)$", text, re.M):
            self.alias |= dict(zip(self._bits(left), self._bits(right), strict=True))

    def _bits(self, spec: str) -> list[Bit]:
        """The bits of an expression, lowest first; a constant bit is 0 or 1."""
        found: list[Bit] = []
        for token in reversed(TOKEN.findall(spec)):
            if token[0].isdigit():
                found += [int(digit) for digit in reversed(token.split("'")[1])]
                continue
            name, _, part = token.partition(" ")
            high, _, low = part.strip("[]").partition(":")
            first, last = (int(low or high), int(high)) if part else (0, self.width[name] - 1)
            found += [(name, i) for i in range(first, last + 1)]
        return found

    def _order(self) -> None:
        """Cells in an order in which each finds its inputs done."""
        graph = {}
        for index, (_, a, b, s, _, _) in enumerate(self.cells):
            sources = {self._source(bit) for bit in (*a, *b, *s)}
            graph[index] = {self.drivers[bit] for bit in sources if bit in self.drivers}
        self.order = list(TopologicalSorter(graph).static_order())

    def _source(self, bit: Bit) -> Bit:
        """Where a bit comes from, through plain connections."""
        while bit in self.alias:
            bit = self.alias[bit]
        return bit

    def _named(self, name: str) -> list[Bit]:
        """The bits of a wire, where they come from. A register may be known under its port's name."""
        return [self._source((f"\\{name}", i)) for i in range(self.width[f"\\{name}"])]

    def run(self, count: int, given: dict[str, np.ndarray], wanted: dict[str, bool]) -> dict[str, np.ndarray]:
        """Evaluates.

        Args:
            count: of inputs.
            given: integers of shape (count,), or one integer, for each input port and register.
            wanted: names of wires, registers' next values among them, and whether they are signed.
        """
        planes: dict[Bit, Plane] = {}
        for name, values in given.items():
            full = np.broadcast_to(np.asarray(values, np.int64), (count,))
            bits = self._named(name)
            planes |= dict(zip(bits, to_planes(full, len(bits)), strict=True))

        def value(bit: Bit) -> Plane:
            bit = self._source(bit)
            return (ONE if bit else ZERO) if isinstance(bit, int) else planes[bit]

        goals = {name: [self.next.get(bit, bit) for bit in self._named(name)] for name in wanted}
        needed = self._cone([bit for bits in goals.values() for bit in bits])
        for index in self.order:
            if index in needed:
                kind, a, b, s, y, signed = self.cells[index]
                done = evaluate(kind, [*map(value, a)], [*map(value, b)], [*map(value, s)], len(y), signed)
                planes |= dict(zip(y, done, strict=True))
        return {n: from_planes([value(bit) for bit in bits], count, wanted[n]) for n, bits in goals.items()}

    def _cone(self, bits: list[Bit]) -> set[int]:
        """The cells on which bits depend."""
        seen: set[int] = set()
        todo = list(bits)
        while todo:
            index = self.drivers.get(self._source(todo.pop()))
            if index is not None and index not in seen:
                seen.add(index)
                _, a, b, s, _, _ = self.cells[index]
                todo += [*a, *b, *s]
        return seen
