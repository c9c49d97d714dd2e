"""What Sun et al., NeurIPS 2020, publish in tables 1 and 3, under our names of tasks, networks and recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["PAPER", "Published", "beside"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of the paper's tables: what it trained, and what came of it by our recipes' names.

    Attributes:
        task: our task that has the same metric and comes nearest.
        model: our name of the network where network and data are the paper's own; empty where they are not.
        what: network and data.
        digits: decimals that the paper prints.
        values: the metric by recipe.
    """

    task: str
    model: str
    what: str
    digits: int
    values: Mapping[str, float]

    def gap(self, recipe: str) -> float | None:
        """The recipe's value minus that of fp32; None where the paper has none."""
        return self.values[recipe] - self.values["fp32"] if recipe in self.values and recipe != "fp32" else None

    def cell(self, recipe: str) -> str:
        """The recipe's value with the paper's digits, its gap in brackets; empty where the paper has none."""
        if recipe not in self.values:
            return ""
        gap = self.gap(recipe)
        return f"{self.values[recipe]:.{self.digits}f}" + ("" if gap is None else f" ({gap:+.{self.digits}f})")


_TABLE_1 = ("fp32", "int4_forward_only", "ibm2020", "ibm2020_dw_fp8", "ibm2020_bottom_1x1_fp8", "ibm2020_1x1_fp8")
_TABLE_3 = ("fp32", "ibm2020", "ibm2020_dw_fp8")


def _cifar10(model: str, name: str, *values: float | None) -> Published:
    """A row of table 1."""
    found = {recipe: value for recipe, value in zip(_TABLE_1, values, strict=True) if value is not None}
    return Published(task="cifar10", model=model, what=f"{name}, CIFAR-10", digits=2, values=found)


def _sequences(task: str, what: str, *values: float) -> Published:
    """A row of table 3; of none of them are network and data known well enough to be ours."""
    return Published(task=task, model="", what=what, digits=1, values=dict(zip(_TABLE_3, values, strict=True)))


PAPER: tuple[Published, ...] = (
    _cifar10("vgg16", "VGG-16", 92.07, 91.81, 91.47, 91.81, None, None),
    _cifar10("googlenet", "GoogLeNet", 94.68, 94.50, 94.17, 94.12, None, None),
    _cifar10("resnet18", "ResNet-18", 93.01, 92.97, 92.74, 92.76, None, None),
    _cifar10("resnet50", "ResNet-50", 94.70, 94.34, 93.42, 93.77, 94.03, 94.36),
    _cifar10("resnet101", "ResNet-101", 95.04, 94.76, 93.79, 94.34, 94.19, 94.43),
    _cifar10("densenet121", "DenseNet-121", 95.06, 95.08, 94.71, 94.82, None, 94.91),
    _cifar10("mobilenetv2", "MobileNetV2", 93.00, 92.97, 91.80, 92.39, None, None),
    _sequences("ptb", "2-layer LSTM, Penn Treebank", 83.3, 85.3, 83.8),
    _sequences("multi30k", "Transformer-base, WMT En-De", 27.5, 25.4, 25.9),
    _sequences("an4", "4-layer bidirectional LSTM, SWB300", 9.9, 11.3, 10.4),
)
"""Sun et al., NeurIPS 2020, tables 1 and 3. Table 2 is of ImageNet, for which there is no task."""

_NEAREST: Mapping[str, str] = MappingProxyType({"cifar10": "resnet18"})
"""Of a task with several rows the network whose row stands beside those that the paper has not."""


def beside(task: str, model: str) -> Published | None:
    """The row of the paper that stands beside results of ours.

    Args:
        task: name of the task.
        model: name of the network.

    Returns:
        The row of this very network where the paper has one, else the nearest of the task; None where it has none.
    """
    rows = {row.model: row for row in PAPER if row.task == task}
    return rows.get(model) or rows.get(_NEAREST.get(task, ""))
