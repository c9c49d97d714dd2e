"""Netlists without Yosys: the library reader, compiled evaluation against a slow one, exact floats, toggle energy."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from types import SimpleNamespace

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed")

from halfbyte import oracle  # noqa: E402
from halfbyte.errors import HalfbyteError, UnknownNameError  # noqa: E402
from halfbyte.hardware.synthesis import floats, liberty, logic  # noqa: E402
from halfbyte.hardware.synthesis.evaluate import Evaluator  # noqa: E402
from halfbyte.hardware.synthesis.netlist import Netlist  # noqa: E402
from halfbyte.hardware.synthesis.planes import from_planes, to_planes  # noqa: E402
from halfbyte.hardware.synthesis.toggles import toggle_energy  # noqa: E402

LIBRARY = liberty.Library.load()
FP16 = SimpleNamespace(exponent_bits=5, mantissa_bits=10)
FP8 = SimpleNamespace(exponent_bits=5, mantissa_bits=3)


def module(ports: dict, cells: list, names: dict | None = None) -> dict:
    """A design as Yosys writes it: ports as (direction, bits), cells as (type, {pin: bit}), names as bits."""
    rows = {
        f"g{i}": {"type": kind, "connections": {p: [b] for p, b in pins.items()}}
        for i, (kind, pins) in enumerate(cells)
    }
    return {
        "modules": {
            "top": {
                "attributes": {"top": "1"},
                "ports": {name: {"direction": way, "bits": bits} for name, (way, bits) in ports.items()},
                "cells": rows,
                "netnames": {name: {"hide_name": 0, "bits": bits} for name, bits in (names or {}).items()},
            }
        }
    }


def netlist(ports: dict, cells: list, names: dict | None = None) -> Netlist:
    """The same as a netlist of our own library."""
    return Netlist.from_json(module(ports, cells, names), LIBRARY, "example")


def slowly(example: Netlist, values: dict[object, bool]) -> dict[object, bool]:
    """All wires of a netlist without flip-flops, one gate and one truth value at a time, back from the outputs."""
    known = {"0": False, "1": True, **values}
    source = {bit: (gate, pin) for gate in example.gates for pin, bit in gate.outputs.items()}

    def value(bit: object) -> bool:
        if bit not in known:
            gate, pin = source[bit]
            known[bit] = logic.evaluate(gate.cell.outputs[pin].function, {p: value(b) for p, b in gate.inputs.items()})
        return known[bit]

    for bit in source:
        value(bit)
    return known


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("!A & B | C", "((!A) & B) | C"),
        ("A B + C", "(A & B) | C"),
        ("A ^ B & C", "(A ^ B) & C"),
        ("A' * B", "(!A) & B"),
        ("(A+B)'", "!(A | B)"),
        ("!A'", "!(!A)"),
        ("A & 1", "A & (1)"),
    ],
)
def test_functions_bind_as_liberty_says(text: str, same: str) -> None:
    """NOT binds tightest, then XOR, AND (also by juxtaposition), OR; both ways of writing NOT mean the same."""
    assert logic.parse_function(text) == logic.parse_function(same)


@pytest.mark.parametrize("text", ["", "A &", "(A", "A)", "A ? B", "& A"])
def test_unreadable_functions_are_refused(text: str) -> None:
    """What is no logic function is an error that quotes it, never a guess."""
    with pytest.raises(HalfbyteError, match=r"cannot be read; names, 0, 1"):
        logic.parse_function(text)


TEXT = """
/* a comment { with braces } */
library ("lib") {
  nom_voltage : 0.5;
  values_list ("1, 2", \\
               "3");
  cell (ND2) {
    area : 4.0
    ;
    pin ("A;") { direction : input; capacitance : 1; }
    pin (B) { direction : input; capacitance : 2; };
    pin (Z) { direction : output; function : "(!A;B)"; }
  }
}
"""


def test_liberty_groups_attributes_and_lists_are_read() -> None:
    """Comments go, quoted punctuation is text, a list may span lines, and a semicolon behind a group is allowed."""
    group = liberty.parse(TEXT)
    cell = next(group.inside("cell"))
    assert (group.arguments, group.attributes) == (("lib",), {"nom_voltage": "0.5", "values_list": "1, 2 3"})
    assert cell.number("area") == 4.0
    assert [pin.arguments for pin in cell.inside("pin")] == [("A;",), ("B",), ("Z",)]
    assert [pin.number("capacitance") for pin in cell.inside("pin")] == [1.0, 2.0, 0.0]


@pytest.mark.parametrize("text", ["", "library (x) {", "cell (x) { }", TEXT.rstrip()[:-1]])
def test_what_is_no_library_is_refused(text: str) -> None:
    """A truncated file, another group or an empty file is an error that says what was expected."""
    with pytest.raises(HalfbyteError, match="is no Liberty file"):
        liberty.parse(text)


def test_a_library_needs_a_nand_and_a_flip_flop(tmp_path) -> None:
    """Without the cell that defines a gate equivalent there is no area to speak of; a missing file says so as well."""
    path = tmp_path / "poor.lib"
    path.write_text(
        "library (x) { cell (INV) { area : 1; pin (A) { direction : input; }"
        ' pin (Y) { direction : output; function : "!A"; } } }'
    )
    with pytest.raises(HalfbyteError, match=r"NANDs of the areas \[\]; at least one"):
        liberty.Library.load(path)
    with pytest.raises(HalfbyteError, match="cannot be read"):
        liberty.Library.load(tmp_path / "none.lib")


@pytest.mark.parametrize(
    ("right", "wrong", "text"),
    [
        ("area : 0.5;", "area : 0.5um;", "cell INV .*ValueError"),
        ('values ("0.5, 0.5");', "", "cell INV .*KeyError: 'values'"),
        ('values ("0.5, 0.5");', 'values ("");', "cell INV .*StatisticsError"),
        ('clocked_on : "CK";', "", "cell DFF .*KeyError: 'clocked_on'"),
        ("ff (IQ, IQN)", "ff ()", "cell DFF .*IndexError"),
        ("cell (INV)", "cell ()", "cell without a name .*IndexError"),
        ("nom_voltage : 1.0;", "nom_voltage : high;", "nom_voltage of .* is no number"),
        ("area : 1;", "area : 0;", r"areas \[0.0\]; at least one"),
    ],
)
def test_a_malformed_cell_is_named(tmp_path, right: str, wrong: str, text: str) -> None:
    """What is wrong in a library is an error that names the cell and what is missing, never a traceback from inside."""
    path = tmp_path / "bad.lib"
    source = liberty.UNIT_GATE.read_text()
    assert right in source
    path.write_text(source.replace(right, wrong))
    with pytest.raises(HalfbyteError, match=text):
        liberty.Library.load(path)


def test_a_library_without_a_name_goes_by_its_file(tmp_path) -> None:
    """`library () {` is read, and called by the name of the file."""
    path = tmp_path / "unnamed.lib"
    path.write_text(liberty.UNIT_GATE.read_text().replace("library (unit_gate)", "library ()"))
    assert liberty.Library.load(path).name == "unnamed"


def test_too_short_streams_are_refused() -> None:
    """Four cycles, or a number of streams that does not fill words, are errors, and no energy is made of them."""
    for shape in ((4, 64), (9, 63)):
        with pytest.raises(HalfbyteError, match="more than 4 cycles and a multiple of 64"):
            toggle_energy(netlist(*COUNTER), {"up": np.zeros(shape, int)})


def test_pads_and_latches_are_left_out(tmp_path) -> None:
    """A cell whose output reads a pin that is no input, and one that holds a level, are no cells to map to."""
    path = tmp_path / "more.lib"
    text = liberty.UNIT_GATE.read_text().rstrip().removesuffix("}")
    pins = (
        'pin (A) { direction : input; } pin (P) { direction : inout; } pin (Y) { direction : output; function : "%s"; }'
    )
    latch = f"cell (LATCH) {{ latch (Q, QN) {{ }} {pins % 'A'} }}"
    path.write_text(f"{text} cell (PAD) {{ {pins % 'P'} }} {latch} cell (ODD) {{ {pins % 'A'} }} }}")
    assert liberty.Library.load(path).cells.keys() - LIBRARY.cells.keys() == {"ODD"}


TRANSISTORS = {
    "INV": 2, "BUF": 4, "NAND2": 4, "NAND3": 6, "NAND4": 8, "NOR2": 4, "NOR3": 6, "NOR4": 8, "AND2": 6, "AND3": 8,
    "OR2": 6, "OR3": 8, "AOI21": 6, "OAI21": 6, "AOI22": 8, "OAI22": 8, "XOR2": 10, "XNOR2": 10, "MUX2": 12, "DFF": 24,
}  # fmt: skip
MEANING = {
    "INV": lambda a: not a,
    "BUF": lambda a: a,
    "AOI21": lambda a, b, c: not ((a and b) or c),
    "OAI21": lambda a, b, c: not ((a or b) and c),
    "AOI22": lambda a, b, c, d: not ((a and b) or (c and d)),
    "OAI22": lambda a, b, c, d: not ((a or b) and (c or d)),
    "XOR2": lambda a, b: a != b,
    "XNOR2": lambda a, b: a == b,
    "MUX2": lambda a, b, s: b if s else a,
    **{f"NAND{n}": lambda *x: not all(x) for n in (2, 3, 4)},
    **{f"NOR{n}": lambda *x: not any(x) for n in (2, 3, 4)},
    **{f"AND{n}": lambda *x: all(x) for n in (2, 3)},
    **{f"OR{n}": lambda *x: any(x) for n in (2, 3)},
}


def test_the_unit_gate_library_counts_transistors() -> None:
    """Every cell's area is its transistors divided by four, 19 gates and a flip-flop, a NAND2 being one."""
    assert {name: cell.area for name, cell in LIBRARY.cells.items()} == {n: t / 4 for n, t in TRANSISTORS.items()}
    assert LIBRARY.gate_area == 1.0
    assert [name for name, cell in LIBRARY.cells.items() if cell.flip_flop] == ["DFF"]


@pytest.mark.parametrize("name", sorted(MEANING))
def test_the_unit_gate_library_means_what_its_names_say(name: str) -> None:
    """Every gate has the truth table of its name."""
    cell = LIBRARY.cells[name]
    for row in itertools.product((False, True), repeat=len(cell.capacitance)):
        got = logic.evaluate(cell.outputs["Y"].function, dict(zip(cell.capacitance, row, strict=True)))
        assert got == bool(MEANING[name](*row))


def test_planes_hold_what_was_put_in() -> None:
    """Integers of any sign and count come back from their bit planes."""
    values = np.array([0, 1, -1, 5, -8, 7] * 37)
    assert (from_planes(to_planes(values, 4), len(values), signed=True) == values).all()
    assert (from_planes(to_planes(values, 7), len(values)) == values & 127).all()
    assert to_planes(np.array([1, 2, 3]), 2)[:, 0].tolist() == [5, 6]


def random_netlist(seed: int, gates: int = 100) -> Netlist:
    """A random circuit of all cells of our library, with 8 inputs, constants among the gates' inputs, 8 outputs."""
    chance = random.Random(seed)
    kinds = [name for name, cell in LIBRARY.cells.items() if not cell.flip_flop]
    cells, wires = [], [*range(2, 10), "0", "1"]
    for i in range(gates):
        kind = kinds[i % len(kinds)]
        pins = {pin: chance.choice(wires[-40:]) for pin in LIBRARY.cells[kind].capacitance}
        cells.append((kind, {**pins, "Y": 10 + i}))
        wires.append(10 + i)
    chance.shuffle(cells)
    return netlist({"x": ("input", list(range(2, 10))), "y": ("output", [*wires[-7:], wires[3]])}, cells)


@pytest.mark.parametrize("seed", range(3))
def test_the_compiled_netlist_equals_the_gates_one_by_one(seed: int) -> None:
    """On random circuits of every cell, in any order of gates, all 256 inputs give what single gates give."""
    example = random_netlist(seed)
    got = Evaluator(example)(x=np.arange(256))["y"]
    for x in range(256):
        known = slowly(example, {2 + k: bool(x >> k & 1) for k in range(8)})
        assert got[x] == sum(known[bit] << k for k, bit in enumerate(example.outputs["y"]))


COUNTER = (
    {"clk": ("input", [2]), "up": ("input", [3]), "count": ("output", [4, 5])},
    [
        ("XOR2", {"A": 4, "B": 8, "Y": 6}),
        ("AND2", {"A": 4, "B": 8, "Y": 9}),
        ("XOR2", {"A": 5, "B": 9, "Y": 7}),
        ("DFF", {"CK": 2, "D": 6, "Q": 4}),
        ("DFF", {"CK": 2, "D": 7, "Q": 5}),
        ("DFF", {"CK": 2, "D": 3, "Q": 8}),
    ],
    {"count": [4, 5], "up_q": [8], "up": [3]},
)


def test_named_registers_are_state_and_the_others_wires() -> None:
    """A two-bit counter steps from any given state, and its input register takes no extra cycle."""
    step = Evaluator(netlist(*COUNTER), ["count"])
    state, up = np.divmod(np.arange(8), 2)
    result = step(count=state, up=up)
    assert step.inputs.keys() == {"up", "count"}  # the clock is no input
    assert (result["count"] == (state + up) % 4).all()


def test_a_register_that_feeds_itself_must_be_named() -> None:
    """A loop through an unnamed register, an unknown name and wrong inputs are errors that say so."""
    example = netlist(*COUNTER)
    with pytest.raises(HalfbyteError, match="form a loop"):
        Evaluator(example)
    with pytest.raises(UnknownNameError, match=r"'cuont'\. Did you mean 'count'"):
        Evaluator(example, ["cuont"])
    with pytest.raises(HalfbyteError, match="was given up; it takes count, up"):
        Evaluator(example, ["count"])(up=np.zeros(1, int))


def test_a_register_that_lost_bits_cannot_be_set() -> None:
    """A register of which synthesis kept half cannot hold every value, so it is not given any."""
    ports, cells, names = COUNTER
    with pytest.raises(HalfbyteError, match="has 4 bits, of which synthesis kept 2"):
        netlist(ports, cells, {**names, "count": [4, 5, 5, "0"]}).register("count")


def test_what_is_not_mapped_is_refused() -> None:
    """A cell that the library lacks means that the mapping failed."""
    with pytest.raises(HalfbyteError, match=r"is a \$_AND_, which unit_gate lacks"):
        netlist({"y": ("output", [3])}, [("$_AND_", {"A": 2, "B": 2, "Y": 3})])


def test_area_cells_and_depth_of_the_counter() -> None:
    """By hand: XOR2 2.5 twice, AND2 1.5, three flip-flops of 6; the longest path is AND2 then XOR2."""
    example = netlist(*COUNTER)
    assert (example.area_ge, example.cells.total(), example.depth) == (2 * 2.5 + 1.5 + 3 * 6, 6, 2)


def test_toggle_energy_of_an_inverter_behind_a_register() -> None:
    """By hand: a register that flips every cycle, an inverter behind it, and an unloaded output.

    Per cycle: load, one edge each of D (1 pair) and of the inverter's input (1), half a unit a pair, 1. Cells: D's
    inner 2 pairs, the stored value's 13, the inverter's output 1, halved, 8. Clock: 7 inner pairs and the pin's 1, at
    two edges, 8.
    """
    example = netlist(
        {"clk": ("input", [2]), "d": ("input", [3]), "y": ("output", [5])},
        [("DFF", {"CK": 2, "D": 3, "Q": 4}), ("INV", {"A": 4, "Y": 5})],
    )
    flips = np.repeat(np.arange(40)[:, None] % 2, 64, axis=1)
    busy = toggle_energy(example, {"d": flips})
    assert (busy.load, busy.cells, busy.clock) == (1.0, 8.0, 8.0)
    idle = toggle_energy(example, {"d": np.zeros_like(flips)})
    assert (idle.load, idle.cells, idle.clock) == (0.0, 0.0, 8.0)


def ieee_without_subnormals(x: Fraction, layout: SimpleNamespace) -> int:
    """The code of a number, by `halfbyte.oracle`: rounded without limits, then infinity or plus zero outside them."""
    wide = oracle.to_binary(x, precision=layout.mantissa_bits + 1, min_exponent=-1000, max_exponent=1000)
    bias, top = (1 << (layout.exponent_bits - 1)) - 1, (1 << layout.exponent_bits) - 1
    if wide == 0 or abs(wide) < 2.0 ** (1 - bias):
        return 0
    mantissa, exponent = np.frexp(abs(wide))
    field = int(exponent) - 1 + bias
    code = (
        top << layout.mantissa_bits
        if field >= top
        else (field << layout.mantissa_bits)
        + int(mantissa * 2 ** (layout.mantissa_bits + 1))
        - (1 << layout.mantissa_bits)
    )
    return code | (wide < 0) << (layout.mantissa_bits + layout.exponent_bits)


@pytest.mark.parametrize(("factors", "total"), [(FP16, FP16), (FP8, FP16), (FP16, FP8)])
def test_float_sums_round_once(factors: SimpleNamespace, total: SimpleNamespace) -> None:
    """A product plus an addend, through round-to-odd binary64, equals the one rounding of the exact rational."""
    rng = np.random.default_rng(1)
    a, b = (floats.finite_codes(factors, rng, 2000) for _ in range(2))
    product = floats.decode(factors, a) * floats.decode(factors, b)
    c = floats.decode(FP16, floats.finite_codes(FP16, rng, 2000)) * np.ldexp(1.0, rng.integers(-30, 5, 2000))
    c = np.where(rng.random(2000) < 0.3, -np.ldexp(np.rint(np.ldexp(product, 9)), -9), c)
    got = floats.encode(total, floats.add_odd(product, c))
    want = [ieee_without_subnormals(Fraction(p) + Fraction(q), total) for p, q in zip(product, c, strict=True)]
    assert got.tolist() == want


def test_rounding_twice_would_be_seen() -> None:
    """1 + 2^-11 + 2^-60 lies above a tie of FP16: to nearest binary64 it would become the tie, and then 1."""
    x, y = np.array([1.0 + 2.0**-11]), np.array([2.0**-60])
    assert floats.encode(FP16, floats.add_odd(x, y)).tolist() == [0x3C01]
    assert floats.encode(FP16, x + y).tolist() == [0x3C00]
