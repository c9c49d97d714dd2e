"""The hook that runs the notebooks for the site: outputs behind the code, an error where a block fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = """# Title

Some prose.

```python
x = 2
print("printed")
x + 1
```

```python
y = x
```

The end.
"""


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """The hook's module, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("notebooks_hook", ROOT / "docs/hooks/notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_outputs_stand_behind_their_code(hook: ModuleType) -> None:
    """What a block prints and the value of its last line follow it; a block without either is followed by nothing."""
    page, figures = hook.run(PAGE, "name")
    expected = PAGE.replace("x + 1\n```\n", "x + 1\n```\n\n```text\nprinted\n3\n```\n")
    assert page == expected
    assert figures == {}


def test_a_figure_becomes_a_file(hook: ModuleType) -> None:
    """A figure as the last value is drawn into a file of its own, equal for equal figures, and shown."""
    pytest.importorskip("matplotlib", reason="figures need the extra 'lab'")
    source = "```python\nfrom matplotlib.figure import Figure\nf = Figure()\nf.subplots().plot([1, 2])\nf\n```\n"
    page, figures = hook.run(source, "name")
    assert page.endswith("![What the code above draws](name-1.svg)\n")
    assert figures["name-1.svg"].count("</svg>") == 1
    assert hook.run(source, "name")[1] == figures


def test_a_block_that_fails_stops_the_build(hook: ModuleType) -> None:
    """An error names the page and the line of its block."""
    with pytest.raises(hook.NotebookError, match=r"notebooks/name\.md, the block at line 4: ZeroDivisionError"):
        hook.run("# A\n\n```python\n1 / 0\n```\n", "name")


def test_the_copy_for_jupyter(hook: ModuleType) -> None:
    """The copy has prose and code in turn, each with an id of its own, and no outputs."""
    written = json.loads(hook.jupyter(PAGE))
    assert (written["nbformat"], written["nbformat_minor"]) == (4, 5)
    assert [cell["cell_type"] for cell in written["cells"]] == ["markdown", "code", "code", "markdown"]
    assert written["cells"][1]["source"] == 'x = 2\nprint("printed")\nx + 1'
    assert all(cell["outputs"] == [] for cell in written["cells"] if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in written["cells"]}) == 4


def test_the_sources_hold_no_outputs() -> None:
    """A notebook's source holds prose and Python alone: an output in it could go stale."""
    sources = sorted((ROOT / "docs/notebooks").glob("*.md"))
    assert [path.stem for path in sources] == ["formats", "three-gemms", "train-and-read"]
    for path in sources:
        fences = [line for line in path.read_text().splitlines() if line.startswith("```")]
        assert fences == ["```python", "```"] * (len(fences) // 2), path.name
