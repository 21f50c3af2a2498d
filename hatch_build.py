"""Compiles the one C file of the package if there is a compiler; without it the package is the same, and slower."""

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src/transferkit/adam_linear.c")
LIBRARY = SOURCE.with_name("adam_linear.so")
FLAGS = ["-O3", "-shared", "-fPIC", "-pthread"]


class CompileKernel(BuildHookInterface):
    """Puts the compiled kernel beside the modules, and says in the wheel's name which machines it is for."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        (root / LIBRARY).unlink(missing_ok=True)
        if not self._compile(root):
            self.app.display_warning(f"{SOURCE} was not compiled: training a head on the CPU will take longer.")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        if version != "editable":
            build_data["force_include"][str(LIBRARY)] = f"transferkit/{LIBRARY.name}"

    def _compile(self, root: Path) -> bool:
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if platform.system() != "Linux" or platform.machine() != "x86_64" or compiler is None:
            return False
        command = [compiler, *FLAGS, "-o", str(root / LIBRARY), str(root / SOURCE)]
        return subprocess.run(command, check=False).returncode == 0
