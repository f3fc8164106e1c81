import pytest

from mmchat.hardware.compilers import Compiler, find_compilers

GCC = "gcc (Debian 12.2.0-14+deb12u1) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.\n"
CLANG = "Debian clang version 14.0.6\nTarget: x86_64-pc-linux-gnu\nThread model: posix\n"
APPLE = "Apple clang version 15.0.0 (clang-1500.3.9.4)\nTarget: arm64-apple-darwin23.5.0\n"
NVCC = (
    "nvcc: NVIDIA (R) Cuda compiler driver\nCopyright (c) 2005-2024 NVIDIA Corporation\n"
    "Cuda compilation tools, release 12.4, V12.4.131\nBuild cuda_12.4.r12.4/compiler.34097967_0\n"
)


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Puts programs that print a text on an otherwise empty PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    def add(name, text):
        (tmp_path / f"{name}.txt").write_text(text)
        program = tmp_path / name
        program.write_text(
            f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done < '{program}.txt'\n"
        )
        program.chmod(0o755)
        return str(program)

    return add


def test_no_compiler_is_an_empty_list(on_path):
    assert find_compilers() == []


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("gcc", GCC, "12.2.0"),
        ("clang", CLANG, "14.0.6"),
        ("clang", APPLE, "15.0.0"),
        ("nvcc", NVCC, "12.4.131"),
        ("gcc", "no numbers here", ""),
    ],
)
def test_a_compiler_is_found_with_its_version(on_path, name, text, version):
    path = on_path(name, text)
    assert find_compilers() == [Compiler(name, path, version)]


def test_the_environments_own_compiler_comes_first(on_path, monkeypatch):
    on_path("gcc", GCC)
    path = on_path("gcc-13", GCC)
    monkeypatch.setenv("CC", "gcc-13")
    assert next(c.path for c in find_compilers()) == path
