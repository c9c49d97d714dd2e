"""A small systolic array of mixed units that multiplies tiles of 4-bit codes, as a chip's inner part would.

Output stationary: each element keeps one sum. Codes of the left operand enter at the left edge and move right, codes of
the right operand enter at the top and move down, one element a cycle. Row r is delayed by r cycles and column c by c,
so that what belongs together meets. A fold of K steps takes K + R + C - 2 cycles, from the first multiplication of the
first element to the last one of the last element, which is the closed form of `halfbyte.hardware.cycles` (``"os"``).
The finished sums leave through the columns while the next fold runs.
"""

from __future__ import annotations

from amaranth.hdl import EnableInserter, Module, Mux, Shape, Signal, Value, signed
from amaranth.lib import data, stream
from amaranth.lib.wiring import Component, In, Out

from ...errors import SpecError
from .dots import tree
from .lanes import PRODUCT_BITS, gated, multiplicand, product
from .words import register, wire

__all__ = ["Element", "Tile", "step_layout"]

_FLAGS = ("first", "unsigned", "fp4")


def step_layout(rows: int, columns: int, lanes: int) -> data.StructLayout:
    """What one step of a fold brings: `lanes` codes for each row and column, and what they are.

    Fields:
        a: for each row the codes of the left operand, INT4.
        b: for each column the codes of the right operand, INT4 or FP4.
        unsigned: `a` is 0...15.
        fp4: `b` is FP4.
        last: the fold ends with this step.
    """
    codes = data.ArrayLayout(4, lanes)
    fields = {"a": data.ArrayLayout(codes, rows), "b": data.ArrayLayout(codes, columns)}
    return data.StructLayout({**fields, "unsigned": 1, "fp4": 1, "last": 1})


class Element(Component):  # type: ignore[misc] # Amaranth ships no types
    """One processing element: lanes, a tree, a sum; and the registers through which codes go on to the neighbors.

    Ports:
        a: codes from the left, packed.
        b: codes from above, packed.
        first: from the left with `a`: this step starts a new sum.
        unsigned: from the left: `a` is 0...15.
        fp4: from the left: `b` is FP4.
        a_next: to the right, a cycle later.
        b_next: downwards, a cycle later.
        first_next: to the right.
        unsigned_next: to the right.
        fp4_next: to the right.
        acc: the sum.

    Args:
        lanes: products a cycle.
        width: bits of the sum.
    """

    def __init__(self, lanes: int, width: int) -> None:
        self.lanes, self.width = lanes, width
        ports = {"a": In(4 * lanes), "b": In(4 * lanes), "a_next": Out(4 * lanes), "b_next": Out(4 * lanes)}
        for flag in _FLAGS:
            ports |= {flag: In(1), f"{flag}_next": Out(1)}
        super().__init__({**ports, "acc": Out(signed(width))})

    def elaborate(self, platform: object) -> Module:
        """As a mixed `halfbyte.hardware.rtl.dots.Dot`, whose operand registers are also the way to the neighbors."""
        m = Module()
        held = {name: register(m, f"{name}_q", getattr(self, name)) for name in ("a", "b", *_FLAGS)}
        m.d.comb += [getattr(self, f"{name}_next").eq(value) for name, value in held.items()]
        products: list[Value] = []
        for i in range(self.lanes):
            number = multiplicand(m, f"number{i}", held["a"].word_select(i, 4), held["unsigned"])
            code = wire(m, f"code{i}", held["b"].word_select(i, 4))
            products.append(product(m, "mixed", number, code, fp4=held["fp4"], name=f"product{i}"))
        m.d.sync += self.acc.eq(gated(self.acc, ~held["first"]) + tree(m, products, "sum"))
        return m


class Tile(Component):  # type: ignore[misc] # Amaranth ships no types
    """R x C elements between two streams: steps of folds go in, rows of finished sums come out.

    The left operand of a fold is R x (K * lanes), the right one (K * lanes) x C, given in K steps. A step without data
    (`valid` low) adds nothing. If the rows of the fold before have not been taken when a fold ends, the array waits.

    Ports:
        steps: stream of `step_layout`.
        sums: stream of C signed sums, row 0 of a fold first; in units of 4^-3 where the fold's `b` was FP4.
        busy: high in each cycle from the first multiplication of a fold to its last.

    Args:
        rows: R.
        columns: C.
        lanes: products of an element a cycle.
        width: bits of a sum: 24 are exact for a chunk of 64 products, 32 for 34,952.

    Raises:
        SpecError: if a size is below 1, or the array is a single element, or one step's sum does not fit.
    """

    def __init__(self, rows: int = 4, columns: int = 4, lanes: int = 4, width: int = 32) -> None:
        if min(rows, columns, lanes) < 1 or rows * columns == 1:
            raise SpecError(f"A tile of {rows} x {columns} elements of {lanes} lanes; two elements are the least.")
        least = PRODUCT_BITS["mixed"] + (lanes - 1).bit_length()
        if width < least:
            raise SpecError(f"Sums of {width} bits were asked for; {lanes} products need {least} or more.")
        self.rows, self.columns, self.lanes, self.width = rows, columns, lanes, width
        super().__init__(
            {
                "steps": In(stream.Signature(step_layout(rows, columns, lanes))),
                "sums": Out(stream.Signature(data.ArrayLayout(signed(width), columns))),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """The control around the array: when a step may enter, when sums are taken over, when everything waits."""
        m = Module()
        go, accept, due = Signal(), Signal(), Signal()
        left = Signal(range(self.rows + 1))  # rows of sums that have not been taken
        taken = self.sums.valid & self.sums.ready
        m.d.comb += [
            self.sums.valid.eq(left != 0),
            go.eq(~due | (left == 0) | ((left == 1) & taken)),
            accept.eq(self.steps.valid & self.steps.ready),
        ]
        self._admit(m, go, accept, due)
        m.submodules.array = array = EnableInserter(go)(_Array(self.rows, self.columns, self.lanes, self.width))
        m.d.comb += [array.step.eq(Mux(accept, self.steps.payload.as_value(), 0)), array.first.eq(self._fresh & accept)]
        kept = [[register(m, f"kept{r}_{c}", shape=signed(self.width)) for c in range(self.columns)]
                for r in range(self.rows)]  # fmt: skip
        m.d.comb += [self.sums.payload[c].eq(kept[0][c]) for c in range(self.columns)]
        with m.If(due & go):
            m.d.sync += left.eq(self.rows)
            m.d.sync += [kept[r][c].eq(array.sums[r][c]) for r in range(self.rows) for c in range(self.columns)]
        with m.Elif(taken):
            m.d.sync += left.eq(left - 1)
            m.d.sync += [kept[r][c].eq(kept[r + 1][c]) for r in range(self.rows - 1) for c in range(self.columns)]
        return m

    def _admit(self, m: Module, go: Value, accept: Value, due: Signal) -> None:
        """After a fold's last step nothing enters until the last element's last multiplication."""
        skew = self.rows + self.columns - 2
        wait = Signal(range(skew + 1))
        ending, active, self._fresh = Signal(), Signal(), Signal(init=1)
        m.d.comb += [self.steps.ready.eq(go & (wait == 0)), self.busy.eq(active & go)]
        with m.If(go):
            m.d.sync += due.eq(ending & (wait == 0))
            with m.If(wait != 0):
                m.d.sync += wait.eq(wait - 1)
            with m.Elif(ending):
                m.d.sync += [ending.eq(0), active.eq(0)]
        with m.If(accept):
            last = self.steps.payload.last
            m.d.sync += [active.eq(1), self._fresh.eq(last), ending.eq(last), wait.eq(Mux(last, skew, 0))]


class _Array(Component):  # type: ignore[misc] # Amaranth ships no types
    """The elements and the delays at their edges. Everything in it moves, or nothing."""

    def __init__(self, rows: int, columns: int, lanes: int, width: int) -> None:
        self.rows, self.columns, self.lanes, self.width = rows, columns, lanes, width
        layout = step_layout(rows, columns, lanes)
        super().__init__(
            {"step": In(Shape.cast(layout)), "first": In(1), "sums": Out(signed(width)).array(rows, columns)}
        )

    def elaborate(self, platform: object) -> Module:
        """Skew, then neighbor to neighbor."""
        m = Module()
        step = data.View(step_layout(self.rows, self.columns, self.lanes), self.step)
        flags = {"first": self.first, "unsigned": step.unsigned, "fp4": step.fp4}
        above = [self._delayed(m, f"b{c}", step.b[c].as_value(), c) for c in range(self.columns)]
        for r in range(self.rows):
            row = {"a": self._delayed(m, f"a{r}", step.a[r].as_value(), r)}
            row |= {name: self._delayed(m, f"{name}{r}", flag, r) for name, flag in flags.items()}
            for c in range(self.columns):
                element = Element(self.lanes, self.width)
                m.submodules[f"element{r}_{c}"] = element
                m.d.comb += [getattr(element, name).eq(value) for name, value in row.items()]
                m.d.comb += [element.b.eq(above[c]), self.sums[r][c].eq(element.acc)]
                row = {name: getattr(element, f"{name}_next") for name in row}
                above[c] = element.b_next
        return m

    def _delayed(self, m: Module, name: str, value: Value, cycles: int) -> Value:
        """A value some cycles later."""
        for i in range(cycles):
            value = register(m, f"{name}_later{i}", value)
        return value
