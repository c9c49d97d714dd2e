"""What the hardware model says of a recipe: cycles and energy of one training step, of networks cheap to trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from ...errors import HalfbyteError
from ...hardware.model import Totals, estimate
from ...hardware.networks import NETWORKS
from ...hardware.presets import PAPER_ENGINE, isoarea
from ...hardware.tracing import trace
from ...recipes import RECIPES

__all__ = ["TRACED", "modeled"]

TRACED: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("digits", "cnn"): "digits",
        ("fashion", "cnn"): "fashion",
        ("cifar10", "resnet20"): "cifar10",
        ("cifar10", "resnet18"): "resnet18-cifar",
    }
)
"""By task and network its name in `halfbyte.hardware.networks`.
A recurrent one is traced step by step, which takes minutes."""

_BASE = "fp16"
_MOST = 12


def modeled(task: str, model: str, recipes: Sequence[str]) -> dict[str, Any] | None:
    """One training step on the machine of equal area of Sun et al., under each recipe that its arrays can multiply.

    Args:
        task: name of the task.
        model: name of the network.
        recipes: names; those in floating point and those that are not known are left out, and of many the last ones.

    Returns:
        ``machine``, ``what``, ``batch``, ``base``; ``rows``, of each recipe its ``cycles`` and ``energy_pj`` and how
        many times fewer they are than in 16 bits; ``left_out``, the recipes for which the machine has no arrays. None
        where there is nothing to model.
    """
    name = TRACED.get((task, model))
    wanted = [r for r in recipes if r in RECIPES and not RECIPES[r].in_floating_point][:_MOST]
    if name is None or not wanted:
        return None
    example, machine = NETWORKS[name], isoarea(engine=PAPER_ENGINE)

    def totals(recipe: str) -> Totals:
        with torch.device("meta"):
            network = example.network()
        step = trace(network, example.inputs(example.batch), recipe, name=name, batch=example.batch)
        return estimate(step, machine).totals

    base, rows, left_out = totals(_BASE), [], []
    for recipe in wanted:
        try:
            own = totals(recipe)
        except HalfbyteError:  # A format for which the machine has no array, or work that cannot be traced.
            left_out.append(recipe)
            continue
        rows.append(
            {
                "recipe": recipe,
                "cycles": own.cycles,
                "energy_pj": own.energy_pj,
                "faster": base.cycles / own.cycles,
                "less_energy": base.energy_pj / own.energy_pj,
            }
        )
    first = {"recipe": _BASE, "cycles": base.cycles, "energy_pj": base.energy_pj, "faster": 1.0, "less_energy": 1.0}
    return {
        "machine": machine.name,
        "what": example.what,
        "batch": example.batch,
        "base": _BASE,
        "rows": [first, *rows],
        "left_out": left_out,
    }
