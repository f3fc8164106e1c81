"""Puts the compiled kernels into a wheel, where a C compiler for Linux is there.

CC names the compiler; a cross compiler makes the wheel of its machine. An editable install has none
of them and needs none: there, kernels are compiled on first use, as where a wheel has none.
"""

import os
import re
import runpy
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "mmchat/quant/kernels"


class KernelHook(BuildHookInterface):
    """hatchling calls `initialize` before it builds a wheel, and `finalize` after it."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        sources = Path(self.root, KERNELS)
        rules = runpy.run_path(str(sources / "compiler.py"))
        compiler = os.environ.get("CC") or "gcc"
        self._scratch = tempfile.TemporaryDirectory()
        try:
            machine = linux_machine(compiler)
            for variant in rules["VARIANTS"][machine]:
                target = Path(self._scratch.name, f"{variant.name}.so")
                flags = (*rules["FLAGS"], *variant.flags)
                rules["compile_kernels"](compiler, flags, sources, target)
                build_data["force_include"][str(target)] = f"{KERNELS}/built/{target.name}"
        except (OSError, KeyError, subprocess.SubprocessError) as error:
            build_data["force_include"].clear()
            self.app.display_warning(
                f"a wheel without compiled kernels ({error!r}): on a CPU, mmchat compiles them at"
                " first use, or answers more slowly where there is no C compiler"
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self._scratch.cleanup()


def linux_machine(compiler: str) -> str:
    """What `compiler` compiles for, if that is Linux with glibc; else KeyError, OSError."""
    done = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True)
    found = re.match(r"(\w+)-.*linux(?!.*musl)", done.stdout)
    if found is None:
        raise KeyError(done.stdout.strip())
    return found[1]
