"""A stranger with the README alone gets from an empty folder to a report of a model of their own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.report import groups

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """The text under a heading of the README."""
    text = (ROOT / "README.md").read_text()
    _, _, rest = text.partition(f"\n## {title}\n")
    assert rest, f"README.md has no section {title!r}"
    return rest.partition("\n## ")[0]


def steps(text: str) -> list[tuple[str, str]]:
    """What a reader does, in order: (file, its content) for code that begins with a file's name, ("", command)."""
    found: list[tuple[str, str]] = []
    for language, block in FENCE.findall(text):
        if language == "bash":
            found += [("", line) for line in block.splitlines() if line.strip()]
        else:
            name = re.match(r"# (\w+\.py)\n", block)
            assert language == "python", f"a {language} block: what is a reader to do with it?"
            assert name, "a code block must begin with the name of its file: # mine.py"
            found.append((name[1], block))
    return found


def test_steps_are_read_in_order() -> None:
    """The reader of the README, on which the test below rests, keeps order, files and commands apart."""
    text = "Do\n\n```bash\npip install .\n```\n\n```python\n# mine.py\nx = 1\n```\n\n```bash\nhalfbyte info\n```\n"
    assert steps(text) == [("", "pip install ."), ("mine.py", "# mine.py\nx = 1\n"), ("", "halfbyte info")]


def test_the_file_has_fifteen_lines() -> None:
    """What has to be written for a model of one's own is no more than 15 lines of code."""
    code = [content for name, content in steps(section("Your own model")) if name]
    lines = [line for line in "".join(code).splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) == 1
    assert len(lines) <= 15


@pytest.mark.slow
def test_a_stranger_gets_to_a_report(tmp_path: Path) -> None:
    """The section's files and commands as they stand there, in order, lead to a report of one's own model.

    The package that is installed stands in for the installation, which must be the first command. Ten minutes is when a
    command is given up, all of them together take less than one on an idle machine.
    """
    todo = steps(section("Your own model"))
    assert todo.pop(0)[1].startswith("pip install")
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    asked = ""
    for name, content in todo:
        if name:
            (tmp_path / name).write_text(content)
            continue
        words = shlex.split(content, comments=True)
        assert words.pop(0) == "halfbyte", f"{content!r} is no command that halfbyte installs"
        asked = words[-1]
        done = subprocess.run(
            [sys.executable, "-m", "halfbyte", *words],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{content}\n{done.stdout}\n{done.stderr}"
    assert asked == "report.html"
    page = tmp_path / asked
    assert page.stat().st_size > 0
    assert {r.task for r in groups.gather([tmp_path / "runs"])} == {"mine:task"}
    for recipe in ("fp32", "bf16", "ibm2020"):
        assert recipe in page.read_text()
