"""The shape of the package: floors, imports, sizes, names, and what a tracked file may say."""

from __future__ import annotations

import ast
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "halfbyte"

# Where each part of the package lives. A key is a module or a folder below halfbyte; the longest key that fits decides.
# `errors` and `files` are the ground under all floors: even floor 0 raises, and writes.
FLOORS = {
    "errors": -1,
    "distributed": 0,
    "files": -1,
    "own": 0,
    "formats": 0,
    "rng": 0,
    "lab": 0,
    "lab.checkpoint": 0,
    "lab.data": 0,
    "lab.guard": 0,
    "lab.history": 9,
    "lab.models": 0,
    "lab.record": 0,
    "oracle": 1,
    "qtensor": 1,
    "kernels": 2,
    "quantizers": 3,
    "stash": 3,
    "recipes": 4,
    "ops": 5,
    "nn": 6,
    "convert": 7,
    "watching": 7,
    "probes": 8,
    "hardware": 9,
    "hardware.constants": 1,
    "hardware.cycles": 1,
    "hardware.units": 1,
    "hardware.workload": 1,
    "hardware.machine": 2,
    "hardware.rtl": 2,
    "hardware.presets": 3,
    "hardware.mapping": 3,
    "hardware.synthesis": 4,
    "hardware.model": 4,
    "hardware.density": 4,
    "hardware.waterfall": 5,
    "hardware.tracing": 8,
    "hardware.networks": 8,
    "hardware.command": 9,
    "lab.tasks": 7,
    "lab.callbacks": 9,
    "lab.compare": 9,
    "lab.console": 9,
    "lab.jobs": 9,
    "lab.loop": 9,
    "lab.phases": 9,
    "lab.position": 0,
    "lab.ranks": 9,
    "lab.run": 9,
    "lab.trainer": 9,
    "auditing": 8,
    "bench": 8,
    "": 10,
    "__main__": 10,
    "cli": 10,
    "explain": 10,
    "export": 10,
    "listing": 10,
    "picture": 10,
    "report": 10,
}
TORCH_FREE = (
    "errors",
    "files",
    "formats",
    "oracle",
    "hardware.constants",
    "hardware.cycles",
    "hardware.density",
    "hardware.machine",
    "hardware.mapping",
    "hardware.model",
    "hardware.presets",
    "hardware.units",
    "hardware.waterfall",
    "hardware.workload",
)
MAX_LINES = 400
MAX_PUBLIC_NAMES = 35

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """The dotted name below halfbyte: kernels/__init__.py is "kernels", halfbyte/__init__.py is ""."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def part_of(module: str) -> str | None:
    """The key of FLOORS that a module belongs to. The root and a bare `lab` hold their own file only."""
    if module in FLOORS:
        return module
    keys = [key for key in FLOORS if key not in ("", "lab") and module.startswith(f"{key}.")]
    return max(keys, key=len, default=None)


def imports(name: str, source: str, is_package: bool, modules: set[str]) -> Iterator[str]:
    """The modules of ours that a source file names in an import, wherever in the file it stands."""
    here = name.split(".") if name else []

    def resolve(base: str, names: list[str]) -> Iterator[str]:
        """`from base import names`: each name is a submodule if there is one, else something in `base`."""
        for item in names:
            child = f"{base}.{item}" if base else item
            yield child if child in modules else base

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
            yield from (n.removeprefix("halfbyte").removeprefix(".") for n in dotted if n.split(".")[0] == "halfbyte")
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                up = node.level - 1 if is_package else node.level
                base = [*here[: len(here) - up], *(node.module or "").split(".")]
                yield from resolve(".".join(filter(None, base)), names)
            elif node.module and node.module.split(".")[0] == "halfbyte":
                yield from resolve(node.module.removeprefix("halfbyte").removeprefix("."), names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(target, str) and target.startswith("halfbyte"):
                yield target.removeprefix("halfbyte").removeprefix(".")


def import_graph() -> dict[str, set[str]]:
    """For each module the modules of ours that it imports. The root's implicit execution is not an import."""
    known = set(MODULES)
    return {
        name: set(imports(name, path.read_text(), path.name == "__init__.py", known)) - {name}
        for name, path in MODULES.items()
    }


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """One import cycle, first module repeated at the end; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if found := visit(target, [*trail, name]):
                return found
        done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in sorted(graph))), [])


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that sees this checkout's package."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


def test_every_module_has_a_floor() -> None:
    """Every module of the package stands in the table of floors, and the package has not vanished."""
    homeless = [name for name in MODULES if part_of(name) is None]
    assert not homeless, f"{homeless} have no floor: add them to FLOORS in {Path(__file__).name}, as low as they can go"
    assert {"", *TORCH_FREE} <= set(MODULES)


def may_import(module: str, target: str) -> bool:
    """Whether the floors let a module import a target.

    Downwards always; sideways within one part, or on one floor of one folder. The package's root is no such folder,
    except on floor 10: the entry points call each other (`python -m halfbyte` is the CLI, which shows the version).
    """
    home, there = part_of(module), part_of(target)
    if home is None or there is None:
        return False
    if FLOORS[there] != FLOORS[home]:
        return FLOORS[there] < FLOORS[home]
    same_folder = home.rpartition(".")[0] == there.rpartition(".")[0] != ""
    return home == there or same_folder or FLOORS[home] == FLOORS[""]


@pytest.mark.parametrize("name", sorted(MODULES), ids=lambda n: n or "__init__")
def test_imports_go_down(name: str) -> None:
    """A module imports only from lower floors or from its own part of the package, lazy imports included."""
    wrong = {t: FLOORS.get(part_of(t) or "?") for t in import_graph()[name] if not may_import(name, t)}
    floor = FLOORS.get(part_of(name) or "?")
    assert not wrong, f"halfbyte.{name} is on floor {floor} and imports upwards or sideways: {wrong}"


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("formats", "errors", True),
        ("qtensor", "formats", True),
        ("kernels.reference.encode", "kernels.geometry", True),
        ("lab.trainer", "lab.run", True),
        ("cli", "", True),
        ("oracle", "qtensor", False),
        ("formats", "lab.data", False),
        ("kernels.reference", "recipes", False),
        ("lab.tasks", "lab.trainer", False),
        ("nn", "", False),
        ("no_such_module", "errors", False),
    ],
)
def test_floors(module: str, target: str, allowed: bool) -> None:
    """Down is allowed, up and sideways are not, and a folder's own floor is its own affair."""
    assert may_import(module, target) is allowed


def test_no_import_cycle() -> None:
    """No chain of imports, lazy ones included, comes back to where it began."""
    cycle = find_cycle(import_graph())
    assert not cycle, " -> ".join(name or "halfbyte" for name in cycle)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .reference import gemm", {"kernels.reference"}),
        ("from . import reference", {"kernels.reference"}),
        ("from ..formats import Format", {"formats"}),
        ("from .. import formats", {"formats"}),
        ("from .. import __version__", {""}),
        ("import halfbyte.cli", {"cli"}),
        ("from halfbyte import nn, convert", {"nn", ""}),
        ("def late():\n    from halfbyte.cli import main", {"cli"}),
        ("importlib.import_module('halfbyte.lab')", {"lab"}),
        ("import torch\nfrom os import path\nimport halfbytes", set()),
    ],
)
def test_import_reader(source: str, expected: set[str]) -> None:
    """The reader of imports, on which the tests above rest, resolves every way of writing one."""
    known = {"", "cli", "formats", "kernels", "kernels.reference", "lab", "nn"}
    assert set(imports("kernels", source, True, known)) == expected
    if source.startswith("from ."):
        deeper = source.replace("from .", "from ..", 1)
        assert set(imports("kernels.reference", deeper, True, known)) == expected


@pytest.mark.parametrize("name", TORCH_FREE)
def test_torch_free(name: str) -> None:
    """The formats, the errors and the exact oracle run where torch is not installed."""
    result = run_python(
        "import importlib, sys, types\n"
        "sys.modules['torch'] = None\n"  # what `import torch` then raises is an ImportError
        "stub = types.ModuleType('halfbyte')\n"
        f"stub.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['halfbyte'] = stub\n"
        f"importlib.import_module('halfbyte.{name}')\n"
    )
    assert result.returncode == 0, result.stderr


def test_lean_import() -> None:
    """`import halfbyte` brings torch and nothing of the lab, and starts no device."""
    result = run_python(
        "import sys, halfbyte, torch\n"
        "heavy = {'lightning', 'lightning_fabric', 'tensorboard', 'transformers', 'triton'}\n"
        "heavy |= {'typer', 'click', 'rich', 'sklearn', 'scipy', 'PIL'}\n"
        "loaded = sorted(m for m in sys.modules if m.split('.')[0] in heavy or m.startswith('halfbyte.lab'))\n"
        "sys.exit(f'loaded: {loaded}' if loaded or torch.cuda.is_initialized() else 0)\n"
    )
    assert result.returncode == 0, result.stderr


def is_public(name: str) -> bool:
    """Whether a name is meant for everybody."""
    return not name.startswith("_")


def decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The last names of a function's decorators: `functools.wraps(f)` is "wraps", `x.setter` is "setter"."""
    plain = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "") for d in plain}


def untyped(node: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> list[str]:
    """The arguments without a type, and "return" if that has none."""
    spec = node.args
    named = [*spec.posonlyargs, *spec.args]
    if is_method and "staticmethod" not in decorators(node):
        named = named[1:]
    every = [*named, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    missing = [argument.arg for argument in every if argument.annotation is None]
    return missing if node.returns is not None else [*missing, "return"]


def inherits_docstring(owner: str, name: str) -> bool:
    """Whether a base class documents a method: ours always counts, torch's only where it is not `forward`."""
    for base in pkgutil.resolve_name(owner).__mro__[1:]:
        if getattr(base.__dict__.get(name), "__doc__", None):
            return base.__module__.split(".")[0] == "halfbyte" or name != "forward"
    return False


def complaints(body: list[ast.stmt], owner: str, in_class: bool = False) -> Iterator[str]:
    """What is missing from the public functions and classes of a module or class body."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from complaints([*node.body, *node.orelse], owner, in_class)
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            if not ast.get_docstring(node):
                yield f"{owner}.{node.name} has no docstring"
            yield from complaints(node.body, f"{owner}.{node.name}", in_class=True)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            constructor = in_class and node.name in ("__init__", "__new__", "__call__")
            if not (is_public(node.name) or constructor):
                continue
            if missing := untyped(node, in_class):
                yield f"{owner}.{node.name} has no type for {', '.join(missing)}"
            if constructor or ast.get_docstring(node) or decorators(node) & {"overload", "setter"}:
                continue
            if not (in_class and inherits_docstring(owner, node.name)):
                yield f"{owner}.{node.name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_names_are_typed_and_documented(path: Path) -> None:
    """Every public module, class, function and method has complete types and a docstring, its own or a base class's."""
    tree = ast.parse(path.read_text())
    name = f"halfbyte.{module_name(path)}".rstrip(".")
    missing = [] if ast.get_docstring(tree) else [f"{name} has no docstring"]
    if all(is_public(part) for part in name.split(".") if part != "__main__"):
        missing += complaints(tree.body, name)
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_small(path: Path) -> None:
    """A source file has fewer than 400 lines: past that, split it along a seam that a newcomer would guess."""
    assert len(path.read_text().splitlines()) < MAX_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda p: p.stem)
def test_tests_state_their_claim(path: Path) -> None:
    """Each test has a docstring: the claim that it makes."""
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    silent = [f.name for f in functions if f.name.startswith("test_") and not ast.get_docstring(f)]
    assert not silent, f"{path.name}: no docstring in {', '.join(silent)}"


def tracked_files() -> list[Path]:
    """What is in the repository or about to be: tracked and new files that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode == 0:
        names = listed.stdout.decode().split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    # Not a checkout but an unpacked archive: everything in it is tracked.
    made_here = {".venv", "runs", "site", "__pycache__", ".hypothesis"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not made_here & set(p.relative_to(ROOT).parts)]


# An absolute path into somebody's machine: not part of an address or of a relative path.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:root|home|work|opt|mnt|Users)/\w")
# Hosts that packages come from. Their names are in two pieces so that this file does not hold them.
REGISTRY_HOST = re.compile("|".join(re.escape(a + b) for a, b in (
    ("pypi.", "org"), ("pythonhosted.", "org"), ("download.pytorch.", "org"), ("anaconda.", "org"),
    ("registry.npmjs.", "org"), ("pypi.", "nvidia.com"),
)))  # fmt: skip


def test_no_machine_paths() -> None:
    """No file of the repository names a path of one machine or a host that packages come from."""
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        for number, line in enumerate(text.splitlines(), 1):
            if match := MACHINE_PATH.search(line) or REGISTRY_HOST.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n".join(found)


def test_path_patterns_find_paths() -> None:
    """The patterns of the test above find what they should and leave addresses and relative paths alone."""
    for folder in ("root", "home", "work"):
        assert MACHINE_PATH.search(f"see /{folder}/x for more")
    assert REGISTRY_HOST.search("https://pypi." + "org/simple")
    for harmless in ("src/" + "work/x", "https://example.com/home/x", "../" + "root/x", "~/opt/x"):
        assert not MACHINE_PATH.search(harmless)


def test_public_face_is_small_and_in_the_reference() -> None:
    """`halfbyte.__all__` holds at most 25 names that exist, and the reference documents each of them."""
    import halfbyte

    names = [name for name in halfbyte.__all__ if is_public(name)]
    assert len(names) <= MAX_PUBLIC_NAMES, f"{len(names)} public names: which of them could a stranger do without?"
    assert all(hasattr(halfbyte, name) for name in halfbyte.__all__)
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: halfbyte\.([\w.]+)", pages, flags=re.MULTILINE))
    missing = [name for name in names if name not in documented]
    assert not missing, f"add to a page of docs/reference: {', '.join('::: halfbyte.' + name for name in missing)}"
