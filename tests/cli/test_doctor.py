"""Verdicts, tables and problems of machines that are written down here."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from mmchat.cli import console
from mmchat.doctor import Diagnosis, problems
from mmchat.doctor.machine import Device, Machine, examine
from mmchat.doctor.outlook import outlooks
from mmchat.doctor.problems import find_problems
from mmchat.doctor.verdict import recommend
from mmchat.estimate.speed import BusyError, ReadingSpeeds
from mmchat.hardware.bandwidth import Bandwidth
from mmchat.hardware.placement import Placement
from mmchat.hub.holdings import Holding
from mmchat.limits import MIB
from mmchat.quant.kernels.ops import Choice

GIB = 1024 * MIB
GB = 10**9


def written_down(free_gib, gb_per_second=30.0, device="cpu", **changes):
    """A machine that reads weights of every format at the speed of its memory."""
    rate = gb_per_second * GB
    free = int(free_gib * GIB)
    return replace(
        Machine(
            cores=8,
            threads=8,
            load=0.5,
            limited_by=None,
            devices=(Device(device, "Example", 2 * free, free),),
            dtype="bfloat16",
            reading=ReadingSpeeds(
                Bandwidth(rate, 256 * MIB, 8), dict.fromkeys(("none", "int8", "int4"), rate)
            ),
            kernels=(
                Choice("int4", "C", "compiled for this machine, AVX2"),
                Choice("attention", "C for some, else torch", "compiled for this machine, AVX2"),
            ),
            cache="/home/me/.cache/huggingface/hub",
            disk_free=100 * GIB,
            versions={"mmchat": "0.1.0", "torch": "2.13.0", "cuda": None},
        ),
        **changes,
    )


@pytest.fixture(autouse=True)
def nothing_downloaded(monkeypatch):
    monkeypatch.setattr("mmchat.doctor.verdict.holding", lambda repo: Holding("absent"))
    monkeypatch.setattr(problems.shutil, "which", lambda name: None)
    unlimited = problems.resource.RLIM_INFINITY
    monkeypatch.setattr(problems.resource, "getrlimit", lambda which: (unlimited, unlimited))


@pytest.fixture
def with_gpu(monkeypatch):
    """Lets the GPU be chosen that this machine has not got."""
    placement = Placement(torch.device("cuda:0"), torch.bfloat16, "as asked")
    monkeypatch.setattr("mmchat.doctor.outlook.choose_placement", lambda *_: placement)


def found(machine):
    return tuple(outlooks(machine))


def said(machine):
    return recommend(machine, found(machine))


def of_the_11b(machine):
    """Scheme -> outlook of the chat model."""
    return {o.scheme: o for o in found(machine) if o.short == "llama3.2-11B"}


# Speeds


def test_a_token_takes_as_long_as_reading_its_weights_and_caches():
    """15.01 GB of weights and the cache of 1,024 tokens at 100 GB/s; with a picture 18.36 GB, and
    0.21 GB of its keys and values."""
    text, picture = of_the_11b(written_down(200, 100.0))["none"].speeds
    assert text == pytest.approx(100 / (15.01 + 0.134), rel=2e-3)
    assert picture == pytest.approx(100 / (18.36 + 0.134 + 0.21), rel=2e-3)


def test_each_format_is_read_at_its_own_speed():
    machine, slow = written_down(200, 100.0), written_down(200, 100.0)
    slow.reading.linears["int4"] = 10 * GB
    before = {scheme: o.speeds[0] for scheme, o in of_the_11b(machine).items()}
    after = {scheme: o.speeds[0] for scheme, o in of_the_11b(slow).items()}
    assert (after["none"], after["int8"]) == (before["none"], before["int8"])
    # the 3.93 GB of the text layers take ten times as long; the head is int8
    assert 1 / after["int4"] - 1 / before["int4"] == pytest.approx(3.926 * 0.09, rel=1e-2)


def test_of_a_small_model_no_speed_is_told():
    tiny = [o for o in found(written_down(8)) if o.spec.name == "tiny"]
    assert [(o.scheme, o.speeds, o.fits) for o in tiny] == [("none", None, True)]


# The verdict


@pytest.mark.parametrize(
    ("free", "rate", "model", "scheme"),
    [
        (7.5, 30, "11B", "int4"),
        (24, 30, "11B", "int4"),  # int8 would be too slow
        (24, 60, "11B", "int4"),  # int8 is pleasant too, but larger and slower
        (24, 200, "11B", "none"),
        (200, 200, "11B", "none"),  # the 90B would be too slow
        (60, 500, "90B", "int4"),
        (200, 2000, "90B", "none"),
        (24, 5, "11B", "int4"),  # slow: the most exact that is nearly the quickest
        (7, 30, "11B", "int4-g128"),  # the only one that fits
    ],
)
def test_the_verdict_is_the_largest_model_that_writes_pleasantly(free, rate, model, scheme):
    chosen = said(written_down(free, rate))
    assert (chosen.model, chosen.scheme) == (f"Llama-3.2-{model}-Vision-Instruct", scheme)


def test_int8_is_recommended_where_int4_is_hardly_faster():
    machine = written_down(24, 60)
    machine.reading.linears["int4"] = 32 * GB
    assert said(machine).scheme == "int8"


def test_the_verdict_says_the_pace_and_the_commands():
    chosen = said(written_down(16, 30))
    assert re.fullmatch(
        r"This machine runs llama3\.2-11B in int4: about \d\.\d tokens/s with a picture\.",
        chosen.text,
    )
    assert chosen.commands == (
        "mmchat download llama3.2-11B",
        "mmchat chat llama3.2-11B --quantize int4",
    )


def test_a_model_that_is_here_is_not_downloaded_again(monkeypatch):
    monkeypatch.setattr("mmchat.doctor.verdict.holding", lambda repo: Holding("present"))
    assert said(written_down(24, 200)).commands == ("mmchat chat llama3.2-11B",)


def test_where_only_another_family_fits_it_is_recommended():
    chosen = said(written_down(6.6))
    assert (chosen.model, chosen.scheme) == ("llava-1.5-7b-hf", "int4")


def test_of_each_family_the_smallest_comes_first():
    names = list(dict.fromkeys(o.short for o in found(written_down(24))))
    assert names[0] == "tiny"
    assert names[-4:] == ["llava-1.5-7b", "llava-1.5-13b", "qwenvl-base", "qwenvl-chat"]


def test_too_little_memory_leaves_the_built_in_model():
    chosen = said(written_down(4))
    assert (chosen.model, chosen.commands) == (None, ("mmchat chat",))
    assert "even int4-g128 needs 7.0 GiB and 4.0 GiB are free" in chosen.text


def test_without_a_measurement_the_verdict_tells_no_pace():
    chosen = said(written_down(24, reading=None))
    assert chosen.text == (
        "This machine runs llama3.2-11B unquantised; its speed was not measured."
    )


@pytest.mark.usefixtures("with_gpu")
def test_on_a_gpu_no_weight_stays_in_the_file():
    on_gpu = written_down(24, 1000, device="cuda:0")
    assert of_the_11b(on_gpu)["none"].need.in_file == 0
    assert said(on_gpu).scheme == "none"


# Problems


def problem_texts(machine):
    return [f"{p.problem}; {p.remedy}" for p in find_problems(machine)]


def test_a_machine_in_order_has_no_problems():
    assert problem_texts(written_down(24)) == []


def test_few_threads_name_the_variable_that_limits_them(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (text,) = problem_texts(written_down(24, threads=1))
    assert text == "torch uses 1 of 8 processors; unset OMP_NUM_THREADS, which is 1"


def test_missing_kernels_name_the_reason_and_the_compiler():
    choice = Choice("int4", "torch int4pack", "no C compiler here")
    (text,) = problem_texts(written_down(24, kernels=(choice,)))
    assert "no C compiler here; install gcc" in text


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch):
    monkeypatch.setattr(problems.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(problems.torch.version, "cuda", None)
    assert "install the CUDA build" in problem_texts(written_down(24))[0]
    monkeypatch.setattr(problems.torch.version, "cuda", "12.4")
    assert "built for CUDA 12.4 and finds no GPU" in problem_texts(written_down(24))[0]


def test_a_busy_machine_a_small_disk_and_a_limited_shell_are_problems(monkeypatch):
    monkeypatch.setattr(problems.resource, "getrlimit", lambda which: (4 * GIB, 4 * GIB))
    machine = written_down(24, load=20.0, cache="/data", disk_free=3 * GIB)
    busy, limited, full = problem_texts(machine)
    assert busy.startswith("the machine is busy (load 20.0 on 8 processors)")
    assert "4.0 GiB (ulimit -v)" in limited
    assert full.startswith("3.0 GiB are free at /data")


# The command


@pytest.fixture
def doctor(run_real, monkeypatch):
    """Runs the command on a written-down machine, on a terminal of a width, or into a pipe."""

    def diagnosis(machine, ranks):
        seen, problems = found(machine), tuple(find_problems(machine))
        shared = tuple(outlooks(machine, ranks)) if ranks > 1 else ()
        return Diagnosis(recommend(machine, seen), machine, seen, problems, shared)

    def run(machine, *arguments, columns=80, piped=False):
        if not piped:
            monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stdout)
        monkeypatch.setattr("mmchat.doctor.diagnose", lambda _, ranks: diagnosis(machine, ranks))
        monkeypatch.setenv("COLUMNS", str(columns))
        return run_real("doctor", *arguments)

    return run


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(doctor, columns):
    done = doctor(written_down(24, load=20.0), columns=columns)
    assert done.exit_code == 0, done.stderr
    shown = done.stdout.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert max(map(len, shown.splitlines())) <= columns


@pytest.mark.slow
def test_what_each_of_eight_ranks_needs_of_the_90b(doctor):
    done = doctor(written_down(8 * 24), "--parallel", "8", piped=True)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    at = lines.index("MODEL SCHEME EACH NEEDS FITS")
    assert "llama3.2-90B none 21.8 GiB ✔ yes" in lines[at:]
    assert "int8 11.6 GiB ✔ yes" in lines[at:]
    assert any("For each of 8 ranks (--parallel 8)" in line for line in lines)
    assert doctor(written_down(24), "--parallel", "7").exit_code == 2


def test_lines_in_a_pipe_are_not_broken(doctor):
    machine = written_down(24, limited_by="/sys/fs/cgroup/memory.max")
    piped = doctor(machine, columns=60, piped=True).stdout
    lines = piped.splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert "device     cpu: Example; 24.0 GiB of 48.0 GiB free, limited by /sys/fs/cgr" in piped
    assert "reading    weights in bfloat16 30.0, int8 30.0, int4 30.0 GB/s" in piped
    assert "attention: C for some, else torch (compiled for this machine, AVX2)" in piped
    assert any(
        line.startswith("In bfloat16 on the processor") and line.endswith("need as much.")
        for line in lines
    )
    shown = doctor(machine, columns=60).stdout
    assert len(lines) < len(shown.splitlines())


def test_the_verdict_comes_first_and_the_models_in_a_table(doctor):
    lines = doctor(written_down(24)).stdout.splitlines()
    assert lines[0].startswith("This machine runs llama3.2-11B in int4: about ")
    assert lines[1].strip() == "mmchat download llama3.2-11B"
    header = next(i for i, line in enumerate(lines) if "MODEL" in line)
    rows = [line.split() for line in lines[header + 1 : header + 10]]
    assert rows[0] == ["tiny", "none", rows[0][2], "MiB", "✔", "yes", "-", "-"]
    assert rows[1][:6] == ["llama3.2-11B", "none", "18.7", "GiB", "✔", "yes"]
    assert rows[3][:5] == ["int4", "7.2", "GiB", "✔", "yes"]
    assert rows[5][:6] == ["llama3.2-90B", "none", "164.3", "GiB", "✘", "no"]


def test_problems_are_listed_with_the_next_step(doctor):
    lines = doctor(written_down(24, load=20.0)).stdout.splitlines()
    assert any(line.startswith("! the machine is busy") for line in lines)
    assert " ".join(line.strip() for line in lines[-2:]) == (
        "run mmchat doctor again when it is idle; while it is not, fewer threads"
        " (OMP_NUM_THREADS=1) may be faster, as each step waits for the slowest"
    )


def test_names_from_outside_cannot_drive_the_terminal(doctor):
    devices = (Device("cpu", "Evil\x1b[2J\x07", 24 * GIB, 24 * GIB),)
    assert "\x1b[2J" not in doctor(written_down(24, devices=devices)).stdout


def test_json_is_one_object_with_every_model_and_scheme(doctor):
    report = json.loads(doctor(written_down(24), "--json").stdout)
    assert report["verdict"]["scheme"] == "int4"
    assert report["reading"]["bandwidth"]["bytes_per_second"] == 30 * GB
    schemes = report["models"]["Llama-3.2-90B-Vision"]
    assert list(schemes) == ["none", "int8", "int4", "int4-g128"]
    assert schemes["int8"]["fits"] is False
    assert schemes["int8"]["memory"]["total"] > 80 * GIB
    assert set(schemes["int8"]["tokens_per_second"]) == {"text", "picture"}
    assert report["devices"][0]["available"] == 24 * GIB
    assert [kernel["serves"] for kernel in report["kernels"]] == ["int4", "attention"]


@pytest.mark.slow
def test_this_machine_can_be_diagnosed(run_real):
    report = json.loads(run_real("doctor", "--json").stdout)
    if report["reading"] is None:  # other programs were in the way, here and now
        assert report["unmeasured"] == "busy, no figure"
        return
    assert report["reading"]["bandwidth"]["bytes_per_second"] > 10**8
    assert all(speed > 10**7 for speed in report["reading"]["linears"].values())
    assert report["devices"][-1]["name"] == "cpu"
    assert report["versions"]["torch"]


def test_a_machine_that_is_too_busy_to_be_measured_is_given_no_figure(monkeypatch):
    monkeypatch.setattr("mmchat.doctor.machine.measure_reading", busy)
    machine = examine(lambda stage: None)
    assert (machine.reading, machine.unmeasured) == (None, "busy, no figure")
    loaded = replace(written_down(24, reading=None), load=20.0)
    assert "so no speeds are given" in problem_texts(loaded)[0]


def busy(*_):
    raise BusyError
