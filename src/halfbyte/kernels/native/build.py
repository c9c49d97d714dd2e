"""Compiles the native backend: ``python -m halfbyte.kernels.native.build`` builds it in place.

The build hook of the package (hatch_build.py) loads this file by its path, where neither torch nor halfbyte is
installed, so it needs nothing but the standard library.

One command compiles each object (one for each instruction set, and the dispatcher), one links them. The compiler is
the one that ``CXX`` names, else the system's, else the clang inside the PyPI package ``ziglang``, which `fetch_ziglang`
can download.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path

__all__ = [
    "SOURCES",
    "TARGET",
    "BuildError",
    "build",
    "fetch_ziglang",
    "find_compiler",
    "fingerprint",
    "is_current",
    "main",
]

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
TARGET = Path(__file__).resolve().parent / ("libhalfbyte.dylib" if sys.platform == "darwin" else "libhalfbyte.so")

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-ffp-contract=off",  # a fused multiply-add rounds once where the reference rounds twice
    "-Wall",
    "-Wextra",
]
"""What every object is compiled with."""

_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]

ISA_FLAGS: dict[str, list[str]] = {"avx512": [*_AVX2, *_AVX512], "avx2": _AVX2, "portable": []}
"""What each instruction set adds, the best first. Arm has the portable one only."""

HOW_TO_GET = (
    "install a C++ compiler (g++ or clang++) or `pip install ziglang`, then `python -m halfbyte.kernels.native.build`"
)
"""The cure, for every message that says that there is no native backend."""


class BuildError(RuntimeError):
    """The library could not be built; the text is one line that says why."""


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: ``CXX``, else the system's, else ziglang's clang; None if there is none.

    Raises:
        BuildError: if ``CXX`` names a command that does not exist.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if not shutil.which(named[0]):
            raise BuildError(f"CXX names {named[0]!r}, which is not found; correct or unset it")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    # The second place is for builds that pip isolates: they do not see what is installed for the same interpreter.
    found = PathFinder.find_spec("ziglang", [*sys.path, sysconfig.get_path("platlib")])
    return None if found is None or found.origin is None else _ziglang(Path(found.origin).parent)


def fetch_ziglang(folder: Path, *, timeout: float = 300) -> list[str]:
    """Downloads the package ``ziglang`` (100 MB) by pip, or by uv where that is what installs.

    Args:
        folder: where it goes; nothing else of the machine changes.
        timeout: seconds after which it gives up.

    Returns:
        The command of its C++ compiler.

    Raises:
        BuildError: if it cannot be had.
    """
    # An isolated build hides pip behind a path of its own.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = ["install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(folder), "ziglang"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "10"]
    commands = [pip, *([path, "pip"] for path in (shutil.which("uv"),) if path)]
    for command in commands:
        try:
            done = subprocess.run(
                [*command, *options], check=False, capture_output=True, text=True, env=environment, timeout=timeout
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and (folder / "ziglang").is_dir():
            return _ziglang(folder / "ziglang")
    raise BuildError(f"no C++ compiler was found, and ziglang could not be downloaded: {HOW_TO_GET}")


def _ziglang(package: Path) -> list[str]:
    return [str(package / "zig"), "c++"]


def _is_ziglang(command: Sequence[str]) -> bool:
    return Path(command[0]).name == "zig"


def _target_flags(command: Sequence[str]) -> list[str]:
    """What ziglang needs to hear: by itself it compiles for this very processor and this very C library."""
    if not _is_ziglang(command):
        return []
    flags = ["-fno-sanitize=undefined"]
    if sys.platform != "linux":
        return [*flags, "-mcpu=baseline"]
    libc = "gnu.2.17" if platform.libc_ver()[0] == "glibc" else "musl"
    return [*flags, "-target", f"{platform.machine()}-linux-{libc}"]


def fingerprint(sources: Path = SOURCES) -> str:
    """Twelve hexadecimal digits that change with any byte of the sources or of this file's flags."""
    digest = hashlib.sha256(repr((FLAGS, ISA_FLAGS)).encode())
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def is_current(target: Path = TARGET, sources: Path = SOURCES) -> bool:
    """Whether a library was built from the sources as they are now."""
    return target.is_file() and fingerprint(sources).encode() in target.read_bytes()


def build(
    target: Path = TARGET,
    *,
    compiler: Sequence[str] | None = None,
    sources: Path = SOURCES,
    extra: Sequence[str] = (),
) -> str:
    """Compiles the library.

    Args:
        target: where it goes; replaced in one step, so that a process that has the old one keeps it.
        compiler: the compiler's command; `find_compiler` looks for one if None. It gets the flags in ``CXXFLAGS``, too.
        sources: the folder of the C++ files.
        extra: more flags for every command, for example ``-fsanitize=address,undefined``.

    Returns:
        One line that names the compiler and the instruction sets.

    Raises:
        BuildError: if there is no compiler, or it fails.
    """
    if sys.platform == "win32":
        raise BuildError("there is no native backend for Windows")
    command = list(compiler) if compiler else find_compiler()
    if not command:
        raise BuildError(f"no C++ compiler was found: {HOW_TO_GET}")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = list(ISA_FLAGS) if x86 else ["portable"]
    name = "ziglang" if _is_ziglang(command) else shlex.join([Path(command[0]).name, *command[1:]])
    label = f"{name}, {platform.machine()}, {'+'.join(isas)}, sources {fingerprint(sources)}"
    command += _target_flags(command)
    units = [(isa, "kernels.cpp", ISA_FLAGS[isa]) for isa in isas]
    own = shlex.split(os.environ.get("CXXFLAGS", ""))
    units.append(("dispatch", "dispatch.cpp", [f'-DHB_BUILD="{label}"', *(["-DHB_WITH_X86"] if x86 else [])]))
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            work = Path(folder)
            jobs = [
                [*command, *FLAGS, *flags, *own, *extra, "-c", str(sources / source), "-o", str(work / f"{unit}.o")]
                for unit, source, flags in units
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, jobs))
            _run([*command, "-shared", *extra, *(job[-1] for job in jobs), "-o", str(work / target.name)])
            (work / target.name).replace(target)
    except OSError as error:
        raise BuildError(f"{target} cannot be written or the compiler cannot be started ({error})") from error
    return label


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.splitlines() or ["it said nothing"]
        first = next((line for line in said if "error" in line), said[0])
        raise BuildError(f"`{shlex.join(command)}` failed: {first}")
    if done.stderr:
        sys.stderr.write(done.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: builds in place, or where its one argument says, and tells what it made."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    target = Path(given[0]) if given else TARGET
    try:
        label = build(target)
    except BuildError as error:
        sys.stderr.write(f"halfbyte: no native backend: {error}\n")
        return 1
    sys.stdout.write(f"halfbyte: built {target} ({label})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
