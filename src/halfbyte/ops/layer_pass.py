"""One pass of one layer through its three GEMMs: which tensor goes where, in which rotation, quantized how.

With a transform on fprop everything between its operands and its backward results lives in the rotated space: fprop's
codes are of rotated tensors, the backward GEMMs multiply those codes, and what comes out is rotated back at the end,
after the quantizer's own backward step.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..kernels import Gemm, Geometry
from ..qtensor import QTensor
from ..quantizers import Parts, Quantizer, Use
from ..recipes import REUSE, Requantize
from .plan import Plan

__all__ = ["Operand", "Pass", "Saved", "wide"]

Operand = QTensor | Tensor
Saved = tuple[Tensor | None, ...]
Kind = Literal["input", "weight"]

_NUMBER = {
    "dgrad.grad_output": 0,
    "wgrad.grad_output": 1,
    "dgrad.weight": 2,
    "wgrad.input": 3,
    "fprop.input": 4,
    "fprop.weight": 5,
    "fprop": 8,
    "dgrad": 9,
    "wgrad": 10,
}
"""Numbers of the slots and, for their signs, of the transforms, in the key of the random numbers."""

_READERS = {
    "input": ("fprop.input", "wgrad.input"),
    "weight": ("fprop.weight", "dgrad.weight"),
    "grad_output": ("dgrad.grad_output", "wgrad.grad_output"),
}
"""The slots that read a tensor."""

_PLACE: dict[str, tuple[Gemm, int]] = {
    "fprop.input": ("fprop", 0),
    "fprop.weight": ("fprop", 1),
    "dgrad.weight": ("dgrad", 1),
    "wgrad.input": ("wgrad", 1),
}


_HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; everything else as it is."""
    return x.float() if x.dtype in _HALF else x


@dataclass(eq=False)
class Pass:
    """What the two halves of a pass share.

    Attributes:
        plan: the layer's numerics.
        geometry: its shape.
        observe: whether the forward pass may move state.
        observe_gradient: whether the backward pass may. A recomputed forward pass moves nothing again, but where a
            compiled graph is recomputed, the one backward pass that there is belongs to it.
        step: the number of the pass; int64 of shape ().
        time: the number of the step in a sequence, for a recurrent layer.
        graph: whether there can be a backward pass.
    """

    plan: Plan
    geometry: Geometry
    observe: bool
    observe_gradient: bool
    step: Tensor
    time: int = 0
    graph: bool = True
    _signs: dict[Gemm, Tensor | None] = field(default_factory=dict)

    @classmethod
    def start(
        cls, plan: Plan, geometry: Geometry, weight: Tensor, *, grad: bool | None = None, trained: bool | None = None
    ) -> Pass:
        """Begins a forward pass.

        Args:
            plan: the layer's numerics.
            geometry: its shape.
            weight: its weight.
            grad: whether gradients are being recorded; None asks torch.
            trained: whether the weight is to get one; None asks the weight.
        """
        grad = torch.is_grad_enabled() if grad is None else grad
        trained = weight.requires_grad if trained is None else trained
        observe = plan.begin(weight, grad=grad, trained=trained)
        return cls(plan, geometry, observe, plan.training and grad, plan.step.clone(), graph=grad)

    def at(self, geometry: Geometry, time: int) -> Pass:
        """The same pass for one step of a sequence, or for all of them together."""
        return replace(self, geometry=geometry, time=time)

    def inside(self) -> AbstractContextManager[object]:
        """The watcher's, around what the layer computes."""
        return nullcontext() if self.plan.watcher is None else self.plan.watcher.inside()

    def widen(self, kind: Literal["input", "weight", "grad_output"], x: Tensor) -> Tensor:
        """`wide`, but where all that reads x is quantizers, which take 16 bits as they are."""
        if x.dtype not in _HALF or self.plan.watcher is not None:
            return wide(x)
        recipe = self.plan.recipe
        for name in _READERS[kind]:
            spec, gemm = recipe.slots[name], name.partition(".")[0]
            if spec is None or recipe.transforms[gemm] is not None:  # type: ignore[index]
                return wide(x)
        return x

    def use(self, slot: str, gemm: Gemm, operand: int, partner: Operand | None = None) -> Use:
        """What a slot's tensor is quantized for."""
        draw = self.plan.draw(self.step, _NUMBER[slot])
        # At most eight samples of a tensor are drawn, so the steps of a sequence lie eight apart.
        return Use(gemm=gemm, operand=operand, geometry=self.geometry, draw=draw, partner=partner, sample=8 * self.time)

    def rotate(self, gemm: Gemm, operand: int, x: Tensor, *, back: bool = False) -> Tensor:
        """An operand under its GEMM's transform, or back from it."""
        transform = self.plan.recipe.transforms[gemm]
        if transform is None:
            return x
        if gemm not in self._signs:
            self._signs[gemm] = transform.draw_signs(self.plan.draw(self.step, _NUMBER[gemm]))
        turn = transform.rotate_back if back else transform.rotate
        view = self.geometry.reduction_view(gemm, operand)
        return turn(x, view, self._signs[gemm], backend=self.plan.backend)

    def encode(
        self, slot: str, x: Tensor, *, differentiable: bool = False, forward: bool = True
    ) -> tuple[Operand, Saved]:
        """A slot's operand of x, which may be x itself, and what its quantizer needs for its backward step."""
        gemm, operand = _PLACE[slot]
        turned = self.rotate(gemm, operand, x)
        name = slot.split(".")[1] if gemm == "fprop" else slot.replace(".", "_")
        quantizer: Quantizer | None = getattr(self.plan, name)
        found: Operand = turned
        saved: Saved = ()
        if quantizer is not None:
            use = self.use(slot, gemm, operand)
            observe = self.observe and forward  # state stands still in a backward pass
            found, saved = quantizer.quantize(turned, observe=observe, differentiable=differentiable, use=use)
        if self.plan.watcher is not None:
            self.plan.watcher.operand(self.plan, slot, turned, (found,))
        return found, saved

    def keep(self, kind: Kind, x: Tensor, fprop: Operand) -> Operand:
        """What is kept of the input for wgrad, or of the weight for dgrad."""
        slot = "wgrad.input" if kind == "input" else "dgrad.weight"
        chosen = self.plan.recipe.slots[slot]
        if chosen is REUSE or isinstance(chosen, Requantize):
            return fprop
        return self.encode(slot, x)[0]

    def take(self, kind: Kind, kept: Operand) -> Operand:
        """What wgrad or dgrad multiplies, from what was kept."""
        slot = "wgrad.input" if kind == "input" else "dgrad.weight"
        if not isinstance(self.plan.recipe.slots[slot], Requantize):
            return kept
        assert isinstance(kept, QTensor)
        return self.encode(slot, kept.dequantize(), forward=False)[0]

    def gradients(self, grad: Tensor, partners: Mapping[Gemm, Operand | None]) -> dict[Gemm, Parts]:
        """grad_output for each GEMM named in `partners`, which holds the other operand of each."""
        turned = {gemm: self.rotate(gemm, 0, grad) for gemm in partners}
        quantizer = self.plan.grad_output
        parts: dict[Gemm, Parts] = {gemm: (x,) for gemm, x in turned.items()}
        if quantizer is not None and partners:
            uses = {gemm: self.use(f"{gemm}.grad_output", gemm, 0, partner) for gemm, partner in partners.items()}
            parts = quantizer.quantize(turned, uses, observe=self.observe_gradient)
        if self.plan.watcher is not None:
            for gemm, x in turned.items():
                self.plan.watcher.operand(self.plan, f"{gemm}.grad_output", x, parts[gemm])
        return parts

    def product(self, which: Gemm, a: Parts, b: Operand) -> Tensor:
        """One GEMM: the sum over the parts of its first operand."""
        total: Tensor | None = None
        for part in a:
            result = self.plan.kernels.gemm(which, part, b, self.geometry, accumulate=self.plan.recipe.accumulate)
            total = result if total is None else total.add_(result)
        assert total is not None
        if self.plan.watcher is not None:
            self.plan.watcher.product(self.plan, which, a, b, self.geometry, total)
        return total

    def through(self, kind: Kind, grad: Tensor, fprop: Operand | None, saved: Saved) -> tuple[Tensor, Tensor | None]:
        """From the gradient of fprop's operand to those of the tensor that it was made of and of what was learned."""
        quantizer = self.plan.input if kind == "input" else self.plan.weight
        learned: Tensor | None = None
        if quantizer is not None:
            # Only a quantizer that saved something looks at the codes.
            grad, learned = quantizer.backward(grad, fprop, saved)  # type: ignore[arg-type]
        if learned is not None and quantizer is not None and quantizer.learned is not None:
            learned = learned.reshape(quantizer.learned.shape)
        return self.rotate("fprop", 0 if kind == "input" else 1, grad, back=True), learned
