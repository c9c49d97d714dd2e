"""Another function in the place of one of the reference's, to see whether that is noticed."""

from collections.abc import Callable
from typing import Any

import pytest

from halfbyte.kernels import reference
from halfbyte.kernels.reference import blocks, fused


def replace_kernel(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., Any]) -> None:
    """Replaces a function of the reference, also where others of it are composed of that one."""
    for module in (reference, fused, blocks):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, function)
