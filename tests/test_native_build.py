"""How the native library is built: which compiler is taken, what is said without one, and what the wheel then holds."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from halfbyte.kernels.native import build

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(SYSTEM is None, reason="this machine has no C++ compiler")


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No compiler and no ziglang can be found; a folder for commands, the only one on the PATH."""
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "PathFinder", SimpleNamespace(find_spec=lambda name, path: None))
    return commands


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Sources of the right names that compile at once."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "kernels.cpp").write_text("// one object for each instruction set\n")
    (folder / "dispatch.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) const char* hb_build(void) { return HB_BUILD; }\n'
    )
    return folder


def command(folder: Path, name: str, text: str) -> Path:
    """An executable script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def label_of(target: Path) -> str:
    """What a library says of its build."""
    library = ctypes.CDLL(str(target))
    library.hb_build.restype = ctypes.c_char_p
    return str(library.hb_build().decode())


def test_the_systems_compiler_comes_first(hidden: Path) -> None:
    """c++ is taken before g++, g++ before clang++."""
    for name in ("clang++", "g++", "c++"):
        command(hidden, name, "exit 0")
        assert build.find_compiler() == [name]


def test_cxx_comes_before_all(hidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CXX is taken with its arguments; one that does not exist is an error, not passed over."""
    command(hidden, "c++", "exit 0")
    command(hidden, "mine", "exit 0")
    monkeypatch.setenv("CXX", "mine --flag")
    assert build.find_compiler() == ["mine", "--flag"]
    monkeypatch.setenv("CXX", "gone")
    with pytest.raises(build.BuildError, match="CXX names 'gone', which is not found"):
        build.find_compiler()


def test_ziglang_comes_last(hidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler on the PATH the one in the package ziglang is taken, where that is installed."""
    assert build.find_compiler() is None
    package = hidden / "ziglang"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(build, "PathFinder", PathFinder)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(hidden))
    assert build.find_compiler() == [str(package / "zig"), "c++"]


def test_ziglang_that_cannot_be_had_is_one_line(hidden: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without an index pip finds no ziglang: the error names the cure, and a slow index is given up in time."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for timeout in (60.0, 0.001):
        with pytest.raises(build.BuildError, match="could not be downloaded: install a C\\+\\+ compiler") as caught:
            build.fetch_ziglang(tmp_path / "zig", timeout=timeout)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("hidden")
def test_without_a_compiler_the_cure_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 1 and one line that says what to install."""
    assert build.main([str(tmp_path / "lib.so")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("halfbyte: no native backend: no C++ compiler was found: install a C++ compiler")
    assert "pip install ziglang" in said


@needs_compiler
def test_cxxflags_reach_the_compiler(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag of one's own is handed over: one that no compiler knows fails the build."""
    monkeypatch.setenv("CXXFLAGS", "-O1 -fno-such-flag")
    with pytest.raises(build.BuildError, match="no-such-flag"):
        build.build(tmp_path / "lib.so", compiler=[str(SYSTEM)], sources=sources)


@needs_compiler
def test_a_built_library_says_what_it_is(sources: Path, tmp_path: Path) -> None:
    """The library names its compiler, instruction sets and sources, and nothing else is left over."""
    target = tmp_path / "out" / "lib.so"
    target.parent.mkdir()
    assert not build.is_current(target, sources)
    label = build.build(target, compiler=[str(SYSTEM)], sources=sources)
    assert label_of(target) == label
    assert label.endswith(f"portable, sources {build.fingerprint(sources)}")
    assert build.is_current(target, sources)
    assert [path.name for path in target.parent.iterdir()] == ["lib.so"]


def test_the_fingerprint_changes_with_the_sources(sources: Path) -> None:
    """Any change of a source, and any new one, makes a library of before stale."""
    seen = {build.fingerprint(sources)}
    (sources / "kernels.cpp").write_text("// changed\n")
    seen.add(build.fingerprint(sources))
    (sources / "more.h").write_text("")
    seen.add(build.fingerprint(sources))
    assert len(seen) == 3


@needs_compiler
def test_ziglangs_clang_is_told_not_to_tune(hidden: Path, sources: Path, tmp_path: Path) -> None:
    """ziglang would compile for this very processor: it is told a plain target, and the library loads."""
    # In the place of the real one: writes down how it was called and lets the system's compiler do the work.
    script, log, target = tmp_path / "stand_in.py", tmp_path / "log", tmp_path / "lib.so"
    script.write_text(
        "import subprocess, sys\n"
        f"open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n"
        "rest = [a for a in sys.argv[2:] if not a.startswith(('-mcpu', '-target')) and '-linux-' not in a]\n"
        f"sys.exit(subprocess.run([{SYSTEM!r}, *rest], env={{'PATH': '/usr/bin:/bin'}}).returncode)\n"
    )
    wrapper = command(hidden, "zig", f'exec {sys.executable} {script} "$@"')
    label = build.build(target, compiler=[str(wrapper), "c++"], sources=sources)
    assert label_of(target) == label
    calls = log.read_text().splitlines()
    assert all(call.startswith("c++ ") for call in calls)
    assert all("-target" in call or "-mcpu=baseline" in call for call in calls)


@needs_compiler
def test_a_compilers_error_is_one_line(sources: Path, tmp_path: Path) -> None:
    """Where compiling fails the error names the command and the first complaint, and no half-made library stays."""
    (sources / "dispatch.cpp").write_text("int f( { }\n")
    target = tmp_path / "lib.so"
    with pytest.raises(build.BuildError, match=r"failed: .*dispatch\.cpp:1:.*error") as caught:
        build.build(target, compiler=[str(SYSTEM)], sources=sources)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_a_place_that_cannot_be_written_is_an_error(sources: Path, tmp_path: Path) -> None:
    """A missing folder is named, without a traceback of the compiler's."""
    with pytest.raises(build.BuildError, match="cannot be written"):
        build.build(tmp_path / "nowhere" / "lib.so", compiler=["c++"], sources=sources)


@needs_compiler
@pytest.mark.slow
def test_the_kernels_compile_without_a_warning(tmp_path: Path) -> None:
    """All instruction sets compile under -Wall -Wextra, less optimized: more warnings come up, and sooner."""
    build.build(tmp_path / "lib.so", compiler=[str(SYSTEM)], extra=["-Werror", "-O1"])


# ---- the hook of the wheel -------------------------------------------------------------------------------------------


class App:
    """hatchling's voice, kept."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.display_info = self.display_warning = self.said.append


def load_hook() -> ModuleType:
    """hatch_build.py, which only hatchling imports."""
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hook_for(module: ModuleType, target: str = "wheel") -> tuple[object, App]:
    """A hook as hatchling makes it, and what it says."""
    app = App()
    return module.NativeHook(str(ROOT), {}, None, None, "", target, app), app


def without_ziglang(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook's download of ziglang fails at once."""

    def fail(folder: Path) -> list[str]:
        raise build.BuildError(f"no C++ compiler was found, and ziglang could not be downloaded: {build.HOW_TO_GET}")

    monkeypatch.setattr(build, "fetch_ziglang", fail)
    monkeypatch.setattr(module, "load_builder", lambda root: build)


@pytest.mark.usefixtures("hidden")
def test_the_hook_without_a_compiler_leaves_the_wheel_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing compiles the wheel stays as it is and one line says so and what to do."""
    module = load_hook()
    without_ziglang(module, monkeypatch)
    hook, app = hook_for(module)
    data: dict[str, object] = {"force_include": {}}
    hook.initialize("standard", data)
    hook.finalize("standard", data, "")
    assert data == {"force_include": {}}
    (line,) = app.said
    assert line.startswith("halfbyte: installed without the native backend: no C++ compiler was found")
    assert line.endswith(build.HOW_TO_GET)


@pytest.mark.usefixtures("hidden")
def test_the_hook_can_be_told_that_it_must_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """HALFBYTE_NATIVE=1 makes a failure of what would else be a pure wheel; any other word is refused."""
    module = load_hook()
    without_ziglang(module, monkeypatch)
    hook, _ = hook_for(module)
    monkeypatch.setenv("HALFBYTE_NATIVE", "1")
    with pytest.raises(RuntimeError, match="HALFBYTE_NATIVE=1 asks for the native backend, but no C\\+\\+ compiler"):
        hook.initialize("standard", {"force_include": {}})
    monkeypatch.setenv("HALFBYTE_NATIVE", "yes")
    with pytest.raises(ValueError, match=r"HALFBYTE_NATIVE is 'yes'\. Possible .* 0: left out; 1: built, or"):
        hook.initialize("standard", {"force_include": {}})


def test_the_hook_asks_for_nothing_beforehand() -> None:
    """No build requirement but hatchling's own: one that cannot be downloaded would fail the whole installation."""
    hook, _ = hook_for(load_hook())
    assert hook.dependencies() == []


def test_the_hook_adds_the_library_and_the_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel with the library is for one platform and any Python 3, and the library lies beside its module."""
    module = load_hook()
    hook, app = hook_for(module)
    builder = SimpleNamespace(
        TARGET=Path("libhalfbyte.so"),
        BuildError=RuntimeError,
        find_compiler=lambda: ["gcc"],
        build=lambda target, compiler: target.write_text("x") and f"by {compiler[0]}",
    )
    monkeypatch.setattr(module, "load_builder", lambda root: builder)
    data: dict[str, object] = {"force_include": {}, "pure_python": True}
    hook.initialize("standard", data)
    ((built, place),) = data["force_include"].items()
    assert Path(built).is_file()
    assert place == "halfbyte/kernels/native/libhalfbyte.so"
    assert data["pure_python"] is False
    assert re.fullmatch(r"py3-none-(linux|macosx_\d+_\d+)_[a-z0-9_]+", data["tag"])
    assert app.said == ["halfbyte: built the native backend (by gcc)"]
    hook.finalize("standard", data, "")
    assert not Path(built).exists()


def test_the_hook_builds_in_place_for_an_editable_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An editable install gets the library beside its sources and no platform's tag."""
    module = load_hook()
    hook, _ = hook_for(module)
    target = tmp_path / "libhalfbyte.so"
    builder = SimpleNamespace(
        TARGET=target,
        BuildError=RuntimeError,
        find_compiler=lambda: ["gcc"],
        build=lambda path, compiler: path.write_text("x") and "",
    )
    monkeypatch.setattr(module, "load_builder", lambda root: builder)
    data: dict[str, object] = {"force_include": {}}
    hook.initialize("editable", data)
    hook.finalize("editable", data, "")
    assert data == {"force_include": {}}
    assert target.is_file()


def test_the_hook_can_be_told_not_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """HALFBYTE_NATIVE=0 gives the pure wheel and says so; a source archive says nothing."""
    module = load_hook()
    monkeypatch.setenv("HALFBYTE_NATIVE", "0")
    hook, app = hook_for(module)
    hook.initialize("standard", {})
    hook_for(module, "sdist")[0].initialize("standard", {})
    assert app.said == ["halfbyte: the native backend is left out, as HALFBYTE_NATIVE=0 asks"]


def test_the_build_module_needs_nothing_installed() -> None:
    """build.py runs by its path without site packages: where a wheel is built neither torch nor halfbyte is there."""
    code = f"import runpy; runpy.run_path({str(build.__file__)!r})"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built before the sources changed is as good as none, and the text says how to build it again."""
    from halfbyte.kernels.native import library

    if not library.available():
        pytest.skip("no compiled library")
    monkeypatch.setattr(library, "fingerprint", lambda: "0" * 12)
    found = library._load.__wrapped__()
    assert isinstance(found, str)
    assert "was built from other sources" in found
    assert "python -m halfbyte.kernels.native.build" in found
