"""Which compilers are on this machine, and how they call themselves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

COMPILERS = ("gcc", "g++", "clang", "clang++", "nvcc")
_SECONDS = 10
# "release 12.4, V12.4.131", "clang version 14.0.6", "gcc (Debian 12.2.0-14) 12.2.0"
_VERSIONS = (r"release .*V(\d+[\d.]*)", r"version (\d+[\d.]*)", r"^\S+ \(.*\) (\d+[\d.]*)")


@dataclass(frozen=True)
class Compiler:
    """version: as it says itself, such as "12.2.0"; empty if it does not run."""

    name: str
    path: str
    version: str


def find_compilers() -> list[Compiler]:
    """$CC first if it is set, then those of COMPILERS that are on the PATH."""
    wanted = dict.fromkeys(name for name in (os.environ.get("CC"), *COMPILERS) if name)
    found = ((name, shutil.which(name)) for name in wanted)
    return [Compiler(name, path, _version(path)) for name, path in found if path]


def _version(path: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            [path, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    for pattern in _VERSIONS:
        if found := re.search(pattern, done.stdout, re.M):
            return found[1]
    return ""
