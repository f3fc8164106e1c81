"""The kernels of a wheel: the best that this processor runs is taken, and each of them is right."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from mmchat.hardware.cpu import processor_flags
from mmchat.quant.kernels import native, self_check
from mmchat.quant.kernels.compiler import FLAGS, VARIANTS, Variant, compile_kernels
from mmchat.quant.kernels.library import Library, UnavailableError
from tests.quant.kernels.available import needs_compiler

HERE = VARIANTS.get(platform.machine(), ())


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


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("variant", HERE, ids=lambda variant: variant.name)
def test_each_is_right_wherever_it_runs(variant: Variant, tmp_path: Path) -> None:
    if missing := variant.needs - processor_flags():
        pytest.skip(f"NOT TESTED: this processor has no {' '.join(sorted(missing))}")
    target = tmp_path / "kernels.so"
    sources = Path(native.__file__).parent
    compile_kernels(native._compiler(), (*FLAGS, *variant.flags), sources, target)
    library = Library(target)
    named = library.instructions.lower().replace("-", "").replace(" ", "")
    assert named.removeprefix("neon").removesuffix("c") in (variant.name, "")
    assert self_check.first_fault(library) is None
