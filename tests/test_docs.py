"""The documents keep their word: code blocks run, commands exist, links lead somewhere, numbers name their command."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from halfbyte.nn import TWINS
from halfbyte.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run:(.*?)-->", flags=re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)", flags=re.MULTILINE)
COMMAND = re.compile(r"`((?:\./dev|halfbyte) [^`]+)`")

LANGUAGES = {"python", "bash", "json", "text"}
SLOW = {"docs/how-to/export.md", "docs/how-to/trainers.md", "docs/notebooks/train-and-read.md"}
"""Pages whose code takes more than about ten seconds where something else runs: they import graphs, other trainers."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the number of its first line, its text, and why it is not run, if it is marked."""

    language: str
    line: int
    text: str
    reason: str


def all_blocks(text: str) -> Iterator[Block]:
    """Every fenced block of a page. A mark counts for the block that follows it directly."""
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip()
        marks = [mark for mark in MARK.finditer(before) if mark.end() == len(before)]
        reason = " ".join(marks[0][1].split()) if marks else ""
        yield Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2], reason)


def blocks(text: str, language: str) -> Iterator[tuple[int, str]]:
    """The blocks of one language that are not marked, each with the number of its first line."""
    for block in all_blocks(text):
        if block.language == language and not block.reason:
            yield block.line, block.text


def name_of(page: Path) -> str:
    """The page's path as a reader knows it."""
    return str(page.relative_to(ROOT))


def pages_with(language: str) -> list[object]:
    """The pages that hold a block of this language."""
    pages = [page for page in PAGES if any(blocks(page.read_text(), language))]
    slow = pytest.mark.slow if language == "python" else ()
    return [pytest.param(page, marks=slow if name_of(page) in SLOW else (), id=name_of(page)) for page in pages]


def test_blocks_are_told_apart() -> None:
    """The reader of blocks, on which this file rests, sees language, line and mark of each."""
    text = "a\n\n```python\nx\n```\n\n<!-- not run: needs\ntwo -->\n\n```python\ny\n```\n```\nz\n```\n"
    assert list(all_blocks(text)) == [
        Block("python", 4, "x\n", ""),
        Block("python", 11, "y\n", "needs two"),
        Block("", 14, "z\n", ""),
    ]
    assert list(blocks(text, "python")) == [(4, "x\n")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    """A block is of a language that a test here knows; a mark stands before a block and gives its reason in words."""
    text = page.read_text()
    marked = [block for block in all_blocks(text) if block.reason]
    assert len(MARK.findall(text)) == len(marked), f"{name_of(page)}: a mark without a reason, or not before a block"
    short = [block.reason for block in marked if len(block.reason.split()) < 4]
    assert not short, f"{name_of(page)}: {short} are no reasons"
    strange = {block.language for block in all_blocks(text)} - LANGUAGES
    assert not strange, f"{name_of(page)}: blocks of {strange}, which no test runs; possible: {sorted(LANGUAGES)}"


@pytest.fixture
def untouched() -> Iterator[None]:
    """What a page adds to halfbyte's own tables is gone for the next test, and so are filters of warnings."""
    tables: list[dict[object, object]] = [TWINS, RECIPES]  # type: ignore[list-item]
    known = [dict(table) for table in tables]
    with warnings.catch_warnings(), contextlib.ExitStack() as after:
        after.callback(torch.set_num_threads, torch.get_num_threads())
        yield
    for table, before in zip(tables, known, strict=True):
        table.clear()
        table.update(before)


@pytest.mark.parametrize("page", pages_with("python"))
@pytest.mark.usefixtures("untouched")
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who runs a page's Python blocks from top to bottom sees no error and no warning."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in blocks(page.read_text(), "python"):
        # The empty lines in front make a traceback name the line of the page.
        exec(compile("\n" * (line - 1) + block, page, "exec"), namespace)


def shell_lines(text: str) -> list[list[str]]:
    """The words of each command in a page's bash blocks; comments dropped, continued lines joined."""
    joined = "\n".join(block.replace("\\\n", " ") for _, block in blocks(text, "bash"))
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def misused_options(words: list[str]) -> list[str]:
    """The words of a `halfbyte ...` command line that the CLI does not know."""
    typer_main = pytest.importorskip("typer.main", reason="the command line needs the extra 'lab'")
    from halfbyte.cli import app

    command = typer_main.get_command(app)
    rest = words[1:]
    while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
        if rest[0] not in command.commands:
            return [rest[0]]
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in rest if word.startswith("-") and word.split("=")[0] not in known | {"--help"}]


def own_command(words: list[str]) -> list[str]:
    """The `halfbyte ...` command in a line of words, from `-m halfbyte` on where another starts it; empty if none."""
    if words[:1] == ["halfbyte"]:
        return words
    return words[words.index("halfbyte") :] if "-m halfbyte" in " ".join(words) and "halfbyte" in words else []


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_exist(page: Path) -> None:
    """Every command in a bash block is ours with options that exist, a script or module that is there, or pip."""
    known = set(re.findall(r"^  ([a-z]+)\)", (ROOT / "dev").read_text(), flags=re.MULTILINE))
    for line in shell_lines(page.read_text()):
        words = [word for word in line if not re.match(r"[A-Z_]+=", word)]
        said = f"{name_of(page)}: {shlex.join(words)}"
        if own := own_command(words):
            assert not misused_options(own), f"{said}: no {misused_options(own)}"
        elif words[0] == "./dev":
            assert words[1] in known, f"{said}: there is no such command"
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), f"{said}: there is no such module"
        elif words[0] in ("python", "torchrun"):
            script = next(word for word in words[1:] if not word.startswith("-"))
            assert (ROOT / script).is_file(), f"{said}: there is no such file"
        else:
            assert words[0] in ("pip", "tensorboard"), f"{said}: whose command is that?"


def why_only_parsed(words: list[str]) -> str:
    """Why a command of ours is not run here; empty if it is."""
    name, rest = words[1], words[2:]
    if name in ("bench", "hw", "quantize"):
        return "takes minutes, or a file of the reader's; it has tests of its own"
    if name == "report":
        return "tests/test_readme.py runs it"
    if any(re.fullmatch(r"[A-Z]+", word) for word in rest):
        return "has a place that the reader fills in"
    if name in ("compare", "train", "audit") and rest[0].split(":")[-1] != "digits":
        return "needs data, or a file of the reader's"
    return "starts processes, which do not see that the digits were made few" if "--jobs" in rest else ""


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task of the digits under every size in one pass over 64 pictures, so that commands run as they stand."""
    tasks = pytest.importorskip("halfbyte.lab.tasks", reason="the tasks need the extra 'lab'")
    few = replace(tasks.get("digits").settings("cpu"), epochs=1, batch_size=32, examples=64, test_examples=32)
    digits = replace(tasks.get("digits"), sizes=MappingProxyType(dict.fromkeys(tasks.SIZES, few)))
    monkeypatch.setattr(tasks, "TASKS", MappingProxyType({**tasks.TASKS, "digits": digits}))


def runnable() -> list[object]:
    """The pages that hold a command of ours that can be run here."""
    found = []
    for page in PAGES:
        own = [words for words in shell_lines(page.read_text()) if words[0] == "halfbyte"]
        if any(not why_only_parsed(words) for words in own):
            found.append(pytest.param(page, id=name_of(page)))
    return found


@pytest.mark.parametrize("page", runnable())
@pytest.mark.usefixtures("few_digits", "untouched")
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's commands as they stand there, in order, end well: with few digits, and if nothing else is needed."""
    from halfbyte.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.set_num_threads(1)
    text = page.read_text()
    for _, block in blocks(text, "python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / name[1]).write_text(block)
    for words in shell_lines(text):
        if words[0] == "halfbyte" and not why_only_parsed(words):
            assert main(words[1:]) == 0, f"{name_of(page)}: {shlex.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    """Every relative link of a page leads to a file of the repository."""
    text = FENCE.sub("", page.read_text())
    targets = [link.split("#")[0] for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]
    broken = [target for target in targets if target and not (page.parent / target).exists()]
    assert not broken, f"{name_of(page)}: {broken}"


def test_decisions_are_listed() -> None:
    """Every decision has its line in the index, and the index lists no other."""
    folder = DOCS / "decisions"
    index = (folder / "README.md").read_text()
    written = {path.name for path in folder.glob("*.md")} - {"README.md"}
    listed = {link for link in LINK.findall(index) if "/" not in link and link.endswith(".md")}
    assert written == listed, f"in docs/decisions/README.md add {written - listed} and drop {listed - written}"


def sections(text: str) -> Iterator[str]:
    """A page cut at its headings, code blocks left out."""
    yield from re.split(r"^(?=#+ )", FENCE.sub("", text), flags=re.MULTILINE)


def has_measured_numbers(section: str) -> bool:
    """Whether a section holds a table with a cell that is a number, with or without a deviation or a unit."""
    rows = [line for line in section.splitlines() if line.startswith("|")]
    cells = (cell.strip(" *") for row in rows for cell in row.split("|"))
    return any(re.match(r"[-+−]?\d+\.?\d*($|\s*[±%×x(])", cell) for cell in cells)


@pytest.mark.parametrize("page", [README, DOCS / "index.md"], ids=name_of)
def test_number_tables_name_their_command(page: Path) -> None:
    """A table of numbers stands beside the command that made it and the number of seeds."""
    for section in filter(has_measured_numbers, sections(page.read_text())):
        title = section.splitlines()[0]
        assert COMMAND.search(section), f"{name_of(page)}, {title!r}: which command made these numbers?"
        assert "seed" in section, f"{name_of(page)}, {title!r}: how many seeds?"


def test_number_tables_are_recognized() -> None:
    """The test above sees a table of numbers and lets a table of words pass."""
    assert has_measured_numbers("| recipe | accuracy |\n|---|---|\n| fp32 | 98.1 ± 0.2 |")
    assert has_measured_numbers("| fp32 | **98.1** |")
    assert not has_measured_numbers("| weight | INT4 codes |\n| 1,797 is in the text only: 98.1 |")


def test_readme_shows_the_results_of_the_demo() -> None:
    """The README keeps the marked place for the results on digits."""
    text = README.read_text()
    start, end = text.index("<!-- results:digits -->"), text.index("<!-- /results:digits -->")
    assert has_measured_numbers(text[start:end]), "fill the block from runs/demo/comparison.json"
