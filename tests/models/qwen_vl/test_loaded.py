"""A Qwen-VL as a folder: loaded, asked, quantised, by command and in Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

import mmchat
from mmchat.api import Model
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError, ImageError, ParamsError, PromptError, UsageError
from mmchat.models.base import Batch
from mmchat.models.qwen_vl.model import QwenVLForConditionalGeneration
from mmchat.runtime.eager import EagerRuntime
from tests.models.asking import finished, run
from tests.models.qwen_vl import oracle
from tests.models.qwen_vl.folders import SPARE_ROWS, tokenizer, weights, write_folder
from tests.models.qwen_vl.oracle import image
from tests.models.reading import read

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, speculate="off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("qwen") / "tiny-qwen")


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return mmchat.load(folder, device="cpu")


@pytest.fixture
def png(tmp_path) -> str:
    image(0).pixels.save(tmp_path / "dog.png")
    return str(tmp_path / "dog.png")


def math_of(model: Model) -> QwenVLForConditionalGeneration:
    assert isinstance(model.runtime, EagerRuntime)
    assert isinstance(model.runtime.model, QwenVLForConditionalGeneration)
    return model.runtime.model


def test_a_folder_as_its_makers_publish_it_is_a_chat_model_or_a_base(model, tmp_path):
    assert model.spec.chat_format == "instruct"
    assert vars(model.spec.generation) == {"temperature": 1.0, "top_p": 0.3}
    base = mmchat.load(write_folder(tmp_path / "base", is_chat=False), device="cpu")
    assert base.spec.chat_format == "base"


def test_greedy_tokens_are_those_of_the_logits_and_ids_without_a_token_are_never_written(model):
    prompt = model.processor.chat([mmchat.Message("user", (image(0), mmchat.Text("dog")))])
    tokens = model.tokenizer.vocab_size
    assert model.vocab_size == tokens == model.spec.config.vocab_size - SPARE_ROWS
    math = math_of(model)
    answer = finished(model.chat().send("dog", [image(0)], GREEDY))
    with torch.inference_mode():
        cache = math.new_cache(1, 0)
        last = read(math, cache, prompt)[-1:]
        said = torch.tensor(answer.output_ids[:-1])
        after = Batch.all_of(said, len(prompt.token_ids))  # rotated as the prompt is
        rows = torch.cat((last, math.forward(after, cache)))
    assert rows[:, :tokens].argmax(-1).tolist() == list(answer.output_ids)


def test_penalties_and_drafts_do_not_take_pictures_for_tokens(model):
    params = {"temperature": 0.0, "max_new_tokens": 24, "repetition_penalty": 1.3}
    one = finished(model.chat().send("dog dog dog", [image(0)], SamplingParams(**params)))
    plain = SamplingParams(**params, speculate="off")
    other = finished(model.chat().send("dog dog dog", [image(0)], plain))
    assert one.output_ids == other.output_ids


def test_a_second_turn_beyond_the_limit_of_rotation_answers_as_a_fresh_one(model):
    """The first turn has one picture, below the limit; with the second all is read anew."""
    chat = model.chat()
    first = finished(chat.send("dog", [image(0)], GREEDY))
    second = finished(chat.send("in?", [image(1)], GREEDY))
    assert first.usage.prompt_tokens < oracle.SEQ_LENGTH < second.usage.prompt_tokens
    fresh = model.chat()
    fresh.messages = chat.messages[:2]
    model.engine.release()
    assert finished(fresh.send("in?", [image(1)], GREEDY)).output_ids == second.output_ids


def test_many_questions_at_once_are_answered_as_each_alone(model):
    questions = [
        ("dog", image(0)),
        ("in <img/> and <img/>", [image(1), image(2)]),
        ("the", ()),
        ("<img>1.png</img> dog", image(1)),
    ]
    together = [one.output_ids for one in model.generate_many(questions, GREEDY)]
    alone = [next(iter(model.generate_many([one], GREEDY))).output_ids for one in questions]
    assert together == alone


def test_the_demos_of_rtp_llm(model, png):
    """A tag with its picture apart, for many prompts too, and an address in the text."""
    ask = "Picture 1:<img/>\nWhat is this?"
    expected = model.ask(ask, image(0), sampling=GREEDY)
    for urls in ([[png]], [png]):
        [answer] = model.generate_many([ask], GREEDY, urls=urls)
        assert answer.text == expected
    named = ask.replace("<img/>", f"<img>{png}</img>")
    [answer] = model.generate_many([named], GREEDY, image_tags=True)
    assert answer.text == expected
    both = model.generate_many([ask, "dog"], GREEDY, urls=[[png], []])
    assert [one.text for one in both] == [expected, model.ask("dog", sampling=GREEDY)]
    for questions, urls in (([ask, ask], [[png]]), ([ask], [[png], [png]]), ([(ask, png)], [png])):
        with pytest.raises(UsageError, match="each question is a text, and has its own list"):
            list(model.generate_many(questions, GREEDY, urls=urls))
    with pytest.raises(PromptError, match="1 <img/> tag, and there are 2 pictures"):
        list(model.generate_many([ask], GREEDY, urls=[[png, png]]))


def test_only_image_tags_open_what_a_text_names(model, png):
    text = f"<img>{png}</img> dog"
    with pytest.raises(PromptError, match="which is not given; give it with --image-prompt"):
        model.ask(text)
    opened = model.ask(text, sampling=GREEDY, image_tags=True)
    assert opened == model.ask("<img/> dog", image(0), sampling=GREEDY)
    [many] = model.generate_many([text], GREEDY, image_tags=True)
    assert many.text == opened
    with pytest.raises(ImageError, match="does not exist"):
        model.ask("<img>/nowhere/x.png</img>", image_tags=True)
    with pytest.raises(UsageError, match="messages hold their pictures"):
        model.ask([{"role": "user", "content": text}], image_tags=True)
    message = mmchat.Message("user", text)  # of a program: text, and nothing is opened
    assert finished(model.chat().ask(message, GREEDY)).pictures == ()


def test_the_command_line_opens_what_its_prompt_names_and_never_what_is_piped(folder, png):
    named = f"<img>{png}</img> dog"
    ask = ("generate", str(folder), "-n", "4", "-t", "0", "--json")
    assert "which is not given" in run(*ask, "-p", named, code=2)
    facts = json.loads(run(*ask, "-p", named, "--image-tags"))
    assert [one["source"] for one in facts["images"]] == [png]
    assert "which is not given" in run(*ask, "--image-tags", code=2, typed=named)
    piped = run(*ask, "-p", "dog", "--image-tags", code=2, typed=named)
    assert "which is not given" in piped
    counted = json.loads(run(*ask, "-p", named, "--image-tags", "--dry-run"))
    assert counted["prompt_tokens"] > 256
    tiny = ("generate", "tiny", "-p", named, "--image-tags")
    assert "prompts of this model name no pictures" in run(*tiny, code=2)


def test_the_chat_opens_nothing_that_a_pipe_names(folder, png, tmp_path):
    saved = tmp_path / "saved"
    lines = ["\\set image_tags on", f"<img>{png}</img> dog", f"\\save {saved}"]
    typed = "\n".join([*lines, ""])
    said = run("chat", str(folder), "-n", "2", "-t", "0", typed=typed, code=2)
    assert "image_tags is for a terminal" in said
    [turn] = json.loads((saved / "chat.json").read_text("utf-8"))["turns"]
    [part] = turn["question"]
    assert (part["text"], part["image"]) == (f"<img>{png}</img> dog", None)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_logits_stay_near(scheme, folder, model):
    """The layers are thin, so that rounding shows; the bound is that of the tiny Mllama."""
    rounded = math_of(mmchat.load(folder, device="cpu", quantize=scheme))
    prompt = model.processor.chat([mmchat.Message("user", (image(0), mmchat.Text("dog")))])
    with torch.inference_mode():
        plain, other = (read(m, m.new_cache(1, 0), prompt) for m in (math_of(model), rounded))
    error = float((plain - other).norm() / plain.norm())
    assert 1e-4 < error < {"int8": 0.05, "int4": 0.35}[scheme]


def test_text_alone_needs_no_vision(folder, model):
    text = mmchat.load(folder, device="cpu", text_only=True)
    loaded = [n for n, p in math_of(text).named_parameters() if not p.is_meta]
    assert loaded
    assert not any(n.startswith("transformer.visual.") for n in loaded)
    assert text.ask("dog", sampling=GREEDY) == model.ask("dog", sampling=GREEDY)


def test_commands_speak_of_the_square(folder, png, tmp_path):
    said = run("inspect", str(folder))
    assert "3 layers of 48 and a resampler; squares of 84 px, 258 positions each" in said
    assert "665 tokens, context 1,200, of which 300 were trained" in said
    facts = json.loads(run("inspect", str(folder), "--json"))
    assert facts["vision"]["positions_per_image"] == 258
    assert facts["checkpoint"]["tensors"] == len(weights())
    told = json.loads(run("tiles", png, "-m", str(folder), "-o", str(tmp_path / "x.png"), "--json"))
    assert (told["square"], told["fit"], told["resized"]) == ([84, 84], "stretch", [84, 84])
    with PILImage.open(tmp_path / "x.png") as drawn:
        assert drawn.size[0] >= 700


def test_programs_are_refused_with_what_can_be_done(folder, tmp_path):
    said = run("export", str(folder), "-o", str(tmp_path / "out"), "--format", "aoti", code=2)
    assert "safetensors" in said


def test_weights_are_exported_and_answer_alike(folder, model, tmp_path):
    run("export", str(folder), "-o", str(tmp_path / "out"), "--format", "safetensors")
    assert (tmp_path / "out" / "qwen.tiktoken").is_file()
    exported = mmchat.load(tmp_path / "out", device="cpu")
    expected = model.ask("dog", image(0), sampling=GREEDY)
    assert exported.ask("dog", image(0), sampling=GREEDY) == expected


def test_a_folder_of_the_hub_is_written_and_read_again(folder, model, tmp_path):
    run("export", str(folder), "-o", str(tmp_path / "hub"), "--format", "hf")
    again = mmchat.load(tmp_path / "hub", device="cpu")
    assert again.spec.config == model.spec.config
    assert again.spec.chat_format == "instruct"
    expected = model.ask("dog", image(0), sampling=GREEDY)
    assert again.ask("dog", image(0), sampling=GREEDY) == expected


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "round them with --quantize int4"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "round them with --quantize int4"),
        ({"rotary_pct": 0.25}, "rotary_pct: 0.25 is not supported here, only 1.0"),
        ({"no_bias": False}, "no_bias"),
        ({"kv_channels": 32}, "kv_channels: 32 is not supported here, only 64"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"intermediate_size": 415}, "intermediate_size: expected an even number"),
        ({"visual": {"output_dim": 512}}, "visual.output_dim: 512 is not supported here, only 256"),
    ],
)
def test_what_is_not_run_is_refused_by_name(folder, tmp_path, changed, said):
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ParamsError) as caught:
        mmchat.load(tmp_path / "other")
    assert said in str(caught.value)


def test_a_qwen_for_text_alone_is_refused(folder, tmp_path):
    found = json.loads((folder / "config.json").read_text())
    del found["visual"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ParamsError, match="a Qwen for text alone; mmchat runs Qwen-VL"):
        mmchat.load(path, checkpoint_path=folder)


def test_weights_of_other_sizes_are_refused_with_what_differs(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    found = json.loads(path.read_text())
    found["intermediate_size"] += 2
    found["visual"]["layers"] += 1
    path.write_text(json.dumps(found))
    with pytest.raises(CheckpointError) as caught:
        mmchat.load(tmp_path / "other")
    assert "expected [209, 256], found [208, 256]" in str(caught.value)
    assert "12 missing: 'transformer.visual.transformer.resblocks.3." in str(caught.value)


def test_an_answer_obeys_a_schema(model):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"the dog": {"enum": ["in the image", "<ref>"]}, "犬": {"type": "boolean"}},
        "required": ["the dog", "犬"],
        "additionalProperties": False,
    }
    for seed in range(3):
        sampling = SamplingParams(schema=schema, seed=seed, temperature=1.0, max_new_tokens=200)
        answer = finished(model.chat().send("dog", [image(0)], sampling))
        assert answer.reason == "stop"
        assert json.loads(answer.text).keys() == {"the dog", "犬"}


def test_tools_are_refused(model):
    question = mmchat.Message("user", "dog")
    with pytest.raises(UsageError, match="was not taught to call tools; leave them out"):
        model.processor.chat([question], [{"type": "function", "function": {"name": "look"}}])


def test_tags_of_places_are_text_of_answers(model):
    ids = tokenizer().encode("<ref>dog</ref><box>(1,2),(3,4)</box>")
    assert len(set(ids) & set(tokenizer().tags.values())) == 4
    assert model.tokenizer.decode(ids) == "<ref>dog</ref><box>(1,2),(3,4)</box>"
