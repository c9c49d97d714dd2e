"""Runs of the lab: from a checkpoint to the network that was trained, and from a file's description to its network.

A network of the lab is made from its data, of which it takes only sizes (words in a vocabulary, numbers in a frame). A
checkpoint's own tensors tell those, so no data are read here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import formats, recipes
from ..errors import HalfbyteError
from ..lab import checkpoint, phases, tasks
from ..own import is_own
from ..qtensor import packed_size
from ..stash import STEP
from .packed import FileError, Packed

__all__ = ["Trained", "build", "example_inputs", "open_checkpoint", "rebuild"]

_SIZES = {"vocabulary": ("embedding.weight", 0), "bands": ("lstm.weight_ih_l0", 1), "symbols": ("head.weight", 0)}
"""What a network takes from its data: which length of which tensor it became."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A network of the lab as a checkpoint has it.

    Attributes:
        network: in evaluation, on the CPU.
        recipe: the name of its run's.
        about: ``task``, ``network``, ``size``, ``fine_tuned`` and ``sizes``: what `build` needs.
    """

    network: nn.Module
    recipe: str
    about: Mapping[str, Any]


def open_checkpoint(path: Path) -> Trained:
    """The network of a run's checkpoint.

    Args:
        path: the file ``last.ckpt`` or the run's folder.

    Raises:
        CheckpointError: if it is missing, damaged, no checkpoint, or of other code than here.
        FileError: if it is of a task or a recipe of somebody's own.
    """
    file = checkpoint.path_in(path) if path.is_dir() else path
    identity, state = checkpoint.read(file, cure="Name the folder of a run, or the last.ckpt in it.")
    _demand_known(identity)
    try:
        weights: dict[str, Tensor] = state["model"]
        task, recipe = tasks.get(identity["task"]), recipes.get(identity["recipe"])
        settings = task.settings(identity["size"])
        tuned = bool(identity["fine_tune"]) and state["position"]["epoch"] >= settings.epochs
        about = {
            "task": identity["task"],
            "network": identity["model"],
            "size": identity["size"],
            "fine_tuned": tuned and not recipe.in_floating_point,
            "sizes": {name: weights[key].shape[dim] for name, (key, dim) in _SIZES.items() if key in weights},
        }
        network = build({**about, "recipe": recipe.name}, seed=identity["seed"])
        # What counts the draws of a stash belongs to training.
        network.load_state_dict({name: tensor for name, tensor in weights.items() if name != STEP})
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, HalfbyteError) as error:
        raise checkpoint.CheckpointError(
            f"{file} does not fit this version of halfbyte ({error}). Export it with the version that trained it."
        ) from error
    return Trained(network=network.eval(), recipe=recipe.name, about=about)


def build(about: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """An untrained network as a description names it, converted as its run converted it.

    Args:
        about: ``task``, ``network``, ``size``, ``recipe``, ``fine_tuned`` and ``sizes``.
        seed: of the run, for recipes that draw random numbers.

    Raises:
        FileError: if one of them is missing, or the task or the recipe is of somebody's own.
        UnknownNameError: if a name is in no table.
    """
    kinds = {"task": str, "network": str, "size": str, "recipe": str, "fine_tuned": bool, "sizes": dict}
    for name, kind in kinds.items():
        if not isinstance(about.get(name), kind):
            raise FileError(
                f"A network of the lab is described by {', '.join(kinds)}; {name} is {about.get(name)!r} here. Give "
                "the model, as it was made for training: halfbyte.load(path, model)."
            )
    _demand_known(about)
    task = tasks.get(about["task"])
    make = task.models[task.model_named(about["network"], about["size"])]
    with torch.random.fork_rng(devices=[]):
        network = make(SimpleNamespace(**about["sizes"]), task.settings(about["size"]))  # type: ignore[arg-type]
    recipe = recipes.get(about["recipe"])
    phases.prepare(network, recipe, seed, backend="auto")
    if about["fine_tuned"]:
        phases.switch(network, recipe, seed, backend="auto")
    return network


def _demand_known(about: Mapping[str, Any]) -> None:
    """Refuses a task or a recipe of somebody's own: it is in a module, and what a file names is never imported."""
    for what in ("task", "recipe"):
        if is_own(about.get(what)):
            raise FileError(
                f"The network is of {about[what]!r}, a {what} of somebody's own, and nothing that a file names is "
                "imported. Take it out from Python, halfbyte.export.save_safetensors(model, path), and bring it back "
                "into the model, halfbyte.load(path, model)."
            )


def rebuild(packed: Packed) -> nn.Module:
    """The network that a file names, as `build` makes it, if its sizes are those of the file's own tensors.

    So a file cannot ask for more memory than the tensors that it holds are worth.

    Raises:
        FileError: if sizes are others, or too few for the network.
        UnknownNameError: if a name is in no table.
    """
    shapes = {name.removeprefix("state/"): list(t.shape) for name, t in packed.tensors.items()}
    for name, row in packed.about["weights"].items():
        codes = packed.tensors.get(f"codes/{name}")
        if codes is not None and packed_size(math.prod(row["shape"]), formats.get(row["format"]).bits) == codes.numel():
            shapes[row["parameter"]] = row["shape"]
    sizes = {name: shapes[key][dim] for name, (key, dim) in _SIZES.items() if len(shapes.get(key, ())) > dim}
    if packed.about.get("sizes") != sizes:
        raise FileError(f"The file gives the sizes {packed.about.get('sizes')!r} and holds tensors of {sizes}.")
    try:
        return build(packed.about)
    except AttributeError as error:
        raise FileError(f"The file's sizes, {sizes}, do not make its network ({error}).") from error


def example_inputs(task: str, batch: int) -> tuple[Tensor, ...]:
    """Zeros in the shapes that a task's network takes.

    Args:
        task: its name.
        batch: how many samples.
    """
    from ..hardware.networks import NETWORKS

    return tuple(torch.zeros_like(x, device="cpu") for x in NETWORKS[task].inputs(batch))
