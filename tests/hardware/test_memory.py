"""What the kernel's files say about memory, as written down from machines of each kind."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mmchat.hardware.memory import HostMemory, host_memory
from mmchat.limits import MIB

CGROUPS = Path("/sys/fs/cgroup")
V2_MOUNT = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V1_OTHER = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"


@pytest.fixture
def machine(tmp_path):
    """Files of a machine with 16,000 MiB, of which 12,000 can be had, and 4,000 MiB of swap."""
    return Machine(tmp_path)


class Machine:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.write(
            "proc/meminfo",
            f"MemTotal: {16_000 * 1024} kB\nMemFree: 100 kB\nMemAvailable: {12_000 * 1024} kB\n"
            f"SwapTotal: {4_000 * 1024} kB\nSwapFree: {4_000 * 1024} kB\n",
        )

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def version_2(self, path: str, group: str, top: str = "/", **files: object) -> None:
        self.write("proc/self/cgroup", f"0::{group}")
        self.write("proc/self/mountinfo", V2_MOUNT.format(top=top))
        for name, value in files.items():
            self.write(f"sys/fs/cgroup{path}/memory.{name}", value)

    def version_1(self, path: str, group: str, top: str = "/", **files: object) -> None:
        self.write("proc/self/cgroup", f"5:cpu:{group}\n4:memory:{group}\n0::/")
        self.write("proc/self/mountinfo", f"{V1_OTHER}\n{V1_MOUNT.format(top=top)}")
        for name, value in files.items():
            self.write(f"sys/fs/cgroup/memory{path}/memory.{name}", value)

    def memory(self) -> tuple[float, float, str | None]:
        """MiB of (total, available), and the folder of the group that decides."""
        found = host_memory(self.root)
        assert isinstance(found, HostMemory)
        decides = found.limited_by
        folder = None if decides is None else f"/{decides.relative_to(self.root)}"
        return found.total / MIB, found.available / MIB, folder


def mib(number: int) -> int:
    return number * MIB


def test_without_a_container_the_machine_decides_and_swap_does_not_count(machine):
    assert machine.memory() == (16_000, 12_000, None)


def test_the_limit_of_the_own_group_counts(machine):
    machine.version_2("/app", "/app", max=mib(8000), current=mib(3000))
    assert machine.memory() == (8000, 5000, "/sys/fs/cgroup/app")


def test_the_lowest_of_all_groups_above_decides(machine):
    machine.version_2("/a", "/a/b/c", max=mib(4000), current=mib(3500))
    machine.version_2("/a/b", "/a/b/c", max="max", current=mib(3000))
    machine.version_2("/a/b/c", "/a/b/c", max=mib(9000), current=mib(1000))
    assert machine.memory() == (4000, 500, "/sys/fs/cgroup/a")


def test_a_group_without_a_limit_changes_nothing(machine):
    machine.version_2("/a", "/a", max="max", current=mib(3000))
    assert machine.memory() == (16_000, 12_000, None)


def test_a_limit_above_what_the_machine_has_changes_nothing(machine):
    machine.version_2("/a", "/a", max=mib(64_000), current=mib(3000))
    assert machine.memory() == (16_000, 12_000, None)


def test_memory_high_is_a_limit_too(machine):
    machine.version_2("/a", "/a", max=mib(8000), high=mib(6000), current=mib(1000))
    assert machine.memory() == (6000, 5000, "/sys/fs/cgroup/a")


def test_pages_of_files_can_be_given_up_unless_they_wait_to_be_written(machine):
    stat = f"anon 5\ninactive_file {mib(1000)}\nactive_file {mib(500)}\nfile_dirty {mib(200)}"
    machine.version_2("/a", "/a", max=mib(8000), current=mib(3000), stat=stat)
    assert machine.memory() == (8000, 5000 + 1000 + 500 - 200, "/sys/fs/cgroup/a")


def test_a_container_that_sees_only_its_own_group_finds_its_limit(machine):
    machine.version_2("", "/", max=mib(2000), current=mib(500))
    assert machine.memory() == (2000, 1500, "/sys/fs/cgroup")


def test_a_container_without_a_namespace_finds_its_limit_at_the_top_of_the_mount(machine):
    machine.version_2("", "/docker/1f", top="/docker/1f", max=mib(2000), current=mib(500))
    assert machine.memory() == (2000, 1500, "/sys/fs/cgroup")


def test_a_group_whose_folder_is_not_mounted_falls_back_to_those_above(machine):
    machine.version_2("", "/gone/away", max=mib(2000), current=mib(500))
    assert machine.memory() == (2000, 1500, "/sys/fs/cgroup")


def test_version_1_limits_count_with_their_parents(machine):
    stat = f"inactive_file 1\ntotal_inactive_file {mib(300)}\ntotal_active_file {mib(100)}"
    big = 9223372036854771712
    machine.version_1("", "/box/me", limit_in_bytes=big, usage_in_bytes=mib(9000))
    machine.version_1("/box/me", "/box/me", limit_in_bytes=big, usage_in_bytes=mib(900))
    machine.version_1(
        "/box", "/box/me", limit_in_bytes=mib(3000), usage_in_bytes=mib(1000), stat=stat
    )
    assert machine.memory() == (3000, 2000 + 400, "/sys/fs/cgroup/memory/box")


def test_a_group_over_its_limit_has_nothing_left(machine):
    machine.version_2("/a", "/a", high=mib(1000), max="max", current=mib(1500))
    assert machine.memory() == (1000, 0, "/sys/fs/cgroup/a")


def test_paths_of_groups_cannot_leave_the_mount(machine):
    machine.write("memory.max", mib(1))
    machine.version_2("", "/../../..", max=mib(2000), current=mib(500))
    assert machine.memory() == (2000, 1500, "/sys/fs/cgroup")


def test_this_machine_can_be_read():
    found = host_memory()
    assert found is None or 0 <= found.available <= found.total


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone hands the figure on")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    program = """
import sys, types
from mmchat.hardware.memory import peak_memory
print(peak_memory(types.SimpleNamespace(type="cpu")))
"""
    large = bytearray(b"x") * 300_000_000  # written to, so that it is in memory
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 1_000_000 < int(done.stdout) < len(large) / 2


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others keep little")
def test_freed_memory_goes_back():
    program = """
from pathlib import Path
from mmchat.hardware.memory import return_freed_memory
def held(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
blocks = [b"x" * 100_000 for _ in range(2_000)]
del blocks[:-1]  # the last lies above the others, which keeps them in the heap
before = held()
return_freed_memory()
print(before - held())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 150_000_000


@pytest.fixture
def control_group():
    """A control group of this machine with a limit of 512 MiB; skips where none can be made."""
    folder, limit = CGROUPS / "memory", "memory.limit_in_bytes"
    if not folder.is_dir():
        folder, limit = CGROUPS, "memory.max"
    folder /= f"mmchat-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error.strerror})")
    try:
        (folder / limit).write_text(str(mib(512)))
    except OSError as error:
        folder.rmdir()
        pytest.skip(f"control groups here limit no memory ({error.strerror})")
    yield folder
    folder.rmdir()


@pytest.mark.process
def test_the_limit_of_a_real_control_group_is_seen_and_what_is_taken_is_counted(control_group):
    script = """
from mmchat.limits import MIB
from mmchat.hardware.memory import host_memory
before = host_memory()
held = bytearray(b"x" * 100 * MIB)
after = host_memory()
print(before.total // MIB, (before.available - after.available) // MIB, after.limited_by)
"""
    enter = f'echo $$ > "{control_group}/cgroup.procs" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", enter, "sh", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    total, taken, folder = done.stdout.split()
    assert (int(total), folder) == (512, str(control_group))
    assert 95 <= int(taken) <= 110


@pytest.mark.process
@pytest.mark.parametrize("wish", [None, "0"])
def test_large_tensors_lie_in_large_pages_unless_the_user_forbids_it(wish):
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no large pages")
    told = "import mmchat, torch; x = torch.ones(2**23); print(open('/proc/self/smaps').read())"
    given = {name: text for name, text in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    given |= {} if wish is None else {"THP_MEM_ALLOC_ENABLE": wish}
    done = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True, env=given
    )
    flags = [line.split() for line in done.stdout.splitlines() if line.startswith("VmFlags:")]
    assert any("hg" in line for line in flags) == (wish is None)  # asked for, whoever grants it
