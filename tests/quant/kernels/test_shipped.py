"""The kernels of a wheel: the best that this processor runs is taken, and each of them is right."""

from __future__ import annotations

import functools
import platform
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mmchat.hardware.cpu import processor_flags
from mmchat.quant.kernels import native, self_check
from mmchat.quant.kernels.compiler import VARIANTS, Variant
from mmchat.quant.kernels.library import Library, UnavailableError
from tests.quant.kernels.available import needs_compiler
from tests.quant.kernels.test_arm import CPUS, CROSS, check, needs_emulator
from tests.test_package import VERSION, build_wheel, members  # noqa: F401

HERE = VARIANTS.get(platform.machine(), ())
BUILT = "mmchat/quant/kernels/built"
long = pytest.mark.timeout(1500)  # the first of these tests compiles for minutes


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder as a wheel has it, of files that load as their names."""
    for variant in VARIANTS["x86_64"]:
        (tmp_path / f"{variant.name}.so").touch()
    monkeypatch.setattr(native, "SHIPPED", tmp_path)
    monkeypatch.setattr(native, "_checked", lambda path, briefly: path.stem)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return tmp_path


def choice(monkeypatch: pytest.MonkeyPatch, *sets: str) -> object:
    """What is taken on a processor that has what these variants need."""
    needs = [variant.needs for variant in VARIANTS["x86_64"] if variant.name in sets]
    monkeypatch.setattr(native, "processor_flags", lambda: frozenset().union(*needs))
    return native._shipped.__wrapped__()


def test_the_best_that_the_processor_runs_is_taken(
    chosen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variant in VARIANTS["x86_64"]:
        assert choice(monkeypatch, variant.name) == variant.name
    assert choice(monkeypatch, "avxvnni", "avx512vnni") == "avx512vnni"
    assert choice(monkeypatch) is None


def test_what_is_wrong_or_missing_gives_way_to_the_next(
    chosen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(path: Path, briefly: bool) -> str:
        if path.stem == "avx512vnni":
            raise UnavailableError("the compiled kernel for int8 is wrong here")
        return path.stem

    monkeypatch.setattr(native, "_checked", checked)
    assert choice(monkeypatch, "avxvnni", "avx512vnni") == "avxvnni"
    (chosen / "avxvnni.so").unlink()
    assert choice(monkeypatch, "avxvnni", "avx512vnni") == "avx2"
    monkeypatch.setattr(native, "SHIPPED", chosen / "none")  # as in a checkout
    assert choice(monkeypatch, "avx512vnni") is None


def test_they_are_switched_off_too(chosen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMCHAT_NATIVE_KERNELS", "0")
    assert choice(monkeypatch, "avx2") is None


def test_nothing_is_told_of_compiling_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_shipped", lambda: "library")
    native.prepare(lambda *stage: pytest.fail(f"told {stage}"))


def test_each_machine_has_one_that_needs_little() -> None:
    for variants in VARIANTS.values():
        assert all(variants[-1].needs <= variant.needs for variant in variants)
        assert len({variant.name for variant in variants}) == len(variants)


@pytest.fixture(scope="module")
def wheel_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiler -> the wheel that it gives; each is built once, as it takes a minute."""

    @functools.cache
    def build(compiler: str) -> Path:
        if shutil.which(compiler) is None:
            pytest.skip(f"NOT TESTED: there is no {compiler} here")
        return build_wheel(tmp_path_factory.mktemp("wheel"), compiler)

    return build


def kernels_in(wheel: Path, variant: Variant, folder: Path) -> Path:
    """The library of a variant, taken out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"{BUILT}/{variant.name}.so", folder))


@pytest.mark.slow
@long
@pytest.mark.parametrize(("compiler", "machine"), [("gcc", platform.machine()), (CROSS, "aarch64")])
def test_a_wheel_that_is_built_with_a_compiler_has_kernels(
    compiler: str,
    machine: str,
    wheel_of: Callable[[str], Path],
    members: dict[str, bytes],  # noqa: F811
) -> None:
    wheel = wheel_of(compiler)
    assert wheel.name == f"mmchat-{VERSION}-py3-none-linux_{machine}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert (
            "Root-Is-Purelib: false" in archive.read(f"mmchat-{VERSION}.dist-info/WHEEL").decode()
        )
    assert names - members.keys() == {f"{BUILT}/{v.name}.so" for v in VARIANTS[machine]}


@pytest.mark.slow
@long
@needs_compiler
@pytest.mark.parametrize("variant", HERE, ids=lambda variant: variant.name)
def test_each_is_right_wherever_it_runs(
    variant: Variant, wheel_of: Callable[[str], Path], tmp_path: Path
) -> None:
    if missing := variant.needs - processor_flags():
        pytest.skip(f"NOT TESTED: this processor has no {' '.join(sorted(missing))}")
    library = Library(kernels_in(wheel_of("gcc"), variant, tmp_path))
    named = library.instructions.lower().replace("-", "").replace(" ", "")
    assert named.removeprefix("neon").removesuffix("c") in (variant.name, "")
    assert self_check.first_fault(library) is None


@pytest.mark.slow
@long
@needs_emulator
@pytest.mark.parametrize("variant", VARIANTS["aarch64"], ids=lambda variant: variant.name)
def test_what_a_wheel_for_arm_holds_is_exact(
    variant: Variant, wheel_of: Callable[[str], Path], tmp_path: Path
) -> None:
    [features] = (features for features in CPUS if set(features) == variant.needs)
    library = kernels_in(wheel_of(CROSS), variant, tmp_path)
    check(features, library.parent, library)
