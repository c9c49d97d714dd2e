"""What every test shares: the repository's root, a fixed seed, and one Hypothesis profile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from browser import chromium, page

__all__ = ["chromium", "page"]  # Fixtures of browser.py, for every test.

# No deadline: the first call of a torch operator is slow. In CI the examples are the same on every run, so that a red
# run means a changed program; on a desk they are new each time, which is how new failures are found.
settings.register_profile(
    "halfbyte",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("halfbyte")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same torch seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]
