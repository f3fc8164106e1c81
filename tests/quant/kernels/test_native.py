"""Compiling the C kernels: kept between runs, checked before use, never fatal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmchat.quant.kernels import native
from mmchat.quant.kernels.library import Library
from mmchat.storage import safe_files
from tests.quant.kernels.available import needs_compiler

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]  # long: begun early


@pytest.fixture(autouse=True)
def nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a checkout: kernels are compiled on first use."""
    monkeypatch.setattr(native, "_shipped", lambda: None)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_compiler: None) -> Path:
    """An empty cache folder; what was loaded before is forgotten for the test."""
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "kernels")
    return tmp_path / "kernels"


def load() -> tuple[Library | None, str]:
    return native._load.__wrapped__()


def copy_sources(folder: Path, old: str = "", new: str = "") -> None:
    """The C files, with `new` in the place of `old`."""
    for name in native.SOURCES + native.HEADERS:
        text = (Path(native.__file__).parent / name).read_text()
        (folder / name).write_text(text.replace(old, new) if old else text)


@needs_compiler
def test_the_kernels_are_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load()[0]
    (built,) = fresh.iterdir()
    assert built.name.startswith("kernels-")
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert load()[0]
    assert [built] == list(fresh.iterdir())


@needs_compiler
def test_compiling_is_told_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: load()[0])
    told: list[tuple[str, int, int]] = []
    for _ in range(2):
        native.prepare(lambda *stage: told.append(stage))
    assert told == [("kernels", 0, 1), ("kernels", 1, 1)]


def test_what_cannot_be_compiled_is_not_said_to_be(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    native.prepare(lambda *stage: pytest.fail(f"told {stage}"))


def test_without_a_compiler_there_is_a_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load() == (None, "no C compiler here; install gcc")


@needs_compiler
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_FLAGS", ("-march=no-such-machine",))
    library, reason = load()
    assert library is None
    assert "failed: " in reason
    assert "no-such-machine" in reason
    assert not list(fresh.iterdir())


def cut(whole: bytes) -> bytes:
    """The first page, so that a mapping of the rest ends the process (SIGBUS)."""
    return whole[:4096]


def empty(whole: bytes) -> bytes:
    return b""


def change(whole: bytes) -> bytes:
    middle = len(whole) // 2
    return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]


@needs_compiler
@pytest.mark.parametrize("damage", [cut, empty, change])
def test_a_damaged_library_is_compiled_anew(fresh: Path, damage: Callable[[bytes], bytes]) -> None:
    kept = native._compiled()
    whole = kept.read_bytes()
    kept.unlink()  # another file: this process has mapped the whole one
    kept.write_bytes(damage(whole))
    again = native._compiled()
    assert again.read_bytes() == whole
    assert list(fresh.iterdir()) == [again]
    assert load()[0]


@needs_compiler
def test_what_a_kill_after_the_compilation_left_is_removed(fresh: Path) -> None:
    native._compiled()
    (fresh / ".mmchat-0123456789abcdef.tmp").mkdir()
    safe_files._swept.clear()
    assert load()[0]
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


@needs_compiler
def test_what_a_killed_compilation_left_is_removed(fresh: Path) -> None:
    begin = "import os; from mmchat.quant.kernels import native; "
    begin += "native._FLAGS = ('-Og', *native._FLAGS[1:]); "
    script = "native._compile = lambda *_: os.kill(os.getpid(), 9); native.prepare()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(fresh)}
    killed = subprocess.run([sys.executable, "-c", begin + script], env=environment, check=False)
    (kernels,) = fresh.glob("mmchat/kernels")
    assert (killed.returncode, len(list(kernels.iterdir()))) == (-9, 1)
    script = "assert native.library()"
    subprocess.run([sys.executable, "-c", begin + script], env=environment, check=True)
    assert [path.suffix for path in kernels.iterdir()] == [".so"]


@needs_compiler
def test_a_kernel_that_computes_something_else_is_not_used(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy_sources(tmp_path, "* wscale[r * apart]", "* wscale[0]")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    library, reason = load()
    assert library is None
    assert reason == "the compiled kernel for int8 is wrong here"


@needs_compiler
@pytest.mark.parametrize("name", native.SOURCES + native.HEADERS)
def test_an_edited_file_is_compiled_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    copy_sources(tmp_path)
    before = native._fingerprint("/bin/sh")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._fingerprint("/bin/sh") == before
    with (tmp_path / name).open("a") as file:
        file.write("// edited\n")
    assert native._fingerprint("/bin/sh") != before


def test_every_file_in_c_is_known() -> None:
    folder = Path(native.__file__).parent
    assert {path.name for path in folder.glob("*.[ch]")} == {*native.SOURCES, *native.HEADERS}


def test_the_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMCHAT_NATIVE_KERNELS", "0")
    assert load() == (None, "switched off by MMCHAT_NATIVE_KERNELS=0")


@needs_compiler
def test_a_cache_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "file" / "kernels")
    library, reason = load()
    assert library is None
    assert "cannot write" in reason


HOSTILE_WEIGHTS = """
import ctypes, itertools, math, sys
kernels = ctypes.CDLL(sys.argv[1])
odd = [math.nan, -math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0, 1.0]
for first, second in itertools.product(odd, odd):
    weights = (ctypes.c_float * 128)(*[first, second] * 64)
    out, scale, zero = (ctypes.create_string_buffer(512) for _ in range(3))
    sizes = ctypes.c_int64(1), ctypes.c_int64(128)
    kernels.mmchat_quantize_int8(weights, out, scale, *sizes, 1)
    for group in (32, 64, 128):
        kernels.mmchat_quantize_int4(weights, out, scale, zero, *sizes, ctypes.c_int64(group), 1)
"""


@needs_compiler
def test_rounding_has_no_undefined_behaviour_whatever_the_weights(tmp_path: Path) -> None:
    """As the compiler's sanitizer sees it, which checks every cast to a whole number."""
    source = Path(native.__file__).with_name("quantize.c")
    checks = ("-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all")
    built = tmp_path / "checked.so"
    command = [native._compiler(), "-O1", "-fPIC", "-shared", *checks, str(source), "-lm"]
    subprocess.run([*command, "-o", str(built)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE_WEIGHTS, str(built)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
