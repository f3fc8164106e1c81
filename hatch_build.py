"""What a wheel holds beside the package: compiled kernels, the manual page, shells' completions.

Kernels come in where a C compiler for Linux is there. CC names it; a cross compiler makes the wheel
of its machine. An editable install has nothing of this and needs no compiler: there, kernels are
compiled on first use, as where a wheel has none.
"""

import os
import re
import runpy
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "mmchat/quant/kernels"
COMPLETIONS = {
    "bash": "share/bash-completion/completions/mmchat",
    "zsh": "share/zsh/site-functions/_mmchat",
    "fish": "share/fish/vendor_completions.d/mmchat.fish",
}
MANUAL = "share/man/man1/mmchat.1"


class WheelHook(BuildHookInterface):
    """hatchling calls `initialize` before it builds a wheel, and `finalize` after it."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        self._scratch = tempfile.TemporaryDirectory()
        folder = Path(self._scratch.name)
        for place, text in shared_texts(Path(self.root)).items():
            target = folder / place.replace("/", "-")
            target.write_text(text, "utf-8")
            build_data["shared_data"][str(target)] = place
        try:
            machine, kernels = compiled_kernels(Path(self.root), folder)
        except (OSError, KeyError, subprocess.SubprocessError) as error:
            self.app.display_warning(
                f"a wheel without compiled kernels ({error!r}): on a CPU, mmchat compiles them at"
                " first use, or answers more slowly where there is no C compiler"
            )
            return
        build_data["force_include"] |= {
            str(path): f"{KERNELS}/built/{path.name}" for path in kernels
        }
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self._scratch.cleanup()


def compiled_kernels(root: Path, folder: Path) -> tuple[str, list[Path]]:
    """The machine that the compiler compiles for, and the libraries, which are put into `folder`.

    Raises OSError without a compiler, KeyError if it is not one for a Linux that we know.
    """
    compiler = os.environ.get("CC") or "gcc"
    said = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True)
    found = re.match(r"(\w+)-.*linux(?!.*musl)", said.stdout)
    machine = found[1] if found else said.stdout.strip()
    rules = runpy.run_path(str(root / KERNELS / "compiler.py"))
    variants = rules["VARIANTS"][machine]
    kernels = [folder / f"{variant.name}.so" for variant in variants]
    for variant, target in zip(variants, kernels, strict=True):
        flags = (*rules["FLAGS"], *variant.flags)
        rules["compile_kernels"](compiler, flags, root / KERNELS, target)
    return machine, kernels


def shared_texts(root: Path) -> dict[str, str]:
    """Place in an environment -> text of the manual page and of the completions."""
    sys.path.insert(0, str(root))
    from typer._completion_shared import get_completion_script

    from mmchat.cli import app

    variable = "_MMCHAT_COMPLETE"
    texts = {
        place: get_completion_script(prog_name="mmchat", complete_var=variable, shell=shell) + "\n"
        for shell, place in COMPLETIONS.items()
    }
    # zsh runs the file when it completes for the first time
    registered = "compdef _mmchat_completion mmchat"
    texts[COMPLETIONS["zsh"]] = texts[COMPLETIONS["zsh"]].replace(
        registered, '_mmchat_completion "$@"'
    )
    version = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    return texts | {MANUAL: manual_page(app, version)}


def manual_page(app: Any, version: str) -> str:
    """The --help of all commands as one page in roff."""
    page = Manual()
    page.add(f'.TH MMCHAT 1 "" "mmchat {version}" "User Commands"', ".nh", ".ad l", ".SH NAME")
    page.add(r"mmchat \- chat about pictures with Llama 3.2 Vision on your own machine")
    page.add(".SH SYNOPSIS", ".B mmchat", r"[\fICOMMAND\fR] [\fIOPTIONS\fR]")
    page.add(".SH COMMANDS")
    for name in app.COMMANDS:
        page.add_command(app.load(name), f"mmchat {name}")
    codes = " ".join((app.__doc__ or "").partition("Exit codes: ")[2].split())
    page.add(".SH EXIT STATUS", escaped(codes))
    return "\n".join(page.lines) + "\n"


def escaped(text: str) -> str:
    """Text that roff takes for nothing else."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("\n", " ")
    text = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in text)
    return rf"\&{text}" if text[:1] in (".", "'") else text


class Manual:
    """Takes what a formatter of help pages is told."""

    width = 1000  # nothing is cut

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, *lines: str) -> None:
        self.lines += lines

    def add_command(self, command: Any, path: str) -> None:
        self.add(f".SS {escaped(path)}")
        command.format_help(command.context_class(command, info_name=path), self)
        for name, inner in getattr(command, "commands", {}).items():
            self.add_command(inner, f"{path} {name}")

    def write_usage(self, program: str, arguments: str) -> None:
        self.add(f"\\fB{escaped(program)}\\fR {escaped(arguments)}")

    def write_paragraph(self) -> None:
        self.add(".PP")

    def write_text(self, text: str) -> None:
        for paragraph in text.split("\n\n"):
            self.add(".PP", escaped(paragraph))

    def write_dl(self, rows: list[tuple[str, str]]) -> None:
        for name, help in rows:
            self.add(".TP", f"\\fB{escaped(name)}\\fR", escaped(help))

    @contextmanager
    def section(self, title: str) -> Iterator[None]:
        self.add(".PP", f"\\fI{escaped(title)}\\fR")
        yield

    @contextmanager
    def indentation(self) -> Iterator[None]:
        yield
