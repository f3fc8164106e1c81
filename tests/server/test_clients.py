"""The newest clients of OpenAI and Ollama, against the application in this process."""

from __future__ import annotations

import base64

import ollama
import openai
import pytest

from tests.server.conftest import ASSETS
from tests.server.serving import serving

QUESTION = "What is in this picture?"
ANSWER = "A brown dog."
PICTURE = ASSETS / "dog.jpg"
MODEL = "llama3.2-vision"
GREEDY = {"temperature": 0}


def picture_input(dog):
    content = [
        {"type": "input_text", "text": QUESTION},
        {"type": "input_image", "image_url": dog, "detail": "auto"},
    ]
    return [{"role": "user", "content": content}]


# ---- OpenAI -----------------------------------------------------------------------------------


def test_openai_chat(theirs, dog):
    parts = [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": dog, "detail": "high"}},
    ]
    asked = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "temperature": 0}
    answer = theirs.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.content == ANSWER
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    with theirs.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER
    assert theirs.models.list().data[0].id == theirs.models.retrieve("tiny").id == "tiny"


def test_openai_completions(theirs):
    asked = {"model": MODEL, "prompt": "A red circle", "temperature": 0}
    whole = theirs.completions.create(**asked, max_tokens=5, logprobs=2)
    pieces = theirs.completions.create(**asked, max_tokens=5, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens
    scored = theirs.completions.create(**asked, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "A red circle"
    assert scored.choices[0].logprobs.token_logprobs[0] is None


def test_openai_responses(theirs, dog):
    answer = theirs.responses.create(model=MODEL, input=picture_input(dog), temperature=0)
    assert (answer.output_text, answer.status) == (ANSWER, "completed")
    assert answer.usage.output_tokens == 5
    history = [
        *picture_input(dog),
        *[item.model_dump(exclude_none=True) for item in answer.output],
        {"role": "user", "content": "What colour is it?"},
    ]
    assert theirs.responses.create(model=MODEL, input=history, instructions="Be brief.").output_text


def test_openai_responses_as_a_stream(theirs, dog):
    asked = {"model": MODEL, "input": picture_input(dog), "temperature": 0}
    events = list(theirs.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == ANSWER
    assert [event.type.removeprefix("response.") for event in events if event not in deltas] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    with theirs.responses.stream(**asked) as stream:
        assert [event.type for event in stream][-1] == "response.completed"
        assert stream.get_final_response().output_text == ANSWER


def test_openai_responses_may_be_cut_and_tell_probabilities(theirs):
    answer = theirs.responses.create(
        model=MODEL,
        input="Hello",
        max_output_tokens=2,
        temperature=0,
        top_logprobs=2,
        include=["message.output_text.logprobs"],
    )
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    told = answer.output[0].content[0].logprobs
    assert [len(entry.top_logprobs) for entry in told] == [2, 2]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "x", "content": "y"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ],
)
def test_openai_responses_say_what_is_wrong(theirs, more, param):
    with pytest.raises(openai.BadRequestError) as failure:
        theirs.responses.create(**{"model": MODEL, "input": "Hello"} | more)
    assert failure.value.param.startswith(param)


def test_openai_responses_take_what_changes_nothing(theirs):
    history = [
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    answer = theirs.responses.create(
        model=MODEL, input=history, store=True, background=False, parallel_tool_calls=False,
        reasoning={"effort": "low"}, prompt_cache_key="x", tool_choice="auto", tools=[],
        include=["reasoning.encrypted_content"], text={"format": {"type": "text"}},
    )  # fmt: skip
    assert answer.output_text
    assert answer.store is False


# ---- Ollama -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "picture", [str(PICTURE), PICTURE.read_bytes(), base64.b64encode(PICTURE.read_bytes()).decode()]
)
def test_ollama_chat(their, picture):
    message = {"role": "user", "content": QUESTION, "images": [picture]}

    async def whole(client):
        return await client.chat(MODEL, [message], options=GREEDY)

    async def streamed(client):
        parts = await client.chat(MODEL, [message], options=GREEDY, stream=True)
        return [part async for part in parts]

    answer = their(whole)
    assert (answer.message.content, answer.done_reason) == (ANSWER, "stop")
    assert answer.eval_count == 5
    parts = their(streamed)
    assert "".join(part.message.content for part in parts) == ANSWER
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]


def test_ollama_generate(their):
    async def twice(client):
        first = await client.generate(MODEL, "Hello", options=GREEDY)
        second = await client.generate(MODEL, "And?", context=first.context, options=GREEDY)
        seen = await client.generate(MODEL, QUESTION, images=[PICTURE.read_bytes()], options=GREEDY)
        return first, second, seen

    first, second, seen = their(twice)
    assert seen.response == ANSWER
    assert second.prompt_eval_count > first.prompt_eval_count + first.eval_count


def test_ollama_asks_what_there_is(their):
    async def ask(client):
        pulled = await client.pull(MODEL)
        return await client.list(), await client.show(MODEL), await client.ps(), pulled

    listed, shown, running, pulled = their(ask)
    assert f"{MODEL}:latest" in [model.model for model in listed.models]
    assert "vision" in shown.capabilities
    assert running.models[0].model == "tiny"
    assert pulled.status == "success"


def test_ollama_says_what_is_wrong(their):
    async def ask(client):
        await client.chat("nobody", [{"role": "user", "content": "Hello"}])

    with pytest.raises(ollama.ResponseError, match="model 'nobody' not found") as failure:
        their(ask)
    assert failure.value.status_code == 404


@pytest.mark.process
def test_the_clients_over_a_socket():
    with serving() as served:
        local = ollama.Client(served.url)
        message = {"role": "user", "content": QUESTION, "images": [str(PICTURE)]}
        parts = local.chat(MODEL, [message], options=GREEDY, stream=True)
        assert "".join(part.message.content for part in parts) == ANSWER
        theirs = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused")
        with theirs.responses.stream(model=MODEL, input="Hello") as stream:
            assert stream.get_final_response().output_text
