"""kill -9 of a whole `mmchat export`: the old folder or the new one, and no other."""

import random
import signal
import subprocess
import sys
import time

import pytest

from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest
from mmchat.hub.integrity import verify_folder

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="no kill -9")]
MOMENTS = ("new", "model.safetensors", "params.json", MANIFEST_NAME, "in place")


def start(folder, dtype):
    options = ["--format", "safetensors", "--device", "cpu", "--dtype", dtype, "-q"]
    command = [sys.executable, "-m", "mmchat", "export", "tiny", *options, "-o", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_after(process, folder, moment, seconds):
    """Kill the run after a file appears in its staging folder, or after the folder is in place."""
    staged = folder.parent / f".mmchat-new-{folder.name}"
    before = folder.stat().st_ino if folder.exists() else None
    while process.poll() is None:
        if moment == "in place":
            reached = folder.exists() and folder.stat().st_ino != before
        else:
            reached = (staged / "new" / ("." if moment == "new" else moment)).exists()
        if reached:
            break
        time.sleep(0.0005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def dtype_of(folder):
    """What the folder was exported in; it must be whole."""
    assert not verify_folder(folder).faults
    manifest = read_manifest(folder / MANIFEST_NAME)
    assert {*manifest.files, MANIFEST_NAME} == {path.name for path in folder.iterdir()}
    return manifest.export.dtype


def finish(process):
    _, said = process.communicate()
    assert process.returncode == 0, said


def test_a_kill_leaves_the_old_folder_or_the_new_one_and_the_next_run_completes(tmp_path):
    folder, draw, seen = tmp_path / "out", random.Random(1), []
    kill_after(start(folder, "float32"), folder, "model.safetensors", 0)
    assert not folder.exists()
    finish(start(folder, "bfloat16"))
    for moment in MOMENTS:
        old = dtype_of(folder)
        new = "float32" if old == "bfloat16" else "bfloat16"
        kill_after(start(folder, new), folder, moment, draw.uniform(0, 0.02))
        seen.append(dtype_of(folder) == new)
    assert not seen[0]
    assert seen[-1]
    new = "float32" if dtype_of(folder) == "bfloat16" else "bfloat16"
    finish(start(folder, new))
    assert dtype_of(folder) == new
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
