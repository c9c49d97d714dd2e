"""Closed forms of systolic arrays, against SCALE-Sim's numbers and against arrays simulated register by register."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import SpecError, UnknownNameError
from halfbyte.hardware.cycles import (
    DATAFLOWS,
    Array,
    SramCounts,
    array_cycles,
    ceil_div,
    folds,
    scalesim_cycles,
    sram_counts,
)

# SCALE-Sim 3.0.0, array of 16 x 24, operands in its SRAMs: dataflow, M, N, K, "Total Cycles", and of its
# DETAILED_ACCESS_REPORT the SRAM reads of IFMAP and filter and the writes of OFMAP.
SCALESIM = [
    ("ws", 100, 70, 50, 1847, 15000, 3500, 28000),
    ("ws", 37, 129, 200, 7097, 44400, 25800, 62049),
    ("ws", 1, 64, 512, 5279, 1536, 32768, 2048),
    ("ws", 512, 512, 8, 12451, 90112, 4096, 262144),
    ("os", 100, 70, 50, 1847, 15000, 24500, 7840),
    ("os", 37, 129, 200, 4283, 44400, 77400, 5493),
    ("os", 1, 64, 512, 1649, 1536, 32768, 184),
    ("os", 512, 512, 8, 32383, 90112, 131072, 290304),
    ("is", 100, 70, 50, 2479, 5000, 17500, 28000),
    ("is", 37, 129, 200, 4757, 7400, 51600, 62049),
    ("is", 1, 64, 512, 3775, 512, 32768, 2048),
    ("is", 512, 512, 8, 12451, 4096, 90112, 262144),
]

sizes = st.integers(1, 9)
sides = st.integers(1, 4)
flows = st.sampled_from(sorted(DATAFLOWS))
arrays = st.builds(Array, sides, sides, st.integers(1, 3))
large_arrays = st.builds(Array, st.integers(1, 300), st.integers(1, 300), st.integers(1, 16))
large = st.integers(1, 5000)


def padded(matrix, rows, columns):
    """A matrix with zeros to a multiple of rows and columns."""
    r, c = matrix.shape
    return np.pad(matrix, ((0, -r % rows), (0, -c % columns)))


def real(index, start, size):
    """Whether a position of a fold holds an element and not padding."""
    return start + index < size


def simulate_stationary(a, b, array, overlap):
    """A weight-stationary array, register by register: (product, cycles, counts).

    Weights enter column c from the top, the lowest row's first, c cycles later than column 0, into a shadow register
    in each element. The first input of a fold carries a flag that makes each element that it reaches take its shadow
    as its weight. Inputs move right and sums move down, a place a cycle; row r's inputs are r cycles late.
    """
    (m, k), n = a.shape, b.shape[1]
    rows, columns, lanes = array.rows, array.columns, array.lanes
    a_pad, b_pad = padded(a, 1, rows * lanes), padded(b, rows * lanes, columns)
    tiles = list(product(range(b_pad.shape[0] // (rows * lanes)), range(b_pad.shape[1] // columns)))
    loads, starts = [0], [rows]
    for _ in tiles[1:]:
        after = starts[-1] + (max(m, rows) - rows if overlap else m + rows + columns - 2)
        loads.append(after)
        starts.append(after + rows)
    shadow = np.zeros((rows, columns, lanes), int)
    weight = np.zeros_like(shadow)
    x = [[None] * columns for _ in range(rows)]
    sums = [[None] * columns for _ in range(rows)]
    result, arrived = np.zeros((m, b_pad.shape[1]), int), [0] * columns
    a_reads = b_reads = writes = last = 0
    for t in range(starts[-1] + m + rows + columns):
        new_x = [[None] * columns for _ in range(rows)]
        new_sums = [[None] * columns for _ in range(rows)]
        for r, c in product(range(rows), range(columns)):
            if c:
                token = x[r][c - 1]
            else:
                at = [(f, t - r - start) for f, start in enumerate(starts) if 0 <= t - r - start < m]
                assert len(at) < 2, "two folds feed one row in one cycle"
                token = None
                if at:
                    (f, i), first_k = at[0], tiles[at[0][0]][0] * rows * lanes + r * lanes
                    token = (a_pad[i, first_k : first_k + lanes], i == 0)
                    a_reads += sum(real(lane, first_k, k) for lane in range(lanes))
            new_x[r][c] = token
            if token is None:
                continue
            values, swaps = token
            if swaps:
                weight[r, c] = shadow[r, c]
            above = 0 if r == 0 else sums[r - 1][c]
            assert above is not None, "an input arrives without the sum from above"
            new_sums[r][c] = above + int(values @ weight[r, c])
            if r == rows - 1:
                f, i = divmod(arrived[c], m)
                arrived[c] += 1
                column = tiles[f][1] * columns + c
                result[i, column] += new_sums[r][c]
                writes += column < n
                last = t
        old = shadow.copy()
        for c, (f, load) in product(range(columns), enumerate(loads)):
            step = t - c - load
            for r in range(rows):
                if not r <= step < rows:
                    continue
                shadow[r, c] = old[r - 1, c]
                if r == 0:
                    first_k, column = (tiles[f][0] * rows + rows - 1 - step) * lanes, tiles[f][1] * columns + c
                    shadow[0, c] = b_pad[first_k : first_k + lanes, column]
                    b_reads += sum(real(lane, first_k, k) and column < n for lane in range(lanes))
        x, sums = new_x, new_sums
    return result[:, :n], last + 1, SramCounts(a_reads, b_reads, writes, writes)


def simulate_output_stationary(a, b, array, overlap):
    """An output-stationary array, register by register: (product, cycles, counts).

    Inputs of a move right, those of b move down; row r and column c are fed as many cycles late. A finished sum goes
    into its element's second register. From there a column's sums move down and out, once its lowest is there. A sum
    that finds that register full is an error.
    """
    (m, k), n = a.shape, b.shape[1]
    rows, columns, lanes = array.rows, array.columns, array.lanes
    a_pad, b_pad = padded(a, rows, lanes), padded(b, lanes, columns)
    steps = a_pad.shape[1] // lanes
    tiles = list(product(range(a_pad.shape[0] // rows), range(b_pad.shape[1] // columns)))
    period = max(steps, rows) if overlap else steps + rows + columns - 2
    starts = [f * period for f in range(len(tiles))]
    done, second = np.zeros((a_pad.shape[0], b_pad.shape[1]), int), {}
    sums = np.zeros((rows, columns), int)
    x, w = ([[None] * columns for _ in range(rows)] for _ in range(2))
    a_reads = b_reads = writes = last = 0
    for t in range(starts[-1] + steps + 3 * rows + columns):
        leaving, second = second, {}
        for (r, c), (f, origin, value) in leaving.items():
            moves = t >= starts[f] + steps + rows - 1 + c
            if not moves:
                assert (r, c) not in second, "a sum runs into one that waits"
                second[r, c] = (f, origin, value)
            elif r + 1 < rows:
                assert (r + 1, c) not in second, "a sum runs into one that waits"
                second[r + 1, c] = (f, origin, value)
            else:
                row, column = tiles[f][0] * rows + origin, tiles[f][1] * columns + c
                done[row, column] = value
                writes += row < m and column < n
        new_x, new_w = ([[None] * columns for _ in range(rows)] for _ in range(2))
        for r, c in product(range(rows), range(columns)):
            for late, source, moved, previous in (
                (r, "a", new_x, x[r][c - 1] if c else None),
                (c, "b", new_w, w[r - 1][c] if r else None),
            ):
                if (c if source == "a" else r) > 0:
                    moved[r][c] = previous
                    continue
                at = [(f, t - late - start) for f, start in enumerate(starts) if 0 <= t - late - start < steps]
                assert len(at) < 2, "two folds feed one place in one cycle"
                for f, step in at:
                    span = slice(step * lanes, step * lanes + lanes)
                    inside = sum(real(lane, step * lanes, k) for lane in range(lanes))
                    if source == "a":
                        row = tiles[f][0] * rows + r
                        moved[r][c] = (f, step, a_pad[row, span])
                        a_reads += inside * (row < m)
                    else:
                        column = tiles[f][1] * columns + c
                        moved[r][c] = (f, step, b_pad[span, column])
                        b_reads += inside * (column < n)
            if new_x[r][c] is None:
                assert new_w[r][c] is None
                continue
            (f, step, left), (g, other, top) = new_x[r][c], new_w[r][c]
            assert (f, step) == (g, other), "the operands of different products meet"
            sums[r, c] = (0 if step == 0 else sums[r, c]) + int(left @ top)
            last = t
            if step == steps - 1:
                assert (r, c) not in second, "the second register is still full"
                second[r, c] = (f, r, sums[r, c])
        x, w = new_x, new_w
    assert not second
    return done[:m, :n], last + 1, SramCounts(a_reads, b_reads, writes, writes)


def simulate(dataflow, a, b, array, overlap):
    """Any of the three; input stationary is weight stationary on the transposed product."""
    if dataflow == "os":
        return simulate_output_stationary(a, b, array, overlap)
    if dataflow == "ws":
        return simulate_stationary(a, b, array, overlap)
    result, cycles, counts = simulate_stationary(b.T, a.T, array, overlap)
    return result.T, cycles, SramCounts(counts.b_reads, counts.a_reads, counts.sum_writes, counts.sum_reads)


@pytest.mark.parametrize(("dataflow", "m", "n", "k", "cycles", "a", "b", "sums"), SCALESIM)
def test_scalesim(dataflow, m, n, k, cycles, a, b, sums):
    """Cycles and SRAM counts equal SCALE-Sim 3.0.0's, except its count of output-stationary results with padding."""
    array = Array(16, 24)
    assert scalesim_cycles(dataflow, m, n, k, array) == cycles
    counts = sram_counts(dataflow, m, n, k, array)
    assert (counts.a_reads, counts.b_reads) == (a, b)
    assert counts.sum_writes == (m * n if dataflow == "os" else sums)


@settings(max_examples=120)
@given(dataflow=flows, m=sizes, n=sizes, k=st.integers(1, 14), array=arrays, overlap=st.booleans())
def test_simulated_array(dataflow, m, n, k, array, overlap):
    """An array that is simulated register by register computes the product in the closed form's cycles and accesses."""
    rng = np.random.default_rng(m + 10 * n + 100 * k)
    a, b = rng.integers(-8, 8, (m, k)), rng.integers(-8, 8, (k, n))
    result, cycles, counts = simulate(dataflow, a, b, array, overlap)
    np.testing.assert_array_equal(result, a @ b)
    assert cycles == array_cycles(dataflow, m, n, k, array, overlap=overlap)
    assert counts == sram_counts(dataflow, m, n, k, array)


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_overlap_is_as_tight_as_registers_allow(dataflow):
    """Where a stream is shorter than the rows, folds follow one another by the rows.

    8 x 6 on an array of 4 x 3 are 2 x 2 folds, each with a stream of 2. The last of them begins 3 x 4 cycles after the
    first, and one alone takes 2 + 4 + 3 - 2 = 7 cycles, and 4 more to load what lies still.
    """
    array = Array(4, 3)
    m, n, k = {"ws": (2, 6, 8), "is": (6, 2, 8), "os": (8, 6, 2)}[dataflow]
    assert folds(dataflow, m, n, k, array) == 4
    alone = 7 if dataflow == "os" else 11
    assert array_cycles(dataflow, m, n, k, array, overlap=True) == 3 * 4 + alone
    assert array_cycles(dataflow, m, n, k, array) == 4 * alone


@given(dataflow=flows, m=large, n=large, k=large, array=large_arrays, overlap=st.booleans())
def test_no_array_beats_its_multipliers(dataflow, m, n, k, array, overlap):
    """On any array no product takes fewer cycles than its multiply-accumulates need."""
    cycles = array_cycles(dataflow, m, n, k, array, overlap=overlap)
    assert cycles * array.macs_per_cycle >= m * n * k


@given(dataflow=flows, m=large, n=large, k=large, array=large_arrays, overlap=st.booleans(), which=st.integers(0, 2))
def test_larger_products_take_no_less(dataflow, m, n, k, array, overlap, which):
    """On any array one more row, column or term takes at least as many cycles."""
    more = [m, n, k]
    more[which] += 1
    cycles = array_cycles(dataflow, m, n, k, array, overlap=overlap)
    assert array_cycles(dataflow, *more, array, overlap=overlap) >= cycles


@given(dataflow=flows, m=large, n=large, k=large, array=large_arrays, repeats=st.integers(1, 5))
def test_overlap_never_hurts(dataflow, m, n, k, array, repeats):
    """Overlapping takes at most as long, and exactly as long where there is one fold; repeats are more folds."""
    plain = array_cycles(dataflow, m, n, k, array, repeats=repeats)
    overlapped = array_cycles(dataflow, m, n, k, array, repeats=repeats, overlap=True)
    assert plain == repeats * array_cycles(dataflow, m, n, k, array)
    assert overlapped <= plain
    if repeats * folds(dataflow, m, n, k, array) == 1:
        assert overlapped == plain


@given(m=large, n=large, k=large, array=large_arrays)
def test_input_stationary_is_the_transposed_product(m, n, k, array):
    """Input stationary is weight stationary with the operands exchanged, in cycles and in accesses."""
    assert array_cycles("is", m, n, k, array) == array_cycles("ws", n, m, k, array)
    ours, theirs = sram_counts("is", m, n, k, array), sram_counts("ws", n, m, k, array)
    assert (ours.a_reads, ours.b_reads, ours.sum_writes) == (theirs.b_reads, theirs.a_reads, theirs.sum_writes)


@given(a=st.integers(0, 10**30), b=st.integers(1, 10**20))
def test_ceil_div(a, b):
    """Rounding up is exact for whole numbers of any size."""
    pieces = ceil_div(a, b)
    assert (pieces - 1) * b < a <= pieces * b or (a == 0 and pieces == 0)


def test_errors():
    """A dataflow or a size that cannot be is refused, with what is possible."""
    with pytest.raises(UnknownNameError, match=r"no dataflow named 'row'.*is, os, ws"):
        array_cycles("row", 1, 1, 1, Array(1, 1))
    with pytest.raises(SpecError, match="m=0, n=1, k=1 was given; each is at least 1"):
        sram_counts("ws", 0, 1, 1, Array(1, 1))
    with pytest.raises(SpecError, match="lanes=0 was given; a whole number of at least 1"):
        Array(1, 1, 0)
    with pytest.raises(SpecError, match="rows=True"):
        Array(True, 1)
