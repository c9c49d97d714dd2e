"""What every unit is made of: named wires, plain registers, and a normalizer that keeps what rounding needs.

The units are written for small area and in one clock cycle. Two habits make them small, and both serve the FP16
baselines as much as the 4-bit units:

* A negative sum is inverted, not negated. The missing +1 is remembered as one bit (``plus_one``) and paid in the
  rounder, which has to be able to add one anyway.
* The normalizer drops, at each stage, the bits that can no longer reach the result; they live on as one sticky bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import C, Cat, Module, Mux, Shape, Signal, Value

__all__ = ["Normalized", "align", "normalize", "register", "signed_for", "wire"]


def wire(m: Module, name: str, value: Value, shape: Shape | None = None) -> Signal:
    """A named signal that equals an expression, so that the expression is built once and can be seen in a waveform.

    Args:
        m: the module.
        name: its visible name.
        value: the expression.
        shape: a shape that holds it; its own if None, which is often wider than what can occur.
    """
    signal = Signal(Value.cast(value).shape() if shape is None else shape, name=name)
    m.d.comb += signal.eq(value)
    return signal


def register(m: Module, name: str, value: Value | None = None, shape: Shape | int | None = None) -> Signal:
    """A register of the domain ``sync``, without a reset, as data paths have them.

    Args:
        m: the module.
        name: its visible name.
        value: what it takes at each clock edge; None if the caller assigns it.
        shape: its shape; that of the value if None.
    """
    kind = shape if shape is not None else Value.cast(value).shape()
    signal = Signal(kind, name=name, reset_less=True)
    if value is not None:
        m.d.sync += signal.eq(value)
    return signal


def signed_for(low: int, high: int) -> Shape:
    """The narrowest signed shape that holds every integer from low to high."""
    return Shape(max((~low if low < 0 else low).bit_length(), (~high if high < 0 else high).bit_length()) + 1, True)


@dataclass(frozen=True, kw_only=True)
class Normalized:
    """A word shifted left until its top bit is one.

    Attributes:
        top: the leading bits, the highest one set unless the word was zero.
        sticky: whether anything but zeros (or but the deferred ones, see `normalize`) follows below `top`.
        count: by how many places the word was shifted.
    """

    top: Value
    sticky: Value
    count: Value


def normalize(m: Module, word: Value, keep: int, *, plus_one: Value | int = 0, name: str = "norm") -> Normalized:
    """Shifts a word left past its leading zeros, stage by stage, each stage deciding one bit of the count.

    With `plus_one` the number meant is ``word + 1``. Ones are shifted in instead of zeros, so that the shifted word
    plus one is the shifted number, exactly; `round_up` settles it.

    Args:
        m: the module.
        word: unsigned.
        keep: how many leading bits are wanted.
        plus_one: whether the number meant is one more.
        name: prefix of the wires.
    """
    stages = len(word).bit_length()
    missing = keep + (1 << stages) - 1 - len(word)
    fill = wire(m, f"{name}_fill", Value.cast(plus_one)[0])
    rest: Value = Cat(fill.replicate(missing), word)
    sticky: Value = C(0, 1)
    digits = []
    for stage in reversed(range(stages)):
        step = 1 << stage
        shift = wire(m, f"{name}_shift{step}", ~rest[-step:].any())
        lost = (rest[:step] ^ fill.replicate(step)).any()
        sticky = wire(m, f"{name}_sticky{step}", sticky | (~shift & lost))
        rest = wire(m, f"{name}_{step}", Mux(shift, rest[:-step], rest[step:]))
        digits.append(shift)
    return Normalized(top=rest, sticky=sticky, count=Cat(*reversed(digits)))


def align(m: Module, word: Value, shift: Value, width: int, name: str) -> tuple[Value, Value]:
    """A word at the top of a frame, moved right.

    Args:
        m: the module.
        word: unsigned; what is wider than the frame hangs over its right end.
        shift: by how many places; unsigned.
        width: of the frame.
        name: prefix of the wires.

    Returns:
        The frame, and whether a one fell off its right end.
    """
    over = max(0, len(word) - width)
    frame, sticky = word[over:], word[:over].any()
    stages = min(len(shift), (width - 1).bit_length())
    for digit in range(stages):
        step = 1 << digit
        grown = Cat(C(0, step), frame)
        moved = Cat(frame, C(0, step))
        lost = max(0, len(grown) - width)
        sticky = wire(m, f"{name}_sticky{step}", sticky | (shift[digit] & moved[:lost].any()))
        frame = wire(m, f"{name}_{step}", Mux(shift[digit], moved[lost:], grown[lost:]))
    assert len(frame) == width, "a shift that reaches from one end of the frame to the other"
    far = shift[stages:].any()
    sticky = wire(m, f"{name}_sticky", sticky | (far & frame.any()))
    return wire(m, f"{name}_frame", frame & (~far).replicate(width)), sticky
