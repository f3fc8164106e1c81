import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmchat.checkpoints.manifest import read_manifest
from tests.cli.hub_fixtures import (
    COMMIT,
    FILES,
    REPO,
    ROOT,
    USUAL,
    WEIGHTS,
    interrupt,
    wait_until,
)
from tests.hub_server import LARGE

pytestmark = pytest.mark.process

WEIGHTS_PATH = "model.safetensors"


def hf(machine, *args):
    command = [str(Path(sys.executable).with_name("hf")), *args]
    return subprocess.run(
        command, env=machine.environment({}), capture_output=True, text=True, check=False
    )


# What comes, and where


def test_a_fresh_download_prints_the_folder_alone(machine):
    done = machine.run("download", REPO)
    assert (done.stdout, done.exit_code) == (f"{machine.snapshot}\n", 0)
    assert machine.tree() == USUAL  # the weights once, no README, nothing of original/
    assert f"{REPO} at commit {COMMIT}" in done.stderr
    assert "5 files, 297.9 KiB" in done.stderr
    assert "free in" in done.stderr


def test_other_tools_share_the_cache(machine):
    machine.run("download", REPO)
    verified = hf(machine, "cache", "verify", REPO)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    machine.hub.requests.clear()
    again = hf(machine, "download", REPO, *USUAL)
    assert str(machine.snapshot) in again.stdout
    assert not [seen for seen in machine.hub.sent("GET", "/resolve/") if seen.server == "hub"]


def test_the_commit_is_recorded_with_every_hash(machine):
    machine.run("download", REPO)
    manifest = read_manifest(machine.root / "mmchat" / f"{COMMIT}.json")
    assert (manifest.repo, manifest.revision, manifest.commit) == (REPO, "main", COMMIT)
    assert manifest.files.keys() == USUAL.keys()
    assert manifest.files[WEIGHTS_PATH].etag == manifest.files[WEIGHTS_PATH].sha256
    assert (machine.root / "refs" / "main").read_text() == COMMIT


def test_a_second_run_asks_one_question_and_a_pinned_one_none(machine):
    machine.run("download", REPO)
    done = machine.run("download", REPO)
    assert done.stdout == f"{machine.snapshot}\n"
    assert [seen.path for seen in machine.hub.requests] == [f"/api/models/{REPO}/revision/main"]
    pinned = machine.run("download", REPO, "--revision", COMMIT)
    assert (pinned.stdout, machine.hub.requests) == (done.stdout, [])


def test_offline_finds_what_is_there_and_asks_nobody(machine):
    missing = machine.run("download", REPO, "--offline")
    assert (missing.stdout, missing.exit_code) == ("", 6)
    assert missing.stderr == (
        f"mmchat: error: {REPO} is not complete on this machine, and this run may not fetch it"
        " (--offline or HF_HUB_OFFLINE); 'mmchat list' shows what is here\n"
    )
    assert machine.hub.requests == []
    machine.run("download", REPO)
    for extra in ({"HF_HUB_OFFLINE": "1"}, {"MMCHAT_OFFLINE": "1"}):
        found = machine.run("download", REPO, **extra)
        assert (found.stdout, found.exit_code) == (f"{machine.snapshot}\n", 0)
        assert machine.hub.requests == []


def test_offline_does_not_trust_a_folder_that_lost_a_file(machine):
    machine.run("download", REPO)
    (machine.snapshot / "config.json").unlink()
    assert machine.run("download", REPO, "--offline").exit_code == 6
    assert machine.run("download", REPO).exit_code == 0
    assert machine.tree() == USUAL


def test_a_dry_run_counts_bytes_and_writes_nothing(machine):
    done = machine.run("download", REPO, "--dry-run", "--json")
    found = json.loads(done.stdout)
    assert found["commit"] == COMMIT
    assert found["missing_bytes"] == found["total_bytes"] == sum(map(len, USUAL.values()))
    assert {f["path"]: f["bytes"] for f in found["files"]} == {n: len(d) for n, d in USUAL.items()}
    assert (found["fetched_bytes"], found["dry_run"]) == (0, True)
    assert not machine.root.exists()
    assert "would fetch 5 files" in done.stderr


def test_json_says_what_was_fetched(machine):
    found = json.loads(machine.run("download", REPO, "--json", "-q").stdout)
    assert found["fetched_bytes"] == sum(map(len, USUAL.values()))
    assert found["path"] == str(machine.snapshot)


def test_quiet_says_nothing(machine):
    assert machine.run("download", REPO, "-q").stderr == ""


def test_the_original_format_is_metas_files_alone(machine):
    done = machine.run("download", REPO, "--format", "original")
    assert done.exit_code == 0
    wanted = {n: d for n, d in FILES.items() if n.startswith("original/")}
    assert machine.tree() == wanted | {"LICENSE.txt": FILES["LICENSE.txt"]}
    machine.run("download", REPO)
    assert machine.tree() == wanted | USUAL


def test_patterns_choose_files_and_one_without_a_match_is_an_error(machine):
    done = machine.run("download", REPO, "--include", "*.json", "--exclude", "original/*")
    assert sorted(machine.tree()) == ["config.json", "generation_config.json", "tokenizer.json"]
    assert done.exit_code == 0
    for patterns in (["--include", "*.gguf"], ["--exclude", "*.gguf"], ["--exclude", "*"]):
        done = machine.run("download", REPO, *patterns)
        assert (done.stdout, done.exit_code) == ("", 2), done.stderr


def test_a_local_dir_gets_plain_files_and_a_manifest(machine, tmp_path):
    folder = tmp_path / "here"
    done = machine.run("download", REPO, "--local-dir", str(folder))
    assert done.stdout == f"{folder}\n"
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert files.keys() == {*USUAL, "mmchat-manifest.json"}
    assert all(files[name].read_bytes() == data for name, data in USUAL.items())
    assert not (machine.home / "hub").exists()
    again = machine.run("download", REPO, "--local-dir", str(folder))
    assert (again.stdout, len(machine.hub.requests)) == (done.stdout, 1)


def test_a_file_of_the_users_in_a_local_dir_is_not_replaced(machine, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    done = machine.run("download", REPO, "--local-dir", str(folder))
    assert done.exit_code == 2
    assert "config.json' is there already and differs" in done.stderr
    assert (folder / "config.json").read_text() == "mine"


def test_paths_that_leave_the_folder_are_never_written(machine):
    hostile = ("../../evil.json", "a\\b.json", "/abs.json", "original/../x.json", ".hid/x.json")
    machine.hub.files |= dict.fromkeys(hostile, b"evil")
    assert machine.run("download", REPO, "--include", "*.json").exit_code == 0
    assert not [path for path in machine.home.rglob("*") if path.is_file() and (
        path.read_bytes() == b"evil")]  # fmt: skip


# What the server refuses


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["acme/ghost"], 6, "no repository 'acme/ghost'"),
        ([REPO, "--revision", "v9"], 6, "has no revision 'v9'"),
        ([REPO, "--revision", "../x"], 2, "no branch, tag or commit"),
        (["no-such-model"], 3, "no model 'no-such-model'"),
        (["tiny"], 2, "built in"),
        ([REPO, "--format", "original", "--include", "*"], 2, "leave --format out"),
    ],
)
def test_what_does_not_exist_is_named(machine, args, code, message):
    done = machine.run("download", *args)
    assert (done.stdout, done.exit_code) == ("", code)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_gated_repository_tells_the_three_states_apart(machine):
    machine.hub.faults.gated = True
    page = f"{machine.hub.url}/{REPO}"
    none = machine.run("download", REPO)
    bad = machine.run("download", REPO, "--token", "hf_bad")
    pending = machine.run("download", REPO, HF_TOKEN="hf_pending")
    assert [none.exit_code, bad.exit_code, pending.exit_code] == [6, 6, 6]
    assert "there is no token" in none.stderr
    assert page in none.stderr
    assert "hf auth login" in none.stderr
    assert "does not accept the token from --token" in bad.stderr
    assert "account 'ann' has no access" in pending.stderr
    assert page in pending.stderr
    assert not machine.root.exists()
    assert "hf_" not in bad.stderr + pending.stderr


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(machine):
    machine.hub.faults.gated = True
    done = machine.run("download", REPO, HF_TOKEN="hf_good")
    assert done.exit_code == 0, done.stderr
    by_server = {"hub": set(), "cdn": set()}
    for seen in machine.hub.requests:
        by_server[seen.server].add(seen.headers.get("authorization"))
    assert by_server == {"hub": {"Bearer hf_good"}, "cdn": {None}}


def test_no_server_and_a_silent_server_have_their_own_messages(machine):
    down = machine.run("download", REPO, HF_ENDPOINT="http://me:secret@127.0.0.1:9")
    assert "secret" not in down.stderr + down.stdout
    assert (down.exit_code, "no connection to http://…@127.0.0.1:9" in down.stderr) == (6, True)
    machine.hub.faults.hangs = True
    silent = machine.run("download", REPO, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert (silent.exit_code, "did not answer within 1 s" in silent.stderr) == (6, True)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_once_is_asked_again(machine, status):
    for place in ("/revision/", f"/{WEIGHTS_PATH}", "/config.json"):
        machine.hub.faults.status_once[place] = [status]
    assert machine.run("download", REPO).exit_code == 0
    assert machine.tree() == USUAL


# What the server sends wrongly: never a bad file in place


def test_a_connection_that_breaks_is_continued_from_there(machine):
    machine.hub.faults.cut_once = 100_000
    assert machine.run("download", REPO).exit_code == 0
    assert machine.tree() == USUAL
    ranges = [s.headers.get("range") for s in machine.hub.sent("GET") if s.server == "cdn"]
    assert sum(1 for value in ranges if value) == 1


def test_a_server_without_ranges_is_read_from_the_start(machine):
    machine.hub.faults.cut_once = 100_000
    machine.hub.faults.ignores_range = True
    assert machine.run("download", REPO).exit_code == 0
    assert machine.tree() == USUAL


@pytest.mark.parametrize("fault", ["wrong_bytes", "too_long", "etag_changed"])
def test_content_that_is_not_the_listed_one_is_not_kept(machine, fault):
    setattr(machine.hub.faults, fault, True)
    done = machine.run("download", REPO)
    assert (done.stdout, done.exit_code) == ("", 6)
    assert any(repr(name) in done.stderr for name in USUAL)
    assert machine.tree() == {}
    assert WEIGHTS not in [path.read_bytes() for path in machine.root.rglob("*") if path.is_file()]
    setattr(machine.hub.faults, fault, False)
    assert machine.run("download", REPO).exit_code == 0
    assert machine.tree() == USUAL


def test_a_part_with_wrong_bytes_is_found_and_fetched_again(machine):
    part = part_of_weights(machine)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" + WEIGHTS[1:200_000])
    assert machine.run("download", REPO).exit_code == 0
    assert machine.tree() == USUAL


def test_a_blob_with_wrong_bytes_of_another_tool_is_replaced(machine):
    part = part_of_weights(machine)
    blob = part.with_name(part.name.partition(".")[0])
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"\0" + WEIGHTS[1:])
    assert machine.run("download", REPO).exit_code == 0
    assert machine.tree() == USUAL


# Stop and go on


def part_of_weights(machine) -> Path:
    etag = machine.hub.entry(WEIGHTS_PATH)["lfs"]["oid"]
    return machine.root / "blobs" / f"{etag}.mmchat.part"


def start_slowly(machine, *args):
    """A download that is under way, with some bytes of the weights on disk."""
    machine.hub.faults.drip = 0.05
    process = machine.start("download", REPO, *args)
    part = part_of_weights(machine)
    wait_until(lambda: part.exists() and part.stat().st_size > 20_000)
    return process, part


def test_ctrl_c_ends_within_a_second_and_keeps_what_came(machine):
    begin = time.monotonic()
    machine.run("--version")
    startup = time.monotonic() - begin  # a loaded machine is slow in everything
    process, part = start_slowly(machine)
    done, seconds = interrupt(process)
    assert (done.stdout, done.exit_code) == ("", 130)
    assert seconds < max(1, 3 * startup)
    assert done.stderr.splitlines()[-1] == "stopped; run the same command to go on"
    kept = part.stat().st_size
    assert 20_000 < kept < len(WEIGHTS)
    assert "Traceback" not in done.stderr
    machine.hub.faults.drip = 0
    again = machine.run("download", REPO)
    assert "kept from before" in again.stderr
    assert machine.tree() == USUAL
    assert machine.parts == []
    [seen] = [s for s in machine.hub.sent("GET", WEIGHTS_PATH) if s.server == "cdn"]
    assert seen.headers["range"] == f"bytes={kept}-"  # not a byte twice


def test_kill_9_leaves_only_what_can_be_continued(machine):
    process, part = start_slowly(machine)
    process.kill()
    process.wait()
    kept = part.stat().st_size
    assert machine.tree() == {}
    assert "incomplete" in machine.run("list").stdout
    machine.hub.faults.drip = 0
    assert machine.run("download", REPO).exit_code == 0
    assert machine.tree() == USUAL
    [seen] = [s for s in machine.hub.sent("GET", WEIGHTS_PATH) if s.server == "cdn"]
    assert seen.headers["range"] == f"bytes={kept}-"


def start_second(machine, *args):
    """Another download of the same, which waits for the first and has said so."""
    machine.hub.faults.drip = 1.0
    other = machine.start("download", REPO, *args)
    lines = []
    while "another mmchat is fetching this model; waiting for it\n" not in lines:
        assert other.poll() is None, lines
        lines.append(other.stderr.readline())
    return other


def test_a_second_download_waits_for_the_first_and_fetches_nothing_again(machine):
    process, _ = start_slowly(machine)
    other = start_second(machine, "--json")
    machine.hub.faults.drip = 0
    assert process.wait(60) == 0
    out, err = other.communicate(timeout=60)
    assert (other.returncode, err) == (0, "")
    assert json.loads(out)["fetched_bytes"] == 0
    assert machine.tree() == USUAL
    assert len(machine.hub.sent("GET", WEIGHTS_PATH)) == 2  # the hub, and where it redirects to


def test_a_second_download_goes_on_where_a_killed_one_stopped(machine):
    process, part = start_slowly(machine)
    other = start_second(machine)
    process.kill()
    process.wait()
    kept = part.stat().st_size
    machine.hub.faults.drip = 0
    assert other.wait(60) == 0
    assert machine.tree() == USUAL
    seen = [s for s in machine.hub.sent("GET", WEIGHTS_PATH) if s.server == "cdn"]
    assert seen[-1].headers["range"] == f"bytes={kept}-"


def test_two_downloads_into_one_folder_take_turns(machine, tmp_path):
    machine.hub.faults.drip = 0.05
    folder = tmp_path / "mine"
    process = machine.start("download", REPO, "--local-dir", str(folder))
    wait_until(lambda: list(folder.glob(".mmchat/*.part")))
    other = start_second(machine, "--local-dir", str(folder))
    machine.hub.faults.drip = 0
    assert (process.wait(60), other.wait(60)) == (0, 0)
    assert (folder / WEIGHTS_PATH).read_bytes() == WEIGHTS
    assert not (folder / ".mmchat").exists()


KILLER = """
import os, random, signal, sys, time
from mmchat.cli.app import app
import mmchat.hub.download, huggingface_hub, httpx2
from huggingface_hub import HfApi, hf_hub_url, get_hf_file_metadata
from huggingface_hub.utils import hf_raise_for_status
chance, ends = random.Random(int(sys.argv[2])), []
while len(ends) < int(sys.argv[3]):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        app(["download", sys.argv[1]])
    time.sleep(chance.uniform(0.02, 0.35))
    os.kill(child, signal.SIGKILL)
    ends.append(os.waitpid(child, 0)[1])
print(sum(end == signal.SIGKILL for end in ends))
"""


def kill_many_times(machine, seed: int, times: int) -> int:
    """Start a download and kill it at a random moment, again and again; kills that hit."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, REPO, str(seed), str(times)],
        env=machine.environment({}), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_kills_at_random_moments_tear_nothing(machine):
    """Never a torn file under its name, and at most a chunk of 64 KiB comes twice for each kill."""
    weights, hits, rounds = WEIGHTS * 8, 0, 0
    machine.hub.files[WEIGHTS_PATH] = weights
    usual = USUAL | {WEIGHTS_PATH: weights}
    large = sum(len(data) for data in usual.values() if len(data) >= LARGE)
    while hits < 200:
        rounds += 1
        machine.hub.requests.clear()
        machine.hub.large_bytes = 0
        machine.hub.faults.drip = 0.004
        killed = kill_many_times(machine, rounds, 20)
        hits += killed
        for name, data in machine.tree().items():
            assert data == usual[name]
        machine.hub.faults.drip = 0
        machine.start("download", REPO).communicate()
        assert machine.tree() == usual
        assert machine.parts == []
        assert machine.hub.large_bytes <= large + killed * 64 * 1024
        seen = [s for s in machine.hub.sent("GET", WEIGHTS_PATH) if s.server == "cdn"]
        starts = [int(s.headers.get("range", "bytes=0-")[6:-1]) for s in seen]
        assert starts == sorted(starts)  # no run went back behind what another had kept
        assert machine.run("remove", REPO, "--yes").exit_code == 0
        print(f"{hits} kills in {rounds} downloads; {machine.hub.large_bytes - large:,} twice")


# Space


def test_too_little_space_is_said_with_numbers_before_the_first_byte(machine):
    machine.hub.faults.sizes[WEIGHTS_PATH] = 10**15
    done = machine.run("download", REPO)
    assert (done.stdout, done.exit_code) == ("", 7)
    assert "needs 1,010,000,000" in done.stderr
    assert "are free; free " in done.stderr
    assert all(seen.path.endswith("/config.json") for seen in machine.hub.sent("GET", "/resolve/"))
    assert not machine.root.exists()


def test_a_disk_that_fills_up_keeps_the_part(machine):
    done = machine.run("download", REPO, before="ulimit -f 100")  # blocks of 1,024 bytes
    assert (done.stdout, done.exit_code) == ("", 7)
    assert "File too large; what was fetched is kept" in done.stderr
    assert part_of_weights(machine).stat().st_size == 102_400
    assert machine.tree() == {}
    assert machine.run("download", REPO).exit_code == 0
    assert machine.tree() == USUAL


def test_a_cache_that_cannot_be_written_is_a_disk_error(machine):
    machine.home.write_text("a file in the place of a folder")
    done = machine.run("download", REPO)
    assert (done.stdout, done.exit_code) == ("", 7)


# A model that is not there


def test_generate_says_what_to_run(machine):
    done = machine.run("generate", "llama3.2-11B", "-p", "hi")
    assert (done.stdout, done.exit_code) == ("", 3)
    assert "'mmchat download Llama-3.2-11B-Vision-Instruct' (about 19.9 GiB)" in done.stderr
    assert machine.hub.requests == []


@pytest.mark.parametrize(("answer", "is_asked"), [(b"n\n", False), (b"\n", False), (b"y\n", True)])
def test_on_a_terminal_generate_offers_the_download(machine, answer, is_asked):
    machine.hub.repo = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "mmchat", "generate", "llama3.2-11B", "-p", "hi"]
    process = subprocess.Popen(
        command, env=machine.environment({"NO_COLOR": "1", "TERM": "dumb"}), cwd=ROOT,
        stdin=terminal, stdout=subprocess.PIPE, stderr=terminal,
    )  # fmt: skip
    machine.processes.append(process)
    os.close(terminal)
    os.write(keyboard, answer)
    shown = b""
    while True:
        try:
            shown += os.read(keyboard, 4096)
        except OSError:
            break
    process.wait(60)
    os.close(keyboard)
    assert b"about 19.9 GiB" in shown
    assert b"are free in" in shown
    assert b"download it now? [y/N]" in shown
    assert bool(machine.hub.requests) is is_asked
    assert bool(machine.tree()) is is_asked
    if not is_asked:
        said = b" ".join(shown.split())
        assert said.endswith(
            b"mmchat: error: Llama-3.2-11B-Vision-Instruct is not here;"
            b" 'mmchat download Llama-3.2-11B-Vision-Instruct' fetches it"
        )
    assert process.returncode == 3  # after the download: what the fake hub serves is no model


# Weights that another program quantised


def with_config(machine, **config):
    text = json.dumps({"model_type": "mllama", **config}).encode()
    machine.hub.files["config.json"] = text


def test_what_becomes_of_packed_weights_is_said_before_they_come(machine):
    with_config(machine, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    done = machine.run("download", REPO, "--dry-run")
    assert done.exit_code == 0
    assert "packed by bitsandbytes int8; they are loaded as int8" in done.stderr
    assert not machine.hub.sent("GET", f"/{WEIGHTS_PATH}")


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_packed_weights_of_a_family_that_reads_none_are_not_fetched(machine, key):
    with_config(machine, **{"model_type": "qwen", key: {"bits": 4, "group_size": 128}})
    done = machine.run("download", REPO)
    assert done.exit_code == 3
    assert f"config.json: {key}: a 'qwen_vl' quantised by another program" in done.stderr
    assert not machine.hub.sent("GET", f"/{WEIGHTS_PATH}")


def test_packed_weights_that_would_not_load_are_not_fetched(machine):
    with_config(machine, quantization_config={"quant_method": "hqq"})
    done = machine.run("download", REPO)
    assert (done.stdout, done.exit_code) == ("", 3)
    assert "packed by 'hqq'; mmchat reads bitsandbytes" in done.stderr
    assert not machine.hub.sent("GET", f"/{WEIGHTS_PATH}")
    assert not machine.root.exists()
