from mmchat.hardware.cpu import (
    Cpu,
    describe_cpu,
    is_amd,
    processor_flags,
    processor_identity,
)

CPUINFO = """processor\t: 0
model name\t: Example 9000 CPU
flags\t\t: fpu avx avx2 fma avx512_vnni amx_int8 sse4_2

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def write_machine(root, caches):
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(CPUINFO)
    for number, (level, size) in enumerate(caches):
        folder = root / f"sys/devices/system/cpu/cpu0/cache/index{number}"
        folder.mkdir(parents=True)
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")


def test_the_first_processor_is_described(tmp_path):
    write_machine(tmp_path, [(1, "32K"), (1, "32K"), (2, "512K"), (3, "32M")])
    assert describe_cpu(tmp_path) == Cpu(
        "Example 9000 CPU", ("avx", "avx2", "fma", "avx512_vnni", "amx_int8"), 32 * 1024**2
    )


def test_who_made_the_processor_is_known(tmp_path):
    (tmp_path / "proc").mkdir()
    for maker, expected in (("AuthenticAMD", True), ("GenuineIntel", False)):
        (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        assert is_amd(tmp_path) == expected
    (tmp_path / "proc/cpuinfo").unlink()
    assert not is_amd(tmp_path)


def test_arm_names_its_instruction_sets_features(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("Features\t: fp asimd i8mm bf16 sve\n")
    assert describe_cpu(tmp_path).isa == ("asimd", "i8mm", "bf16", "sve")


def test_a_machine_that_says_nothing_is_no_error(tmp_path):
    cpu = describe_cpu(tmp_path)
    assert cpu.model
    assert (cpu.isa, cpu.llc_bytes) == ((), None)


def test_the_identity_of_a_processor_changes_with_its_instruction_sets(tmp_path):
    (tmp_path / "proc").mkdir()
    seen = set()
    for flags in ("fma avx2", "fma avx2 bmi2", "fma avx2 bmi2"):
        lines = f"processor : 0\nmodel name : X\nflags : {flags}\ncpu MHz : {len(seen)}\n"
        (tmp_path / "proc/cpuinfo").write_text(lines)
        seen.add(processor_identity(tmp_path))
    assert len(seen) == 2


def test_macos_is_asked_by_name(monkeypatch):
    class System:
        def sysctlbyname(self, name, value, size, *_):
            if name == b"hw.optional.arm.FEAT_I8MM":
                return -1  # an older macOS does not know it
            value._obj.value = 1
            return 0

    monkeypatch.setattr("mmchat.hardware.cpu.platform.system", lambda: "Darwin")
    monkeypatch.setattr("mmchat.hardware.cpu.ctypes.CDLL", lambda _: System())
    assert processor_flags() == {"asimddp"}
