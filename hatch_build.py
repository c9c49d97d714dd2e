"""The build hook of the wheel: it compiles the native backend, or says in one line that the wheel goes without it.

The compiler is the one that ``CXX`` names, else the system's, else the clang inside the PyPI package ``ziglang``, which
is asked for where there is no other. Where nothing compiles, the wheel is pure Python and the backend ``"native"`` is
absent. ``HALFBYTE_NATIVE=0`` asks for that.

An editable install gets the library beside its sources, where ``python -m halfbyte.kernels.native.build`` puts it too.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src") / "halfbyte" / "kernels" / "native"


def load_builder(root: Path) -> ModuleType:
    """The module halfbyte.kernels.native.build, from its file: neither halfbyte nor torch is installed here."""
    spec = importlib.util.spec_from_file_location("halfbyte_native_build", root / NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def platform_tag() -> str:
    """The wheel's platform: ``linux_x86_64``, ``macosx_11_0_arm64``. One machine only, as one is compiled for."""
    name = sysconfig.get_platform().replace("universal2", platform.machine())
    return name.replace("-", "_").replace(".", "_")


class NativeHook(BuildHookInterface):
    """Compiles the library before the wheel is put together."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """What the build needs besides: ziglang where there is no compiler and it is made for the system."""
        possible = sys.platform in ("linux", "darwin") and platform.machine() in ("x86_64", "aarch64", "arm64")
        if not (possible and self.wanted):
            return []
        builder = load_builder(Path(self.root))
        try:
            return [] if builder.find_compiler() else ["ziglang"]
        except builder.BuildError:
            return []  # `initialize` says what is wrong

    @property
    def wanted(self) -> bool:
        """Whether a library is to be built at all."""
        return self.target_name == "wheel" and os.environ.get("HALFBYTE_NATIVE") != "0"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds the library and adds it to the wheel.

        Args:
            version: ``"editable"`` for an editable install.
            build_data: what hatchling puts into the wheel; the library's place and the wheel's tag are added.
        """
        if not self.wanted:
            self.app.display_info("halfbyte: the native backend is left out, as HALFBYTE_NATIVE=0 asks")
            return
        builder = load_builder(Path(self.root))
        editable = version == "editable"
        self.folder = tempfile.mkdtemp()
        target = builder.TARGET if editable else Path(self.folder) / builder.TARGET.name
        try:
            label = builder.build(target)
        except builder.BuildError as error:
            self.app.display_warning(f"halfbyte: installed without the native backend: {error}")
            return
        self.app.display_info(f"halfbyte: built the native backend ({label})")
        if not editable:
            build_data["force_include"][str(target)] = f"halfbyte/kernels/native/{target.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes what was built on the way."""
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)
