import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
from PIL import Image as PILImage

import mmchat
from mmchat import limits
from mmchat.errors import ImageError
from mmchat.images import load_image, worker

pytestmark = pytest.mark.process

REQUEST = {
    "kind": "PNG",
    "page": None,
    "alpha": "white",
    "max_pixels": 10**6,
    "cpu_seconds": 10,
    "memory": 2**30,
}


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "dot.png"
    PILImage.new("RGB", (3, 2), (1, 2, 3)).save(path)
    return path


@pytest.fixture(autouse=True)
def fresh_pool(monkeypatch):
    """A pool of this test's own, so that its faults do not reach others."""
    pool = worker.Pool(1)
    monkeypatch.setattr(worker, "pool", pool)
    yield pool
    pool.close()


def process_of(pool: worker.Pool) -> subprocess.Popen:
    with pool.worker() as decoder:
        return decoder._process


def reason(data: bytes, name: str = "it") -> str:
    with pytest.raises(ImageError) as caught:
        load_image(data, name=name)
    return str(caught.value)


@cache
def large_jpeg(scans: int, mode: str = "L") -> bytes:
    """A progressive JPEG of 36 million pixels whose last scan is repeated."""
    buffer = io.BytesIO()
    PILImage.new(mode, (6000, 6000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def test_one_process_decodes_one_picture_after_the_other(fresh_pool, picture):
    load_image(picture)
    first = process_of(fresh_pool)
    load_image(picture)
    reason(b"\x89PNG\r\n\x1a\n")  # a damaged file is no reason to end it
    assert process_of(fresh_pool) is first
    assert first.poll() is None


def test_a_worker_that_was_started_ahead_is_the_one_that_is_used(fresh_pool, picture):
    fresh_pool.start()
    fresh_pool.start()
    [ahead] = fresh_pool._idle
    load_image(picture)
    assert fresh_pool._idle == [ahead]


def test_a_picture_takes_no_more_cpu_time_than_allowed(fresh_pool, picture, monkeypatch):
    monkeypatch.setattr(limits, "DECODE_CPU_SECONDS", 0.1)
    slow = large_jpeg(80)
    assert "'slow' takes longer than 0.1 s to decode" in reason(slow, "slow")
    assert load_image(picture).width == 3  # by a new process


def test_each_picture_has_the_whole_time(picture, monkeypatch):
    monkeypatch.setattr(limits, "DECODE_CPU_SECONDS", 1)
    data = large_jpeg(0)
    for _ in range(3):
        load_image(data)


def test_a_picture_takes_no_more_time_by_the_clock_than_allowed(fresh_pool, picture, monkeypatch):
    monkeypatch.setattr(limits, "DECODE_WALL_SECONDS", 0.2)
    os.kill(process_of(fresh_pool).pid, signal.SIGSTOP)
    assert "takes longer than" in reason(picture.read_bytes())
    monkeypatch.setattr(limits, "DECODE_WALL_SECONDS", 60)
    assert load_image(picture).width == 3


def test_a_picture_takes_no_more_memory_than_allowed(fresh_pool, picture, monkeypatch):
    large = large_jpeg(0, "RGB")
    load_image(picture)
    before = process_of(fresh_pool)
    monkeypatch.setattr(limits, "DECODE_MEMORY_BYTES", 150 * limits.MIB)
    assert "needs more memory than there is" in reason(large)
    monkeypatch.setattr(limits, "DECODE_MEMORY_BYTES", 1024 * limits.MIB)
    assert process_of(fresh_pool) is before
    assert load_image(large).width == 6000


def test_a_decoder_that_crashes_takes_one_picture_with_it(fresh_pool, picture):
    data = picture.read_bytes()
    for sign in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
        process = process_of(fresh_pool)
        process.send_signal(sign)
        process.wait()
        assert "'it' cannot be decoded: it makes the decoder crash" in reason(data)
        assert load_image(picture).width == 3


def test_a_crash_between_answer_and_pixels_is_told(fresh_pool, picture):
    data = picture.read_bytes()
    with fresh_pool.worker() as decoder:
        assert decoder.ask(REQUEST, data)["size"] == [3, 2]
        assert decoder.read(18) == bytes([1, 2, 3] * 6)
        decoder._process.terminate()
        with pytest.raises(worker.WorkerError, match="crash"):
            decoder.read(1)
        decoder.close()


def test_an_answer_that_is_left_half_read_ends_the_worker(fresh_pool, picture):
    with contextlib.suppress(KeyboardInterrupt), fresh_pool.worker() as decoder:
        decoder.ask(REQUEST, picture.read_bytes())
        raise KeyboardInterrupt
    assert decoder._process.returncode == -signal.SIGKILL
    assert load_image(picture).width == 3


@pytest.mark.parametrize("answer", [b"", b"{", b"\xff\n", b"x" * 100_000])
def test_an_answer_that_is_none_is_told(picture, monkeypatch, answer):
    monkeypatch.setattr(
        worker,
        "_CODE",
        f"import sys; sys.stdin.buffer.readline(); sys.stdout.buffer.write({answer})",
    )
    assert "crash" in reason(picture.read_bytes())


def test_a_size_over_the_limit_is_not_believed(picture, monkeypatch):
    lie = {"size": [60_000, 60_000], "notices": []}
    monkeypatch.setattr(worker.Worker, "ask", lambda *_: lie)
    assert "pixels; at most 67,108,864" in reason(picture.read_bytes())


def test_threads_take_turns(picture):
    hashes = []
    threads = [
        threading.Thread(target=lambda: hashes.append(load_image(picture).content_hash))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hashes) == 8
    assert len(set(hashes)) == 1


def test_a_pool_has_as_many_workers_as_it_may(picture):
    pool = worker.Pool(2)
    with pool.worker() as one, pool.worker() as two:
        assert one is not two
    assert len(pool._idle) == 2
    pool.close()
    assert one._process.returncode == two._process.returncode == -signal.SIGKILL


def test_a_forked_process_has_a_worker_of_its_own(fresh_pool, picture):
    load_image(picture)
    ours = process_of(fresh_pool)
    child = os.fork()
    if child == 0:
        fresh_pool._reset()  # as the pool of the module does by itself
        fine = load_image(picture).width == 3 and process_of(fresh_pool).pid != ours.pid
        fresh_pool.close()
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert load_image(picture).width == 3
    assert process_of(fresh_pool) is ours


def test_the_worker_writes_no_file_and_dumps_no_core(fresh_pool, picture):
    load_image(picture)
    pid = process_of(fresh_pool).pid
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        assert resource.prlimit(pid, limit) == (0, 0)
    assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == limits.DECODE_MEMORY_BYTES


def test_no_process_can_be_started(picture, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "no process can be started to decode pictures: No such file" in reason(b"BM")


CODE = """
import os, sys
from mmchat.images import load_image, worker
load_image(sys.argv[1])
print(worker.pool._idle[0]._process.pid, flush=True)
sys.stdin.readline()
"""


def ends(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("end", ["exit", "kill", "interrupt"])
def test_the_worker_ends_with_the_process_that_started_it(picture, end):
    parent = subprocess.Popen(
        [sys.executable, "-c", CODE, str(picture)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = int(parent.stdout.readline())
    if end == "kill":
        parent.kill()
    elif end == "interrupt":
        parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert ends(pid)
    if end == "exit":
        assert (parent.returncode, errors) == (0, "")


def test_modules_of_the_working_folder_are_not_run(picture):
    for name in ("mmchat", "PIL", "json"):
        (picture.parent / f"{name}.py").write_text("open('ran', 'w')")
    code = (
        "import sys; sys.path.pop(0)\n"
        "from mmchat.images import load_image\n"
        "import os, PIL.Image; os.chdir(sys.argv[1]); sys.path.insert(0, '')\n"
        "load_image('dot.png')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(picture.parent)], check=True, timeout=60)
    assert not (picture.parent / "ran").exists()


def test_the_worker_runs_the_code_that_asked_it(tmp_path, picture):
    """Another copy of the package, which is installed here, is not taken instead."""
    copy = tmp_path / "copy" / "mmchat"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(mmchat.__file__).parent, copy, ignore=ignored)
    process = copy / "images" / "worker" / "process.py"
    changed = process.read_text().replace('"notices": notices', '"notices": ["of the copy"]')
    process.write_text(changed)
    program = f"import mmchat; print(mmchat.load_image({str(picture)!r}).notices)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=copy.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "('of the copy',)\n"


@pytest.mark.parametrize("limit", ["-t 8", "-v 1100000"])
def test_a_lower_limit_of_the_system_is_kept(limit, picture):
    program = f"from mmchat.images import load_image; print(load_image({str(picture)!r}).width)"
    command = ["bash", "-c", f'ulimit {limit}; exec "$0" -c "$1"', sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_a_worker_that_cannot_start_is_not_the_pictures_fault(monkeypatch, picture):
    monkeypatch.setattr(worker, "_CODE", "import nothing_of_this_name")
    assert "the decoder failed; is mmchat installed as a whole?" in reason(picture.read_bytes())
