# amaranth: UnusedElaboratable=no
# ruff: noqa: ERA001
"""The 4-bit units compute exactly what the formats say: lanes, dot units, the rounder, the gradient converter."""

from __future__ import annotations

import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="the optional extra hw")

from amaranth.hdl import signed
from amaranth.lib.wiring import Out
from amaranth.sim import Simulator

from halfbyte import formats, oracle
from halfbyte.errors import SpecError
from halfbyte.hardware.rtl import UNITS
from halfbyte.hardware.rtl.converter import Converter
from halfbyte.hardware.rtl.dots import SCALES, Dot
from halfbyte.hardware.rtl.lanes import Lane
from halfbyte.hardware.rtl.rounding import FP16, Rounder
from hardware_units import FP16_VALUES
from rtl_planes import Circuit

SRC = Path(__file__).resolve().parents[1] / "src"

# The contract of the synthesis table: it looks these up.
NAMES = [
    "fma_fp16",
    "fma_fp16_fp32",
    "fma_dlf16",
    "fma_fp8_dlf16",
    "fma_bf16_fp32",
    "dot4_fp16",
    "dot4_fp16_fp32",
    "lane_int4",
    "lane_fp4",
    "lane_fp4_unsigned",
    "dot4_int4",
    "dot4_fp4",
    "dot4_fp4_unsigned",
    "dot4_mixed",
    "dot4_mixed_unsigned",
    "dot8_mixed",
    "dot4_fp4_acc32",
    "dot8_mixed_acc32",
    "dot4_fp4_round",
    "dot4_mixed_round",
    "dot2_mixed",
    "dot3_fp4",
    "round_int24_fp16",
    "convert_fp16_fp4",
]


def whole(code: int, unsigned: bool) -> int:
    """An integer operand's value."""
    return int(oracle.decode(formats.uint4 if unsigned else formats.int4, code))


def factor(code: int, fp4: bool) -> int:
    """The other operand's value: an integer, or FP4 in units of 4^-3."""
    if fp4:
        return int(oracle.decode(formats.fp4_e3m0_r4, code) * 64)
    return int(oracle.decode(formats.int4, code))


@pytest.mark.parametrize(
    ("kind", "can_be_unsigned"), [("int", False), ("fp4", False), ("fp4", True), ("mixed", False), ("mixed", True)]
)
def test_lanes_multiply_exactly(kind: str, can_be_unsigned: bool) -> None:
    """A lane's product is exact for every pair of codes in every mode, in Amaranth's simulator."""
    lane = Lane(kind, unsigned=can_be_unsigned)
    modes = [False, True] if kind == "mixed" else [kind == "fp4"]
    wrong = []

    async def drive(ctx) -> None:
        for fp4 in modes:
            if kind == "mixed":
                ctx.set(lane.fp4, fp4)
            for unsigned in [False, True] if can_be_unsigned else [False]:
                if can_be_unsigned:
                    ctx.set(lane.unsigned, unsigned)
                for a in range(16):
                    for b in range(16):
                        ctx.set(lane.a, a)
                        ctx.set(lane.b, b)
                        await ctx.delay(1e-9)
                        if ctx.get(lane.product) != whole(a, unsigned) * factor(b, fp4):
                            wrong.append((fp4, unsigned, a, b))

    simulator = Simulator(lane)
    simulator.add_testbench(drive)
    simulator.run()
    assert not wrong


def run_dot(unit: Dot, steps: list[dict[str, object]], output: str) -> list[int]:
    """Gives a unit one step at each clock edge; what stands at its output from the first result on."""
    latency = 3 if output == "out" else 2
    seen = []

    async def drive(ctx) -> None:
        for step in [*steps, *[steps[-1]] * latency]:
            seen.append(ctx.get(getattr(unit, output)))
            for name, value in step.items():
                port = getattr(unit, name)
                for one, single in zip(port, value, strict=True) if isinstance(value, list) else [(port, value)]:
                    ctx.set(one, single)
            await ctx.tick()

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    simulator.run()
    return seen[latency:]


def random_steps(unit: Dot, count: int, seed: int) -> list[dict[str, object]]:
    """Steps that start a new sum now and then."""
    draw = random.Random(seed)
    names = set(unit.signature.members)
    steps = []
    for i in range(count):
        step: dict[str, object] = {n: [draw.randrange(16) for _ in range(unit.lanes)] for n in ("a", "b")}
        step["first"] = int(i == 0 or draw.random() < 0.1)
        step |= {n: draw.randrange(2) for n in ("unsigned", "fp4") if n in names}
        if "scale" in names:
            step["scale"] = draw.randrange(len(SCALES[unit.kind]))
        steps.append(step)
    return steps


def sums(unit: Dot, steps: list[dict[str, object]]) -> list[int]:
    """The exact sum after each step."""
    total, found = 0, []
    for step in steps:
        fp4 = bool(step.get("fp4", unit.kind == "fp4"))
        pairs = zip(step["a"], step["b"], strict=True)
        total = total * (not step["first"]) + sum(
            whole(a, bool(step.get("unsigned"))) * factor(b, fp4) for a, b in pairs
        )
        found.append(total)
    return found


@pytest.mark.parametrize("name", [n for n, unit in UNITS.items() if unit.role == "unit" and "round" not in n])
def test_dot_units_accumulate_exactly(name: str) -> None:
    """A dot unit's accumulator is the exact sum, two clock edges after the operands, and `first` starts a new one."""
    unit = UNITS[name].build()
    steps = random_steps(unit, 40, seed=1)
    assert run_dot(unit, steps, "acc") == sums(unit, steps)


@pytest.mark.parametrize("name", ["dot4_fp4_round", "dot4_mixed_round"])
def test_rounding_units_round_the_exact_sum_once(name: str) -> None:
    """A unit with a rounder gives its exact sum times 2^-6, 2^-7 or 1 in FP16, three clock edges after the operands."""
    unit = UNITS[name].build()
    steps = random_steps(unit, 40, seed=2)
    got = run_dot(unit, steps, "out")
    for bits, total, step in zip(got, sums(unit, steps), steps, strict=True):
        scaled = total * Fraction(2) ** SCALES[unit.kind][step["scale"]]
        assert FP16_VALUES[bits] == oracle.to_binary(scaled, precision=11, min_exponent=-14, max_exponent=15)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("dot4_fp4_unsigned", {"a": [15] * 4, "b": [7] * 4, "unsigned": 1}),
        ("dot4_fp4_unsigned", {"a": [15] * 4, "b": [15] * 4, "unsigned": 1}),
        ("dot4_mixed_unsigned", {"a": [15] * 4, "b": [8] * 4, "unsigned": 1, "fp4": 0}),
        ("dot4_int4", {"a": [8] * 4, "b": [8] * 4}),
    ],
)
def test_accumulator_holds_the_worst_chunk_of_64(name: str, step: dict[str, object]) -> None:
    """64 products of the largest magnitude, all of one sign, leave no accumulator's range."""
    unit = UNITS[name].build()
    steps = [step | {"first": int(i == 0)} for i in range(16)]
    assert run_dot(unit, steps, "acc")[-1] == sums(unit, steps)[-1]
    assert abs(sums(unit, steps)[-1]) < 1 << 22


def test_wide_accumulator_holds_34952_products() -> None:
    """A 32-bit accumulator is exact for 34,952 products of +-61,440, the largest there are."""
    unit = Dot("fp4", unsigned=True, accumulator_bits=32)
    state = 34948 * 61440
    operands = {f"{port}{i}_q": code for port, code in (("a", 15), ("b", 7)) for i in range(4)}
    given = operands | {"acc_q": state, "first_q": 0, "unsigned_q": 1}
    assert Circuit(unit).run(1, given, {"acc_q": True})["acc_q"].tolist() == [34952 * 61440]


def test_every_operand_of_two_mixed_lanes() -> None:
    """The 2-way mixed unit adds the exact dot product to its accumulator for all 2^17 operands and modes."""
    a0, a1, b0, b1, fp4 = (axis.ravel() for axis in np.meshgrid(*[np.arange(16)] * 4, np.arange(2), indexing="ij"))
    acc = np.random.default_rng(3).integers(-(1 << 22), 1 << 22, a0.size)
    given = {"a0_q": a0, "a1_q": a1, "b0_q": b0, "b1_q": b1, "fp4_q": fp4, "acc_q": acc, "first_q": 0}
    got = Circuit(UNITS["dot2_mixed"].build()).run(a0.size, given, {"acc_q": True})["acc_q"]
    numbers = np.array([whole(c, False) for c in range(16)])
    factors = np.array([[factor(c, bool(mode)) for c in range(16)] for mode in range(2)])
    assert np.array_equal(got, acc + numbers[a0] * factors[fp4, b0] + numbers[a1] * factors[fp4, b1])


def float16_bits(values: np.ndarray) -> np.ndarray:
    """FP16 bits of float64 numbers: one rounding, to nearest even."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16).astype(np.int64)


def check_rounder(numbers: np.ndarray) -> None:
    """The catalog's rounder against NumPy's conversion, which is from float64 and so rounds once."""
    got = Circuit(UNITS["round_int24_fp16"].build()).run(numbers.size, {"integer": numbers}, {"out": False})["out"]
    assert np.array_equal(got, float16_bits(numbers.astype(np.float64)))


def test_rounder_near_every_power_of_two() -> None:
    """The rounder gives the nearest FP16, ties to even, for 2^20 integers: all small ones, and those near ties."""
    near = [sign * ((1 << k) + (j << max(k - 11, 0)) + d) for sign in (1, -1) for k in range(23) for j in range(2048)
            for d in (-1, 0, 1)]  # fmt: skip
    numbers = np.array([n for n in near if -(1 << 23) <= n < 1 << 23])
    check_rounder(np.concatenate([numbers, np.arange(-(1 << 16), 1 << 16)]))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_rounder_on_every_integer(part: int) -> None:
    """The rounder gives the nearest FP16, ties to even, for each of the 2^24 integers."""
    check_rounder(np.arange(part << 22, (part + 1) << 22) - (1 << 23))


def test_odd_phase_is_one_exponent_less() -> None:
    """For one accumulator the odd phase's FP16 is exactly half the even phase's, wherever that does not overflow."""
    sums_ = np.random.default_rng(4).integers(-(1 << 22) + 1024, (1 << 22) - 1024, 1 << 16)
    unit = Circuit(UNITS["dot4_fp4_round"].build())
    even, odd = (unit.run(sums_.size, {"acc_q": sums_, "scale_acc": s}, {"out_q": False})["out_q"] for s in (0, 1))
    assert np.array_equal(odd, np.where(sums_ == 0, 0, even - (1 << 10)))


def test_converter_equals_the_oracle_everywhere() -> None:
    """The converter gives the oracle's code for all 65,536 FP16 inputs in both phases, NaN and infinity included."""
    bits = np.arange(1 << 16)
    circuit = Circuit(UNITS["convert_fp16_fp4"].build())
    for odd, fmt in enumerate((formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd)):
        got = circuit.run(bits.size, {"x": bits, "odd": odd}, {"code": False})["code"].tolist()
        # The oracle reads the sign apart from the magnitude, so one half of the inputs tells both; NaN has no sign.
        positive = [oracle.encode(fmt, value) for value in FP16_VALUES[: 1 << 15]]
        nan = (FP16.top << 10) + 1
        want = positive + [code | 8 for code in positive[:nan]] + positive[nan:]
        assert want[::97] == [oracle.encode(fmt, value) for value in FP16_VALUES[::97]]
        wrong = [i for i in range(1 << 16) if got[i] != want[i]]
        assert not wrong, f"{fmt.name}: {len(wrong)} wrong, first {wrong[0]:#06x}"


def test_planes_equal_the_simulator() -> None:
    """The evaluator on which the tests above rest gives what Amaranth's simulator gives, for the converter's inputs."""
    unit = Converter()
    inputs = [random.Random(5).getrandbits(16) for _ in range(500)]
    seen = []

    async def drive(ctx) -> None:
        for x in inputs:
            ctx.set(unit.x, x)
            ctx.set(unit.odd, x & 1)
            await ctx.delay(1e-9)
            seen.append(ctx.get(unit.code))

    simulator = Simulator(unit)
    simulator.add_testbench(drive)
    simulator.run()
    given = {"x": np.array(inputs), "odd": np.array(inputs) & 1}
    assert Circuit(Converter()).run(500, given, {"code": False})["code"].tolist() == seen


def test_catalog_is_complete() -> None:
    """The catalog holds each unit of the synthesis table, and a unit's name tells its lanes, modes and widths."""
    assert list(UNITS) == NAMES
    for name, unit in UNITS.items():
        ports = unit.build().signature.members
        pairs = 0 if unit.macs == 0 else (ports["a"].dimensions or (1,))[0]
        assert (unit.name, unit.macs) == (name, pairs)
        if unit.role == "unit":
            assert name.startswith(f"dot{pairs}_{unit.build().kind}")
            assert [port in ports for port in ("acc", "out")] == ["round" not in name, "round" in name]
            width = 32 if "acc32" in name else 16 if "int4" in name else 24
            assert "round" in name or ports["acc"] == Out(signed(width))
            assert ("unsigned" in name) == ("unsigned" in ports)


@pytest.mark.parametrize("name", NAMES)
def test_ports_are_documented(name: str) -> None:
    """Each port of a unit stands in its class's docstring."""
    component = UNITS[name].build()
    documented = (type(component).__doc__ or "").split("Ports:")[1].split("Args:")[0]
    assert all(f"{port}: " in documented for port in component.signature.members)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Lane("fp5"), "A lane of kind 'fp5' was asked for; 'int', 'fp4' and 'mixed' are possible."),
        (lambda: Dot("fp4", 0), "A dot unit of 0 'fp4' lanes; one lane or more of int, fp4, mixed are possible."),
        (lambda: Dot("fp4", accumulator_bits=18), "An accumulator of 18 bits was asked for; 4 products"),
        (lambda: Rounder(24, FP16, ()), "A rounder of 24 bits with scales (); 2 bits and one scale are the least."),
    ],
)  # fmt: skip
def test_impossible_units_are_refused(build: object, said: str) -> None:
    """A unit that cannot exist is refused, and the error says what is possible."""
    with pytest.raises(SpecError) as caught:
        build()
    assert said in str(caught.value)


def test_missing_amaranth_is_named() -> None:
    """Without Amaranth the units cannot be imported, and the error names the cure."""
    code = (
        "import sys, types\n"
        "sys.modules['amaranth'] = None\n"
        "sys.modules['halfbyte'] = stub = types.ModuleType('halfbyte')\n"
        f"stub.__path__ = [{str(SRC / 'halfbyte')!r}]\n"  # the package without its root, which would load torch
        "from halfbyte.errors import HalfbyteError\n"
        "try:\n"
        "    import halfbyte.hardware.rtl\n"
        "except HalfbyteError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'halfbyte[hw]'" in result.stdout, result.stderr
