"""The work of one training step, layer by layer: the matrix products and everything else, with sizes and formats.

This is what a tracer writes and a hardware model reads; neither knows the other. A `Workload` holds `Gemm`s, the
products that an array of multipliers computes, and `VectorOp`s, what the lanes beside it do (norms, activations,
quantizers, the optimizer). All sizes are those of the whole batch.

Orientation. A GEMM's result is ``m x n``, summed over ``k``; operand ``a`` is ``m x k``, operand ``b`` is ``k x n``:

    fprop: a = input,       b = weight     m = rows              n = out channels    k = in channels * taps
    dgrad: a = grad_output, b = weight     m = rows              n = in channels     k = out channels * taps
    wgrad: a = grad_output, b = input      m = out channels      n = in channels * taps    k = rows

A linear layer has one tap and a row for each vector; a convolution has ``kh * kw`` taps and a row for each output
position of each image. The rows of a strided convolution's dgrad are those of its output too, so that all three GEMMs
have equally many multiply-accumulates: that is what is executed when no zero between the strides is multiplied. With
groups, channels are those of one group. Between two positions of a GEMM stand no copies: the element counts are those
of the stored tensors, in which a convolution's input is not unfolded.

This module imports neither torch nor anything else of ours except the errors and the formats.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

from ..errors import HalfbyteError, SpecError, UnknownNameError
from ..files import write_text
from ..formats import FORMATS

__all__ = ["FLOAT_BITS", "Gemm", "Phase", "StepPhase", "VectorOp", "Workload", "format_bits"]

Phase = Literal["fprop", "dgrad", "wgrad"]
"""Which of a layer's three GEMMs."""

StepPhase = Literal["fprop", "dgrad", "wgrad", "update"]
"""When in the step: the forward pass, the backward pass (gradients of inputs, of weights), or the optimizer."""

FLOAT_BITS: dict[str, int] = {"fp16": 16, "bf16": 16, "fp32": 32, "fp64": 64}
"""Bits of an element that is in no format of four or eight bits."""


def format_bits(fmt: str) -> int:
    """Bits of an element in a format of `halfbyte.formats`, or in fp16, bf16, fp32 or fp64.

    The scales of block formats are not counted: NVFP4 adds 8 bits for 16 elements, MXFP4 8 for 32.

    Raises:
        UnknownNameError: if there is no such format.
    """
    if fmt in FLOAT_BITS:
        return FLOAT_BITS[fmt]
    if fmt not in FORMATS:
        raise UnknownNameError("format", str(fmt), (*FLOAT_BITS, *FORMATS))
    return FORMATS[fmt].bits


def _check_sizes(what: str, least: int, **sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SpecError(f"{what}: {name}={value!r} was given; a whole number of at least {least} is possible.")


def _check_phase(what: str, phase: object, possible: tuple[str, ...]) -> None:
    if phase not in possible:
        raise SpecError(f"{what}: phase={phase!r} was given; possible: {', '.join(possible)}.")


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """One product of two matrices, or ``groups`` independent ones of the same size.

    Attributes:
        layer: fully qualified name of the layer, with the weight's behind it where a layer has several; empty for the
            model itself.
        kind: class of the layer (``"Conv2d"``, ``"LSTM"``), or ``"matmul"`` for a product that no layer's weight is in.
        phase: fprop, dgrad or wgrad.
        m: rows of the result, per group.
        n: columns of the result, per group.
        k: length of the sums, per group.
        groups: how many products.
        a_format: format of the first operand: one of `halfbyte.formats.FORMATS` or of `FLOAT_BITS`.
        b_format: format of the second operand.
        a_elements: elements of the tensor that the first operand is read from, all groups together.
        b_elements: the same of the second operand.
        out_elements: elements of the result as it is stored.
        recipe: name of the recipe that decided the formats.
        why: the rule that chose the recipe.
    """

    layer: str
    kind: str
    phase: Phase
    m: int
    n: int
    k: int
    groups: int = 1
    a_format: str
    b_format: str
    a_elements: int
    b_elements: int
    out_elements: int
    recipe: str
    why: str

    def __post_init__(self) -> None:
        what = f"Gemm of layer {self.layer!r}"
        _check_phase(what, self.phase, get_args(Phase))
        _check_sizes(what, 1, m=self.m, n=self.n, k=self.k, groups=self.groups)
        counts = {"a_elements": self.a_elements, "b_elements": self.b_elements, "out_elements": self.out_elements}
        _check_sizes(what, 1, **counts)
        format_bits(self.a_format)
        format_bits(self.b_format)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.m * self.n * self.k * self.groups


@dataclass(frozen=True, kw_only=True)
class VectorOp:
    """Work that is no matrix product.

    Attributes:
        layer: fully qualified name of the layer it belongs to; empty for the model itself.
        name: what it is: ``"batch_norm"``, ``"relu"``, ``"add"``, ``"quantize"``, ``"statistics"``, ``"optimizer"`` ...
        phase: fprop, dgrad or wgrad, or ``"update"`` for the optimizer.
        elements: elements that it works on.
        flops: floating-point operations, 0 for a copy.
        read_bytes: what it reads if its operands come from memory.
        written_bytes: what it writes if its result goes to memory.
        fusible: whether it can be done on the way out of or into a GEMM, so that neither is moved.
    """

    layer: str
    name: str
    phase: StepPhase
    elements: int
    flops: int
    read_bytes: int
    written_bytes: int
    fusible: bool

    def __post_init__(self) -> None:
        what = f"VectorOp {self.name!r} of layer {self.layer!r}"
        _check_phase(what, self.phase, get_args(StepPhase))
        sizes = {"elements": self.elements, "flops": self.flops}
        _check_sizes(what, 0, **sizes, read_bytes=self.read_bytes, written_bytes=self.written_bytes)


_HEADER = ("Layer", "M", "N", "K")
_ROW_NAME = re.compile(r"(?P<layer>.*):(?P<phase>fprop|dgrad|wgrad)(?: x(?P<groups>[1-9][0-9]*))?")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step of a model on one batch.

    Attributes:
        name: the model's.
        recipe: the recipe's.
        batch: how many samples the step is on.
        gemms: the products, in the order of execution.
        vector_ops: all other work, in the order of execution.
    """

    name: str
    recipe: str
    batch: int
    gemms: tuple[Gemm, ...]
    vector_ops: tuple[VectorOp, ...] = ()

    def __post_init__(self) -> None:
        what = f"Workload {self.name!r}"
        _check_sizes(what, 1, batch=self.batch)
        for name, items, kind in (("gemms", self.gemms, Gemm), ("vector_ops", self.vector_ops, VectorOp)):
            if not isinstance(items, tuple) or not all(isinstance(item, kind) for item in items):
                raise SpecError(f"{what}: {name} was given as {type(items).__name__}; a tuple of {kind.__name__} is.")

    def macs(self, phase: Phase | None = None) -> int:
        """Multiply-accumulates of the step, or of one of its three kinds of GEMM."""
        if phase is not None:
            _check_phase(f"Workload {self.name!r}", phase, get_args(Phase))
        return sum(gemm.macs for gemm in self.gemms if phase in (None, gemm.phase))

    def to_scalesim(
        self,
        path: str | PathLike[str],
        *,
        phases: Iterable[Phase] = ("fprop", "dgrad", "wgrad"),
        repeat_groups: bool = True,
    ) -> int:
        """Writes the GEMMs as a topology for SCALE-Sim 2 and 3 in its M, N, K form (run it with ``-i gemm``).

        Each row is ``layer:phase,m,n,k,``. SCALE-Sim has no groups and no formats: formats are not written.

        Args:
            path: of the CSV file, which is overwritten.
            phases: which GEMMs.
            repeat_groups: a row for each group, so that SCALE-Sim's total is the step's; otherwise one row, whose
                name ends in `` x<groups>``, to be multiplied by the reader.

        Returns:
            The number of rows.

        Raises:
            HalfbyteError: if there is no GEMM of those phases, or a layer's name has a comma, which the file cannot
                hold.
        """
        wanted = tuple(phases)
        for phase in wanted:
            _check_phase(f"to_scalesim of {self.name!r}", phase, get_args(Phase))
        rows: list[str] = []
        for gemm in self.gemms:
            if gemm.phase not in wanted:
                continue
            if re.search(r"[,\r\n]", gemm.layer):
                raise HalfbyteError(
                    f"Layer {gemm.layer!r} has a comma or a line break in its name, which a SCALE-Sim topology cannot "
                    "hold; rename the module."
                )
            once = gemm.groups == 1 or repeat_groups
            name = f"{gemm.layer}:{gemm.phase}{'' if once else f' x{gemm.groups}'}"
            rows += [f"{name},{gemm.m},{gemm.n},{gemm.k},"] * (gemm.groups if once else 1)
        if not rows:
            raise HalfbyteError(
                f"Workload {self.name!r} has no GEMM of the phases {', '.join(wanted) or '(none given)'}; "
                f"possible: {', '.join(sorted({gemm.phase for gemm in self.gemms})) or 'none'}."
            )
        # SCALE-Sim cuts off what follows the last comma of each row, so each row ends in one.
        write_text(Path(path), "\n".join([",".join((*_HEADER, "")), *rows, ""]))
        return len(rows)

    @classmethod
    def from_scalesim(
        cls, path: str | PathLike[str], *, name: str | None = None, batch: int = 1, fmt: str = "fp16"
    ) -> Workload:
        """Reads a topology in SCALE-Sim's M, N, K form: the one that `to_scalesim` writes, or somebody else's.

        A row that names no phase is an fprop. The file has no formats and no layouts: every operand is in `fmt`, and
        its elements are those of a plain matrix.

        Args:
            path: of the CSV file.
            name: of the workload; None takes the file's.
            batch: samples of the step.
            fmt: format of all operands.

        Raises:
            HalfbyteError: if the file is a convolution topology, empty, or holds a row that is no GEMM.
        """
        where = Path(path)
        format_bits(fmt)
        lines = [[cell.strip() for cell in row] for row in csv.reader(where.read_text(encoding="utf-8").splitlines())]
        header = [cell.lower() for cell in lines[0][1:4]] if lines else []
        if header != ["m", "n", "k"]:
            raise HalfbyteError(
                f"{where} does not begin with the header 'Layer, M, N, K,' of SCALE-Sim's GEMM topologies; got "
                f"{','.join(lines[0]) if lines else 'an empty file'}. Convolution topologies are not read: export "
                "their GEMMs."
            )
        gemms = [_read_row(row, number, where, fmt) for number, row in enumerate(lines[1:], 2) if any(row)]
        if not gemms:
            raise HalfbyteError(f"{where} holds no GEMM below its header; write a row 'name, M, N, K,' for each.")
        return cls(name=where.stem if name is None else name, recipe=fmt, batch=batch, gemms=tuple(gemms))


def _read_row(row: list[str], number: int, where: Path, fmt: str) -> Gemm:
    """The GEMM of a row of a topology."""
    sizes = row[1:4]
    if len(sizes) < 3 or not all(re.fullmatch("[1-9][0-9]*", size) for size in sizes) or any(row[4:]):
        raise HalfbyteError(
            f"{where}, line {number}: got {','.join(row)!r}; a row is 'name, M, N, K,' with three whole numbers above "
            "zero and nothing behind them (no sparsity, no batch)."
        )
    m, n, k = map(int, sizes)
    found = _ROW_NAME.fullmatch(row[0])
    phase: str = found["phase"] if found else "fprop"
    groups = int(found["groups"] or 1) if found else 1
    return Gemm(
        layer=found["layer"] if found else row[0],
        kind="matmul",
        phase=phase,  # type: ignore[arg-type]
        m=m,
        n=n,
        k=k,
        groups=groups,
        a_format=fmt,
        b_format=fmt,
        a_elements=m * k * groups,
        b_elements=k * n * groups,
        out_elements=m * n * groups,
        recipe=fmt,
        why=f"read from {where.name}",
    )
