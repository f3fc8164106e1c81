"""The C kernels under the address and undefined behaviour sanitizers, with random shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmchat.quant.kernels import native
from tests.attack.conftest import Figures, rounds
from tests.quant.kernels.kept_objects import keeping

ROOT = Path(__file__).parents[2]
CASES = 3_500  # of each build
SANITIZERS = (
    "-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)  # fmt: skip
BUILDS = {"this processor's": ("-march=native",), "plain C": ()}


def runtime_of(sanitizer: str) -> str | None:
    """Where gcc has the library of a sanitizer."""
    name = f"lib{sanitizer}.so"
    try:
        command = [os.environ.get("CC") or "gcc", f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found if Path(found).is_absolute() else None


@pytest.fixture(scope="module", autouse=True)
def objects_are_kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of a source that is changed in one file, that one is compiled."""
    folder = tmp_path_factory.mktemp("compiler") / "objects"
    keeping(folder, native._compiler())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", str(folder / "cc"))
        yield


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        native.library() is None or not runtime_of("asan") or not runtime_of("ubsan"),
        reason="needs gcc with its sanitizers",
    ),
]


def run(library: Path, first: int, last: int) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime_of('asan')} {runtime_of('ubsan')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "tests.attack.kernel_cases", str(library)]
    command += [str(first), str(last)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def build(target: Path, flags: tuple[str, ...], folder: Path | None = None) -> Path:
    kept = [flag for flag in native._FLAGS if not flag.startswith(("-march=", "-O"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_FLAGS", (*kept, *SANITIZERS, *flags))
        if folder:
            patch.setattr(native, "__file__", str(folder / "native.py"))
        native._compile(native._compiler(), target)
    return target


@pytest.mark.parametrize("flags", BUILDS.values(), ids=BUILDS)
def test_no_kernel_leaves_its_tensors_or_does_what_is_undefined(
    tmp_path: Path, flags: tuple[str, ...], figures: Figures
) -> None:
    count = rounds(CASES)
    done = run(build(tmp_path / "kernels.so", flags), 0, count)
    assert (done.stdout, done.returncode) == (f"{count}\n", 0), done.stderr[-3000:]
    figures(cases=count)


def test_the_sanitizers_see_a_kernel_that_leaves_its_tensors(tmp_path: Path) -> None:
    for name in native.SOURCES + native.HEADERS:
        shutil.copy(Path(native.__file__).parent / name, tmp_path / name)
    source = tmp_path / "quantize.c"
    right, wrong = "q[n * K + k] =", "q[n * K + k + 1] ="
    assert right in source.read_text()
    source.write_text(source.read_text().replace(right, wrong))
    done = run(build(tmp_path / "kernels.so", BUILDS["this processor's"], tmp_path), 0, 20)
    assert "AddressSanitizer" in done.stderr
    assert done.returncode != 0
