"""/metrics: what Prometheus reads of the server."""

import re

from tests.server.conftest import about


def figures(client):
    text = client.get("/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'mmchat_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? \S+', ln) for ln in lines)
    names = re.findall(r"# TYPE (\S+)", text)
    assert len(names) == len(set(names))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_an_answer_is_counted(client, dog):
    before = figures(client)
    assert client.post("/v1/chat/completions", json=about(dog)).status_code == 200
    client.post("/v1/chat/completions", json={"messages": 5, "model": "canary-1234"})
    after = figures(client)
    assert after.keys() >= before.keys()

    def more(name):
        return after[f"mmchat_{name}"] - before.get(f"mmchat_{name}", 0)

    assert more('requests_total{api="openai",code="200"}') == 1
    assert more('requests_total{api="openai",code="400"}') == 1
    assert (more("images_total"), more("generation_tokens_total")) == (1, 5)
    assert more("prompt_tokens_total") > 10
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "vision_seconds"):
        assert more(f"{name}_count") == 1
        assert more(f'{name}_bucket{{le="+Inf"}}') == 1
    assert more("inter_token_latency_seconds_count") == 4
    assert more("decode_rows_count") >= 1
    assert after["mmchat_kv_bytes_budget"] > after["mmchat_kv_bytes_used"] > 0
    assert (after["mmchat_requests_running"], after["mmchat_requests_waiting"]) == (0, 0)


def test_nothing_of_a_request_is_a_label(client):
    client.get("/v1/canary-1234")
    client.request("POST", "/api/canary-1234")
    assert "canary" not in client.get("/metrics").text
