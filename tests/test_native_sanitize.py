"""AddressSanitizer and UndefinedBehaviorSanitizer watch the kernels while they compute on random shapes.

``./dev sanitize`` is the door. The library is compiled with both and the fuzz tests run on it, so every kernel runs on
every instruction set; a read or write one byte beside a tensor, or arithmetic that C++ does not define, ends the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.kernels.native import build

TESTS = Path(__file__).resolve().parent
EXAMPLES = 40
COMPILER = shutil.which("g++")
# Checks for null and for the size of what a pointer points to would double the time to compile, and find little in
# code that computes on arrays.
FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all"]


def runtime() -> str | None:
    """Where g++ has the library of AddressSanitizer, which must be in the process before all others."""
    if COMPILER is None:
        return None
    done = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True)
    return done.stdout.strip() if Path(done.stdout.strip()).is_absolute() else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(runtime() is None, reason="needs g++ with AddressSanitizer"),
]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with both sanitizers."""
    target = tmp_path_factory.mktemp("sanitized") / build.TARGET.name
    build.build(target, compiler=[str(COMPILER)], extra=FLAGS)
    return target


def run(library: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python in a process that is watched. What Python and torch never give back is their affair: no leaks."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "HALFBYTE_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]),
    }
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)


def test_no_kernel_reads_or_writes_beside_its_tensors(watched: Path) -> None:
    """All kernels run under both sanitizers on random shapes without a complaint."""
    done = run(watched, str(TESTS / "test_native_fuzz.py"), str(EXAMPLES), "-q", "-x", "--hypothesis-seed=4")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "comparisons" in done.stdout


def test_the_sanitizers_watch(watched: Path) -> None:
    """A kernel that is told of one number more than its tensor has is stopped: the run above would have seen it."""
    code = (
        "import torch\n"
        "from halfbyte.kernels.native import sums\n"
        "x, out = torch.randn(100), torch.empty(2)\n"
        "sums._value_range(x.data_ptr(), 0, 100, out.data_ptr())\n"
        "print('inside', flush=True)\n"
        "sums._value_range(x.data_ptr(), 0, 101, out.data_ptr())\n"
        "print('beside')\n"
    )
    done = run(watched, "-c", code)
    assert done.stdout == "inside\n"
    assert "heap-buffer-overflow" in done.stderr
    assert done.returncode != 0
