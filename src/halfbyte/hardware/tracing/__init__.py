"""From a PyTorch model to the work of one training step: every GEMM in its formats, and everything beside them.

A copy of the model whose tensors have no data runs forward, loss, backward and the optimizer's step once, while a
recorder sees every operator below autograd. Nothing is computed, so the size of the network does not matter, and the
model itself is not run. Another copy is given to `halfbyte.convert.convert`, which decides by the recipe's own rules
what formats each weight's three GEMMs get.

What a workload says beyond the operators that run:

* Layers that the rules leave alone, and products without a weight, are in high precision. For a recipe of four or eight
  bits that is FP16, the 16-bit baseline that Sun et al. (NeurIPS 2020) compare with; the library itself trains them in
  float32, as PyTorch does. ``"fp16"``, ``"bf16"`` and ``"fp32"`` are baselines: everything is in that format.
* A format that the first batch would choose (PACT: with or without a sign) is chosen by what the input came out of:
  without a sign after a ReLU, a softmax or a sigmoid and what keeps that (pooling, dropout, sums of such). Of the
  model's own input nothing is assumed: it has a sign.
* torch multiplies the three projections of attention at once; they are three GEMMs here, as in a converted layer. A
  recurrent matrix has one wgrad for all steps, as in a converted layer.
* dgrad of a layer whose input needs no gradient is not executed; of one with a learned clip it is, for the clip.
* A sampled gradient makes as many GEMMs as samples. Gradients split in two of which half the rows are drawn make one.
* Quantizers, statistics, rotations, the votes on gradient scales and casts of weights are entries of their own, with
  the operations that `quantizing` counts. Those are ours, not torch's: the recorder runs the plain model.
* Outer products (a product of length one) count as elementwise work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_leaves

from ...convert.checks import check_model
from ...errors import HalfbyteError, UnknownNameError
from ...recipes import RECIPES, Recipe, Rule, get
from ...recipes.table import OWN_RECIPE
from ..workload import FLOAT_BITS, VectorOp, Workload
from .ledger import Ledger
from .numerics import DTYPE_NAMES, Numerics
from .recorder import Recorder
from .stand_in import batch_of, plain_operators, stand_in, stand_in_inputs
from .update import OptimizerLike, optimizer_of, update_ops

__all__ = ["trace"]

_ABSTRACT = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
    torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode,
)


def trace(
    model: nn.Module,
    example_inputs: Any,
    recipe: str | Recipe,
    rules: Sequence[Rule] = (),
    *,
    name: str | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: OptimizerLike = "sgd",
    high_precision: str | None = None,
    master: str = "fp32",
    batch: int | None = None,
) -> Workload:
    """The work of one training step of a model under a recipe.

    Args:
        model: any module of plain PyTorch, not converted; it is not run and not changed. A model in ``eval`` is traced
            in ``train``; of one in ``train``, layers that are in ``eval`` stay so.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. Only shapes and types count, so
            tensors of the meta device do. An input that requires a gradient gets one.
        recipe: a `Recipe`, the name of one in `RECIPES`, or ``"fp16"``.
        rules: asked before the recipe's own, as in `halfbyte.convert.convert`.
        name: of the workload; None takes the model's class.
        loss: from what the model returns to one number. None takes the mean cross-entropy over the last dimension of
            the first floating tensor that has a gradient; that tensor itself if it is one number; the mean of the
            squares of a tensor of one dimension.
        optimizer: ``"sgd"`` (with momentum and weight decay), ``"adam"``, a function from parameters to an optimizer,
            or None.
        high_precision: format of layers that the rules leave alone and of products without a weight: fp16, bf16, fp32
            or fp64. None is the recipe's own where it is a baseline, else fp16. Other floating tensors have its width.
        master: format of the weights that the optimizer holds, of their gradients and of its state.
        batch: samples of the step; None takes the rows of the first tensor.

    Returns:
        The workload: its GEMMs in the order of execution, and an entry for each layer, phase and kind of other work.

    Raises:
        UnknownNameError: if there is no such recipe, optimizer or format.
        ConversionError: if `halfbyte.convert.convert` would refuse the model, the recipe or a rule.
        HalfbyteError: if the model cannot be copied, needs the data of a tensor, calls an operator that hides its
            products, or has nothing to train.
    """
    if not isinstance(model, nn.Module):
        raise HalfbyteError(f"trace takes a torch.nn.Module; got {type(model).__name__}.")
    check_model(model)
    chosen = _recipe(recipe)
    high = _high(chosen) if high_precision is None else high_precision
    for fmt in (high, master):
        if fmt not in FLOAT_BITS:
            raise UnknownNameError("format of high precision", str(fmt), FLOAT_BITS)
    batch = batch_of(example_inputs) if batch is None else batch
    numerics = Numerics(stand_in(model, None), chosen, rules, high=high)
    ledger = Ledger(high_bytes=FLOAT_BITS[high] // 8, master_bytes=FLOAT_BITS[master] // 8)
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    copy = stand_in(model, mode)
    if not copy.training:
        copy.train()
    args, kwargs = stand_in_inputs(example_inputs, mode)
    try:
        with plain_operators(), mode:
            _run(copy, args, kwargs, loss, Recorder(copy, numerics, ledger))
            moved = optimizer_of(optimizer, [p for p in copy.parameters() if p.requires_grad])
            if moved is not None:
                ledger.vector_ops += update_ops(moved, copy, ledger.master_bytes)
    except _ABSTRACT as problem:
        raise HalfbyteError(
            f"{type(model).__name__} asks a tensor for its data ({str(problem).splitlines()[0]}), but a trace has "
            "none. Trace a copy whose shapes and branches do not depend on numbers: no .item(), no boolean masks as "
            "indices, no packed sequences, is_causal given to torch's Transformer."
        ) from problem
    return Workload(
        name=type(model).__name__ if name is None else name,
        recipe=chosen.name,
        batch=batch,
        gemms=tuple(ledger.gemms),
        vector_ops=_merged(ledger.vector_ops),
    )


def _merged(entries: Sequence[VectorOp]) -> tuple[VectorOp, ...]:
    """One entry for all work of a layer that has one name, at its first place: of a sequence, that of all steps."""
    found: dict[tuple[str, str, str, bool], VectorOp] = {}
    for entry in entries:
        key = entry.layer, entry.name, entry.phase, entry.fusible
        before = found.get(key)
        found[key] = (
            entry
            if before is None
            else replace(
                before,
                elements=before.elements + entry.elements,
                flops=before.flops + entry.flops,
                read_bytes=before.read_bytes + entry.read_bytes,
                written_bytes=before.written_bytes + entry.written_bytes,
            )
        )
    return tuple(found.values())


def _recipe(recipe: str | Recipe) -> Recipe:
    if recipe == "fp16":
        return Recipe(name="fp16", description="Every GEMM in float16: the 16-bit baseline.", dtype=torch.float16)
    if isinstance(recipe, str) and recipe not in RECIPES:
        raise UnknownNameError("recipe", recipe, (*RECIPES, "fp16"), OWN_RECIPE)
    return get(recipe)


def _high(recipe: Recipe) -> str:
    if recipe.dtype is not None:
        return DTYPE_NAMES[recipe.dtype]
    return "fp32" if recipe.leaves_alone else "fp16"


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], Tensor] | None,
    recorder: Recorder,
) -> None:
    """Forward, loss and backward under the recorder."""
    with torch.enable_grad(), recorder:
        out = model(*args, **kwargs)
        recorder.phase = "loss"
        value = _default_loss(out) if loss is None else loss(out)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise HalfbyteError(
                f"The loss is {_shown(value)}; one number with a gradient is possible. Are the parameters frozen, is "
                "the forward pass under no_grad, or does the loss not depend on the model's output?"
            )
        recorder.phase = "backward"
        value.backward()
    recorder.ledger.close()


def _default_loss(out: Any) -> Tensor:
    """The mean cross-entropy over the last dimension, or what stands for it where there is none."""
    found = [leaf for leaf in tree_leaves(_plain(out)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not found:
        raise HalfbyteError(
            f"The model returned {_shown(out)}, and no tensor with a gradient: nothing in it is trained. Are its "
            "parameters frozen, or is its forward pass under no_grad?"
        )
    result = found[0]
    if result.dim() < 2:
        return result if result.numel() == 1 else result.square().mean()
    rows = result.reshape(-1, result.shape[-1])
    labels = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    return nn.functional.cross_entropy(rows, labels)


def _plain(out: Any) -> Any:
    """A result object's fields, where it is no tree that torch knows."""
    known = isinstance(out, Tensor | tuple | list | dict)
    return out if known or not hasattr(out, "__dict__") else vars(out)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'}"
    return f"a {type(value).__name__}"
