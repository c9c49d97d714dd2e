"""`Plan`: one layer's recipe with the state of its quantizers; and who may watch it work."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .. import kernels
from ..distributed import rank
from ..errors import ConversionError, UnsupportedError
from ..formats import Format
from ..kernels import Gemm, Geometry
from ..qtensor import QTensor
from ..quantizers import GradQuantizer, GradScaleState, Parts, Quantizer, Spec, Stateful, in_backward
from ..recipes import REUSE, Recipe, Requantize
from ..rng import Draw

__all__ = ["Plan", "Watcher", "plan_of"]

_HANDLES = itertools.count()
_PLANS: WeakValueDictionary[int, Plan] = WeakValueDictionary()


class Watcher(Protocol):
    """Somebody who looks at what a layer does, and changes nothing. Set as `Plan.watcher`."""

    def inside(self) -> AbstractContextManager[object]:
        """Entered around everything that a layer computes by itself, forward and backward."""
        ...

    def operand(self, plan: Plan, slot: str, x: Tensor, parts: Parts) -> None:
        """A slot's tensor was quantized.

        Args:
            plan: whose.
            slot: for example ``"fprop.input"``.
            x: what was quantized, after a transform.
            parts: the codes, or x itself where the slot is floating point.
        """
        ...

    def product(
        self, plan: Plan, which: Gemm, a: Parts, b: QTensor | Tensor, geometry: Geometry, result: Tensor
    ) -> None:
        """A GEMM was computed: the sum of the products of `a`'s parts with `b`, before bias and rotation back."""
        ...


class Plan(Stateful):
    """The six operand slots of one layer: a recipe and the state of its quantizers.

    Attributes:
        recipe: what it was built from; at least one slot holds a spec, or `Recipe.dtype` is set.
        in_floating_point: whether no slot holds a spec.
        backend: a name in `halfbyte.kernels.BACKENDS`.
        input: quantizer of ``fprop.input``, or None.
        weight: quantizer of ``fprop.weight``, or None.
        dgrad_weight: quantizer of ``dgrad.weight`` where its codes are not fprop's, or None.
        wgrad_input: quantizer of ``wgrad.input`` where its codes are not fprop's, or None.
        grad_output: quantizer of both grad_output slots, or None.
        seed: what random numbers are drawn from, with the layer's number and the step.
        layer: the layer's number in its model.
        step: how many training forward passes there have been; int64 of shape ().
        watcher: who looks on, or None.
        handle: the number by which `plan_of` finds the plan in this process; int64 of shape (), on the CPU. A tensor,
            so that one compiled graph serves every layer of one shape.
    """

    input: Quantizer | None
    weight: Quantizer | None
    dgrad_weight: Quantizer | None
    wgrad_input: Quantizer | None
    grad_output: GradQuantizer | None
    weight_checksum: Tensor
    step: Tensor
    handle: Tensor

    def __init__(
        self,
        recipe: Recipe,
        *,
        device: torch.device | None = None,
        backend: str = "reference",
        shared_scale: GradScaleState | None = None,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        """Fresh state for a recipe.

        Args:
            recipe: the recipe.
            device: where the state lives.
            backend: a name in `halfbyte.kernels.BACKENDS`.
            shared_scale: the model's one gradient scale, for a recipe that has one (`GradScaleSpec.shared`).
            seed: what random numbers are drawn from, with the layer's number and the step.
            layer: the layer's number in its model.

        Raises:
            UnknownNameError: if there is no such backend.
        """
        super().__init__()
        kernels.get(backend)
        # A layer has no use for the rules that chose its recipe, and they may hold functions that cannot be pickled.
        self.recipe = replace(recipe, rules=())
        self.in_floating_point = recipe.in_floating_point
        self.backend, self.seed, self.layer = backend, seed, layer
        slots = {
            "input": recipe.fprop.input,
            "weight": recipe.fprop.weight,
            "dgrad_weight": recipe.dgrad.weight,
            "wgrad_input": recipe.wgrad.input,
        }
        for name, slot in slots.items():
            spec = slot.spec if isinstance(slot, Requantize) else slot
            self.register_module(name, spec.build(device=device, backend=backend) if isinstance(spec, Spec) else None)
        grad_output = None
        if recipe.quantizes_gradient:
            scale = shared_scale
            if scale is None and recipe.grad_scale is not None:
                scale = recipe.grad_scale.build(device=device)
            grad_output = GradQuantizer(
                {"dgrad": recipe.dgrad.grad_output, "wgrad": recipe.wgrad.grad_output},
                scale,
                samples={"dgrad": recipe.dgrad.samples, "wgrad": recipe.wgrad.samples},
                gains={"dgrad": recipe.dgrad.gain, "wgrad": recipe.wgrad.gain},
                shared=recipe.one_gradient,
                device=device,
                backend=backend,
            )
        self.register_module("grad_output", grad_output)
        self.declare("step", 0, torch.int64, device=device)
        # No weight's: the first forward pass after building or loading settles what a checkpoint left to be settled.
        self.declare("weight_checksum", 1 << 40, torch.int64, device=device, persistent=False)
        self._weight_version = -1
        self._passed_over = False
        self.watcher: Watcher | None = None
        self._take_handle()

    def _take_handle(self) -> None:
        number = next(_HANDLES)
        self.handle = torch.tensor(number, device="cpu")
        _PLANS[number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._take_handle()  # a copy is another plan

    @property
    def kernels(self) -> kernels.Backend:
        """The backend's functions."""
        return kernels.get(self.backend)

    @property
    def grad_scale(self) -> GradScaleState | None:
        """The state of the layer's gradient scale, where it has one."""
        return None if self.grad_output is None else self.grad_output.grad_scale

    @property
    def formats(self) -> dict[str, str]:
        """The format of each slot by name, as `summary` prints it."""
        shown = {}
        for name, slot in self.recipe.slots.items():
            if slot is REUSE:
                shown[name] = "reuse"
            elif slot is None:
                shown[name] = "float" if self.recipe.dtype is None else str(self.recipe.dtype).removeprefix("torch.")
            else:
                quantizer = getattr(self, name.split(".")[1]) if name.startswith("fprop") else None
                known: Format | None = quantizer.format if quantizer is not None else None
                spec = slot.spec if isinstance(slot, Requantize) else slot
                assert isinstance(spec, Spec)
                shown[name] = known.name if known else "|".join(f.name for f in spec.formats)
        return shown

    def draw(self, step: Tensor, operand: int) -> Draw:
        """Where the random numbers of one operand come from in one step."""
        return Draw(seed=self.seed, layer=self.layer, step=step, operand=operand, rank=rank())

    def begin(self, weight: Tensor, *, grad: bool, trained: bool) -> bool:
        """Starts a forward pass: settles the vote if the optimizer has stepped; returns whether state may move.

        A step is seen by the weight's version, which in-place updates raise, or its bits, of which a checksum is kept
        (fused optimizers raise no version, and a parametrization's weight is new each time). A weight that is not
        trained has no steps, so there each training forward counts; a scale that other layers share follows theirs.
        Activation checkpointing runs a forward pass twice, the first time, in one of its two forms, without gradients:
        then the second moves the state in its place.

        Args:
            weight: the layer's.
            grad: whether gradients are being recorded.
            trained: whether the weight is to get one.
        """
        if not (self.training and grad):
            self._passed_over = self.training
            return False
        again = in_backward() and not self._passed_over
        self._passed_over = False
        if again:
            return False
        self.step += 1
        for quantizer in (self.input, self.weight, self.dgrad_weight, self.wgrad_input):
            if quantizer is not None:
                quantizer.begin_pass()
        scale = self.grad_scale
        if scale is not None:
            seen = _checksum(weight)
            stepped = (seen != self.weight_checksum) | (weight._version != self._weight_version)
            if not trained:
                stepped = torch.full_like(stepped, not scale.spec.shared)
            scale.advance(stepped)
            self.weight_checksum.copy_(seen)
            self._weight_version = weight._version
        return True

    def get_extra_state(self) -> Tensor:
        """The recipe's conventions as text, so that a checkpoint says what its numbers mean."""
        return torch.tensor(list(self.recipe.conventions.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compares the conventions of a checkpoint with the plan's own.

        Raises:
            ConversionError: if they differ.
        """
        theirs = bytes(state.tolist()).decode(errors="replace")
        if theirs != self.recipe.conventions:
            raise ConversionError(
                f"A checkpoint was made under other conventions than recipe {self.recipe.name!r} has here.\n"
                f"  in the checkpoint: {theirs}\n  here:              {self.recipe.conventions}\n"
                "Convert the model with the recipe that the checkpoint was made with."
            )

    def extra_repr(self) -> str:
        return f"recipe={self.recipe.name}, backend={self.backend}"


def plan_of(handle: Tensor) -> Plan:
    """The plan that has that handle.

    Raises:
        UnsupportedError: if it is gone, with the model that it was part of.
    """
    plan = _PLANS.get(int(handle))
    if plan is None:
        raise UnsupportedError(
            "A compiled graph was run whose model no longer exists in this process. Keep the model while you use it."
        )
    return plan


def _checksum(weight: Tensor) -> Tensor:
    """The sum of a tensor's bits, word by word, modulo 2^32: the same on any number of threads. int64 of shape ()."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().reshape(-1).view(words).sum(dtype=torch.int32).long()
