"""POST /v1/completions: texts continued as they are, and what their tokens were worth."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from mmchat import limits
from mmchat.conversation import Message, Text
from mmchat.models.base import Batch
from mmchat.server import openai_completions

URL = "/v1/completions"
TEXT = "The dog is brown and the fish is é orange"


def complete(client, prompt=TEXT, **more):
    response = client.post(URL, json={"prompt": prompt, "temperature": 0, **more})
    assert response.status_code == 200, response.text
    return response.json()


def chunks(client, **body):
    response = client.post(URL, json={"prompt": TEXT, "temperature": 0, "stream": True, **body})
    *lines, last, empty = response.text.split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def ids_of(tiny, text=TEXT):
    return tiny.processor.raw(Message("user", (Text(text),))).token_ids


def plain(tiny, ids):
    """Log-probabilities [N, V] after each position, of one forward."""
    with torch.inference_mode():
        cache = tiny.runtime.new_cache(1, len(ids))
        logits = tiny.runtime.forward(Batch.all_of(torch.tensor(ids), 0), cache)
        return logits.log_softmax(-1)


def test_a_text_goes_on_by_itself(client):
    answer = complete(client, max_tokens=5)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice["text"]
    assert (choice["index"], choice["logprobs"]) == (0, None)
    assert not choice["text"].startswith(TEXT)
    assert answer["usage"]["completion_tokens"] <= 5


def test_sixteen_tokens_are_the_default(client):
    [choice] = complete(client, prompt="A B C D E", stop=[])["choices"]
    assert complete(client, prompt="A B C D E", max_tokens=16)["choices"] == [choice]


def test_a_list_has_a_choice_for_each_in_its_order(client, tiny):
    texts = [TEXT, "Hello", "A red circle"]
    alone = [complete(client, text, max_tokens=6)["choices"][0]["text"] for text in texts]
    for prompt in (texts, [list(ids_of(tiny, text)) for text in texts]):
        answer = complete(client, prompt, max_tokens=6)
        assert [choice["text"] for choice in answer["choices"]] == alone
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert answer["usage"]["prompt_tokens"] == sum(len(ids_of(tiny, text)) for text in texts)
    [one] = complete(client, list(ids_of(tiny, TEXT)), max_tokens=6)["choices"]
    assert one["text"] == alone[0]


@pytest.mark.slow
def test_a_list_longer_than_the_queue_is_one_request(client):
    answer = complete(client, ["Hello"] * 100, max_tokens=1)
    assert len(answer["choices"]) == 100


@pytest.mark.parametrize("most", [0, 1, 4])
@pytest.mark.parametrize("as_ids", [False, True])
def test_the_prompt_is_scored_as_a_plain_forward_does(client, tiny, most, as_ids):
    ids = list(ids_of(tiny))
    answer = complete(
        client, ids if as_ids else TEXT, echo=True, logprobs=2, max_tokens=most, seed=1
    )
    [choice] = answer["choices"]
    found = choice["logprobs"]
    count = len(ids) + answer["usage"]["completion_tokens"]
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, count)
    assert answer["usage"]["completion_tokens"] <= most
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    expected = plain(tiny, ids)
    for at in range(1, len(ids)):
        value = float(expected[at - 1, ids[at]])
        assert found["token_logprobs"][at] == pytest.approx(value, abs=1e-4)
        best = expected[at - 1].topk(2).values.tolist()
        assert sorted(found["top_logprobs"][at].values()) == pytest.approx(sorted(best), abs=1e-4)
    assert choice["text"].startswith(TEXT)
    if not most:
        assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")


def test_offsets_say_where_a_token_begins(client):
    [choice] = complete(client, echo=True, logprobs=0, max_tokens=4)["choices"]
    found, text = choice["logprobs"], choice["text"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert text[offset : offset + len(token)] == token
    assert found["top_logprobs"][1:] == [{}] * (len(found["tokens"]) - 1)


def test_a_loglikelihood_as_lm_eval_computes_it(client, tiny):
    """It asks for one token more, which it leaves out, and compares the sum and the best ones."""
    context, whole = ids_of(tiny, "The dog is"), list(ids_of(tiny, "The dog is brown"))
    answer = complete(client, [whole], echo=True, logprobs=1, max_tokens=1)
    found = answer["choices"][0]["logprobs"]
    own, best = (found[name][len(context) : -1] for name in ("token_logprobs", "top_logprobs"))
    rows = range(len(context), len(whole))
    expected = plain(tiny, whole)
    assert sum(own) == pytest.approx(
        sum(float(expected[at - 1, whole[at]]) for at in rows), abs=1e-3
    )
    greedy = all(int(expected[at - 1].argmax()) == whole[at] for at in rows)
    pairs = zip(own, best, strict=True)
    assert all(value == max(top.values()) for value, top in pairs) == greedy


@pytest.mark.parametrize("more", [{}, {"echo": True}, {"logprobs": 1}])
def test_a_stream_says_the_same(client, more):
    [choice] = complete(client, max_tokens=6, **more)["choices"]
    *pieces, usage = chunks(client, max_tokens=6, stream_options={"include_usage": True}, **more)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == choice["text"]
    assert pieces[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    if "logprobs" in more:
        found = [piece["choices"][0]["logprobs"] for piece in pieces]
        for name, values in choice["logprobs"].items():
            told = [value for one in found if one for value in one[name]]
            assert told == pytest.approx(values) if "offset" in name else len(told) == len(values)


def test_a_stream_of_several_says_one_after_the_other(client):
    texts = ["Hello", TEXT]
    whole = complete(client, texts, max_tokens=4)["choices"]
    told = [piece["choices"][0] for piece in chunks(client, prompt=texts, max_tokens=4)]
    assert [piece["index"] for piece in told] == sorted(piece["index"] for piece in told)
    for index, choice in enumerate(whole):
        pieces = [piece["text"] for piece in told if piece["index"] == index]
        assert "".join(pieces) == choice["text"]


def test_a_scored_stream_comes_whole(client):
    [piece] = chunks(client, echo=True, logprobs=1, max_tokens=2)
    [choice] = complete(client, echo=True, logprobs=1, max_tokens=2)["choices"]
    assert piece["choices"][0]["text"] == choice["text"]
    assert piece["choices"][0]["logprobs"]["tokens"] == choice["logprobs"]["tokens"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "echo": 1}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a " * 9_000}, None),
    ],
)
def test_what_is_wrong_is_named(client, body, param):
    response = client.post(URL, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


def test_scores_are_made_into_a_form_in_a_thread(client, monkeypatch):
    threads = []
    form = openai_completions._Tokens.form

    def formed(*given):
        threads.append(threading.current_thread().name)
        return form(*given)

    monkeypatch.setattr(openai_completions._Tokens, "form", formed)
    body = {"prompt": ["Hello you", "there"], "max_tokens": 0, "echo": True, "logprobs": 1}
    for stream in (False, True):
        assert client.post(URL, json={**body, "stream": stream}).status_code == 200
    assert len(threads) == 4
    assert all(name.startswith("mmchat request") for name in threads)


def test_scores_are_bounded_over_all_prompts(client, monkeypatch):
    monkeypatch.setattr(limits, "REQUEST_SCORES", 60)
    body = {"prompt": ["a b c d e f g h i j"] * 2, "max_tokens": 0, "echo": True}
    for top, status in ((1, 200), (5, 400)):
        answer = client.post(URL, json={**body, "logprobs": top})
        assert answer.status_code == status
    assert answer.json()["error"]["param"] == "logprobs"
    assert client.post(URL, json={**body, "logprobs": 5, "stream": True}).status_code == 200
