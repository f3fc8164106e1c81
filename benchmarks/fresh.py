"""Whole processes, started anew: how long until they answer, and the most memory they take."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmchat.errors import MmchatError
from mmchat.runtime.compiler import CACHE_VARIABLE

_TAIL = 300  # characters of a failed process's last words


@dataclass(frozen=True)
class Process:
    """One finished process; times in seconds."""

    wall: float
    cpu: float
    stdout: str


def run_fresh(arguments: Sequence[str], *, environment: dict[str, str] | None = None) -> Process:
    """Run this Python with `arguments`, such as `-m mmchat …`. Raises MmchatError if it fails.

    No module of the working folder is run in the place of an installed one.
    """
    command = [sys.executable, "-P", *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.perf_counter()
        child = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **(environment or {})},
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        wall = time.perf_counter() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    if child.returncode != 0:
        shown = " ".join(arguments[:4])
        last = texts[1].strip()[-_TAIL:]
        raise MmchatError(f"'python {shown} …' ended with {child.returncode}: {last}")
    return Process(wall, usage.ru_utime + usage.ru_stime, texts[0])


def help_text() -> Process:
    """`mmchat --help`, as typed."""
    return run_fresh(["-m", "mmchat", "--help"])


def import_transformers() -> Process:
    """What a program that uses transformers' Mllama pays before its first line."""
    return run_fresh(["-c", "from transformers import MllamaForConditionalGeneration"])


def first_token(options: Sequence[str], picture: bytes, cache: Path) -> Process:
    """`mmchat generate` of one token about a picture. cache: where compiled code is kept."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(picture)
        file.flush()
        asked = ["-q", "-p", "What's in this image?", "-i", file.name, "-n", "1"]
        arguments = ["-m", "mmchat", "generate", *options, *asked]
        folders = {"XDG_CACHE_HOME": cache, CACHE_VARIABLE: cache / "inductor"}
        return run_fresh(arguments, environment={k: str(path) for k, path in folders.items()})
