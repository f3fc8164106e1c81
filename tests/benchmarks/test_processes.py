"""What is measured in processes of their own."""

from types import SimpleNamespace

import pytest

from benchmarks import fresh, processes
from mmchat.bench.variants import Variant
from mmchat.runtime.compiler import CACHE_VARIABLE

PLAIN, INT8 = Variant(), Variant("int8", "on")
ASKED = ["--quantize=int8", "--compile=on"]


@pytest.mark.parametrize(
    ("variants", "started"),
    [
        ((PLAIN,), {"": []}),
        ((PLAIN, INT8), {"": [], ", --quantize=int8 --compile=on": ASKED}),
    ],
)
def test_each_way_of_running_the_model_is_started_twice(variants, started, monkeypatch):
    given = []

    def first_token(options, picture, cache):
        given.append((list(options), cache))
        return fresh.Process(wall=len(given), cpu=0, stdout="")

    monkeypatch.setattr(fresh, "first_token", first_token)
    monkeypatch.setattr(fresh, "help_text", lambda: fresh.Process(0, 0, ""))
    plan = SimpleNamespace(variants=variants, transformers=False)
    found = processes.startup(plan, lambda _: None)["seconds"]
    names = [f"first token, {state} cache{way}" for way in started for state in ("cold", "warm")]
    assert list(found) == ["help", *names]
    assert [found[name]["wall"] for name in names] == list(range(1, len(names) + 1))
    assert [options for options, _ in given] == [o for o in started.values() for _ in range(2)]
    caches = [cache for _, cache in given]
    assert caches[::2] == caches[1::2]
    assert len(set(caches)) == len(started)


@pytest.mark.process
def test_a_child_runs_nothing_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mmchat", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the folder')")
    assert "Usage: mmchat" in fresh.help_text().stdout


def test_a_cold_cache_is_cold_though_this_process_has_set_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, "mine")
    given = {}
    monkeypatch.setattr(fresh, "run_fresh", lambda _, environment: given.update(environment))
    fresh.first_token((), b"", tmp_path)
    assert given == {"XDG_CACHE_HOME": str(tmp_path), CACHE_VARIABLE: str(tmp_path / "inductor")}
