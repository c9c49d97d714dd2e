"""A packed model: what of a converted model goes into a file, and back into a model.

Everything of its ``state_dict`` stays under its name, but for the weights that are multiplied as codes: of those the
codes stay, two to a byte, with their scales. What describes them is plain values (`Packed.about`), so that a file holds
tensors and text and nothing that could be executed.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import formats
from ..convert import convert
from ..errors import ConversionError, HalfbyteError, UnsupportedError
from ..nn import is_twin
from ..ops import Plan
from ..qtensor import Blocks, QTensor, packed_size
from ..quantizers import Quantizer
from ..recipes import RECIPES
from ..stash import STEP
from .stored import Stored
from .weights import Weight, evaluating, plans_in, weights_in

__all__ = ["SCHEMA", "FileError", "Packed", "load_into", "pack_model", "plain_state"]

SCHEMA = "halfbyte packed 1"
"""What ``about["schema"]`` says; another number for another layout."""

_PARTS = {"codes": torch.uint8, "scale": torch.float32, "zero_point": torch.float64}
"""Tensors of a packed weight and their types; the type of ``block_scale`` depends on its format."""


class FileError(HalfbyteError, ValueError):
    """A file that is damaged, no packed model, or of another model than the one that it is loaded into."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What a file of a packed model holds.

    Attributes:
        about: plain values: ``schema``, ``version``, ``recipe``, ``plans``, ``weights``, and what the caller added.
        tensors: by name: ``state/NAME`` for an entry of the ``state_dict``; ``codes/PLAN``, ``scale/PLAN`` and where
            there is one ``zero_point/PLAN`` and ``block_scale/PLAN``; ``rows/PLACE/PARAMETER`` for rows of a parameter
            that are not packed although others are.
    """

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights: codes, scales, zero points."""
        parts = (*_PARTS, "block_scale")
        return sum(t.nbytes for name, t in self.tensors.items() if name.partition("/")[0] in parts)

    @property
    def float_bytes(self) -> int:
        """Bytes of the same weights in FP32."""
        return 4 * sum(torch.Size(row["shape"]).numel() for row in self.about["weights"].values())


def pack_model(model: nn.Module, recipe: str = "", more: Mapping[str, Any] | None = None) -> Packed:
    """A model's packed weights and everything else of its state.

    Args:
        model: converted or not; in training mode or not, the codes are those of evaluation.
        recipe: by what name it was converted; empty finds it where all plans have one.
        more: plain values for ``about``.

    Raises:
        UnsupportedError: if a weight cannot be exported: computed, sharded, broken.
    """
    plans = plans_in(model)
    with evaluating(model):
        rows = [(weight, weight.encode()) for weight in weights_in(model)]
    tensors = _state(model, {weight.parameter for weight, _ in rows})
    for weight, q in rows:
        parts = {"codes": q.qdata, "scale": q.scale, "zero_point": q.zero_point, "block_scale": q.block_scale}
        tensors |= {f"{part}/{weight.name}": t for part, t in parts.items() if t is not None}
    tensors |= _left_over(model, [weight for weight, _ in rows])
    names = {plan.recipe.name for plan in plans.values()} or {"fp32"}
    about = {
        "schema": SCHEMA,
        "version": importlib.metadata.version("halfbyte"),
        "recipe": recipe or (names.pop() if len(names) == 1 else ""),
        "plans": {name: {"recipe": p.recipe.name, "seed": p.seed, "layer": p.layer} for name, p in plans.items()},
        "conventions": _conventions(plans),
        "weights": {weight.name: _described(weight, q) for weight, q in rows},
        **(more or {}),
    }
    return Packed(
        about=about, tensors={name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}
    )


def _conventions(plans: Mapping[str, Plan]) -> list[dict[str, Any]]:
    """The plans by what their numbers mean: every field of a recipe in one line, and the plans under it."""
    found: dict[str, list[str]] = {}
    for name, plan in plans.items():
        found.setdefault(plan.recipe.conventions, []).append(name)
    return [{"text": text, "plans": names} for text, names in found.items()]


def _state(model: nn.Module, packed: set[str]) -> dict[str, Tensor]:
    """The state without the packed parameters, the plans' conventions (said once in ``about``) and a stash's count."""
    found = {}
    for name, value in model.state_dict().items():
        if name in packed or name.endswith("_extra_state") or name == STEP:
            continue
        if not isinstance(value, Tensor) or hasattr(value, "full_tensor"):
            raise UnsupportedError(
                f"{name} of the model's state is a {type(value).__name__}; whole tensors can be exported."
            )
        found[f"state/{name}"] = value
    return found


def _left_over(model: nn.Module, weights: list[Weight]) -> dict[str, Tensor]:
    """Rows of parameters that only some plans pack: keys and values in floating point beside packed queries."""
    found = {}
    for parameter in {weight.parameter for weight in weights}:
        whole = model.get_parameter(parameter).detach()
        at = 0
        taken = sorted((w.start, w.start + len(w.tensor)) for w in weights if w.parameter == parameter)
        for start, stop in (*taken, (len(whole), len(whole))):
            if start > at:
                found[f"rows/{at}/{parameter}"] = whole[at:start]
            at = max(at, stop)
    return found


def _described(weight: Weight, q: QTensor) -> dict[str, Any]:
    if q.format.name not in formats.FORMATS:
        raise UnsupportedError(
            f"{weight.name}: codes of {q.format.name} were to be exported; possible are {', '.join(formats.FORMATS)}."
        )
    row = {
        "parameter": weight.parameter,
        "start": weight.start,
        "shape": list(q.shape),
        "format": q.format.name,
        "dtype": str(weight.tensor.dtype).removeprefix("torch."),
    }
    if q.blocks is not None:
        scales = q.blocks.scale_format
        row |= {"view": list(q.blocks.view), "sizes": list(q.blocks.sizes)}
        row["scale_format"] = None if scales is None else scales.name
    return row


def load_into(model: nn.Module, packed: Packed) -> nn.Module:
    """Gives a model what a file holds, in place: its codes, and the rest of its state.

    Args:
        model: of the same architecture; plain, or converted as the one that was exported was.
        packed: of a file.

    Returns:
        The model, in evaluation.

    Raises:
        FileError: if the file is not of this model, or does not say what it must.
        ConversionError: if the model is plain, and the file's recipe is none of `halfbyte.RECIPES` or has other
            conventions here.
        UnsupportedError: if the model has packed weights already.
    """
    about = packed.about
    if not any(is_twin(m) for m in model.modules()) and about["plans"]:
        if about["recipe"] not in RECIPES:
            raise ConversionError(
                f"The file's recipe, {about['recipe'] or 'several'!r}, has no name in halfbyte.RECIPES, so a plain "
                "model cannot be converted by it. Convert the model as it was for training and give that."
            )
        convert(model, about["recipe"])
    plans = plans_in(model)
    if any(isinstance(plan.weight, Stored) for plan in plans.values()):
        raise UnsupportedError(
            "The model has packed weights already. Make it plain before, halfbyte.restore(model), or build it anew."
        )
    if set(plans) != set(about["plans"]):
        differ = sorted(set(plans) ^ set(about["plans"]))
        raise FileError(
            f"The file is of another model, or was converted otherwise: these layers are under a plan in only one of "
            f"the two: {', '.join(differ[:5])}{', ...' if len(differ) > 5 else ''}. Build the model that was exported."
        )
    _check_conventions(plans, about)
    with evaluating(model), torch.no_grad():
        for name, row in about["plans"].items():
            plans[name].seed, plans[name].layer = row["seed"], row["layer"]
        weights = {weight.name: weight for weight in weights_in(model)}
        if set(weights) != set(about["weights"]):
            raise FileError("The file packs other weights than this model has codes for. It was changed by hand.")
        codes = {name: _codes(packed, name, weights[name]) for name in weights}
        rows = _rows(model, packed, weights)
        _fill(model, packed, weights)
        # A weight that a layer shares with an embedding is that of the file, which holds it in floating point.
        whole = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if f"state/{n}" in packed.tensors}
        for name, weight in weights.items():
            if id(model.get_parameter(weight.parameter)) not in whole:
                weight.tensor.copy_(weight.plain(codes[name]))
        for name, part in rows.items():
            part.copy_(packed.tensors[name])
        for name, weight in weights.items():
            assert isinstance(weight.plan.weight, Quantizer)
            weight.plan.weight = Stored(weight.plan.weight, codes[name])
    return model.eval()


def _check_conventions(plans: Mapping[str, Plan], about: Mapping[str, Any]) -> None:
    told = {name: row["text"] for row in about["conventions"] for name in row["plans"]}
    for name, plan in plans.items():
        if told.get(name) != plan.recipe.conventions:
            raise ConversionError(
                f"{name}: the file was made under other conventions than recipe {plan.recipe.name!r} has here.\n"
                f"  in the file: {told.get(name)}\n  here:        {plan.recipe.conventions}\n"
                "Convert the model with the recipe that it was trained with."
            )


def _codes(packed: Packed, name: str, weight: Weight) -> QTensor:
    """A packed weight of a file, every part of it checked against the layer and the formats.

    Raises:
        FileError: if a part is missing or of a wrong type or shape.
    """
    row, parts = packed.about["weights"][name], {}
    for part in (*_PARTS, "block_scale"):
        parts[part] = packed.tensors.get(f"{part}/{name}")
    fmt, shape = formats.get(row["format"]), torch.Size(row["shape"])
    blocks = None
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.uint8, (packed_size(shape.numel(), fmt.bits),)),
        "scale": (torch.float32, ()),
    }
    if parts["zero_point"] is not None:
        wanted["zero_point"] = torch.float64, ()
    if "view" in row:
        scales = row["scale_format"]
        blocks = Blocks(tuple(row["view"]), tuple(row["sizes"]), None if scales is None else formats.get(scales))
        wanted["block_scale"] = torch.float32 if scales is None else torch.uint8, blocks.grid
    for part, tensor in parts.items():
        has = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
        if has != wanted.get(part):
            raise FileError(f"{part}/{name} is {has} in the file; {wanted.get(part)} is right. It was changed by hand.")
    fits = shape == weight.tensor.shape and (blocks is None or math.prod(blocks.view) == shape.numel())
    if not fits or row["parameter"] != weight.parameter or row["start"] != weight.start:
        raise FileError(
            f"{name} is {tuple(shape)}, rows from {row['start']} of {row['parameter']}, in the file, and "
            f"{tuple(weight.tensor.shape)}, rows from {weight.start} of {weight.parameter}, in this model. Build the "
            "model that was exported."
        )
    if blocks is not None and blocks.scale_format is not None:
        factors = parts["block_scale"]
        assert factors is not None
        if int(factors.max()) >= 1 << blocks.scale_format.bits:
            raise FileError(f"block_scale/{name} holds codes that {row['scale_format']} lacks. It was changed by hand.")
    device = weight.tensor.device
    codes, scale = parts["codes"], parts["scale"]
    assert codes is not None
    assert scale is not None
    return QTensor(codes, scale, fmt, shape, parts["zero_point"], parts["block_scale"], blocks).to(device)


def _rows(model: nn.Module, packed: Packed, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Where the file's rows without codes go, by their names in it.

    Raises:
        FileError: if it holds others than this model has, or tensors that are no part of a packed model.
    """
    rows = _left_over(model, list(weights.values()))
    parts = {f"{part}/{name}" for part in (*_PARTS, "block_scale") for name in weights}
    given = {n: t.shape for n, t in packed.tensors.items() if n not in parts and not n.startswith("state/")}
    expected = {name: part.shape for name, part in rows.items()}
    if given != expected:
        differ = sorted({name for name, _ in given.items() ^ expected.items()})
        raise FileError(
            f"The file is of another model, or was changed by hand: {', '.join(differ[:5])}"
            f"{', ...' if len(differ) > 5 else ''} {'differ' if len(differ) > 1 else 'differs'} from what this model "
            "has. Build the model that was exported."
        )
    return rows


def _fill(model: nn.Module, packed: Packed, weights: Mapping[str, Weight]) -> None:
    """The state that is not packed.

    Raises:
        FileError: if names or shapes are others than the model's.
    """
    given = {n.removeprefix("state/"): t for n, t in packed.tensors.items() if n.startswith("state/")}
    expected = {n.removeprefix("state/") for n in _state(model, {w.parameter for w in weights.values()})}
    if set(given) != expected:
        differ = sorted(set(given) ^ expected)
        raise FileError(
            f"The file is of another model: only one of the two has {', '.join(differ[:5])}"
            f"{', ...' if len(differ) > 5 else ''}. Build the model that was exported."
        )
    try:
        model.load_state_dict(given, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise FileError(f"The file is of another model ({reason}). Build the model that was exported.") from error


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A ``state_dict`` for the model without halfbyte: floating weights, equal to what the codes stand for.

    Args:
        model: converted or not.

    Returns:
        Every entry that the plain architecture has, under its names; nothing of a plan.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Plan))
    state = {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if not name.startswith(inside) and name != STEP
    }
    with evaluating(model):
        for weight in weights_in(model):
            rows = state[weight.parameter][weight.start : weight.start + len(weight.tensor)]
            rows.copy_(weight.plain(weight.encode()))
    return state
