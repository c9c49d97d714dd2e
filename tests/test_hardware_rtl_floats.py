# amaranth: UnusedElaboratable=no
# ruff: noqa: ERA001
"""The floating-point units that the 4-bit ones are compared with are honest: each rounds exactly once."""

from __future__ import annotations

import random
from fractions import Fraction
from functools import cache

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="the optional extra hw")

from amaranth.sim import Simulator

from halfbyte.errors import SpecError
from halfbyte.hardware.rtl import UNITS
from halfbyte.hardware.rtl.fma import FMA
from halfbyte.hardware.rtl.fused import FusedDot
from halfbyte.hardware.rtl.rounding import BF16, DLFLOAT16, FP8, FP16, FP32, FloatLayout
from hardware_units import addend, decode, fused_dot, multiply_add, random_float, rounded
from rtl_planes import Circuit

PAIRS = {
    "fma_fp16": (FP16, FP16),
    "fma_fp16_fp32": (FP16, FP32),
    "fma_dlf16": (DLFLOAT16, DLFLOAT16),
    "fma_fp8_dlf16": (FP8, DLFLOAT16),
    "fma_bf16_fp32": (BF16, FP32),
}
VECTORS = 3000


def vectors(factors: FloatLayout, sum_: FloatLayout, count: int, seed: int) -> list[tuple[int, int, int]]:
    """Factors and an addend that cancels their product, nearly, partly or not at all."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        a, b = random_float(factors, draw), random_float(factors, draw)
        found.append((a, b, addend(factors, sum_, a, b, draw)))
    return found


@cache
def circuit(name: str) -> Circuit:
    """The circuit of a unit of the catalog."""
    return Circuit(UNITS[name].build())


def run_fma(name: str, triples: list[tuple[int, int, int]], first: int = 0) -> list[int]:
    """The next accumulator for each (a, b, accumulator)."""
    a, b, c = (np.array(column) for column in zip(*triples, strict=True))
    given = {"a_q": a, "b_q": b, "acc_q": c, "first_q": first}
    return circuit(name).run(len(triples), given, {"acc_q": False})["acc_q"].tolist()


@pytest.mark.parametrize("name", PAIRS)
def test_multiply_add_rounds_once(name: str) -> None:
    """A fused multiply-add is the exact a * b + c rounded once to nearest even, on vectors made to cancel."""
    factors, sum_ = PAIRS[name]
    triples = vectors(factors, sum_, VECTORS, seed=1)
    want = [multiply_add(factors, sum_, *triple) for triple in triples]
    got = run_fma(name, triples)
    wrong = [(*map(hex, triple), hex(g), hex(w)) for triple, g, w in zip(triples, got, want, strict=True) if g != w]
    assert not wrong, f"{len(wrong)} wrong, first {wrong[0]}"
    # The vectors are worth something: they end in zero, beyond the largest number, and everywhere between.
    assert want.count(0) > VECTORS // 20
    assert len({code >> sum_.mantissa_bits & sum_.top for code in want}) > sum_.top // 3


@pytest.mark.parametrize("name", PAIRS)
def test_first_forgets_the_sum(name: str) -> None:
    """With `first` the result is the rounded product, whatever stood in the accumulator."""
    factors, sum_ = PAIRS[name]
    triples = vectors(factors, sum_, VECTORS // 10, seed=2)
    want = [multiply_add(factors, sum_, a, b, 0) for a, b, _ in triples]
    assert run_fma(name, triples, first=1) == want


# 1 + 2^-10 is 0x3C01, 2^-14 the least normal 0x0400, 65504 the largest 0x7BFF.
@pytest.mark.parametrize(
    ("a", "b", "c", "want", "why"),
    [
        (0x3C01, 0x3C01, 0xBC02, 0x0000, "(1 + u)^2 - (1 + 2u) = u^2 = 2^-20 is below the least normal: +0"),
        (0x4C01, 0x4C01, 0xDC02, 0x0C00, "the same times 2^8 leaves 2^-12, which two roundings would lose"),
        (0x3C00, 0x3C00, 0x1000, 0x3C00, "1 + 2^-11 is a tie: to even, down"),
        (0x3C01, 0x3C00, 0x1000, 0x3C02, "1 + 2^-10 + 2^-11 is a tie: to even, up"),
        (0x3C00, 0x3C00, 0x8C00, 0x3C00, "1 - 2^-12 is a tie below a power of two: to even, up"),
        (0x3C00, 0x3C00, 0x9000, 0x3BFF, "1 - 2^-11 is exact"),
        (0x7BFF, 0x3C00, 0x4BFF, 0x7BFF, "65504 + 15.99 is below the midpoint 65520"),
        (0x7BFF, 0x3C00, 0x4C00, 0x7C00, "65504 + 16 is the midpoint of the largest number and 2^16: infinity"),
        (0xFBFF, 0x7BFF, 0x7BFF, 0xFC00, "-65504^2 is minus infinity"),
        (0x3C00, 0xBC00, 0x3C00, 0x0000, "1 - 1 is +0"),
        (0x03FF, 0x7BFF, 0x3C00, 0x3C00, "a subnormal factor is zero"),
        (0x3C00, 0x3C00, 0x83FF, 0x3C00, "a subnormal addend is zero"),
        (0x3BFF, 0x0400, 0x0000, 0x0000, "(1 - 2^-11) 2^-14 is exact below the least normal: zero"),
    ],
)  # fmt: skip
def test_fp16_corners(a: int, b: int, c: int, want: int, why: str) -> None:
    """Ties, overflow, cancellation and the flush to zero of the FP16 multiply-add, worked by hand."""
    assert run_fma("fma_fp16", [(a, b, c)]) == [want], why


def test_reference_equals_ieee() -> None:
    """The tests' own float rules are IEEE's where no subnormal is near: decoding, and rounding a float64 to FP16."""
    draw = random.Random(3)
    for code in (random_float(FP16, draw) for _ in range(1000)):
        value = float(np.uint16(code).view(np.float16)) if code >> 10 & 31 else 0.0
        assert float(decode(FP16, code)) == value
    with np.errstate(over="ignore"):
        for x in (draw.uniform(-7e4, 7e4) * 2.0 ** -draw.randrange(16) for _ in range(1000)):
            assert abs(x) < 2.0**-13 or rounded(FP16, Fraction(x)) == int(np.float16(x).view(np.uint16))


def test_registers_and_first_in_the_simulator() -> None:
    """Clocked in Amaranth's simulator, a sum of FP16 products is rounded at each step, two edges after its operands."""
    unit, draw = FMA(FP16, FP16), random.Random(4)
    steps = [(random_float(FP16, draw, draw.randrange(10, 20)), random_float(FP16, draw, 15), i % 7 == 0)
             for i in range(40)]  # fmt: skip
    seen: list[int] = []

    async def drive(ctx) -> None:
        for a, b, first in [*steps, *[steps[-1]] * 2]:
            seen.append(ctx.get(unit.acc))
            ctx.set(unit.a, a)
            ctx.set(unit.b, b)
            ctx.set(unit.first, first)
            await ctx.tick()

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    simulator.run()
    acc, want = 0, []
    for a, b, first in steps:
        acc = multiply_add(FP16, FP16, a, b, 0 if first else acc)
        want.append(acc)
    assert seen[2:] == want


@pytest.mark.parametrize("sum_", [FP16, FP32], ids=["fp16", "fp32"])
def test_fused_dot_cuts_and_rounds_once(sum_: FloatLayout) -> None:
    """The fused dot aligns to the largest exponent, cuts each term toward zero there, and rounds the sum once."""
    unit, draw = FusedDot(FP16, sum_), random.Random(5)
    rows = []
    for _ in range(1500):
        near = draw.randrange(3, 28)
        a, b = ([random_float(FP16, draw, field) for field in fields] for fields in (
            [near + draw.randrange(-3, 4) if draw.random() < 0.7 else None for _ in range(4)],
            [draw.randrange(10, 20) if draw.random() < 0.9 else None for _ in range(4)],
        ))  # fmt: skip
        if draw.random() < 0.5:
            a[1], b[1] = a[0] ^ 0x8000, b[0] ^ draw.getrandbits(2)
        rows.append((a, b, addend(FP16, sum_, a[2], b[2], draw)))
    given = {
        f"{port}{i}_q": np.array([row[side][i] for row in rows]) for side, port in enumerate("ab") for i in range(4)
    }
    given |= {"acc_q": np.array([row[2] for row in rows]), "first_q": 0}
    got = Circuit(unit).run(len(rows), given, {"acc_q": False})["acc_q"].tolist()
    assert got == [fused_dot(FP16, sum_, unit.fraction_bits, *row) for row in rows]


def test_fused_dot_without_lanes_is_refused() -> None:
    """A fused dot of no lanes is refused."""
    with pytest.raises(SpecError, match="takes one or more"):
        FusedDot(FP16, FP16, 0)
