"""The build hook of the wheel: it compiles the native backend, or says in one line that the wheel goes without it.

The compiler is the one that ``CXX`` names, else the system's, else the clang inside the PyPI package ``ziglang``: an
installed one, or one that is downloaded for the build. It is no build requirement, for then an installation would fail
where it cannot be had. Where nothing compiles, the wheel is pure Python and the backend ``"native"`` is absent.
``HALFBYTE_NATIVE=0`` asks for that; with ``HALFBYTE_NATIVE=1`` the build fails instead.

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
CHOICES = {"": "built if it can be", "0": "left out", "1": "built, or the installation fails"}
"""What ``HALFBYTE_NATIVE`` may be, and what happens to the native backend."""


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

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds the library and adds it to the wheel.

        Args:
            version: ``"editable"`` for an editable install.
            build_data: what hatchling puts into the wheel; the library's place and the wheel's tag are added.

        Raises:
            ValueError: if ``HALFBYTE_NATIVE`` is none of `CHOICES`.
            RuntimeError: if it is 1 and the library cannot be built.
        """
        if self.target_name != "wheel":
            return  # a source archive holds sources
        choice = os.environ.get("HALFBYTE_NATIVE", "")
        if choice not in CHOICES:
            known = "; ".join(f"{value or 'unset'}: {what}" for value, what in CHOICES.items())
            raise ValueError(f"HALFBYTE_NATIVE is {choice!r}. Possible for the native backend: {known}.")
        if choice == "0":
            self.app.display_info("halfbyte: the native backend is left out, as HALFBYTE_NATIVE=0 asks")
            return
        builder = load_builder(Path(self.root))
        editable = version == "editable"
        self.folder = tempfile.mkdtemp()
        target = builder.TARGET if editable else Path(self.folder) / builder.TARGET.name
        try:
            label = builder.build(target, compiler=self.compiler(builder))
        except builder.BuildError as error:
            if choice == "1":
                shutil.rmtree(self.folder)
                raise RuntimeError(f"HALFBYTE_NATIVE=1 asks for the native backend, but {error}") from error
            self.app.display_warning(f"halfbyte: installed without the native backend: {error}")
            return
        self.app.display_info(f"halfbyte: built the native backend ({label})")
        if not editable:
            build_data["force_include"][str(target)] = f"halfbyte/kernels/native/{target.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag()}"

    def compiler(self, builder: ModuleType) -> list[str]:
        """The command of the compiler; ziglang is downloaded where there is none and it is made for the system."""
        found: list[str] | None = builder.find_compiler()
        if found is None and sys.platform in ("linux", "darwin"):
            found = builder.fetch_ziglang(Path(self.folder))
        return found or []

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes what was built on the way."""
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)
