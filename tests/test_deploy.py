"""The container's steps, run in a fresh Debian without Docker; the unit, as systemd reads it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_package import build_wheel

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KEY = "a key of the tests, long enough"
ASK = f"""
import urllib.request as r
body = b'{{"messages": [{{"role": "user", "content": "Hello"}}], "temperature": 0}}'
q = r.Request("http://127.0.0.1:5000/v1/chat/completions", body, {{"X-Api-Key": "{KEY}"}})
print(r.urlopen(q).read().decode())
"""
TRUSTED = "etc/trusted-by-pip.crt"
# whose Python is this one, so that it takes the same wheel of torch
SUITE = {11: "bookworm", 13: "trixie", 14: "forky"}.get(sys.version_info.minor)


def instructions() -> Iterator[tuple[str, str]]:
    """Each instruction of the Dockerfile, and what follows it."""
    text = re.sub(r"(?m)^#.*\n", "", (DEPLOY / "Dockerfile").read_text("utf-8"))
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield word, rest.strip()


def test_the_container_runs_as_nobodys_user_and_tells_its_health() -> None:
    words = dict(instructions())
    assert words["USER"] == "10001:10001"
    assert "/health" in words["HEALTHCHECK"]
    assert {"FROM", "RUN", "ENTRYPOINT", "VOLUME"} <= words.keys()


def steps(root: Path, wheels: Path) -> str:
    """A script that does in the folder `root` what Docker does to build the image."""
    settings = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
    settings["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    if "PIP_CERT" in settings:
        settings["PIP_CERT"] = f"/{TRUSTED}"
    lines = [f"mount --bind /dev {root}/dev", f"mount -t proc proc {root}/proc"]
    for word, rest in instructions():
        command, mount = rest, ""
        if word == "RUN":
            while found := re.match(r"--mount=type=bind,source=dist,target=(\S+)\s+", command):
                command, mount = command[found.end() :], f"{root}{found[1]}"
                lines += [f"mkdir -p {mount}", f"mount --bind {wheels} {mount}"]
            within = ["chroot", str(root), "env", "-i", *(f"{k}={v}" for k, v in settings.items())]
            lines.append(shlex.join([*within, "sh", "-euc", command]))
            lines += [f"umount {mount}"] * bool(mount)
    return "\n".join(lines)


def running(root: Path, data: Path) -> str:
    """A script that runs the container with a read-only root, and prints what it is asked."""
    words = dict(instructions())
    environment = [*shlex.split(words["ENV"]), f"MMCHAT_API_KEY={KEY}", "OMP_NUM_THREADS=1"]
    within = ["chroot", f"--userspec={words['USER']}", str(root), "env", "-i", *environment]
    serve = [*json.loads(words["ENTRYPOINT"]), *json.loads(words["CMD"])]
    healthy = words["HEALTHCHECK"].partition(" CMD ")[2]
    return f"""
    ip link set lo up
    mount --bind {root} {root}
    mount -o remount,ro,bind {root}
    mount -t tmpfs tmpfs {root}/tmp
    mount --bind {data} {root}/data
    mount -t proc proc {root}/proc
    mount --bind /dev {root}/dev
    if touch {root}/written 2>/dev/null; then echo "the root is writable"; exit 1; fi
    {shlex.join([*within, *serve])} &
    server=$!
    trap 'kill $server 2>/dev/null || true' EXIT
    tries=0
    until {shlex.join([*within, "sh", "-c", healthy])} 2>/dev/null; do
        tries=$((tries + 1))
        test $tries -lt 300 && kill -0 $server && sleep 1 || exit 1
    done
    {shlex.join([*within, "python3", "-c", ASK])}
    {shlex.join([*within, "mmchat", "doctor", "--json"])}
    kill $server && wait $server
    """


def run_script(script: str, *unshare: str) -> str:
    done = subprocess.run(
        ["unshare", "--mount", *unshare, "sh", "-eu"],
        input=script, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def may_mount() -> bool:
    tools = all(map(shutil.which, ("debootstrap", "unshare", "chroot")))
    return (
        tools
        and not subprocess.run(["unshare", "--mount", "--net", "true"], check=False).returncode
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_containers_steps_give_a_server_with_a_read_only_root(tmp_path: Path) -> None:
    if os.geteuid() or SUITE is None or not may_mount():
        pytest.skip("NOT TESTED: the container's steps; they need root, debootstrap and unshare")
    root, wheels, data = (tmp_path / name for name in ("root", "wheels", "data"))
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", SUITE, str(root)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"NOT TESTED: the container's steps; {made.stdout[-200:]}")
    for name in ("etc/resolv.conf", "etc/hosts"):
        shutil.copy(f"/{name}", root / name)
    if trusted := os.environ.get("PIP_CERT"):
        shutil.copy(trusted, root / TRUSTED)
    wheels.mkdir()
    build_wheel(wheels, "gcc")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    subprocess.run([*pip, f"torch=={torch_version()}"], check=False)  # that of CPUs, if to be had
    run_script(steps(root, wheels))
    data.mkdir()
    os.chown(data, 10001, 10001)
    answer, _, report = run_script(running(root, data), "--net").partition("\n")
    assert json.loads(answer)["choices"][0]["message"]["content"]
    assert "as installed" in report
    assert not list(data.rglob("*.so"))  # nothing was compiled, nor left elsewhere


def torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


@pytest.mark.slow
def test_systemd_reads_the_unit_and_finds_it_fenced_in(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("NOT TESTED: the unit; systemd-analyze is not here")
    unit = tmp_path / "mmchat.service"
    text = (DEPLOY / "mmchat.service").read_text("utf-8")
    assert "/opt/mmchat/bin/mmchat serve" in text
    unit.write_text(text.replace("/opt/mmchat/bin/mmchat", shutil.which("true") or ""), "utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-200:]  # an exposure of 2.0 of 10 at most
