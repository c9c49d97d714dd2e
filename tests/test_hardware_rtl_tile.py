# amaranth: UnusedElaboratable=no
# ruff: noqa: ERA001
"""The systolic tile computes what the library computes, to the bit, in the cycles that the performance model says."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("amaranth", reason="the optional extra hw")

import halfbyte
from halfbyte import formats
from halfbyte.errors import SpecError
from halfbyte.hardware.cycles import Array, array_cycles
from halfbyte.hardware.rtl.simulation import matmul
from halfbyte.hardware.rtl.tile import Tile
from halfbyte.kernels import reference
from halfbyte.kernels.geometry import Conv, Linear
from halfbyte.kernels.reference.gemm import output_scale
from halfbyte.qtensor import QTensor
from halfbyte.watching import watch

INTEGERS = {False: formats.int4.integers, True: formats.uint4.integers}
FACTORS = {False: formats.int4.integers, True: formats.fp4_e3m0_r4.integers}
Matrix = list[list[int]]


def matrices(m: int, n: int, k: int, seed: int = 0) -> tuple[Matrix, Matrix]:
    """Random codes of shapes (m, k) and (k, n)."""
    draw = random.Random(seed)
    return tuple([[draw.randrange(16) for _ in range(wide)] for _ in range(high)] for high, wide in ((m, k), (k, n)))


def exact(a: Matrix, b: Matrix, *, fp4: bool, unsigned: bool) -> tuple[tuple[int, ...], ...]:
    """The product of what the codes stand for, in Python's integers."""
    left = [[INTEGERS[unsigned][code] for code in row] for row in a]
    right = [[FACTORS[fp4][code] for code in column] for column in zip(*b, strict=True)]
    return tuple(tuple(sum(x * y for x, y in zip(row, col, strict=True)) for col in right) for row in left)


SHAPES = [
    # rows, columns, lanes, m, n, k: folds that fit, that do not, a single step, one row, one column.
    (4, 4, 4, 8, 8, 8),
    (4, 4, 4, 5, 7, 9),
    (2, 3, 2, 3, 5, 7),
    (3, 2, 1, 5, 3, 2),
    (2, 2, 1, 4, 4, 1),
    (1, 3, 1, 2, 4, 3),
    (3, 1, 1, 6, 1, 1),
]


@pytest.mark.parametrize(("rows", "columns", "lanes", "m", "n", "k"), SHAPES)
def test_sums_and_cycles(rows: int, columns: int, lanes: int, m: int, n: int, k: int) -> None:
    """The sums are the exact integer product, and the cycles are the closed form of output-stationary arrays."""
    fp4, unsigned = k % 2 == 0, m % 2 == 1
    a, b = matrices(m, n, k)
    run = matmul(a, b, fp4=fp4, unsigned=unsigned, tile=Tile(rows, columns, lanes))
    assert run.sums == exact(a, b, fp4=fp4, unsigned=unsigned)
    assert run.cycles == array_cycles("os", m, n, k, Array(rows, columns, lanes))
    # Two registers stand before and behind the multiplications, and the last fold's rows leave one by one.
    assert run.clock_cycles == run.cycles + 2 + rows


@pytest.mark.parametrize(("fp4", "unsigned"), [(False, False), (False, True), (True, False), (True, True)])
def test_modes(fp4: bool, unsigned: bool) -> None:
    """Every mode reads the codes as its formats do."""
    a, b = matrices(4, 4, 16, seed=1)
    assert matmul(a, b, fp4=fp4, unsigned=unsigned).sums == exact(a, b, fp4=fp4, unsigned=unsigned)


@pytest.mark.parametrize("seed", range(3))
def test_streams_may_hesitate(seed: int) -> None:
    """A source that pauses and a reader that is slow change when the sums come, and no sum."""
    draw = random.Random(seed)
    pauses, reluctance = ([draw.random() < 0.5 for _ in range(31)] + [False] for _ in range(2))
    a, b = matrices(6, 5, 6, seed)
    tile = Tile(2, 3, 2)
    run = matmul(a, b, fp4=True, tile=tile, pauses=pauses, reluctance=reluctance)
    assert run.sums == exact(a, b, fp4=True, unsigned=False)
    assert run.clock_cycles > array_cycles("os", 6, 5, 6, Array(2, 3, 2)) + 4


def test_slow_reader_does_not_cost_computing_cycles() -> None:
    """While the array waits for its reader it is not busy: the computing cycles stay those of the closed form."""
    a, b = matrices(4, 4, 2, seed=4)
    run = matmul(a, b, fp4=True, tile=Tile(2, 2, 1), reluctance=[True, True, True, False])
    assert run.sums == exact(a, b, fp4=True, unsigned=False)
    assert run.cycles == array_cycles("os", 4, 4, 2, Array(2, 2)) < run.clock_cycles - 4


class Products:
    """A watcher that keeps the operands and results of every GEMM."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, QTensor, QTensor, Linear | Conv, torch.Tensor]] = []

    def inside(self) -> contextlib.AbstractContextManager[object]:
        """See `halfbyte.ops.Watcher`."""
        return contextlib.nullcontext()

    def operand(self, *_: object) -> None:
        """See `halfbyte.ops.Watcher`."""

    def product(self, plan: object, which: str, a: tuple, b: QTensor, geometry, result: torch.Tensor) -> None:
        """See `halfbyte.ops.Watcher`."""
        self.seen.append((which, a[0], b, geometry, result.clone()))


def train_one_step(model: str) -> Products:
    """One step of the digits under ibm2020; what was multiplied."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from halfbyte.lab.data import digits
    from halfbyte.lab.models.digits import cnn, mlp

    examples = digits.load().train
    net = halfbyte.convert(mlp(48) if model == "mlp" else cnn(16), "ibm2020")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    products = Products()
    with watch(net, products):
        F.cross_entropy(net(examples.inputs[:12]), examples.targets[:12]).backward()
    optimizer.step()
    return products


def as_matrices(which: str, a: QTensor, b: QTensor, geometry: Linear | Conv) -> tuple[torch.Tensor, torch.Tensor]:
    """The integer operand (M, K) and the other one (K, N) as codes: gradients stand on the right, as `Tile` wants them.

    The code 0 is zero in every format, so a convolution's padding is a padding of codes. dgrad of a convolution of
    stride 1 is a convolution of the gradient with the kernel turned around.
    """
    first, second = (q.codes().reshape(q.shape).double() for q in (a, b))
    if isinstance(geometry, Conv):
        assert (geometry.stride, geometry.padding, geometry.weight_shape[2:]) == ((1, 1), (1, 1), (3, 3))

        def patches(x: torch.Tensor) -> torch.Tensor:
            """(N, C, H, W) to (N * H * W, C * 9)."""
            return F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)

        if which == "fprop":
            return patches(first), second.flatten(1).t()
        if which == "dgrad":
            return second.flip(2, 3).transpose(0, 1).flatten(1), patches(first).t()
        return patches(second).t(), first.transpose(0, 1).flatten(1).t()
    if which == "fprop":
        return first, second.t()  # x_NI, w_IO
    if which == "dgrad":
        return second.t(), first.t()  # w_IO, g_ON
    return second.t(), first  # x_IN, g_NO


def as_result(which: str, result: torch.Tensor, geometry: Linear | Conv) -> torch.Tensor:
    """A layer's result as the (M, N) of `as_matrices`."""
    if which == "wgrad":
        return result.flatten(1).t()
    if isinstance(geometry, Conv):
        result = result.movedim(1, -1).flatten(0, -2)
    return result if which == "fprop" else result.t()


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_training_step_on_the_tile(model: str) -> None:
    """The three GEMMs of a layer in a real training step come off the tile as the reference kernels give them."""
    products = train_one_step(model)
    seen = set()
    for which, a, b, geometry, result in products.seen:
        if which in seen:
            continue  # one layer of each kind of GEMM
        seen.add(which)
        left, right = as_matrices(which, a, b, geometry)
        wanted = as_result(which, reference.gemm(which, a, b, geometry), geometry)
        assert torch.equal(wanted, as_result(which, result, geometry)), "the step used the reference's numbers"
        # A part of the result that takes four folds, far enough from the edges to hold no padding only.
        rows = torch.arange(left.shape[0] // 3, left.shape[0] // 3 + 8)
        columns = torch.arange(right.shape[1] // 3, right.shape[1] // 3 + 8)
        part_a, part_b = left[rows].int().tolist(), right[:, columns].int().tolist()
        fp4, unsigned = which != "fprop", which != "dgrad"
        assert [a.format.name, b.format.name] == {
            "fprop": ["uint4", "int4"],
            "dgrad": ["fp4_e3m0_r4", "int4"],
            "wgrad": ["fp4_e3m0_r4_odd", "uint4"],
        }[which]
        run = matmul(part_a, part_b, fp4=fp4, unsigned=unsigned)
        assert run.cycles == array_cycles("os", 8, 8, left.shape[1], Array(4, 4, 4))
        sums = torch.tensor(run.sums)
        assert sums.count_nonzero() > 8, "a part with something in it"
        assert torch.equal(sums.float() * output_scale(a, b), wanted[rows][:, columns])
    assert seen == {"fprop", "dgrad", "wgrad"}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: matmul([], [], fp4=True), "A product of 0 x 0 and 0 x 0 codes; (M, K) and (K, N) are possible."),
        (lambda: matmul([[1, 2]], [[1]], fp4=True), "A product of 1 x 2 and 1 x 1 codes"),
        (lambda: matmul([[16]], [[1]], fp4=True), "A code outside 0 to 15 was given"),
        (lambda: matmul([[1]], [[1]], fp4=True, pauses=[True]), "pauses=[True] never lets anything pass"),
        (lambda: matmul([[1]], [[1]], fp4=True, reluctance=[]), "reluctance=[] never lets anything pass"),
        (lambda: Tile(1, 1), "A tile of 1 x 1 elements of 4 lanes; two elements are the least."),
        (lambda: Tile(width=16), "Sums of 16 bits were asked for; 4 products need 19 or more."),
    ],
)
def test_what_cannot_run_is_refused(call: object, said: str) -> None:
    """What cannot be built or multiplied, or would never end, is refused with what is possible."""
    with pytest.raises(SpecError) as caught:
        call()
    assert said in str(caught.value)
