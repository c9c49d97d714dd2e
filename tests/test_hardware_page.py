"""The page on hardware says what the code computes."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "hardware_page.py"


@pytest.mark.slow
def test_the_tables_are_up_to_date():
    """Every table of docs/hardware.md is what experiments/hardware_page.py makes from the model and units.json."""
    spec = importlib.util.spec_from_file_location("hardware_page", SCRIPT)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, "run: python experiments/hardware_page.py"
