"""Where a matrix product runs and what it moves: precision, dataflow, cores, and bytes on and off the chip.

A product is given whole to one dataflow and split over the cores along one of its sizes. Split along m, n or groups,
each core computes a part of the result. Split along k, each core computes a part of every sum, and the vector lanes
add the parts: that is what a weight gradient needs, whose result is small and whose sums are long. Of all ways the one
that takes least time is taken.

On the chip, an operand is read as often as the array asks (`halfbyte.hardware.cycles.sram_counts`). Off the chip, it is
read once if either operand fits into half of the buffers (all of them, if nothing arrives meanwhile). Otherwise one
is cut into pieces that fit, and the other is read again for each piece; the cheaper order is taken. Operands that
several cores need are read once. No partial sum leaves the chip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import SpecError
from ..formats import FORMATS
from .cycles import DATAFLOWS, Array, array_cycles, ceil_div, sram_counts
from .machine import Machine
from .workload import Gemm, format_bits

__all__ = ["SPLITS", "Placement", "bytes_of", "gemm_dram_bytes", "place", "placements", "precision_of"]

SPLITS = ("m", "n", "groups", "k")
"""Along which of a product's sizes it can be split over the cores; the first of equals is taken."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One way to run a product.

    Attributes:
        precision: which array of the machine.
        dataflow: ``"ws"``, ``"os"`` or ``"is"``.
        split: along which size it is split over the cores; empty where one core does it all.
        cores: how many work.
        compute_cycles: of the array, and of the lanes where they add the parts of split sums.
        sram_cycles: what the busiest core's buffers need.
        sram_bytes: of all cores.
        flops: additions of the lanes.
    """

    precision: str
    dataflow: str
    split: str
    cores: int
    compute_cycles: int
    sram_cycles: int
    sram_bytes: int
    flops: int

    @property
    def cost(self) -> tuple[int, int]:
        """What makes a placement better: less time, then fewer bytes."""
        return max(self.compute_cycles, self.sram_cycles), self.sram_bytes


def precision_of(a_format: str, b_format: str) -> str:
    """The narrowest class of multipliers that can multiply two formats exactly: one of `constants.PRECISIONS`.

    ``"fp4"`` is the unit that shifts a 4-bit integer by the exponent of a 4-bit float, so that float has no mantissa
    and the other number is an integer. ``"fp8"`` is IBM's HFP8 unit, whose significands have four bits (1-5-3 inside):
    it holds every 4-bit format and FP8. 16-bit floats share a price.

    Raises:
        UnknownNameError: if a format does not exist.
        SpecError: if one is wider than 32 bits.
    """
    bits = max(format_bits(a_format), format_bits(b_format))
    if bits > 32:
        raise SpecError(f"A product of {a_format} and {b_format} was asked for; the model prices up to 32 bits.")
    if bits > 8:
        return "fp16" if bits <= 16 else "fp32"
    first, second = FORMATS[a_format], FORMATS[b_format]
    integers = sum(fmt.kind == "int" for fmt in (first, second))
    if integers == 2:
        return "int4" if bits <= 4 else "int8"
    if any(fmt.kind == "int" and fmt.bits > 4 for fmt in (first, second)):
        return "fp16"  # eight bits of an integer do not fit into FP8's significand of four
    powers = any(name.startswith("fp4_e3m0") for name in (a_format, b_format))
    return "fp4" if bits <= 4 and integers == 1 and powers else "fp8"


def bytes_of(elements: int, fmt: str) -> int:
    """Bytes of so many elements, packed; the last byte is filled up."""
    return ceil_div(elements * format_bits(fmt), 8)


def gemm_dram_bytes(gemm: Gemm, machine: Machine) -> int:
    """Bytes that a product reads from and writes to the memory off the chip.

    Each group is a product of its own, so what must fit is a group's operand.
    """
    a, b = bytes_of(gemm.a_elements, gemm.a_format), bytes_of(gemm.b_elements, gemm.b_format)
    room = max(1, machine.capacity_bytes // (2 if machine.double_buffered else 1))
    pieces_of_a, pieces_of_b = (ceil_div(operand, gemm.groups * room) for operand in (a, b))
    width = machine.weight_gradient_bytes if gemm.phase == "wgrad" else machine.result_bytes
    return min(a + b * pieces_of_a, b + a * pieces_of_b) + gemm.out_elements * width


def _parts(size: int, cores: int) -> list[tuple[int, int]]:
    """A size in equal parts for the cores, the last one smaller: (part, how many cores have one), largest first."""
    part = ceil_div(size, cores)
    full, rest = divmod(size, part)
    return [(part, full), *([(rest, 1)] if rest else [])]


def _core_bytes(gemm: Gemm, sizes: dict[str, int], dataflow: str, array: Array, accumulate_bytes: int) -> int:
    """SRAM bytes of one core's part."""
    counts = sram_counts(dataflow, sizes["m"], sizes["n"], sizes["k"], array)
    a = bytes_of(counts.a_reads * sizes["groups"], gemm.a_format)
    b = bytes_of(counts.b_reads * sizes["groups"], gemm.b_format)
    return a + b + (counts.sum_writes + counts.sum_reads) * sizes["groups"] * accumulate_bytes


def placements(gemm: Gemm, machine: Machine) -> Iterator[Placement]:
    """All ways of running a product on a machine.

    Raises:
        SpecError: if the machine has no multipliers wide enough.
    """
    precision = machine.precision_for(precision_of(gemm.a_format, gemm.b_format))
    array = machine.arrays[precision]
    whole = {"m": gemm.m, "n": gemm.n, "k": gemm.k, "groups": gemm.groups}
    splits = [split for split in SPLITS if whole[split] > 1] if machine.cores > 1 else []
    for split in splits or [""]:
        parts = _parts(whole[split], machine.cores) if split else [(1, 1)]
        shares = [(whole | ({split: part} if split else {}), count) for part, count in parts]
        cores = sum(count for _, count in shares)
        # Each core's partial result is read and the sum written; the lanes of all cores share the additions.
        results = gemm.m * gemm.n * gemm.groups if split == "k" and cores > 1 else 0
        flops, adding = results * (cores - 1), results * (cores + 1) * machine.accumulate_bytes
        for dataflow in DATAFLOWS if machine.dataflow == "best" else (machine.dataflow,):
            largest = shares[0][0]
            compute = array_cycles(
                dataflow,
                largest["m"],
                largest["n"],
                largest["k"],
                array,
                repeats=largest["groups"],
                overlap=machine.double_buffered,
            )
            each = [_core_bytes(gemm, sizes, dataflow, array, machine.accumulate_bytes) for sizes, _ in shares]
            busiest = each[0] + ceil_div(adding, machine.cores)
            yield Placement(
                precision=precision,
                dataflow=dataflow,
                split=split,
                cores=cores,
                compute_cycles=compute + ceil_div(flops, machine.vector_lanes * machine.cores),
                sram_cycles=ceil_div(busiest, machine.sram_bytes_per_cycle),
                sram_bytes=sum(b * count for b, (_, count) in zip(each, shares, strict=True)) + adding,
                flops=flops,
            )


def place(gemm: Gemm, machine: Machine) -> Placement:
    """The way of running a product that takes least time, and of those the one that moves fewest bytes on the chip.

    Raises:
        SpecError: if the machine has no multipliers wide enough.
    """
    return min(placements(gemm, machine), key=lambda placement: placement.cost)
