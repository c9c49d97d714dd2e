"""The documents keep their word: code blocks run, commands exist, links lead somewhere, numbers name their command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.nn import TWINS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)", flags=re.MULTILINE)
COMMAND = re.compile(r"`((?:\./dev|halfbyte) [^`]+)`")


def blocks(text: str, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of one language, each with the number of its first line."""
    for match in FENCE.finditer(text):
        if match[1] == language:
            yield text.count("\n", 0, match.start(2)) + 1, match[2]


def name_of(page: Path) -> str:
    """The page's path as a reader knows it."""
    return str(page.relative_to(ROOT))


def pages_with(language: str) -> list[Path]:
    """The pages that hold a block of this language."""
    return [page for page in PAGES if any(blocks(page.read_text(), language))]


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who runs a page's Python blocks from top to bottom sees no error and no warning."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    known = dict(TWINS)
    try:
        for line, block in blocks(page.read_text(), "python"):
            # The empty lines in front make a traceback name the line of the page.
            exec(compile("\n" * (line - 1) + block, page, "exec"), namespace)
    finally:
        # A page may make a layer of its own convertible; the other tests must not see it.
        TWINS.clear()
        TWINS.update(known)


def shell_lines(page: Path) -> list[list[str]]:
    """The words of each command in a page's bash blocks; comments dropped, continued lines joined."""
    text = "\n".join(block.replace("\\\n", " ") for _, block in blocks(page.read_text(), "bash"))
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


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


@pytest.mark.parametrize("page", pages_with("bash"), ids=name_of)
def test_commands_exist(page: Path) -> None:
    """Every `halfbyte` and `./dev` command in a bash block names a command and options that exist."""
    known = set(re.findall(r"^  ([a-z]+)\)", (ROOT / "dev").read_text(), flags=re.MULTILINE))
    for words in shell_lines(page):
        if words[0] == "./dev":
            assert words[1] in known, f"{name_of(page)}: there is no {' '.join(words)}"
        if words[0] == "halfbyte":
            assert not misused_options(words), f"{name_of(page)}: {shlex.join(words)}: no {misused_options(words)}"


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
