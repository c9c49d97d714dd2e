"""One recurrent matrix over the steps of a sequence: quantized once, and one wgrad for all steps.

Each step multiplies the state by the same codes. Its backward step computes dgrad, which the step before waits for,
and lays its gradient aside; when all have, one GEMM over the rows of all steps gives the weight's gradient, under one
scale. Autograd itself finds that moment: every step depends on an anchor, so the anchor's backward runs last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..kernels import Linear
from ..qtensor import Blocks, QTensor, pack
from ..quantizers import Parts
from ..recipes import REUSE, Requantize
from .functions import in_dtype, is_abstract, not_compiled
from .layer_pass import Operand, Pass, Saved, wide
from .plan import Plan
from .three_gemms import load, out_dtype, refuse_second_derivative, save

__all__ = ["Recurrence"]


class Recurrence:
    """``h -> h @ weight.T`` for the steps of one sequence.

    Make one at the start of the sequence and call it once for each step; the number of rows may change from step to
    step. Gradients are those of as many ordinary layers with tied weights, but for the rounding: the weight's gradient
    is one GEMM over all steps.
    """

    def __init__(self, weight: Tensor, plan: Plan) -> None:
        """Begins a forward pass of the plan.

        Args:
            weight: (O, I).
            plan: the numerics.
        """
        self.weight, self.plan = weight, plan
        self.plain = plan.recipe.in_floating_point
        self.abstract = is_abstract(weight)
        self.steps = 0
        if not (self.plain or self.abstract):
            not_compiled(self._begin)

    def _begin(self) -> None:
        self.sequence = _Sequence(self.weight, self.plan)
        learned = None if self.plan.weight is None else self.plan.weight.learned
        self.anchor: Tensor = _Anchor.apply(self.weight, learned, self.sequence)  # type: ignore[no-untyped-call]
        # Not the sequence's: what the steps of the forward pass share must not stay until the backward pass.
        self.weight_codes = _for_many(self.plan, self.sequence.weight_codes)

    def __call__(self, h: Tensor) -> Tensor:
        """One step.

        Args:
            h: (N, I), any floating type.

        Returns:
            (N, O) in the type of h, or autocast's where that is on.
        """
        if self.plain:
            return in_dtype(torch.nn.functional.linear, self.plan, h, self.weight, None)
        if self.abstract or is_abstract(h):
            return (h @ self.weight.t()).to(out_dtype(h))
        result: Tensor = not_compiled(self._step, h)
        return result

    def _step(self, h: Tensor) -> Tensor:
        sequence = self.sequence
        run = sequence.run.at(sequence.shape(h.shape[0]), self.steps)
        self.steps += 1
        learned = None if self.plan.input is None else self.plan.input.learned
        result: Tensor = _Step.apply(  # type: ignore[no-untyped-call]
            h, self.anchor, learned, self.weight_codes, run, sequence
        )
        return result


class _Sequence:
    """What the steps of one sequence share between forward and backward. It holds nothing with a graph behind it.

    Attributes:
        run: the pass.
        weight_codes: what each step's fprop multiplies.
        kept_weight: what is kept of the weight for dgrad.
        collected: by step, the input for wgrad and the gradient that were laid aside.
    """

    def __init__(self, weight: Tensor, plan: Plan) -> None:
        self.out_features, self.in_features = weight.shape
        self.plan = plan
        self.run = Pass.start(plan, self.shape(0), weight)
        self.weight_codes: Operand
        self.kept_weight: Operand
        self._taken: Operand | None = None
        self.collected: dict[int, tuple[Operand, Tensor]] = {}
        self._walk = -1

    def shape(self, rows: int) -> Linear:
        """The GEMMs' shape for that many rows."""
        return Linear(rows=rows, in_features=self.in_features, out_features=self.out_features)

    def lay_aside(self, time: int, given: Operand, grad: Tensor) -> None:
        """Keeps a step's part of wgrad; what an earlier walk through the graph left behind is dropped."""
        walk = torch._C._current_graph_task_id()
        if walk != self._walk:
            self.collected.clear()
            self._walk = walk
        self.collected[time] = given, grad

    def dgrad_weight(self) -> Operand:
        """What every step's dgrad multiplies; made once in a walk through the graph."""
        if self._taken is None:
            self._taken = _for_many(self.plan, self.run.take("weight", self.kept_weight))
        return self._taken

    def end_walk(self) -> None:
        """Every step's dgrad is done: drops what they shared."""
        self._taken = None

    def wgrad(self) -> Tensor:
        """The weight's gradient, in the space of fprop's codes, from what all steps laid aside."""
        times = sorted(self.collected)
        grad = torch.cat([self.collected[t][1] for t in times])
        inputs = [self.collected[t][0] for t in times]
        self.collected.clear()
        run = self.run.at(self.shape(len(grad)), 0)
        chosen = self.plan.recipe.wgrad.input
        if chosen is REUSE and any(isinstance(q, QTensor) and q.zero_point is not None for q in inputs):
            return self._step_by_step(run, grad, inputs)
        if isinstance(chosen, Requantize):
            stacked = torch.cat([q.dequantize() if isinstance(q, QTensor) else q for q in inputs])
            given: Operand = run.encode("wgrad.input", stacked)[0]
        elif chosen is REUSE and isinstance(inputs[0], QTensor):
            given = _stacked([q for q in inputs if isinstance(q, QTensor)])
        else:
            stacked = torch.cat([x for x in inputs if isinstance(x, Tensor)])
            given = stacked if chosen is REUSE else run.encode("wgrad.input", stacked)[0]
        return run.product("wgrad", run.gradients(grad, {"wgrad": given})["wgrad"], given)

    def _step_by_step(self, run: Pass, grad: Tensor, inputs: list[Operand]) -> Tensor:
        """wgrad where each step has a zero point of its own: the gradient is quantized once, the products are added."""
        parts = run.gradients(grad, {"wgrad": None})["wgrad"]
        total, start = None, 0
        for x in inputs:
            rows = x.shape[0]
            some: Parts = tuple(_rows(part, start, rows) for part in parts)
            product = run.at(self.shape(rows), 0).product("wgrad", some, x)
            total = product if total is None else total.add_(product)
            start += rows
        assert total is not None
        return total


class _Anchor(torch.autograd.Function):
    """Stands for the weight: every step depends on its result, so its backward runs after theirs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, learned: Tensor | None, sequence: _Sequence) -> Tensor:
        run, full = sequence.run, wide(weight)
        need = run.graph and any(ctx.needs_input_grad[:2])
        with run.inside():
            codes, saved = run.encode("fprop.weight", full, differentiable=need)
            sequence.weight_codes = codes
            sequence.kept_weight = run.keep("weight", full, codes)
        ctx.sequence, ctx.dtype = sequence, weight.dtype
        save(ctx, [(codes if saved else None, saved)])
        return torch.zeros((), device=weight.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        sequence: _Sequence = ctx.sequence
        ((codes, saved),) = load(ctx)
        sequence.end_walk()
        if not sequence.collected:
            return None, None, None
        with sequence.run.inside():
            grad_weight, learned = sequence.run.through("weight", sequence.wgrad(), codes, saved)
        return grad_weight.to(ctx.dtype), learned, None


class _Step(torch.autograd.Function):
    """fprop of one step; dgrad in its backward, where its gradient is laid aside for the one wgrad."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        anchor: Tensor,
        learned: Tensor | None,
        weight_codes: Operand,
        run: Pass,
        sequence: _Sequence,
    ) -> Tensor:
        need_dgrad, need_wgrad = ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[1]
        need_dgrad, need_wgrad = run.graph and need_dgrad, run.graph and need_wgrad
        full = wide(h)
        with run.inside():
            hq, h_saved = run.encode("fprop.input", full, differentiable=need_dgrad)
            result = run.product("fprop", (hq,), weight_codes)
        # An input that wgrad quantizes by its own rule is kept as it is: that rule may look at all steps at once.
        chosen = run.plan.recipe.wgrad.input
        kept: Operand = hq if chosen is REUSE or isinstance(chosen, Requantize) else full
        ctx.run, ctx.sequence, ctx.dtype = run, sequence, h.dtype
        ctx.need = (need_dgrad, need_wgrad)
        operands: list[tuple[Operand | None, Saved]] = [
            (hq if need_dgrad and h_saved else None, h_saved),
            (kept if need_wgrad else None, ()),
        ]
        save(ctx, operands)
        return result.to(out_dtype(h))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        run: Pass = ctx.run
        sequence: _Sequence = ctx.sequence
        (hq, h_saved), (kept, _) = load(ctx)
        grad = wide(grad_output)
        grad_h: Tensor | None = None
        learned: Tensor | None = None
        with run.inside():
            if ctx.need[0]:
                weight = sequence.dgrad_weight()
                parts = run.gradients(grad, {"dgrad": weight})["dgrad"]
                grad_h, learned = run.through("input", run.product("dgrad", parts, weight), hq, h_saved)
        if ctx.need[1]:
            sequence.lay_aside(run.time, kept, grad)
        anchor = torch.zeros((), device=grad.device) if ctx.need[1] else None
        return None if grad_h is None else grad_h.to(ctx.dtype), anchor, learned, None, None, None


def _for_many(plan: Plan, operand: Operand) -> Operand:
    """An operand as its backend wants it for many products."""
    return operand if isinstance(operand, Tensor) else plan.kernels.prepare(operand)


def _stacked(parts: list[QTensor]) -> QTensor:
    """The rows of several tensors under each other: one scale if all have the same, else one a row."""
    if any(q.blocks is not None for q in parts):
        raise UnsupportedError(
            "A recurrent layer was asked to reuse codes with a scale for each block in wgrad, whose blocks would have "
            "to run over the steps. Give wgrad.input a spec of its own, or Requantize."
        )
    first = parts[0]
    shape = torch.Size((sum(q.shape[0] for q in parts), *first.shape[1:]))
    qdata = pack(torch.cat([q.codes().reshape(-1) for q in parts]), first.format.bits)
    if all(torch.equal(q.scale, first.scale) for q in parts):
        return QTensor(qdata, first.scale, first.format, shape)
    scales = torch.cat([q.scale.expand(q.shape[0], 1) for q in parts])
    return QTensor(
        qdata,
        torch.ones_like(first.scale),
        first.format,
        shape,
        block_scale=scales,
        blocks=Blocks(tuple(shape), (1, *shape[1:]), None),
    )


def _rows(part: QTensor | Tensor, start: int, count: int) -> QTensor | Tensor:
    """Some rows of an operand with one scale, or of a floating one."""
    if isinstance(part, Tensor):
        return part[start : start + count]
    if part.blocks is not None:
        raise UnsupportedError(
            "A recurrent layer was asked for an input with a zero point and a gradient with scales for its blocks; "
            "give fprop.input a spec without a zero point."
        )
    codes = part.codes()[start : start + count]
    return QTensor(pack(codes.reshape(-1), part.format.bits), part.scale, part.format, codes.shape)
