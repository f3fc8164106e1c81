import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import mmchat
from mmchat.catalog.known import data_path
from mmchat.catalog.spec import load_spec
from mmchat.cli.app import app
from mmchat.engine.events import Finished
from mmchat.engine.reading import encode, rest_of
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError, DeviceError, MemoryError_, NumericalError, UsageError
from mmchat.estimate.memory import Setup
from mmchat.export import ExportPlan, export_model
from mmchat.images import load_image
from mmchat.loading import loader, prepared
from mmchat.loading.options import LoadOptions
from mmchat.models.family import parameter_count
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.tensor_names import hf_shapes
from mmchat.models.prompt import PlacedMedia, Prompt
from mmchat.quant.kernels import native, ops
from tests.models.mllama.oracle import CONFIG, build, random_weights

TOKENIZER = data_path("assets", "tiny", "tokenizer.model")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)


def small_config() -> MllamaConfig:
    vocab_size = len(TOKENIZER.read_text().splitlines()) + 256
    return replace(CONFIG, text_config=replace(CONFIG.text_config, vocab_size=vocab_size))


def write_hf_folder(folder, config, weights):
    """A folder as on the Hub, from what `transformers` would write."""
    vision, text = asdict(config.vision_config), asdict(config.text_config)
    rope = {"rope_type": "llama3", "rope_theta": text.pop("rope_theta"), **text.pop("rope_scaling")}
    document = {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": config.image_token_id,
        "vision_config": vision,
        "text_config": {**text, "rope_parameters": rope},
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "chat_template.json").write_text("{}")
    save_file(weights, folder / "model.safetensors")
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture(scope="module")
def weights(config):
    return random_weights(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config, weights):
    return write_hf_folder(tmp_path_factory.mktemp("models") / "random", config, weights)


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.effect_noise((70, 40), 60).convert("RGB").save(path)
    return path


def finish(events):
    *_, last = events
    assert isinstance(last, Finished)
    return last


def greedy_by_full_passes(model, ids, tiled):
    """The oracle: one pass over the whole text for each token, no cache, no engine."""
    start, ids = ids.index(model.config.image_token_id), list(ids)
    new = []
    for _ in range(GREEDY.max_new_tokens):
        prompt, cache = Prompt(tuple(ids), (PlacedMedia(start, 1, tiled),)), model.new_cache(1, 1)
        encode(model, prompt, cache)
        logits = model(rest_of(prompt, cache, torch.device("cpu")), cache)
        new.append(int(logits[0].argmax()))
        ids.append(new[-1])
    return new


@torch.inference_mode()
def test_a_loaded_folder_says_what_the_bare_model_says(folder, config, weights, picture):
    model = mmchat.load(folder, device="cpu")
    finished = finish(model.chat().send("What is it?", [picture], GREEDY))
    tiled = model.processor._prepare(load_image(picture))
    expected = greedy_by_full_passes(build(weights, config), finished.prompt_ids, tiled)
    assert list(finished.output_ids) == expected[: len(finished.output_ids)]
    assert finished.usage.image_tokens == len(tiled.tensors[0]) * 10


@pytest.mark.parametrize("scheme", ["none", "int8", "int4-g32"])
def test_one_weight_that_is_no_number_ends_the_answer_with_an_error(
    tmp_path, config, weights, scheme
):
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    broken = weights[name].clone()
    broken[3, 5] = torch.nan
    folder = write_hf_folder(tmp_path / "broken", config, {**weights, name: broken})
    model = mmchat.load(folder, device="cpu", quantize=scheme)
    with pytest.raises(NumericalError, match="NaN or infinite logits at token 1"):
        finish(model.chat().send("Hello", sampling=GREEDY))


def test_a_stray_buffer_is_passed_over_and_said_to_those_who_ask(tmp_path, config, weights):
    stray = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    folder = write_hf_folder(tmp_path / "stray", config, weights | stray)
    said = "passed over 'model.layers.0.self_attn.rotary_emb.inv_freq', which other libraries"
    for asked in (["-v"], []):
        done = CliRunner().invoke(app, ["generate", str(folder), "-p", "x", "-n", "1", *asked])
        assert done.exit_code == 0, done.stderr
        assert (said in " ".join(done.stderr.split())) == bool(asked)


def test_text_only_leaves_vision_unloaded_and_says_the_same_about_text(folder, picture):
    whole = mmchat.load(folder, device="cpu")
    text_only = mmchat.load(folder, device="cpu", text_only=True)
    unloaded = {n for n, p in text_only.runtime.model.named_parameters() if p.is_meta}
    assert {n.split(".")[0] for n in unloaded} == {
        "vision_model", "multi_modal_projector", "language_model",
    }  # fmt: skip
    answers = [finish(m.chat().send("Hello", (), GREEDY)).output_ids for m in (whole, text_only)]
    assert answers[0] == answers[1]
    with pytest.raises(UsageError, match="text only"):
        finish(text_only.chat().send("Hello", [picture]))


def test_every_weight_is_loaded_as_it_was_stored(folder, weights):
    loaded = mmchat.load(folder, device="cpu").runtime.model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_rotary_frequencies_are_float32_whatever_the_weights_are(folder):
    """Rounded ones would turn late positions by more than a whole circle."""
    models = [mmchat.load(folder, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")]
    one, other = (m.runtime.model.language_model.model.rotary.inv_freq for m in models)
    assert torch.equal(one, other)


def test_tables_filled_for_tiles_that_a_canvas_lacks_are_used_and_said(
    tmp_path, config, monkeypatch
):
    # oneDNN adds up joined layers in another order than each alone
    monkeypatch.setattr(ops, "has_slow_mkl", lambda: False)
    filled = random_weights(config, fill_unused_tiles=True)
    folder = write_hf_folder(tmp_path / "trained", config, filled)
    export_model(ExportPlan(LoadOptions(folder), tmp_path / "saved", "safetensors"))
    image = torch.randn(1, 2, 3, 42, 42), torch.tensor([2])
    expected = build(filled, config).vision_states(*image)
    for place in (folder, tmp_path / "saved"):
        model = mmchat.load(place, device="cpu", dtype="float32")
        assert torch.equal(model.runtime.model.vision_states(*image), expected)
        assert "padding tiles are computed one by one" in model.remarks[0]
        assert mmchat.load(place, device="cpu", text_only=True).remarks == ()


def test_progress_counts_the_tensors(folder, weights):
    seen = []
    mmchat.load(folder, device="cpu", progress=lambda *step: seen.append(step))
    assert seen[-1] == ("weights", len(weights), len(weights))
    assert len(seen) == len(weights)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(prepared, "available_memory", lambda device: 1000)
    monkeypatch.setattr(
        loader, "load_weights", lambda *_, **__: pytest.fail("something was loaded")
    )
    with pytest.raises(MemoryError_, match=r"needs .* MiB on cpu \(weights .* 1000 B are free"):
        mmchat.load(folder, device="cpu")


@pytest.mark.parametrize("quantize", ["none", "int8", "int4-g32"])
@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_counts_every_byte_that_is_loaded(folder, dtype, text_only, quantize):
    model = mmchat.load(folder, device="cpu", dtype=dtype, text_only=text_only, quantize=quantize)
    module = model.runtime.model
    tensors = [*module.parameters(), *module.buffers()]
    loaded = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)
    computed = module.language_model.model.rotary.inv_freq.nbytes  # in no checkpoint
    setup = Setup.of(model.spec, model.placement, quantize=quantize, text_only=text_only)
    assert setup.need().weights == loaded - computed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "warp"}, "unknown device 'warp'"),
        ({"device": "xpu"}, "unknown device 'xpu'; use auto, cpu"),
        ({"device": "cpu", "dtype": "int3"}, "unknown dtype 'int3'"),
    ],
)
def test_a_device_or_dtype_that_is_not_here_is_named(folder, options, message):
    with pytest.raises(DeviceError, match=message):
        mmchat.load(folder, **options)


def test_a_context_beyond_the_models_is_refused(folder):
    with pytest.raises(UsageError, match=r"--max-seq-len 1000000 .* takes 1 to 131,072 positions"):
        mmchat.load(folder, device="cpu", max_seq_len=10**6)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, config, weights):
    text = replace(config.text_config, vocab_size=300)
    smaller = replace(config, text_config=text)
    broken = write_hf_folder(tmp_path / "broken", smaller, random_weights(smaller))
    with pytest.raises(CheckpointError, match=r"tokenizer .* tokens, but the model .* has 300"):
        mmchat.load(broken, device="cpu")


def test_missing_tokenizer_is_named_with_the_option_that_gives_one(tmp_path, folder):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="--tokenizer-path"):
        mmchat.load(copy, device="cpu")
    assert mmchat.load(copy, tokenizer_path=TOKENIZER, device="cpu")


def write_params(path, config):
    """One of our params files for `config`."""
    document = {
        "name": path.stem,
        "model_type": "mllama",
        "description": "For a test.",
        "aliases": [],
        "repo": None,
        "chat_format": "instruct",
        "parameters": parameter_count(hf_shapes(config)),
        "generation": {"temperature": 0.6, "top_p": 0.9},
        **asdict(config),
    }
    path.write_text(json.dumps(document))
    return path


def test_params_for_other_tiles_are_named_with_the_file_that_fits(
    tmp_path, config, folder, monkeypatch
):
    """The predecessor's users met this as an obscure size mismatch."""
    large = replace(config, vision_config=replace(config.vision_config, image_size=56))
    right = write_params(tmp_path / "small-tiles.json", config)
    wrong = write_params(tmp_path / "large-tiles.json", large)
    known = tuple(map(load_spec, (right, wrong)))
    monkeypatch.setattr("mmchat.catalog.known.known_specs", lambda: known)
    files = {
        "checkpoint_path": folder / "model.safetensors",
        "tokenizer_path": folder / "tokenizer.model",
    }
    with pytest.raises(CheckpointError, match=r"tiles of 42 px.*say 56.*small-tiles\.json fits"):
        mmchat.load(params_path=wrong, device="cpu", **files)
    assert mmchat.load(params_path=right, device="cpu", **files)


def test_a_conversation_with_cached_turns_equals_a_fresh_one(folder, picture):
    """The second turn continues the cache; another model reads everything from the start."""
    model = mmchat.load(folder, device="cpu")
    session = model.chat()
    finish(session.send("What is it?", [picture], GREEDY))
    cached = finish(session.send("And now?", (), GREEDY))
    fresh = mmchat.load(folder, device="cpu").chat()
    fresh.messages = session.messages[:2]
    whole = finish(fresh.send("And now?", (), GREEDY))
    assert cached.usage.cached_tokens > 0 == whole.usage.cached_tokens
    assert cached.prompt_ids == whole.prompt_ids
    assert cached.output_ids == whole.output_ids


def test_another_picture_at_the_same_place_is_read_anew(folder, tmp_path):
    """Everything else of the prompt is the same: nothing of the old picture may stay cached."""
    from PIL import Image

    sent = SamplingParams(temperature=0.0, max_new_tokens=4, logprobs=1)
    answers = []
    for name, tone in (("one.png", 20), ("other.png", 220)):
        Image.new("RGB", (70, 40), (tone, 90, 200)).save(tmp_path / name)
    model = mmchat.load(folder, device="cpu")
    session = model.chat()
    for name in ("one.png", "other.png"):
        first = finish(session.send("What is it?", [tmp_path / name], sent))
        session.undo()
        fresh = finish(model.chat().send("What is it?", [tmp_path / name], sent))
        assert first.output_ids == fresh.output_ids
        answers.append([round(entry.logprob, 4) for entry in first.logprobs])
        assert answers[-1] == [round(entry.logprob, 4) for entry in fresh.logprobs]
    assert answers[0] != answers[1]


def test_a_model_that_would_be_faster_with_the_c_kernels_says_so(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "reason", lambda: "no C compiler here; install gcc")
    slower = "slower than it could be, on torch's own kernels: no C compiler here; install gcc"
    assert mmchat.load("tiny", quantize="int8").runtime.notices == [slower]
    assert mmchat.load("tiny").runtime.notices == []
    monkeypatch.setenv("MMCHAT_NATIVE_KERNELS", "0")
    assert mmchat.load("tiny", quantize="int8").runtime.notices == []


@pytest.mark.parametrize("text_only", [False, True])
def test_what_pictures_and_long_prompts_need_is_compiled_while_loading(monkeypatch, text_only):
    told = []
    monkeypatch.setattr(native, "prepare", told.append)
    mmchat.load("tiny", text_only=text_only, progress=(progress := lambda *stage: None))
    assert told == [progress]
