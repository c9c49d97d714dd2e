"""How long a systolic array takes for a matrix product, and what it reads meanwhile: closed forms, proven elsewhere.

An array has R rows and C columns of processing elements, each with ``lanes`` multipliers whose products it sums. A
product of ``m x k`` and ``k x n`` is done in folds, one for each piece that fits:

    ws   weight stationary  b lies still: k over the rows, n over the columns; the m rows of a stream through
    is   input stationary   a lies still: k over the rows, m over the columns; the n columns of b stream through
    os   output stationary  the sums lie still: m over the rows, n over the columns; k streams through

Data enter skewed, a cycle later for each row or column. So a fold of ws takes R cycles to load and M + R + C - 2 to
stream, and one of os K + R + C - 2 (its results leave while the next fold runs). SCALE-Sim 3.0.0 says the number of the
last cycle, counted from zero, hence one less than the count: `scalesim_cycles`.

With ``overlap`` each element has a second register, which is loaded (ws, is) or emptied (os) through the R rows while
the array computes: a fold then begins max(stream, R) cycles after the one before.

This module imports nothing of ours except the errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import SpecError, UnknownNameError

__all__ = ["DATAFLOWS", "Array", "SramCounts", "array_cycles", "ceil_div", "folds", "scalesim_cycles", "sram_counts"]

DATAFLOWS: Mapping[str, str] = MappingProxyType(
    {"ws": "weight stationary", "os": "output stationary", "is": "input stationary"}
)
"""The dataflows by name."""


@dataclass(frozen=True)
class Array:
    """The multipliers of one core for one precision.

    Attributes:
        rows: rows of processing elements.
        columns: columns of processing elements.
        lanes: multipliers in an element, all in one sum.
    """

    rows: int
    columns: int
    lanes: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "lanes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SpecError(f"Array: {name}={value!r} was given; a whole number of at least 1 is possible.")

    @property
    def macs_per_cycle(self) -> int:
        """Multiply-accumulates of a full array in a cycle."""
        return self.rows * self.columns * self.lanes


@dataclass(frozen=True)
class SramCounts:
    """Elements that cross the edge of an array during a product.

    Attributes:
        a_reads: of the first operand.
        b_reads: of the second operand.
        sum_writes: sums that leave the array; of ws and is a partial one for each fold of k.
        sum_reads: partial sums read to be added to, and the finished ones on their way out.
    """

    a_reads: int
    b_reads: int
    sum_writes: int
    sum_reads: int


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up, exactly: as many pieces of b as hold a."""
    return -(-a // b)


def _check(dataflow: str, m: int, n: int, k: int) -> None:
    if dataflow not in DATAFLOWS:
        raise UnknownNameError("dataflow", str(dataflow), DATAFLOWS)
    if min(m, n, k) < 1:
        raise SpecError(f"A product of m={m}, n={n}, k={k} was given; each is at least 1.")


def _extents(dataflow: str, m: int, n: int, k: int, array: Array) -> tuple[int, int, int]:
    """(folds over the rows, folds over the columns, length of the stream)."""
    if dataflow == "os":
        return ceil_div(m, array.rows), ceil_div(n, array.columns), ceil_div(k, array.lanes)
    columns, stream = (n, m) if dataflow == "ws" else (m, n)
    return ceil_div(k, array.rows * array.lanes), ceil_div(columns, array.columns), stream


def folds(dataflow: str, m: int, n: int, k: int, array: Array) -> int:
    """How many pieces a product is done in.

    Raises:
        UnknownNameError: if there is no such dataflow.
    """
    _check(dataflow, m, n, k)
    over_rows, over_columns, _ = _extents(dataflow, m, n, k, array)
    return over_rows * over_columns


def array_cycles(
    dataflow: str, m: int, n: int, k: int, array: Array, *, repeats: int = 1, overlap: bool = False
) -> int:
    """Cycles of `repeats` products of ``m x k`` and ``k x n``, one after the other.

    The closed forms of SCALE-Sim 3.0.0, plus one (see above), and their overlapped variants.

    Args:
        dataflow: ``"ws"``, ``"os"`` or ``"is"``.
        m: rows of the result.
        n: columns of the result.
        k: length of the sums.
        array: the array.
        repeats: how many such products.
        overlap: whether a fold's operand is loaded, or its result taken away, during the fold before or after.

    Raises:
        UnknownNameError: if there is no such dataflow.
        SpecError: if a size is below 1.
    """
    _check(dataflow, m, n, k)
    over_rows, over_columns, stream = _extents(dataflow, m, n, k, array)
    count = repeats * over_rows * over_columns
    load = 0 if dataflow == "os" else array.rows
    alone = load + stream + array.rows + array.columns - 2
    if not overlap:
        return count * alone
    return (count - 1) * max(stream, array.rows) + alone


def scalesim_cycles(dataflow: str, m: int, n: int, k: int, array: Array) -> int:
    """What SCALE-Sim 3.0.0 reports as "Total Cycles" of a product whose operands are in its SRAMs.

    Raises:
        UnknownNameError: if there is no such dataflow.
        SpecError: if a size is below 1.
    """
    return array_cycles(dataflow, m, n, k, array) - 1


def sram_counts(dataflow: str, m: int, n: int, k: int, array: Array) -> SramCounts:
    """Elements read and written at the edge of the array.

    The operand that lies still is read once, the one that streams once for each fold that it meets. The sums of ws and
    is leave once for each fold of k (SCALE-Sim's "OFMAP writes"); those of os leave once. SCALE-Sim counts more of the
    latter, the padding of incomplete folds; that is not copied.

    Raises:
        UnknownNameError: if there is no such dataflow.
        SpecError: if a size is below 1.
    """
    _check(dataflow, m, n, k)
    over_rows, over_columns, _ = _extents(dataflow, m, n, k, array)
    if dataflow == "os":
        return SramCounts(m * k * over_columns, k * n * over_rows, m * n, m * n)
    sums = m * n * over_rows
    if dataflow == "ws":
        return SramCounts(m * k * over_columns, k * n, sums, sums)
    return SramCounts(m * k, k * n * over_columns, sums, sums)
