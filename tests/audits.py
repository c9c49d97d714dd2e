"""What the tests of the audit share: a small network, its data, and an audit of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import cli
from halfbyte.auditing import AuditReport, audit
from halfbyte.recipes import Recipe


def everywhere(model: nn.Module, recipe: str | Recipe) -> nn.Module:
    """The model with every layer under the recipe, whatever the recipe's own rules, on the reference backend."""
    return hb.convert(model, recipe, [hb.Rule(recipe=recipe)], backend="reference")


def network() -> nn.Sequential:
    """Two layers with biases that are not zero."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def data() -> Tensor:
    """32 rows of 16 bell-shaped numbers."""
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def audited(recipe: str | Recipe = "ibm2020") -> AuditReport:
    """The audit of the two layers, both under the recipe."""
    return audit(everywhere(network(), recipe), data())


def reasons(report: AuditReport) -> str:
    """Why an audit failed, after checking that it did."""
    assert report.ok is False
    assert report.reasons
    return "\n".join(report.reasons)


def run_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str) -> int:
    """The command on the small network of the digits."""
    monkeypatch.chdir(tmp_path)
    return cli.main(["audit", "digits", "--recipe", "ibm2020", "--model", "mlp", "--json", "new/a.json", *more])
