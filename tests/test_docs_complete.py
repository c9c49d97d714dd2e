"""Nothing is missing from the documents: the one page names everything, the reference has what pages use."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import halfbyte
from halfbyte.formats import FORMATS
from halfbyte.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ALL = (DOCS / "all-of-halfbyte.md").read_text()
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^::: (halfbyte[\w.]*)((?:\n +.*)*)", flags=re.MULTILINE)


def code_words(text: str) -> set[str]:
    """The words between backticks."""
    return {word for span in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"[\w.:-]+", span)}


def test_the_one_page_has_every_name() -> None:
    """Public names, recipes and formats are all on the page of everything."""
    expected = {*halfbyte.__all__, *RECIPES, *FORMATS}
    assert not expected - code_words(ALL)


def test_the_one_page_has_every_command() -> None:
    """Commands of `halfbyte` and of `./dev` and the lab's tasks are all on the page of everything."""
    typer_main = pytest.importorskip("typer.main", reason="the command line needs the extra 'lab'")
    from halfbyte.cli import app
    from halfbyte.lab.tasks import TASKS

    commands = {f"halfbyte {name}" for name in typer_main.get_command(app).commands}
    chores = {f"./dev {name}" for name in re.findall(r"^  ([a-z]+)\)", (ROOT / "dev").read_text(), flags=re.MULTILINE)}
    missing = [words for words in sorted(commands | chores) if not re.search(rf"`{re.escape(words)}\b", ALL)]
    assert not missing
    assert not set(TASKS) - code_words(ALL)


def test_a_page_is_short() -> None:
    """No page that somebody wrote passes 200 lines but for the reports of measurements: one job a page."""
    reports = {"hardware.md", "LOG.md", "results.md"}
    long = {
        str(page.relative_to(DOCS)): count
        for page in DOCS.rglob("*.md")
        if page.name not in reports and (count := len(page.read_text().splitlines())) > 200
    }
    assert not long


def documented() -> list[object]:
    """What the reference documents: objects, and of modules the members that their entry lists, or all public ones."""
    found: list[object] = []
    for page in sorted((DOCS / "reference").glob("*.md")):
        for name, options in ENTRY.findall(page.read_text()):
            target = pkgutil.resolve_name(name)
            found.append(target)
            listed = re.search(r"members: \[([^\]]*)\]", options)
            if isinstance(target, ModuleType):
                names = listed[1].replace(",", " ").split() if listed else getattr(target, "__all__", ())
                found += [getattr(target, member) for member in names]
    return found


def named_by(tree: ast.AST) -> Iterator[tuple[str, object]]:
    """What code takes from halfbyte, by the words it uses: names that it imports, and attributes of its modules."""
    known: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                alias.asname or "halfbyte": halfbyte for alias in node.names if alias.name.split(".")[0] == "halfbyte"
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "halfbyte":
            for alias in node.names:
                known[alias.asname or alias.name] = pkgutil.resolve_name(f"{node.module}:{alias.name}")
    yield from known.items()
    for node in ast.walk(tree):
        words, at = [], node
        while isinstance(at, ast.Attribute):
            words, at = [at.attr, *words], at.value
        if words and isinstance(at, ast.Name) and isinstance(value := known.get(at.id), ModuleType):
            for count, word in enumerate(words, 1):
                value = getattr(value, word)
                yield ".".join([at.id, *words[:count]]), value
                if not isinstance(value, ModuleType):
                    break


def test_names_are_found() -> None:
    """The reader of code, on which the test below rests, sees imports, attributes, and attributes of modules."""
    code = "import halfbyte as hb\nfrom halfbyte.errors import SpecError as E\nhb.probes.attach(x).rows\nhb.Sawb()"
    found = dict(named_by(ast.parse(code)))
    assert {name for name in found if found[name] is not halfbyte} == {"E", "hb.probes", "hb.probes.attach", "hb.Sawb"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_uses_is_in_the_reference(page: Path) -> None:
    """Every class and function of halfbyte in a page's code has an entry in the reference."""
    blocks = PYTHON.findall(page.read_text())
    if not blocks:
        return
    pytest.importorskip("lightning_fabric", reason="the reference of the lab needs the extra 'lab'")
    known = {id(thing) for thing in documented()}
    used = {name: thing for block in ["\n".join(blocks)] for name, thing in named_by(ast.parse(block))}
    missing = [
        f"{name} ({thing.__module__})"
        for name, thing in used.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and id(thing) not in known
    ]
    assert not missing, f"add to a page of docs/reference: {missing}"
