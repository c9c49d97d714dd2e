"""The gradient converter: FP16 to radix-4 FP4, in the even or the odd phase.

To multiply by 1.6 and truncate the exponent to a power of four (Sun et al., NeurIPS 2020, Fig. 2c) takes no multiplier.
With |x| = m * 2^e, 1 <= m < 2, the even phase chooses 2^e for an even e, and for an odd e 2^(e - 1) if m < 1.25, else
2^(e + 1). So of the mantissa only m >= 1.25 matters, and to add that to an even e as well changes nothing once the sum
is halved. The odd phase is half the even phase of 2x, that is of e + 1. One small adder makes both phases.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux
from amaranth.lib.wiring import Component, In, Out

from .rounding import FP16
from .words import wire

__all__ = ["Converter"]


class Converter(Component):  # type: ignore[misc] # Amaranth ships no types
    """FP16 to a code of `halfbyte.formats.fp4_e3m0_r4`, or of its odd phase. Without registers.

    It equals `halfbyte.oracle.encode` for all 65,536 inputs: infinities saturate, subnormals are below every threshold,
    the sign of what becomes zero is kept, and NaN becomes the code 0.

    Ports:
        x: 16 bits of IEEE binary16; the gradient, already scaled by its layer's power of two.
        odd: the odd phase instead of the even one.
        code: 4 bits, sign and exponent code.
    """

    def __init__(self) -> None:
        super().__init__({"x": In(FP16.bits), "odd": In(1), "code": Out(4)})

    def elaborate(self, platform: object) -> Module:
        """An adder on the exponent field, and the limits of three bits."""
        m = Module()
        mantissa, field, sign = self.x[:10], self.x[10:15], self.x[15]
        far = wire(m, "far", mantissa[8:].any())  # m >= 1.25
        # The code of 2^e is (e + 8) / 2 in the even phase, and field = e + 15. Rounding the half up makes the same of
        # an even e with and without `far`.
        level = wire(m, "level", (field + self.odd + far + 1) >> 1)
        code = wire(m, "clipped", Mux(level < 4, 0, Mux(level > 11, 7, level - 4)[:3]))
        nan = wire(m, "nan", (field == FP16.top) & mantissa.any())
        m.d.comb += self.code.eq(Cat(code[:3], sign) & (~nan).replicate(4))
        return m
