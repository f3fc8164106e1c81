"""A LLaVA as a folder: loaded, asked, quantised, by command and in Python."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmchat
from mmchat.api import Model
from mmchat.conversation import ToolCall
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError, PromptError, UsageError
from mmchat.models.llava.model import LlavaForConditionalGeneration
from mmchat.runtime.eager import EagerRuntime
from tests.models.asking import finished, run
from tests.models.llava import oracle
from tests.models.llava.folders import SPARE_ROWS, hub_document, with_vocabulary, write_hub_folder
from tests.models.llava.test_image_processor import picture
from tests.models.reading import read

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, speculate="off", logprobs=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_hub_folder(tmp_path_factory.mktemp("llava") / "tiny-llava")


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return mmchat.load(folder, device="cpu")


@pytest.fixture
def png(tmp_path) -> str:
    picture(30, 40).pixels.save(tmp_path / "dog.png")
    return str(tmp_path / "dog.png")


def math_of(model: Model) -> LlavaForConditionalGeneration:
    assert isinstance(model.runtime, EagerRuntime)
    assert isinstance(model.runtime.model, LlavaForConditionalGeneration)
    return model.runtime.model


def test_only_what_is_used_is_loaded(model):
    loaded = {n for n, p in math_of(model).named_parameters() if not p.is_meta}
    assert loaded == math_of(model).weight_names(text_only=False)


def test_greedy_tokens_are_those_of_the_logits_and_ids_without_a_token_are_never_written(model):
    prompt = model.processor.chat([mmchat.Message("user", (picture(30, 40), mmchat.Text("dog")))])
    tokens = model.tokenizer.vocab_size
    assert model.vocab_size == tokens == model.spec.config.vocab_size - SPARE_ROWS
    math = math_of(model)
    answer = finished(model.chat().send("dog", [picture(30, 40)], GREEDY))
    with torch.inference_mode():
        cache = math.new_cache(1, 0)
        said = prompt.token_ids + answer.output_ids[:-1]
        whole = type(prompt)(said, prompt.media)
        rows = read(math, cache, whole)[len(prompt.token_ids) - 1 :]
    assert rows[:, :tokens].argmax(-1).tolist() == list(answer.output_ids)
    head = math.language_model.lm_head.weight
    with torch.inference_mode():
        spare = head[tokens:].clone()
        head[tokens:] = head[answer.output_ids[0]] * 2  # now likelier than any token
        again = finished(model.chat().send("dog", [picture(30, 40)], GREEDY))
        head[tokens:] = spare
    assert max(again.output_ids) < tokens
    assert all(token < tokens for one in again.logprobs for token, _ in one.top)


def test_penalties_and_drafts_do_not_take_pictures_for_tokens(model):
    params = SamplingParams(temperature=0.0, max_new_tokens=24, repetition_penalty=1.3)
    plain = SamplingParams(
        temperature=0.0, max_new_tokens=24, repetition_penalty=1.3, speculate="off"
    )
    one = finished(model.chat().send("dog dog dog", [picture(30, 40)], params))
    other = finished(model.chat().send("dog dog dog", [picture(30, 40)], plain))
    assert one.output_ids == other.output_ids


def test_a_second_turn_reads_on_and_answers_as_a_fresh_one(model):
    chat = model.chat()
    finished(chat.send("dog", [picture(30, 40)], GREEDY))
    second = finished(chat.send("in?", [picture(50, 40)], GREEDY))
    fresh = model.chat()
    fresh.messages = chat.messages[:2]
    assert finished(fresh.send("in?", [picture(50, 40)], GREEDY)).output_ids == second.output_ids


def test_the_space_in_front_of_an_answer_is_left_out(model):
    answer = finished(model.chat().send("dog", [], GREEDY))
    assert answer.text == model.tokenizer.decode(answer.output_ids).removeprefix(" ")


def test_prompts_are_scored_by_the_tokens_that_there_are(model):
    prompt = model.processor.raw(mmchat.Message("user", (mmchat.Text("the dog in"),)))
    request = replace(model.request(prompt, GREEDY), score_from=1)
    answer = model.engine.submit(request)
    while model.engine.step():
        pass
    assert answer.finished is not None
    math = math_of(model)
    with torch.inference_mode():
        rows = read(math, math.new_cache(1, 0), prompt)
    expected = rows[:-1, : model.tokenizer.vocab_size].log_softmax(-1)
    ids = torch.tensor(prompt.token_ids[1:])
    found = torch.tensor([one.logprob for one in answer.finished.prompt_logprobs])
    torch.testing.assert_close(found, expected.gather(-1, ids[:, None])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("speculate", ["off", "auto"])
def test_an_answer_obeys_a_schema_also_where_its_text_is_drafted(model, speculate):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"the dog": {"enum": ["in the image", "é"]}, "犬": {"type": "boolean"}},
        "required": ["the dog", "犬"],
        "additionalProperties": False,
    }
    for seed in range(4):
        sampling = SamplingParams(
            schema=schema, seed=seed, temperature=1.0, max_new_tokens=200, speculate=speculate
        )
        answer = finished(model.chat().send("dog", [picture(30, 40)], sampling))
        assert answer.reason == "stop"
        assert json.loads(answer.text).keys() == {"the dog", "犬"}


def test_tools_are_refused(model):
    question = mmchat.Message("user", "dog")
    with pytest.raises(UsageError, match="was not taught to call tools; leave them out"):
        model.processor.chat([question], [{"type": "function", "function": {"name": "look"}}])
    call = mmchat.Message("assistant", "", calls=(ToolCall("look"),))
    for message in (call, mmchat.Message("tool", "a dog")):
        with pytest.raises(PromptError, match="leave calls and their results out"):
            model.processor.chat([question, message])


def test_many_questions_at_once_are_answered_as_each_alone(model):
    questions = [("dog", picture(30, 40)), ("in <image>", picture(9, 90)), ("the", ())]
    together = [one.output_ids for one in model.generate_many(questions, GREEDY)]
    alone = [next(iter(model.generate_many([one], GREEDY))).output_ids for one in questions]
    assert together == alone


def test_tags_and_pictures_are_counted_in_python_and_by_command(model, folder, png):
    with pytest.raises(PromptError, match="2 <image> tags, and there is 1 picture"):
        model.ask("<image> or <image>?", picture(30, 40))
    question = ("generate", str(folder), "-p", "<image> or <image>?", "-i", png)
    assert "2 <image> tags, and there is 1 picture" in run(*question, code=2)
    tagged = ("generate", str(folder), "-p", "dog <image>", "-i", png, "-n", "4", "--json")
    assert json.loads(run(*tagged))["text"] is not None


def test_tags_in_the_chat_are_places_of_what_is_attached(folder, png, tmp_path):
    saved = tmp_path / "saved"
    lines = [f"\\image {png}", "in <image> dog", "What does <image> mean?", f"\\save {saved}"]
    run("chat", str(folder), "-n", "2", "-t", "0", typed="\n".join([*lines, ""]))
    turns = json.loads((saved / "chat.json").read_text("utf-8"))["turns"]
    texts = [[part.get("text") for part in turn["question"]] for turn in turns]
    assert texts == [["in ", None, " dog"], ["What does <image> mean?"]]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_logits_stay_near(scheme, folder, model):
    """The layers are thin, so that rounding shows; the bound is that of the tiny Mllama."""
    rounded = math_of(mmchat.load(folder, device="cpu", quantize=scheme))
    prompt = model.processor.chat([mmchat.Message("user", (picture(30, 40), mmchat.Text("dog")))])
    with torch.inference_mode():
        plain, other = (read(m, m.new_cache(1, 0), prompt) for m in (math_of(model), rounded))
    error = float((plain - other).norm() / plain.norm())
    assert 1e-4 < error < {"int8": 0.05, "int4": 0.35}[scheme]


def test_text_alone_needs_no_vision(folder, model):
    text = mmchat.load(folder, device="cpu", text_only=True)
    assert {n.split(".")[0] for n, p in math_of(text).named_parameters() if not p.is_meta} == {
        "language_model"
    }
    assert text.ask("dog", sampling=GREEDY) == model.ask("dog", sampling=GREEDY)


def test_commands_speak_of_the_square(folder, png, tmp_path):
    said = run("inspect", str(folder))
    assert "4 of 5 layers of 48; squares of 70 px, 25 positions each" in said
    facts = json.loads(run("inspect", str(folder), "--json"))
    assert facts["vision"]["positions_per_image"] == 25
    assert facts["checkpoint"]["tensors"] == len(oracle.random_weights())
    shown = json.loads(
        run("generate", str(folder), "-p", "dog", "-i", png, "-n", "4", "--dry-run", "--json")
    )
    assert shown["prompt_tokens"] > 25
    assert shown["images"][0]["positions"] == 25
    params = tmp_path / "config.json"
    params.write_text(json.dumps(hub_document(with_vocabulary(SPARE_ROWS))))
    told = json.loads(run("tiles", png, "-m", str(folder), "-o", str(tmp_path / "x.png"), "--json"))
    assert (told["square"], told["fit"]) == ([70, 70], "pad")
    assert (tmp_path / "x.png").stat().st_size > 1_000


def test_another_tokenizer_is_refused(folder, tmp_path):
    from tests.sentencepiece_model import trained

    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained(vocab_size=800))
    with pytest.raises(CheckpointError, match="give the tokenizer that came with the weights"):
        mmchat.load(folder, tokenizer_path=path)


def test_programs_are_refused_with_what_can_be_done(folder, tmp_path):
    said = run("export", str(folder), "-o", str(tmp_path / "out"), "--format", "aoti", code=2)
    assert "safetensors" in said


@pytest.mark.parametrize("format", ["safetensors", "hf"])
def test_weights_are_exported_and_answer_alike(format, folder, model, tmp_path):
    run("export", str(folder), "-o", str(tmp_path / "out"), "--format", format)
    exported = mmchat.load(tmp_path / "out", device="cpu")
    assert exported.ask("dog", picture(30, 40), sampling=GREEDY) == model.ask(
        "dog", picture(30, 40), sampling=GREEDY
    )
