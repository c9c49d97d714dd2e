"""The weights that a converted model multiplies as codes: where they lie, and what their codes are in evaluation.

A plan's weight is a whole parameter or, in attention, some rows of one. Codes are what the layer's own quantizer gives
in evaluation, so they depend on its state (a statistic of training, a learned step) and on a rotation, if there is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..convert.sites import plan_fqn
from ..errors import UnsupportedError
from ..kernels import Geometry, Linear
from ..nn import is_twin, plans_of
from ..ops import Plan
from ..ops.layer_pass import Pass, wide
from ..ops.operator import lay_out
from ..qtensor import QTensor

__all__ = ["Weight", "evaluating", "plans_in", "weights_in"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """A weight that its layer multiplies as codes.

    Attributes:
        name: of its plan in the model.
        plan: the layer's numerics; `Plan.weight` is a quantizer.
        parameter: full name of the parameter that it is, or lies in.
        start: its first row there.
        tensor: the numbers, detached; it shares the parameter's memory.
        geometry: the GEMM's shape, of some input: a weight's codes do not depend on which.
    """

    name: str
    plan: Plan
    parameter: str
    start: int
    tensor: Tensor
    geometry: Geometry

    def encode(self) -> QTensor:
        """The codes that the layer multiplies in evaluation, in the space of its rotation if there is one.

        Raises:
            UnsupportedError: if the weight holds NaN or an infinity.
        """
        found, _ = self._run().encode("fprop.weight", wide(self.tensor))
        assert isinstance(found, QTensor)
        if not bool(found.scale.isfinite()):
            raise UnsupportedError(
                f"{self.name}: a weight with NaN or infinity was to be exported; finite weights are possible. The "
                "training has diverged: take an earlier checkpoint."
            )
        return found

    def plain(self, q: QTensor) -> Tensor:
        """What codes stand for as a weight of an ordinary layer: dequantized, and rotated back if they are rotated."""
        flat = q.dequantize(wide(self.tensor).dtype)
        return self._run().rotate("fprop", 1, flat, back=True).to(self.tensor.dtype)

    def _run(self) -> Pass:
        return Pass.start(self.plan, self.geometry, self.tensor, grad=False, trained=False)


def plans_in(model: nn.Module) -> dict[str, Plan]:
    """Every plan of a converted model under its full name: the layer's, with the unit's behind it."""
    return {
        plan_fqn(fqn, unit): plan
        for fqn, module in model.named_modules()
        if is_twin(module)
        for unit, plan in plans_of(module).items()
    }


def weights_in(model: nn.Module) -> list[Weight]:
    """The weights of a model that are multiplied as codes, in the order of its layers.

    Raises:
        UnsupportedError: if a layer's weight is no plain parameter of it.
    """
    found = []
    for fqn, module in model.named_modules():
        for unit, plan in plans_of(module).items() if is_twin(module) else ():
            # The two products inside attention multiply activations alone.
            if plan.weight is None or unit.startswith(("qk_", "pv_")):
                continue
            parameter, start, rows = _place(module, unit)
            name = plan_fqn(fqn, parameter)
            owner = module.get_submodule(parameter.rpartition(".")[0])
            whole = owner._parameters.get(parameter.rpartition(".")[2])
            if whole is None or hasattr(whole, "full_tensor"):
                raise UnsupportedError(
                    f"{name} is computed or sharded; a plain parameter can be exported. Call "
                    "torch.nn.utils.parametrize.remove_parametrizations, or export from a whole copy of the model."
                )
            part = whole.detach() if rows is None else whole.detach()[start : start + rows]
            found.append(
                Weight(
                    name=plan_fqn(fqn, unit),
                    plan=plan,
                    parameter=name,
                    start=start,
                    tensor=part,
                    geometry=_geometry(module, part),
                )
            )
    return found


def _place(module: nn.Module, unit: str) -> tuple[str, int, int | None]:
    """The parameter of a unit by its name in the layer, the first row of it, and how many; None for all."""
    if not isinstance(module, nn.MultiheadAttention):
        return (f"weight_{unit}" if unit else "weight"), 0, None
    if unit == "out":
        return "out_proj.weight", 0, None
    if module.in_proj_weight is None:
        return f"{unit}_proj_weight", 0, None
    return "in_proj_weight", "qkv".index(unit) * module.embed_dim, module.embed_dim


def _geometry(module: nn.Module, weight: Tensor) -> Geometry:
    """A GEMM of the layer, over the smallest input that it takes."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        dims = weight.dim() - 2
        extra = [step - 1 for step in module.stride]
        steps = (module.groups, *module.stride, *(0,) * dims, *module.dilation, *extra)
        return lay_out("conv_transpose", (1, weight.shape[0], *(1,) * dims), weight.shape, steps)
    if isinstance(module, nn.modules.conv._ConvNd):
        dims = weight.dim() - 2
        sizes = [dil * (kernel - 1) + 1 for dil, kernel in zip(module.dilation, weight.shape[2:], strict=True)]
        shape = (1, weight.shape[1] * module.groups, *sizes)
        return lay_out("conv", shape, weight.shape, (module.groups, *module.stride, *(0,) * dims, *module.dilation))
    return Linear(rows=1, in_features=weight.shape[1], out_features=weight.shape[0])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation and without gradients; afterwards each module is as it was."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training
