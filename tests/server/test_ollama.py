"""Ollama's routes, as its programs send and read them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from mmchat import limits
from mmchat.checkpoints import ollama_folder
from mmchat.checkpoints.ollama_folder import OllamaModel
from mmchat.engine.sampling import SamplingParams
from mmchat.loading.options import LoadOptions
from mmchat.server import ask, log, models
from mmchat.server import service as service_module
from mmchat.server.app import make_app
from mmchat.server.ollama import Options
from mmchat.server.options import ServerOptions
from mmchat.server.service import Service

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
GREEDY = {"temperature": 0}
BLOB = f"/api/blobs/sha256:{64 * '0'}"


@pytest.fixture(scope="module")
def picture(dog):
    """The dog, as Ollama's programs send it."""
    return dog.partition(",")[2]


def lines(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text.splitlines()]


def chat(client, *messages, model="tiny", **more):
    body = {"model": model, "messages": messages, "options": GREEDY, "stream": False, **more}
    return client.post("/api/chat", json=body)


def generate(client, prompt, **more):
    body = {"model": "tiny", "prompt": prompt, "options": GREEDY, "stream": False, **more}
    return client.post("/api/generate", json=body)


def user(text="What is in this picture?", **more):
    return {"role": "user", "content": text, **more}


def check_end(line, reason="stop"):
    assert line["done"] is True
    assert line["done_reason"] == reason
    times = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
    assert all(type(line[name]) is int for name in (*times, "prompt_eval_count", "eval_count"))
    assert line["total_duration"] >= line["eval_duration"] > 0


def test_an_answer_about_a_picture_comes_in_lines_unless_asked_otherwise(client, picture):
    body = {"model": "llama3.2-vision", "messages": [user(images=[picture])], "options": GREEDY}
    *deltas, end = lines(client.post("/api/chat", json=body))
    assert "".join(line["message"]["content"] for line in deltas) == "A brown dog."
    for line in deltas:
        assert line.keys() == {"model", "created_at", "message", "done"}
        assert line["done"] is False
    for line in (*deltas, end):
        assert line["model"] == "llama3.2-vision"
        assert TIME.fullmatch(line["created_at"])
        assert line["message"]["role"] == "assistant"
    assert end["message"]["content"] == ""
    check_end(end)


def test_stream_false_is_one_object(client, picture):
    response = chat(client, user(images=[picture]))
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer["message"] == {"role": "assistant", "content": "A brown dog."}
    check_end(answer)


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_generate_says_response_and_a_context(client, picture, prefix):
    answer = generate(client, "What is in this picture?", images=[prefix + picture]).json()
    assert answer["response"] == "A brown dog."
    assert "message" not in answer
    check_end(answer)
    assert len(answer["context"]) == answer["prompt_eval_count"] + answer["eval_count"]


def test_pictures_stand_before_the_text_and_roles_may_be_written_large(client, picture, dog):
    mine = chat(client, {"role": "User", "content": "What is it?", "images": [picture]}).json()
    parts = [{"type": "image_url", "image_url": dog}, {"type": "text", "text": "What is it?"}]
    body = {"messages": [{"role": "user", "content": parts}], "temperature": 0}
    theirs = client.post("/v1/chat/completions", json=body).json()
    assert mine["message"]["content"] == theirs["choices"][0]["message"]["content"]
    assert mine["prompt_eval_count"] == theirs["usage"]["prompt_tokens"]


def test_a_context_goes_on_as_the_same_conversation_would(client):
    first = generate(client, "Hello").json()
    second = generate(client, "What can you do?", context=first["context"]).json()
    answer = {"role": "assistant", "content": first["response"]}
    asked = chat(client, user("Hello"), answer, user("What can you do?")).json()
    assert second["response"] == asked["message"]["content"]
    assert second["prompt_eval_count"] == asked["prompt_eval_count"]


def test_a_context_of_a_picture_is_refused(client, picture):
    context = generate(client, "What is it?", images=[picture]).json()["context"]
    for body in ({"context": context}, {"context": [5], "images": [picture]}):
        response = generate(client, "And now?", **body)
        assert response.status_code == 400
        assert "context" in response.json()["error"]


@pytest.mark.slow
def test_a_system_text_comes_first_and_raw_has_no_format(client):
    plain = generate(client, "Hello").json()
    system = generate(client, "Hello", system="Be brief.").json()
    assert system["prompt_eval_count"] > plain["prompt_eval_count"]
    raw = generate(client, "Hello", raw=True).json()
    assert raw["prompt_eval_count"] < plain["prompt_eval_count"]
    assert "context" not in raw
    assert generate(client, "Hello", raw=True, system="x").status_code == 400


@pytest.mark.parametrize(
    ("keep_alive", "reason"),
    [(None, "load"), ("5m", "load"), (300, "load"), (-1, "load"), (0, "unload"), ("0s", "unload")],
)
@pytest.mark.parametrize(("route", "key"), [("chat", "message"), ("generate", "response")])
def test_no_question_loads_or_unloads(client, route, key, keep_alive, reason):
    body = {"model": "tiny", "keep_alive": keep_alive}
    response = client.post(f"/api/{route}", json=body)
    assert response.status_code == 200
    answer = response.json()
    assert (answer["done"], answer["done_reason"]) == (True, reason)
    assert answer[key] == ({"role": "assistant", "content": ""} if key == "message" else "")


def test_probabilities_stand_in_the_lines(client):
    answer = chat(client, user("Hello"), logprobs=True, top_logprobs=2).json()
    told = answer["logprobs"]
    assert "".join(entry["token"] for entry in told) == answer["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in told)
    streamed = lines(chat(client, user("Hello"), logprobs=True, top_logprobs=2, stream=True))
    again = [entry for line in streamed for entry in line.get("logprobs", [])]
    for one, other in zip(again, told, strict=True):
        assert one["bytes"] == other["bytes"]
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


def test_what_clients_always_send_changes_nothing(client):
    more = {"tools": [], "think": False, "format": "", "keep_alive": "5m", "truncate": True}
    system = {"role": "system", "content": ""}
    usual = chat(client, user("Hello")).json()
    same = chat(client, system, user("Hello"), **more).json()
    assert usual["prompt_eval_count"] == same["prompt_eval_count"]
    assert usual["message"] == same["message"]
    sent = json.dumps({"model": "tiny", "prompt": "Hello", "suffix": "", "template": None})
    response = client.post("/api/generate", content=sent)  # litellm says no content type
    assert lines(response)[-1]["done"] is True


def test_options_become_settings():
    assert Options().sampling(500, {}) == {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    options = Options.model_validate(
        {
            "temperature": 0, "top_k": -1, "top_p": 0.5, "min_p": 0.1, "seed": 7, "stop": "x",
            "num_predict": 9, "repeat_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": -1,
            "num_gpu": 99, "mirostat_tau": 5, "unknown": object(),
        }
    )  # fmt: skip
    settings = options.sampling(500, {})
    assert settings == {
        "temperature": 0, "top_k": 0, "top_p": 0.5, "min_p": 0.1, "seed": 7, "stop": ("x",),
        "max_new_tokens": 9, "repetition_penalty": 1.2, "presence_penalty": 1,
        "frequency_penalty": -1,
    }  # fmt: skip
    SamplingParams(**settings)
    assert Options(seed=2**63 - 1).sampling(500, {})["seed"] == 2**63 - 1
    with pytest.raises(ValueError, match="seed"):
        Options.model_validate({"seed": 2.0**63})
    endless = Options.model_validate({"seed": -1, "num_predict": -2, "stop": []}).sampling(500, {})
    assert endless == {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "max_new_tokens": 500}


def test_what_the_model_says_of_itself_is_between_the_request_and_the_defaults(
    monkeypatch, tmp_path
):
    own = {"temperature": 0.3, "top_p": 0.5}
    assert Options().sampling(5, own) == {**own, "top_k": 40}
    assert Options(temperature=0.1).sampling(5, own)["temperature"] == 0.1
    generation = SimpleNamespace(temperature=0.3, top_p=0.9)  # top_p of the family
    spec = SimpleNamespace(source=tmp_path / "blob", generation=generation)
    model = SimpleNamespace(options=LoadOptions("eyes"), spec=spec)
    found = OllamaModel("eyes", tmp_path / "blob", None, 1, "", "", {"temperature": 0.3})
    monkeypatch.setattr(ollama_folder, "ollama_model", lambda _: found)
    assert service_module._ollama_sampling(model) == {"temperature": 0.3}
    spec.source = tmp_path / "other"  # of the same name, and not what was loaded
    assert service_module._ollama_sampling(model) == {}


def test_num_predict_ends_an_answer(client):
    answer = chat(client, user("Hello"), options=GREEDY | {"num_predict": 2}).json()
    assert (answer["eval_count"], answer["done_reason"]) == (2, "length")


def test_a_smaller_num_ctx_is_kept_and_a_larger_one_is_said(client):
    answer = chat(client, user("Hello"), options=GREEDY | {"num_ctx": 15, "num_predict": -1})
    assert answer.json()["prompt_eval_count"] + answer.json()["eval_count"] == 15
    larger = chat(client, user("Hello"), options=GREEDY | {"num_ctx": 131_072})
    assert larger.status_code == 200
    assert "131072" in larger.headers["x-mmchat-notice"]


def test_a_conversation_that_is_too_long_loses_its_oldest_messages(client):
    system = {"role": "system", "content": "Be brief."}
    turns = [user("Hello"), {"role": "assistant", "content": "Hello!"}] * 4
    asked = [system, *turns, user("What can you do?")]
    short = chat(client, system, *turns[-2:], user("What can you do?")).json()
    options = GREEDY | {"num_ctx": short["prompt_eval_count"] + 3}
    answer = chat(client, *asked, options=options).json()
    assert answer["prompt_eval_count"] == short["prompt_eval_count"]
    refused = chat(client, *asked, options=options, truncate=False)
    assert refused.status_code == 400
    assert chat(client, system, *turns, user("x " * 99), options=options).status_code == 400


@pytest.mark.parametrize(
    ("route", "body", "status", "text"),
    [
        ("chat", None, 400, "missing request body"),
        ("chat", {"messages": []}, 400, "model is required"),
        ("chat", {"model": "nobody"}, 404, "model 'nobody' not found"),
        ("chat", {"messages": [user()], "think": True}, 400, "does not support thinking"),
        ("chat", {"messages": [user()], "think": "high"}, 400, "does not support thinking"),
        ("chat", {"messages": [user()], "format": "xml"}, 400, "format: input should be"),
        ("chat", {"messages": [{"role": "x", "content": "y"}]}, 400, "a role is one of"),
        ("chat", {"messages": [user(images=["no picture"])]}, 400, "no picture"),
        ("chat", {"messages": [user()], "top_logprobs": 2}, 400, "top_logprobs"),
        ("chat", {"messages": [user()], "options": {"temperature": "a"}}, 400, "temperature"),
        ("chat", {"messages": [user()], "options": {"num_ctx": True}}, 400, "num_ctx"),
        ("chat", {"messages": [user()], "options": {"stop": ["a"] * 17}}, 400, "stop"),
        ("chat", {"messages": [user()], "options": {"stop": "a" * 1025}}, 400, "stop.0"),
        ("chat", {"messages": [user()], "options": {"num_ctx": 5}}, 400, "or raise num_ctx"),
        ("chat", {"messages": [user("x " * 9_999)]}, 400, "or raise the server's --max-seq-len"),
        ("chat", {"messages": [user()], "format": 5}, 400, "should be a string or an object"),
        ("chat", {"messages": [user()], "stream": "yes"}, 400, "stream"),
        ("chat", {"messages": [user()], "keep_alive": []}, 400, "keep_alive"),
        ("generate", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("generate", {"prompt": "x", "template": "y"}, 400, "template"),
        ("generate", {"prompt": 5}, 400, "prompt"),
        ("show", {"model": "nobody"}, 404, "not found"),
        ("show", {}, 400, "missing request body"),
        ("pull", {"model": "nobody"}, 404, "not found"),
        ("push", {"model": "tiny"}, 501, "not managed"),
        ("create", {"model": "tiny"}, 501, "not managed"),
        ("copy", {"source": "tiny"}, 501, "not managed"),
        ("delete", {"model": "tiny"}, 501, "not managed"),
        ("blobs/sha256:12", None, 501, "not managed"),
        ("embed", {"model": "tiny", "input": "x"}, 501, "not managed"),
        ("embeddings", {"model": "tiny", "prompt": "x"}, 501, "not managed"),
        ("nothing", {}, 404, "no such route"),
    ],
)
def test_what_is_wrong_is_said_in_ollamas_form(client, route, body, status, text):
    named = body is not None and status != 404 and body != {} and text != "model is required"
    sent = {"model": "tiny", **body} if named else body
    response = client.post(f"/api/{route}", **({} if sent is None else {"json": sent}))
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    assert text in response.json()["error"]


@pytest.mark.parametrize(
    ("method", "route"),
    [("POST", f"/api/{name}") for name in ("push", "create", "copy", "embed", "embeddings")]
    + [("DELETE", "/api/delete"), ("HEAD", BLOB), ("POST", BLOB)],
)
@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"json": {"model": "tiny"}},
        {"content": b"GGUF\x00\xff"},
        {"headers": {"content-length": str(limits.REQUEST_BYTES + 1)}, "content": b""},
    ],
)
def test_models_are_not_managed_by_any_route_of_ollama(client, method, route, sent):
    """Whatever is sent: a blob is a file of weights, which is not even read."""
    response = client.request(method, route, **sent)
    assert response.status_code == 501
    if method != "HEAD":
        text = "models are not managed over the network, nor embedded"
        assert response.json() == {"error": text}
    assert client.request(method, f"{route}/more").status_code in (404, 405)


def test_who_may_not_ask_is_not_told_what_is_not_done():
    app = make_app(Service(ServerOptions(keys={"me": "x" * 20})))
    guarded = TestClient(app, base_url="http://localhost")
    assert guarded.request("DELETE", "/api/delete").status_code == 401
    assert guarded.request("DELETE", "/api/chat").status_code == 405


def test_what_is_shown_is_what_is_used(client, service, monkeypatch):
    shown = client.post("/api/show", json={"model": "tiny"}).json()["parameters"]
    assert shown == "temperature 0.8\ntop_k 40\ntop_p 0.9"
    settings = Options().sampling(5, {})
    assert shown == "\n".join(f"{name} {value}" for name, value in settings.items())
    monkeypatch.setattr(service, "ollama_sampling", {"top_p": 0.5})
    shown = client.post("/api/show", json={"model": "tiny"}).json()["parameters"]
    assert shown == "temperature 0.8\ntop_k 40\ntop_p 0.5"


@pytest.mark.parametrize(
    "name", ["tiny", "Tiny", "tiny:latest", "mllama-tiny", "llama3.2-vision", "llama3.2-vision:90b"]
)
def test_the_model_has_its_names_and_that_of_what_ollama_dropped(client, name):
    assert client.post("/api/show", json={"model": name}).status_code == 200
    assert chat(client, user("Hello"), model=name).json()["model"] == name


@pytest.mark.parametrize("name", ["tiny:3b", "llama3.2", "llama3.2-visionary", ""])
def test_other_names_are_not_found(client, name):
    assert client.post("/api/show", json={"name": name}).status_code in (400, 404)


def test_the_model_is_listed_shown_and_running(client):
    models = client.get("/api/tags").json()["models"]
    assert [model["name"] for model in models] == ["tiny", "mllama-tiny", "llama3.2-vision:latest"]
    for model in models:
        assert re.fullmatch("[0-9a-f]{64}", model["digest"])
        assert model["details"]["family"] == "mllama"
        assert TIME.fullmatch(model["modified_at"])
    shown = client.post("/api/show", json={"name": "tiny"}).json()
    assert {"completion", "vision"} <= set(shown["capabilities"])
    assert shown["model_info"]["mllama.context_length"] == 2_048
    [running] = client.get("/api/ps").json()["models"]
    assert running["digest"] == models[0]["digest"]
    assert running["context_length"] == 2_048


def test_the_version_is_the_last_that_ran_this_model(client):
    response = client.get("/api/version")
    assert response.json() == {"version": "0.24.0"}
    assert response.headers["x-mmchat-version"]
    assert client.head("/api/version").status_code == client.head("/api/tags").status_code == 200


def test_what_is_here_need_not_be_pulled(client):
    asked = {"model": "llama3.2-vision"}
    statuses = [line["status"] for line in lines(client.post("/api/pull", json=asked))]
    assert statuses == ["pulling manifest", "success"]
    once = client.post("/api/pull", json={**asked, "stream": False})
    assert once.json() == {"status": "success"}


def test_pictures_are_opened_once_however_much_is_left_out(client, monkeypatch, dog):
    opened = []
    real = ask.open_pictures
    monkeypatch.setattr(ask, "open_pictures", lambda *given: opened.append(given) or real(*given))
    data = dog.partition(",")[2]
    old = [{"role": "user", "content": "Hello you " * 300, "images": [data]} for _ in range(5)]
    body = {"model": "tiny", "messages": [*old, {"role": "user", "content": "Hello"}]}
    body |= {"stream": False, "options": {"num_predict": 1}}
    answer = client.post("/api/chat", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["prompt_eval_count"] > 500
    assert len(opened) == 1


def test_the_format_is_that_of_the_files(service, tmp_path):
    blob = tmp_path / "sha256-0"
    blob.write_bytes(b"GGUF" + bytes(100))
    model = service.all[0].model
    assert models._details(SimpleNamespace(model=model))["format"] == "safetensors"
    stored = replace(model, spec=replace(model.spec, source=blob))
    assert models._details(SimpleNamespace(model=stored))["format"] == "gguf"


def test_a_prompt_is_logged_once_as_it_was_cut(tiny, monkeypatch):
    said = []
    monkeypatch.setattr(log, "content", lambda kind, text: said.append((kind, text)))
    logging = service_module.Service(ServerOptions(rows=1, log_content=True))
    logging.use(tiny)
    client = TestClient(make_app(logging), base_url="http://localhost")
    old = [user("word " * 50) for _ in range(8)]
    options = GREEDY | {"num_ctx": 100, "num_predict": 2}
    assert chat(client, *old, user("Hello"), options=options).status_code == 200
    logging.close()
    [prompt] = [text for kind, text in said if kind == "prompt"]
    assert "Hello" in prompt
    assert prompt.count("word") < 100
