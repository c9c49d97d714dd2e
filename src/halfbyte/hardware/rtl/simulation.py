"""Runs matrix products of codes through a `Tile` in Amaranth's simulator: exact sums, and the cycles that they took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from amaranth.sim import Simulator

from ...errors import SpecError
from .tile import Tile

__all__ = ["Run", "matmul"]

Codes = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came out of a simulated product.

    Attributes:
        sums: the exact integer sums, of shape (M, N); in units of 4^-3 where the right operand was FP4.
        cycles: in which the array computed; a wait for operands within a fold counts, a wait for the reader does not.
        clock_cycles: from the first cycle to that in which the last sum was taken.
    """

    sums: tuple[tuple[int, ...], ...]
    cycles: int
    clock_cycles: int


def matmul(
    a: Codes,
    b: Codes,
    *,
    fp4: bool,
    unsigned: bool = False,
    tile: Tile | None = None,
    pauses: Sequence[bool] = (False,),
    reluctance: Sequence[bool] = (False,),
) -> Run:
    """The product of two matrices of 4-bit codes, tile by tile.

    Args:
        a: codes of shape (M, K), INT4.
        b: codes of shape (K, N), INT4 or radix-4 FP4.
        fp4: whether `b` is FP4.
        unsigned: whether `a` is 0...15 instead of -8...7.
        tile: the array, which can be simulated once; a fresh one of 4 x 4 elements of 4 lanes if None.
        pauses: whether the source of operands has none in a cycle; repeated over the cycles.
        reluctance: whether the reader of sums takes none in a cycle; repeated over the cycles.

    Raises:
        SpecError: if a matrix is empty or ragged, their inner sizes differ, a code has more than four bits, or the
            source or the reader would never move.
    """
    _check(a, b, pauses, reluctance)
    tile = Tile() if tile is None else tile
    steps = list(_steps(a, b, tile, fp4=fp4, unsigned=unsigned))
    folds = sum(step["last"] for step in steps)
    rows: list[tuple[int, ...]] = []
    counts = {"busy": 0, "clock": 0}
    # Far more than any run takes: a tile that lost a row must not be waited for.
    patience = (len(steps) + folds * (tile.rows * len(reluctance) + tile.rows + tile.columns) + 8) * (len(pauses) + 1)

    async def source(ctx: Any) -> None:
        for step in steps:
            while pauses[counts["clock"] % len(pauses)]:
                await ctx.tick()
            ctx.set(tile.steps.payload, step)
            ctx.set(tile.steps.valid, 1)
            await ctx.tick().until(tile.steps.ready)
            ctx.set(tile.steps.valid, 0)

    async def reader(ctx: Any) -> None:
        while len(rows) < folds * tile.rows:
            assert counts["clock"] < patience, "every fold gives its rows"
            ctx.set(tile.sums.ready, not reluctance[counts["clock"] % len(reluctance)])
            _, _, valid, ready, busy, payload = await ctx.tick().sample(
                tile.sums.valid, tile.sums.ready, tile.busy, tile.sums.payload
            )
            counts["clock"] += 1
            counts["busy"] += busy
            if valid and ready:
                rows.append(tuple(payload[c] for c in range(tile.columns)))

    simulator = Simulator(tile)
    simulator.add_clock(1e-9)
    simulator.add_testbench(source)
    simulator.add_testbench(reader)
    simulator.run()
    return Run(sums=_joined(rows, len(a), len(b[0]), tile), cycles=counts["busy"], clock_cycles=counts["clock"])


def _check(a: Codes, b: Codes, pauses: Sequence[bool], reluctance: Sequence[bool]) -> None:
    """Refuses what cannot be multiplied or would wait forever."""
    k, n = (len(matrix[0]) if matrix else 0 for matrix in (a, b))
    if not (k and n) or len(b) != k or any(len(row) != k for row in a) or any(len(row) != n for row in b):
        raise SpecError(f"A product of {len(a)} x {k} and {len(b)} x {n} codes; (M, K) and (K, N) are possible.")
    if not all(0 <= code < 16 for matrix in (a, b) for row in matrix for code in row):
        raise SpecError("A code outside 0 to 15 was given; operands are 4-bit codes, as `QTensor.codes` holds them.")
    for name, pattern in (("pauses", pauses), ("reluctance", reluctance)):
        if all(pattern):
            raise SpecError(f"{name}={list(pattern)} never lets anything pass; at least one False is needed.")


def _steps(a: Codes, b: Codes, tile: Tile, *, fp4: bool, unsigned: bool) -> Iterator[dict[str, Any]]:
    """The steps of all folds, row of tiles by row of tiles. What is beyond an edge is the code 0, which is zero."""
    m, n, k = len(a), len(b[0]), len(b)

    def code(matrix: Codes, i: int, j: int) -> int:
        return matrix[i][j] if i < len(matrix) and j < len(matrix[0]) else 0

    for top in range(0, m, tile.rows):
        for side in range(0, n, tile.columns):
            for start in range(0, k, tile.lanes):
                inner = range(start, start + tile.lanes)
                yield {
                    "a": [[code(a, top + r, i) for i in inner] for r in range(tile.rows)],
                    "b": [[code(b, i, side + c) for i in inner] for c in range(tile.columns)],
                    "unsigned": int(unsigned),
                    "fp4": int(fp4),
                    "last": int(start + tile.lanes >= k),
                }


def _joined(rows: list[tuple[int, ...]], m: int, n: int, tile: Tile) -> tuple[tuple[int, ...], ...]:
    """The result from the rows of the folds, without what lay beyond its edges."""
    across = -(-n // tile.columns)
    result = []
    for i in range(m):
        fold = i // tile.rows * across
        parts = [rows[(fold + j) * tile.rows + i % tile.rows] for j in range(across)]
        result.append(tuple(value for part in parts for value in part)[:n])
    return tuple(result)
