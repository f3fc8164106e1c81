"""Ollama's files of Mllama: every form gives the exact weights, and answers as those do."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mmchat
from mmchat.catalog.find import find_model
from mmchat.catalog.known import data_path, known_specs
from mmchat.catalog.spec import params_document
from mmchat.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmchat.checkpoints.gguf_checkpoint import GgufPacking
from mmchat.checkpoints.mapped_file import TensorEntry
from mmchat.checkpoints.mapping import identity
from mmchat.engine.events import Finished
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError, MmchatError, ParamsError, UsageError
from mmchat.estimate.memory import used_in_place
from mmchat.export import ExportPlan, export_model
from mmchat.loading.options import LoadOptions
from mmchat.loading.packed import as_packed
from mmchat.models.mllama import build as build_module
from mmchat.models.mllama.build import MllamaBuild
from mmchat.models.mllama.gguf_format import FREQUENCIES, _unsquashed, from_gguf, gguf_rules
from mmchat.models.mllama.tensor_names import hf_shapes
from mmchat.nn.linear import Linear
from mmchat.nn.rope import scale_llama3
from mmchat.quant.formats.blocks import BLOCKS4, BLOCKS6, Blocks
from mmchat.quant.formats.int4 import PackedInt4
from mmchat.quant.formats.plain import PLAIN
from mmchat.quant.kernels import native
from mmchat.quant.schemes import SCHEMES
from mmchat.strict_json import Where
from mmchat.tokenizers import open_tokenizer
from tests.gguf_models import all_of, gguf_name, ollama_folder, write_model
from tests.models.mllama.test_real_shapes import MODELS

BUILD = MllamaBuild()

TINY = data_path("assets", "tiny")
SPEC = known_specs()[0]
PICTURE = data_path("assets", "dog.jpg")
ASKED = SamplingParams(temperature=0.0, max_new_tokens=8, logprobs=3)
FORMS = ("late", "pair", "early")


@pytest.fixture(scope="module")
def weights():
    with open_checkpoint(TINY) as files:
        return {name: files.read(name).clone() for name in files.entries}


@pytest.fixture(scope="module")
def written(tmp_path_factory, weights):
    """Form -> the folder of its files, and their exact weights."""
    root, tokenizer = tmp_path_factory.mktemp("gguf"), open_tokenizer(TINY)
    return {
        form: (root / form, write_model(root / form, weights, SPEC.config, tokenizer, form))
        for form in FORMS
    }


@pytest.fixture
def write(tmp_path, weights):
    """Writes the late form with other types or metadata; returns the file."""

    def write(**options) -> Path:
        tokenizer = open_tokenizer(TINY)
        write_model(tmp_path, weights, SPEC.config, tokenizer, **options)
        return tmp_path / "model.gguf"

    return write


def plain_folder(folder: Path, exact) -> Path:
    """A checkpoint of the exact values, by the Hub's names."""
    folder.mkdir()
    save_file(exact, folder / "model.safetensors")
    (folder / "params.json").write_text(json.dumps(params_document(SPEC)))
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    return folder


def said(model):
    """Its answer, and how likely each token and the next best ones were to it."""
    *_, last = model.chat().send("What is in this picture?", [PICTURE], ASKED)
    assert isinstance(last, Finished)
    return last.text, last.logprobs


def check_alike(ours, theirs):
    """Bit for bit the same weights; products of other addresses may round otherwise."""
    one, other = (model.runtime.model.state_dict() for model in (ours, theirs))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    (text, scores), (wanted, expected) = said(ours), said(theirs)
    assert text == wanted == "A brown dog."
    found = [[value for _, value in score.top] for score in scores]
    assert np.allclose(found, [[v for _, v in score.top] for score in expected], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_exact_weights(written, form):
    folder, exact = written[form]
    source = find_model(folder)
    assert source.spec.family.with_alpha(source.spec.config, "white") == SPEC.config
    assert source.spec.chat_format == "instruct"
    with source.open_weights() as files:
        pairs = [
            (n, t.to(torch.float32).clone()) for n, t in BUILD.iter_weights(files, SPEC.config)
        ]
        entries = BUILD.hub_entries(files, SPEC.config)
    assert [entry.name for entry in entries] == [name for name, _ in pairs]
    found = dict(pairs)
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        assert torch.equal(found[name], tensor), name


def test_the_permutation_that_is_undone_matters(written, monkeypatch):
    options = {"device": "cpu", "dtype": "float32", "quantize": "none"}
    right = said(mmchat.load(written["late"][0], **options))

    def cross_attention_as_it_is(*arguments):
        crossed = re.compile(r".*\.cross_attn\.[qk]_proj\.weight")
        for rule in gguf_rules(*arguments):
            yield replace(rule, transform=identity) if crossed.fullmatch(rule.target) else rule

    monkeypatch.setattr(build_module, "gguf_rules", lambda *a: list(cross_attention_as_it_is(*a)))
    wrong = said(mmchat.load(written["late"][0], **options))
    second, its = (tokens[1][0].top[1] for tokens in (right, wrong))
    assert abs(second[1] - its[1]) > 1e-3


@pytest.mark.parametrize("form", ["late", "pair"])
def test_it_answers_as_a_plain_checkpoint_of_the_exact_values(tmp_path, written, form):
    folder, exact = written[form]
    options = {"device": "cpu", "dtype": "float32", "quantize": "none"}
    plain = mmchat.load(plain_folder(tmp_path / "plain", exact), **options)
    check_alike(mmchat.load(folder / "model.gguf", **options), plain)


JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.mark.parametrize("form", FORMS)
def test_by_default_it_is_held_as_it_is(tmp_path, written, form):
    folder, exact = written[form]
    ours, held = mmchat.load(folder, device="cpu"), set()
    assert not [n for n in ours.runtime.notices if "GGUF" in n]
    for name, layer in ours.runtime.model.named_modules():
        if isinstance(layer, Linear):
            held.add((name.split(".")[0], layer.format))
            if layer.format is not PLAIN:
                owner, _, last = name.rpartition(".")
                parts = [exact[f"{owner}.{part}.weight"] for part in JOINED.get(last, (last,))]
                assert torch.equal(layer.format.widen(*layer.held()), torch.cat(parts)), name
    text, vision = "language_model", "vision_model"
    assert {(text, BLOCKS4), (text, BLOCKS6), (vision, PLAIN)} <= held
    model, source = ours.runtime.model, LoadOptions(folder, device="cpu").find()
    with source.open_weights() as files:
        options, _, others = as_packed(files, source.spec, LoadOptions(folder), ours.placement)
    need = options.setup(source.spec, ours.placement, others=others).need()
    kept = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert need.weights == pytest.approx(sum(kept.values()), rel=0.01)
    assert said(ours)[0] == "A brown dog."


def test_without_kernels_of_blocks_it_is_rounded_to_what_torch_multiplies(written, monkeypatch):
    monkeypatch.setattr(native, "is_possible", lambda: False)
    ours = mmchat.load(written["late"][0], device="cpu")
    assert ours.options.quantize == "int4-g32"
    held = {m.format for m in ours.runtime.model.modules() if isinstance(m, Linear)}
    assert not any(isinstance(format, Blocks) for format in held)


def test_parts_that_are_kept_are_widened(written):
    ours = mmchat.load(written["pair"][0], device="cpu", quantize_keep="head")
    assert ours.options.quantize_keep == ("head", "vision")
    assert ours.runtime.model.language_model.lm_head.format is PLAIN


def test_rounded_it_is_what_rounding_the_plain_checkpoint_gives(tmp_path, written):
    folder, exact = written["pair"]
    ours = mmchat.load(folder, device="cpu", quantize="int4-g32")
    [notice] = [n for n in ours.runtime.notices if "GGUF" in n]
    assert "held as int4-g32, which adds" in notice
    plain = plain_folder(tmp_path / "plain", exact)
    check_alike(ours, mmchat.load(plain, device="cpu", quantize="int4-g32"))


@pytest.mark.parametrize(
    ("kind", "scheme", "percent"),
    [
        ("Q4_0", "int4-g32", 0),
        ("Q5_0", "int8-b32", 0),
        ("Q5_K", "int6", 2.5),
        ("Q8_0", "int8-b32", 0),
    ],
)
def test_each_type_is_held_in_as_many_bits_or_more(write, kind, scheme, percent):
    ours = mmchat.load(write(choose=all_of(kind)), device="cpu")
    layer = ours.runtime.model.language_model.model.layers[0].self_attn.o_proj
    assert layer.format in (SCHEMES[scheme], PackedInt4(32))
    said = [n.split("adds ")[1].split("%")[0] for n in ours.runtime.notices if "GGUF" in n]
    assert len(said) == (percent > 0)
    assert all(float(share) <= percent for share in said)


def test_an_adapter_beside_it_is_not_ignored(write):
    path = write()
    (path.parent / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a model and an adapter"):
        find_model(path)
    assert find_model(path, adapter="none").adapters == ()


def test_exactly_is_as_asked(written):
    model = mmchat.load(written["late"][0], device="cpu", quantize="none")
    assert not [n for n in model.runtime.notices if "GGUF" in n]
    layers = [m for m in model.runtime.model.modules() if isinstance(m, Linear)]
    assert {layer.format.name for layer in layers} == {"none"}


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("Q4_0", "int4-b32"), ("Q4_K", "int4-b32"), ("Q5_0", "int6"), ("Q5_K", "int6"),
     ("Q6_K", "int6"), ("Q8_0", "int8-b32"), ("F16", "none"), ("BF16", "none"), ("F32", "none")],
)  # fmt: skip
def test_the_nearest_scheme(write, kind, scheme):
    source = find_model(write(choose=all_of(kind)))
    assert (source.spec.packing.scheme if source.spec.packing else "none") == scheme
    with source.open_weights() as files:
        assert not used_in_place(files, "float16")
        kinds = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        assert kinds.get(kind, kind) in files.bytes_by_kind()


def test_bits_between_two_schemes_go_to_the_nearer():
    found = {bits: GgufPacking(bits).scheme for bits in (4.5, 5.4, 5.5, 7.5, 7.6, 12.2, 12.3)}
    wanted = ["int4-b32"] * 2 + ["int6"] * 2 + ["int8-b32"] * 2 + ["none"]
    assert list(found.values()) == wanted


def test_text_only_needs_no_weights_of_the_vision(written):
    model = mmchat.load(written["late"][0], device="cpu", text_only=True)
    *_, last = model.chat().send("Hello", (), ASKED)
    assert isinstance(last, Finished)


# ---- exports -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind"), [("auto", "bfloat16"), ("float32", "float32")])
def test_exported_as_on_the_hub(tmp_path, written, dtype, kind):
    folder, exact = written["late"]
    plan = ExportPlan(LoadOptions(folder, dtype=dtype), tmp_path / "out", "hf")
    export_model(plan)
    source = find_model(tmp_path / "out")
    assert source.tokenizer == tmp_path / "out" / "tokenizer.json"
    ids = [open_tokenizer(place).encode("A brown dog.") for place in (source.tokenizer, TINY)]
    assert ids[0] == ids[1]
    with source.open_weights() as files:
        for name, tensor in exact.items():
            assert torch.equal(files.read(name), tensor.to(getattr(torch, kind))), name


def test_exported_as_weights_it_answers_alike(tmp_path, written):
    options = LoadOptions(written["late"][0], device="cpu", quantize="int8")
    export_model(ExportPlan(options, tmp_path / "out", "safetensors"))
    ours = mmchat.load(written["late"][0], device="cpu", quantize="int8")
    check_alike(mmchat.load(tmp_path / "out", device="cpu"), ours)


def test_an_export_rounds_nothing_unasked(tmp_path, written):
    export_model(ExportPlan(LoadOptions(written["pair"][0]), tmp_path / "out", "safetensors"))
    ours = mmchat.load(written["pair"][0], device="cpu", quantize="none")
    check_alike(mmchat.load(tmp_path / "out", device="cpu"), ours)


# ---- what does not fit ---------------------------------------------------------------------------


def test_another_architecture(write):
    path = write()
    path.write_bytes(path.read_bytes().replace(b"mllama", b"qwen2v", 1))
    with pytest.raises(ParamsError, match="a GGUF file of 'qwen2v', an architecture that mmchat"):
        find_model(path)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"mllama.block_count": None}, "'mllama.block_count': missing from the metadata"),
        ({"mllama.block_count": 2**31}, "text_config.num_hidden_layers"),
        ({"mllama.embedding_length": 250}, "num_attention_heads"),
        ({"mllama.attention.head_count": "8"}, "text_config.num_attention_heads"),
        ({"mllama.rope.dimension_count": 16}, "16, but a head has 32 dimensions"),
        ({"mllama.vision.image_size": 224}, "tiles of 112 px, the params say 224"),
        ({"mllama.vision.block_count": 5}, "missing: 'v.blk.4.attn_q.weight'"),
        ({"mllama.rope.freq_base": 10_000.0}, "scale RoPE otherwise than Llama 3.2"),
        ({"tokenizer.ggml.pre": "qwen2"}, "not that of Llama 3"),
        ({"tokenizer.ggml.tokens": None}, "'tokenizer.ggml.tokens': expected a list of texts"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "expected a number for each token"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "is no pair of tokens"),
    ],
)
def test_metadata_that_does_not_fit(write, changed, reason):
    path = write(**changed)
    with pytest.raises(MmchatError) as caught:
        mmchat.load(path, device="cpu")
    assert caught.value.exit_code == 3
    assert reason in str(caught.value).replace('"', "'")


def test_gates_that_are_not_of_one_model(tmp_path, weights):
    path = tmp_path / "model.gguf"
    write_model(tmp_path, weights, SPEC.config, open_tokenizer(TINY))
    with open_checkpoint(path) as files:
        entry = files.entries["v.position_embd.gate"]
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"\0\0\0\x3f")
    with pytest.raises(CheckpointError, match=r"the gates of positions, .* are not of one model"):
        mmchat.load(path, device="cpu")


@pytest.mark.parametrize("gate", [0.0, 0.5, -0.25, 3.0, -7.25, 7.25, 12.0])
def test_gates_come_back_to_the_bit(gate):
    value = torch.tensor([gate]).bfloat16().float()
    found = _unsquashed([value.tanh()])
    assert torch.equal(found, value) if abs(gate) < 7.4 else float(found.tanh()) == 1


def test_a_gate_that_was_no_bfloat16_stays_what_it_was():
    value = torch.tensor([0.123456789])
    assert torch.allclose(_unsquashed([value.tanh()]), value, rtol=1e-6)


# ---- the released models -------------------------------------------------------------------------


class Listed(Checkpoint):
    """Names and shapes of a file that is not there; reads what the rules ask for."""

    def __init__(self, entries, given) -> None:
        self.format, self.files, self.remarks = "gguf", (Path("model.gguf"),), ()
        self.entries = {e.name: e for e in entries}
        self._given = given

    def read(self, name):
        return self._given.get(name, torch.full((1,), 0.37))


@pytest.mark.parametrize("form", ["late", "pair"])
@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_of_the_released_models(model, form):
    config = MODELS[model]
    text = config.text_config
    plain = 1 / text.rope_theta ** (torch.arange(0, text.head_dim, 2).float() / text.head_dim)
    factors = plain / scale_llama3(plain, *vars(text.rope_scaling).values())
    shapes = hf_shapes(config)
    names = {gguf_name(hub, form): shape for hub, shape in shapes.items()}
    names |= {"v.position_embd.gate": (1,), FREQUENCIES: (text.head_dim // 2,)}
    # 11B: 908 tensors in one file; 396 and 512 in two
    if text.hidden_size == 4096:
        vision = sum(name.startswith(("v.", "mm.")) for name in names)
        assert (len(names), vision) == (908, 512)
    entries = [TensorEntry(n, "float32", s, Path("model.gguf")) for n, s in names.items()]
    found = BUILD.check_weights(Listed(entries, {FREQUENCIES: factors}), config)
    assert {name: entry.shape for name, entry in found.items()} == shapes
    kept = [e for e in entries if e.name != "blk.3.cross_attn_q_norm.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: 'blk\.3\.cross_attn_q_norm\.weight'"):
        BUILD.check_weights(Listed(kept, {FREQUENCIES: factors}), config)
    more = [*entries, replace(entries[0], name="blk.7.lora_a")]
    with pytest.raises(CheckpointError, match=r"1 unexpected: 'blk\.7\.lora_a'"):
        BUILD.check_weights(Listed(more, {FREQUENCIES: factors}), config)


@pytest.mark.parametrize("model", ["11B base", "11B instruct", "90B"])
def test_metadata_of_the_released_models(model):
    c = MODELS[model]
    t, v = c.text_config, c.vision_config
    f32 = lambda value: float(torch.tensor(value))  # noqa: E731 - as a file has it
    found = {
        "general.architecture": "mllama",
        "mllama.block_count": t.num_hidden_layers,
        "mllama.context_length": 131072,
        "mllama.embedding_length": t.hidden_size,
        "mllama.feed_forward_length": t.intermediate_size,
        "mllama.attention.head_count": t.num_attention_heads,
        "mllama.attention.head_count_kv": 8,
        "mllama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "mllama.attention.cross_attention_layers": t.cross_attention_layers,
        "mllama.rope.freq_base": 500000.0,
        "mllama.rope.dimension_count": 128,
        "mllama.vocab_size": 128256,
        "mllama.vision.block_count": 32,
        "mllama.vision.global.block_count": 8,
        "mllama.vision.embedding_length": 1280,
        "mllama.vision.feed_forward_length": 5120,
        "mllama.vision.attention.head_count": 16,
        "mllama.vision.attention.layer_norm_epsilon": f32(1e-5),
        "mllama.vision.image_size": v.image_size,
        "mllama.vision.patch_size": 14,
        "mllama.vision.max_num_tiles": 4,
        "mllama.vision.num_channels": 3,
        "mllama.vision.intermediate_layers_indices": (3, 7, 15, 23, 30),
    }
    says = from_gguf(found, Where("model.gguf"))
    assert says is not None
    assert replace(says.config, image_processor=c.image_processor) == c
    assert says.is_chat == (model != "11B base")
    assert from_gguf({**found, "general.architecture": "llama"}, Where("model.gguf")) is None


# ---- Ollama's folder -----------------------------------------------------------------------------


@pytest.fixture
def ollama(tmp_path, monkeypatch, weights):
    """Ollama's folder with a pair as llama3.2-vision:latest."""
    write_model(tmp_path / "new", weights, SPEC.config, open_tokenizer(TINY), "pair")
    files = [tmp_path / "new" / name for name in ("model.gguf", "mmproj.gguf")]
    ollama_folder(tmp_path / "ollama", files, params={"temperature": 0.25, "stop": ["<|eot_id|>"]})
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "ollama"


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_ollamas_model_is_found_by_its_name_and_answers(ollama):
    before = contents(ollama)
    model = mmchat.load("llama3.2-vision", device="cpu", quantize="none")
    assert model.spec.name == "llama3.2-vision-latest"
    assert model.spec.generation.temperature == 0.25
    assert said(model)[0] == "A brown dog."
    assert contents(ollama) == before


def test_options_that_do_not_fit_are_refused(ollama):
    with pytest.raises(UsageError, match="--quantize-keep vision keeps nothing"):
        mmchat.load("llama3.2-vision", quantize="none", quantize_keep="vision")
    with pytest.raises(CheckpointError, match="--vision-tower 'none': no such file"):
        mmchat.load("llama3.2-vision", vision_tower="none")
