"""What each kind of unit must compute, in exact arithmetic, and with which operands to find out whether it does.

A product of codes comes from `halfbyte.oracle`, so what the circuits are held to is the library's own arithmetic. Small
units get every operand there is; the others get random ones, half of them at the edges. Accumulators are random always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ... import formats, oracle
from ...errors import HalfbyteError
from . import floats

if TYPE_CHECKING:
    from amaranth.lib.wiring import Component

    from ..rtl.converter import Converter
    from ..rtl.dots import Dot
    from ..rtl.fma import FMA
    from ..rtl.fused import FusedDot
    from ..rtl.lanes import Lane
    from ..rtl.rounding import Rounder

__all__ = ["BLOCK", "EXHAUSTIVE_BITS", "Numbers", "Subject", "subject"]

BLOCK = 1 << 17
"""Vectors made and checked at once; they stay in a core's cache."""

EXHAUSTIVE_BITS = 24
"""Units with that many bits of operands or fewer get all of them."""

Numbers = Mapping[str, NDArray[np.int64]]
"""For each port n integers."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A unit's meaning.

    Attributes:
        claim: it in words.
        operands: bits of the ports whose every combination is tried where they are few enough.
        state: the register that holds the sum; None for a unit without one.
        fill: completes a block of operands: takes a generator and the operands, which it may change where they mean
            nothing, and adds the ports that are random always and the state. Without operands it makes them.
        expected: from everything given to every output port and the state's next value.
    """

    claim: str
    operands: Mapping[str, int]
    state: str | None
    fill: Callable[[np.random.Generator, int, Numbers | None], Numbers]
    expected: Callable[[Numbers], Numbers]

    @property
    def bits(self) -> int:
        """How many bits of operands there are."""
        return sum(self.operands.values())

    def blocks(self, vectors: int, seed: int) -> Iterator[Numbers]:
        """The operands to try, some at a time: all, if they are few enough, else random ones.

        Args:
            vectors: how many, at least, where they are random; where all are tried, all are tried with that many sums.
            seed: of the random numbers.
        """
        rng = np.random.default_rng(seed)
        every = 1 << self.bits
        if self.bits > EXHAUSTIVE_BITS:
            total = vectors
        else:
            total = every * (max(1, vectors // every) if self.state else 1)
        for start in range(0, total, BLOCK):
            n = -(-min(BLOCK, total - start) // 64) * 64
            if self.bits > EXHAUSTIVE_BITS:
                yield self.fill(rng, n, None)
            else:
                yield self.fill(rng, n, _split(np.arange(start, start + n) & (every - 1), self.operands))

    def sample(self, seed: int) -> Numbers:
        """One block of random operands, also where all could be tried."""
        rng = np.random.default_rng(seed)
        counter = rng.integers(0, 1 << min(self.bits, EXHAUSTIVE_BITS), BLOCK)
        return self.fill(rng, BLOCK, None if self.bits > EXHAUSTIVE_BITS else _split(counter, self.operands))


def _split(counter: NDArray[np.int64], widths: Mapping[str, int]) -> Numbers:
    """A counter's bits, dealt out to ports."""
    ports, low = {}, 0
    for name, width in widths.items():
        ports[name] = counter >> low & ((1 << width) - 1)
        low += width
    return ports


def subject(component: Component) -> Subject:
    """What a component of `halfbyte.hardware.rtl` must compute.

    Raises:
        HalfbyteError: if it is of an unknown kind.
    """
    from ..rtl.converter import Converter
    from ..rtl.dots import Dot
    from ..rtl.fma import FMA
    from ..rtl.fused import FusedDot
    from ..rtl.lanes import Lane
    from ..rtl.rounding import Rounder

    makers: dict[type[Any], Callable[[Any], Subject]] = {
        Lane: _lane,
        Dot: _dot,
        FMA: _fma,
        FusedDot: _fused,
        Rounder: _rounder,
        Converter: _converter,
    }
    for kind, make in makers.items():
        if isinstance(component, kind):
            return make(component)
    raise HalfbyteError(
        f"What a {type(component).__name__} must compute is not known; {', '.join(k.__name__ for k in makers)} are."
    )


@cache
def _products() -> NDArray[np.int64]:
    """Exact products by [FP4?, unsigned?, code of a, code of b]; with FP4 in units of 4^-3."""
    table = np.zeros((2, 2, 16, 16), np.int64)
    for fp4, second in enumerate((formats.int4, formats.fp4_e3m0_r4)):
        for unsigned, first in enumerate((formats.int4, formats.uint4)):
            for a in range(16):
                for b in range(16):
                    product = oracle.decode(first, a) * oracle.decode(second, b) / second.unit
                    table[fp4, unsigned, a, b] = int(product)
    return table


def _product(kind: str, given: Numbers, a: str, b: str) -> NDArray[np.int64]:
    """The exact products of two ports, in the mode that the unit has or is given."""
    fp4 = given["fp4"] if kind == "mixed" else int(kind == "fp4")
    found: NDArray[np.int64] = _products()[fp4, given.get("unsigned", 0), given[a], given[b]]
    return found


def _flags(component: Lane | Dot) -> dict[str, int]:
    """The one-bit modes that a unit has."""
    return {name: 1 for name in ("unsigned", "fp4") if name in component.signature.members}


def _lane(lane: Lane) -> Subject:
    kind = lane.kind
    return Subject(
        claim="the product of halfbyte.oracle",
        operands={"a": 4, "b": 4, **_flags(lane)},
        state=None,
        fill=_given,
        expected=lambda given: {"product": _product(kind, given, "a", "b")},
    )


def _given(_rng: np.random.Generator, _n: int, operands: Numbers | None) -> Numbers:
    """Operands as they are: for units that always get all of them and nothing else."""
    assert operands is not None, "the unit is too wide to be tried exhaustively"
    return operands


def _dot(dot: Dot) -> Subject:
    from ..rtl.dots import SCALES
    from ..rtl.rounding import FP16

    pairs = [(f"a__{i}", f"b__{i}") for i in range(dot.lanes)]
    flags, scales = _flags(dot), SCALES[dot.kind]
    choice = dot.rounds and len(scales) > 1
    low, high = -(1 << (dot.width - 1)), (1 << (dot.width - 1)) - 1

    def fill(rng: np.random.Generator, n: int, operands: Numbers | None) -> Numbers:
        if operands is None:
            codes = {name: _codes(rng, n) for pair in pairs for name in pair}
            operands = {**codes, **{flag: rng.integers(0, 2, n) for flag in flags}}
        # Half of the sums anywhere, half of them within 64 of a power of two, where carries run far.
        near = (1 << rng.integers(0, dot.width, n)) * rng.choice([-1, 1], n) + rng.integers(-64, 65, n)
        acc = np.where(rng.random(n) < 0.5, rng.integers(low, high + 1, n), np.clip(near, low, high))
        extra = {"scale": rng.integers(0, len(scales), n)} if choice else {}
        return {**operands, **extra, "first": rng.integers(0, 2, n), "acc_q": acc}

    def expected(given: Numbers) -> Numbers:
        total = sum(
            (_product(dot.kind, given, a, b) for a, b in pairs), np.where(given["first"] == 1, 0, given["acc_q"])
        )
        if not dot.rounds:
            return {"acc_q": total, "acc": given["acc_q"]}
        exponent = np.array(scales)[given["scale"]] if choice else np.array(scales[0])
        return {"acc_q": total, "out": floats.encode(FP16, np.ldexp(given["acc_q"].astype(float), exponent))}

    rounded = " and the sum in FP16, rounded once" if dot.rounds else ""
    return Subject(
        claim=f"the exact sum of {dot.lanes} products of halfbyte.oracle and the old sum{rounded}",
        operands={**{name: 4 for pair in pairs for name in pair}, **flags},
        state="acc_q",
        fill=fill,
        expected=expected,
    )


def _codes(rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    """Four-bit codes: half of them uniform, half zero or of the largest magnitudes of INT4 and FP4."""
    return np.where(rng.random(n) < 0.5, rng.integers(0, 16, n), rng.choice([0, 7, 8, 15], n))


def _fma(fma: FMA) -> Subject:
    factors, total = fma.factors, fma.sum

    def fill(rng: np.random.Generator, n: int, operands: Numbers | None) -> Numbers:
        given = operands or {name: floats.finite_codes(factors, rng, n) for name in ("a", "b")}
        a, b = (_finite(factors, given[name]) for name in ("a", "b"))
        product = floats.decode(factors, a) * floats.decode(factors, b)
        acc = _beside(total, rng, product)
        return {"a": a, "b": b, "first": (rng.random(n) < 0.125).astype(np.int64), "acc_q": acc}

    def expected(given: Numbers) -> Numbers:
        product = floats.decode(factors, given["a"]) * floats.decode(factors, given["b"])
        addend = np.where(given["first"] == 1, 0.0, floats.decode(total, given["acc_q"]))
        return {"acc_q": floats.encode(total, floats.add_odd(product, addend)), "acc": given["acc_q"]}

    return Subject(
        claim="the product plus the old sum, rounded once to nearest even",
        operands={
            "a": factors.exponent_bits + factors.mantissa_bits + 1,
            "b": factors.exponent_bits + factors.mantissa_bits + 1,
        },
        state="acc_q",
        fill=fill,
        expected=expected,
    )


def _finite(layout: floats.Layout, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Codes with infinity, which is never given, replaced by the numbers below it."""
    field = ((1 << layout.exponent_bits) - 1) << layout.mantissa_bits
    return np.where(codes & field == field, codes & ~(1 << layout.mantissa_bits), codes)


def _beside(layout: floats.Layout, rng: np.random.Generator, product: floats.Floats) -> NDArray[np.int64]:
    """Addends for products: a third anywhere, a third within reach, a third that cancels all but the last places."""
    n = len(product)
    anywhere = floats.finite_codes(layout, rng, n)
    opposite = floats.encode(layout, -product)
    reach = layout.mantissa_bits + 8
    moved = opposite + (rng.integers(-reach, reach + 1, n) << layout.mantissa_bits)
    size = layout.exponent_bits + layout.mantissa_bits
    within = (moved & ((1 << size) - 1) & ~((1 << layout.mantissa_bits) - 1)) | (
        anywhere & ((1 << layout.mantissa_bits) - 1)
    )
    within |= rng.integers(0, 2, n) << size
    near = (opposite + rng.integers(-3, 4, n)) & ((2 << size) - 1)
    kind = rng.integers(0, 3, n)
    return _finite(layout, np.where(kind == 0, anywhere, np.where(kind == 1, within, near)))


def _fused(dot: FusedDot) -> Subject:
    factors, total = dot.factors, dot.sum
    pairs = [(f"a__{i}", f"b__{i}") for i in range(dot.lanes)]

    def products(given: Numbers) -> list[floats.Floats]:
        return [floats.decode(factors, given[a]) * floats.decode(factors, given[b]) for a, b in pairs]

    def fill(rng: np.random.Generator, n: int, _operands: Numbers | None) -> Numbers:
        given = {name: floats.finite_codes(factors, rng, n) for pair in pairs for name in pair}
        # One lane in four repeats another with the other sign, so that sums cancel.
        twin = rng.random(n) < 0.25
        for this, other in zip(pairs[0], pairs[-1], strict=True):
            given[this] = np.where(twin, given[other], given[this])
        flip = 1 << (factors.exponent_bits + factors.mantissa_bits)
        given[pairs[0][0]] = np.where(twin, given[pairs[0][0]] ^ flip, given[pairs[0][0]])
        acc = _beside(total, rng, sum(products(given), np.zeros(n)))
        return {**given, "first": (rng.random(n) < 0.125).astype(np.int64), "acc_q": acc}

    def expected(given: Numbers) -> Numbers:
        addend = np.where(given["first"] == 1, 0.0, floats.decode(total, given["acc_q"]))
        exponents = [_exponent(addend)]
        for a, b in pairs:
            left, right = floats.decode(factors, given[a]), floats.decode(factors, given[b])
            exponents.append(np.where(left * right == 0, _NEVER, _exponent(left) + _exponent(right)))
        cut = dot.fraction_bits - np.maximum.reduce(exponents)
        whole = sum(np.trunc(np.ldexp(term, cut)) for term in (*products(given), addend))
        return {"acc_q": floats.encode(total, np.ldexp(whole, -cut)), "acc": given["acc_q"]}

    return Subject(
        claim="the products and the old sum, each cut at the unit's last place, summed and rounded once",
        operands={name: factors.exponent_bits + factors.mantissa_bits + 1 for pair in pairs for name in pair},
        state="acc_q",
        fill=fill,
        expected=expected,
    )


_NEVER = -400
"""Below every exponent of a float of 32 bits, and of a product of two."""


def _exponent(x: floats.Floats) -> NDArray[np.int64]:
    """The k of 2^k <= |x| < 2^(k + 1); far below all of them where x is zero."""
    return np.where(x == 0, _NEVER, np.frexp(x)[1] - 1)


def _rounder(rounder: Rounder) -> Subject:
    width, scales = len(rounder.integer), np.array(rounder.scales)
    choice = {"scale": (len(scales) - 1).bit_length()} if len(scales) > 1 else {}

    def expected(given: Numbers) -> Numbers:
        integer = given["integer"] - ((given["integer"] >> (width - 1)) << width)
        exponent = scales[np.minimum(given["scale"], len(scales) - 1)] if choice else scales[0]
        return {"out": floats.encode(rounder.layout, np.ldexp(integer.astype(float), exponent))}

    return Subject(
        claim="the integer, rounded once to nearest even",
        operands={"integer": width, **choice},
        state=None,
        fill=_given,
        expected=expected,
    )


@cache
def _fp4_codes() -> NDArray[np.int64]:
    """The FP4 code of each of the 65,536 codes of binary16, by [odd?, code], as halfbyte.oracle encodes it."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(float).tolist()
    phases = (formats.fp4_e3m0_r4, formats.fp4_e3m0_r4_odd)
    return np.array([[oracle.encode(fmt, x) for x in values] for fmt in phases])


def _converter(_converter: Converter) -> Subject:
    return Subject(
        claim="the code of halfbyte.oracle in both phases",
        operands={"x": 16, "odd": 1},
        state=None,
        fill=_given,
        expected=lambda given: {"code": _fp4_codes()[given["odd"], given["x"]]},
    )
