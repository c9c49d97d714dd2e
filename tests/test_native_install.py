"""`pip` builds and installs the project where there is no compiler at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAIN = """
import torch
import halfbyte as hb
from halfbyte.kernels import native, resolve

torch.manual_seed(0)
model = hb.convert(torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))), recipe="ibm2020")
model(torch.randn(4, 8)).sum().backward()
print(hb.__file__, resolve("auto"), native.info().problem or native.info().build, sep="\\n")
"""

pytestmark = pytest.mark.slow


def install(folder: Path, **environment: str) -> tuple[str, Path, list[str]]:
    """Builds the wheel where no command is on the PATH, installs it, trains with it.

    Returns:
        What pip said; the wheel; where halfbyte was imported from, the backend, and the problem or the build.
    """
    pytest.importorskip("hatchling")
    empty = folder / "no-commands"
    empty.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "HALFBYTE_LIBRARY", "PYTHONPATH")}
    env = {**kept, "PATH": str(empty), **environment}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels, place = folder / "wheels", folder / "installed"
    words = [*pip, "wheel", "-v", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)]
    made = subprocess.run(words, capture_output=True, text=True, env=env, timeout=600)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = wheels.glob("*.whl")
    words = [*pip, "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run(words, check=True, capture_output=True, env=env, timeout=120)
    env["PYTHONPATH"] = str(place)
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith(str(place)), "the checkout was imported, not what was installed"
    return made.stdout + made.stderr, wheel, said[1:]


def test_with_no_compiler_at_all_the_reference_backend_is_installed(tmp_path: Path) -> None:
    """No compiler, no ziglang, no index: the installation succeeds, says so in one line, and trains by emulation."""
    out, wheel, (backend, problem) = install(tmp_path, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, HOME=str(tmp_path))
    if "built the native backend" in out:
        pytest.skip("ziglang is installed beside the tests, so there is a compiler")
    (line,) = [line for line in out.splitlines() if "native backend" in line]
    assert "installed without the native backend: no C++ compiler was found, and ziglang could not be" in line
    assert "pip install ziglang" in line
    assert wheel.name.endswith("-py3-none-any.whl")
    assert backend == "reference"
    assert "pip install ziglang" in problem


def test_without_a_system_compiler_ziglang_builds_the_native_backend(tmp_path: Path) -> None:
    """The compiler hidden, the build gets ziglang: the wheel holds the library, and training runs on it."""
    out, wheel, (backend, build) = install(tmp_path, CXXFLAGS="-O1")  # in half the time
    if "ziglang could not be" in out:
        pytest.skip("ziglang cannot be had on this machine")
    assert not wheel.name.endswith("-any.whl")
    assert backend == "native"
    assert build.startswith("ziglang")
