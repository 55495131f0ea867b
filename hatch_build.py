"""Compiles the programs of sandboxes into a wheel, where there is a C compiler; otherwise the wheel is without them."""

import importlib.util
import platform
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = "src/hone/sandbox/native/build.py"


class ProgramsHook(BuildHookInterface[Any]):
    """A wheel with programs is of this machine's kind; one without is of any, and compiles them at first use."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or sys.platform != "linux":
            return
        self._folder = tempfile.TemporaryDirectory()
        build = _load(Path(self.root) / BUILD)
        try:
            folder = build.compile_for_wheel(Path(self._folder.name))
        except build.BuildError as error:
            self.app.display_warning(f"without the programs of sandboxes, which are compiled at first use: {error}")
            return
        for path in folder.iterdir():
            build_data["force_include"][str(path)] = f"hone/sandbox/native/{build.PREBUILT}/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def _load(path: Path) -> ModuleType:
    """It needs nothing but the standard library; the package around it would."""
    specification = importlib.util.spec_from_file_location("hone_native_build", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module
