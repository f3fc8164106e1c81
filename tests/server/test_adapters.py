"""Adapters behind the server's routes: each is a model by its name, beside the one it changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

import mmchat
from mmchat.catalog.adapters import find_adapters
from mmchat.catalog.find import find_model
from mmchat.cli.app import app
from mmchat.cli.serve import _apart
from mmchat.errors import UsageError
from mmchat.loading.loader import load_with
from mmchat.loading.options import LoadOptions
from mmchat.server.app import make_app
from mmchat.server.options import ServerOptions
from mmchat.server.service import Service, names_of
from tests.adapter_folders import low_rank, write_adapter
from tests.loading.test_adapters import BASE, MODULES, WEIGHTS
from tests.loading.test_loader import write_hf_folder

GREEDY = mmchat.SamplingParams(temperature=0.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model `base`, and its adapters `birds` and `plants`."""
    folder = tmp_path_factory.mktemp("adapters")
    write_hf_folder(folder / "base", BASE, WEIGHTS)
    write_adapter(folder / "birds", low_rank(WEIGHTS, MODULES))
    write_adapter(folder / "plants", low_rank(WEIGHTS, MODULES[:2], seed=1))
    return folder


@pytest.fixture(scope="module")
def service(folder) -> Iterator[Service]:
    base = mmchat.load(folder / "base", device="cpu")
    birds, plants = (load_with(base, find_adapters(folder / name)) for name in ("birds", "plants"))
    service = Service(ServerOptions(rows=2, strict_model=True, kv_memory=300_000_000))
    service.use(base, birds, plants)
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service) -> TestClient:
    return TestClient(make_app(service), base_url="http://localhost")


def asked(client, model, status=200):
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8}
    answer = client.post("/v1/chat/completions", json={**body, "model": model})
    assert answer.status_code == status, answer.text
    return answer.json()


def said(folder, *adapter, scale=""):
    model = mmchat.load(folder / "base", device="cpu", adapter=[folder / one for one in adapter])
    return model.ask("hello", sampling=GREEDY)


def test_each_answers_by_its_names_as_if_it_were_alone(client, folder):
    expected = {name: said(folder, *([name] if name != "base" else [])) for name in
                ("base", "birds", "plants")}  # fmt: skip
    assert len(set(expected.values())) == 3
    for model, adapter in (
        ("base", "base"), ("BASE", "base"), ("birds", "birds"), ("base:plants", "plants"),
        ("Plants", "plants"), ("llama3.2-vision:birds", "birds"), ("birds", "birds"),
    ):  # fmt: skip
        answer = asked(client, model)
        assert answer["model"] == adapter
        assert answer["choices"][0]["message"]["content"] == expected[adapter], model
    assert "this server has birds and plants and base" in str(asked(client, "cats", 404))
    body = {"model": "plants:latest", "prompt": "hello", "stream": False,
            "options": {"temperature": 0, "num_predict": 8}}  # fmt: skip
    assert client.post("/api/generate", json=body).json()["response"] == expected["plants"]
    assert client.post("/api/generate", json={**body, "model": "cats"}).status_code == 404


def test_all_are_listed_and_what_names_none_is_answered_with_the_first_adapter(client, service):
    listed = [one["id"] for one in client.get("/v1/models").json()["data"]]
    assert listed == ["birds", "plants", "base"]
    assert client.get("/v1/models/base:birds").status_code == 200
    tags = [one["name"] for one in client.get("/api/tags").json()["models"]]
    assert tags == [*listed, "llama3.2-vision:latest"]
    assert [one["name"] for one in client.get("/api/ps").json()["models"]] == listed
    shared = {name: tensor.data_ptr() for name, tensor in weights(service.all[2]).items()}
    apart = {n for n, t in weights(service.all[0]).items() if t.data_ptr() != shared[n]}
    assert apart == {f"{module}.weight" for module in MODULES}
    assert service.memory == 100_000_000
    assert "mmchat_kv_bytes_budget 300000000" in client.get("/metrics").text
    assert service.served("llama3.2-vision") is service.served(None) is service.all[0]


def weights(served):
    return served.model.runtime.model.state_dict()


def test_an_adapter_as_the_model_has_its_name_and_that_of_its_base(folder):
    source = find_model(folder / "base", adapter=folder / "birds")
    [names] = names_of(source.spec, [source.adapters])
    assert names.listed == ("birds", "base")
    assert {"base:birds", "base"} <= names.known


def test_two_of_one_name_are_refused(folder, tmp_path):
    other = write_adapter(tmp_path / "Birds", low_rank(WEIGHTS, MODULES[:1]))
    spec = find_model(folder / "base").spec
    one, two = find_adapters([folder / "birds", other])
    with pytest.raises(UsageError, match="two models would be called 'Birds'"):
        names_of(spec, [(), (one,), (two,)])
    assert len(names_of(spec, [(), (one,), (replace(two, scale=0.5),)])) == 3
    as_base = write_adapter(tmp_path / "base", low_rank(WEIGHTS, MODULES[:1]))
    command = ("serve", str(folder / "base"), "--adapter", str(as_base), "--port", "0")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "two models would be called 'base'; rename the folder" in done.stderr


def test_adapters_beside_a_model_that_ranks_share_are_refused_before_it_is_loaded(folder):
    model = LoadOptions(folder / "base", adapter=folder / "birds")
    source = model.find()
    assert len(_apart(model, source)[1]) == 1
    with pytest.raises(UsageError, match="one model is served with --parallel; name the adapter"):
        _apart(replace(model, parallel=2), source)
