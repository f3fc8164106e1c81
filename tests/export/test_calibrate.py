"""Weights that are rounded by samples: closer to the plain model, and nothing else is different."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import mmchat
from benchmarks.entrants import byte_tokenizer
from benchmarks.quantization import draw_samples, messages
from benchmarks.shapes import Shapes, shaped_spec
from mmchat.bench.pictures import picture_of
from mmchat.checkpoints.manifest import sha256_of
from mmchat.cli import console
from mmchat.conversation import Message
from mmchat.engine.reading import encode
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import MemoryError_, MmchatError, NumericalError, UsageError
from mmchat.evals.scenes import heldout_scenes
from mmchat.export import ExportPlan, calibrate, export_model
from mmchat.export.calibrate import find_samples
from mmchat.images import from_pil, load_image
from mmchat.loading.loader import LoadedModel
from mmchat.loading.options import LoadOptions
from mmchat.models.base import Batch
from mmchat.models.prompt import Prompt, followed
from mmchat.nn.shapes_only import shapes_only
from mmchat.quant import gptq
from mmchat.quant.schemes import Plan
from tests.models.asking import run
from tests.models.llava.folders import write_hub_folder
from tests.models.qwen_vl.folders import write_folder

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
SCENES, HELD_OUT = 4, 8


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    return draw_samples(tmp_path_factory.mktemp("samples") / "drawn", SCENES)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return draw_samples(tmp_path_factory.mktemp("few") / "drawn", 1)


def export(folder: Path, samples: Path, scheme: str = "int4", progress=lambda *_: None, **options):
    made = LoadOptions(**{"quantize": scheme, "dtype": "float32"} | options)
    return export_model(ExportPlan(made, folder, "safetensors", calibrate=samples), progress)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Questions about scenes that no sample is of, and their right answers."""
    processor, found = mmchat.load("tiny").processor, []
    for scene in heldout_scenes(HELD_OUT):
        pictures = [from_pil(one, source=f"scene {scene.seed}") for one in scene.pictures]
        for question in scene.questions:
            prompt = processor.chat(messages(pictures, question))
            answer = processor.tokenizer.encode(question.answer)
            found.append(followed(processor, prompt, answer))
    return found


def divergence(model: LoadedModel, plain: LoadedModel, prompts: list[Prompt]) -> float:
    """Of the next token at each position of the prompts, in nats."""
    logits: list[torch.Tensor] = []
    for one in (model, plain):
        for prompt in prompts:
            cache = one.runtime.new_cache(1, 0)
            encode(one.runtime, prompt, cache)
            batch = Batch.all_of(torch.tensor(prompt.token_ids), 0)
            logits.append(one.runtime.forward(batch, cache).double().log_softmax(-1))
    mine, expected = torch.cat(logits).chunk(2)
    return float((expected.exp() * (expected - mine)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4", "int4-b32"])
def test_samples_halve_what_rounding_costs_the_built_in_model(samples, prompts, scheme, tmp_path):
    assert not export(tmp_path / "out", samples, scheme).remarks
    model, plain = mmchat.load(tmp_path / "out"), mmchat.load("tiny", dtype="float32")
    assert model.options.quantize == scheme
    rounded = mmchat.load("tiny", dtype="float32", quantize=scheme)
    found, before = (divergence(one, plain, prompts) for one in (model, rounded))
    assert 0 < found < 0.5 * before


@pytest.mark.slow
def test_an_export_has_the_form_of_one_without_samples_and_is_the_same_each_time(few, tmp_path):
    folders = [tmp_path / name for name in ("first", "second", "plain")]
    for folder in folders[:2]:
        export(folder, few, quantize_keep=("head",))
    options = LoadOptions(quantize="int4", quantize_keep=("head",), dtype="float32")
    export_model(ExportPlan(options, folders[2], "safetensors"))
    assert len({sha256_of(folder / "model.safetensors") for folder in folders}) == 2
    assert sha256_of(folders[0] / "params.json") == sha256_of(folders[2] / "params.json")
    mine, plain = (mmchat.load(folder).runtime.model.state_dict() for folder in folders[1:])
    assert {n: (t.shape, t.dtype) for n, t in mine.items()} == {
        n: (t.shape, t.dtype) for n, t in plain.items()
    }
    changed = {name for name, tensor in mine.items() if not torch.equal(tensor, plain[name])}
    levels = {n for n, t in mine.items() if t.dtype == torch.uint8}
    assert changed == levels  # of the text alone; scales and all else are as they were
    answers = [next(mmchat.load(f).generate_many(["Hi"], GREEDY)).output_ids for f in folders[:2]]
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_hub_folder, write_folder], ids=["llava", "qwen-vl"])
def test_families_whose_pictures_take_positions_are_calibrated(write, few, tmp_path):
    check_family(str(write(tmp_path / "model")), few, tmp_path)


def check_family(model: str, samples: Path, tmp_path: Path) -> None:
    """Every text layer is rounded by samples, from the first on what the plain model computes."""
    scheme = "int4-g32"
    report = export(tmp_path / "out", samples, scheme, name=model)
    assert not [remark for remark in report.remarks if "without samples" in remark]
    mine = mmchat.load(tmp_path / "out")
    held = [m.runtime.model.state_dict() for m in (mine, mmchat.load(model, quantize=scheme))]
    levels = [name for name, tensor in held[0].items() if tensor.dtype == torch.uint8]
    assert levels
    assert not [name for name in levels if torch.equal(*(one[name] for one in held))]
    assert next(mine.generate_many([("dog", str(samples / "0-0.png"))], GREEDY)).output_ids


@pytest.mark.parametrize("shapes", ["11B", "90B"])
def test_layers_of_true_widths_are_reached_one_by_one(shapes, monkeypatch):
    """On the meta device, with fewer layers."""
    widths = []

    def quantize(format, weight, gram):
        widths.append(weight.shape[1])
        assert gram.sums.shape == (weight.shape[1], weight.shape[1])
        tensors = format.tensors(*weight.shape).values()
        return [torch.empty(size, dtype=getattr(torch, d), device="meta") for d, size in tensors]

    monkeypatch.setattr(gptq, "quantize", quantize)
    spec = shaped_spec(Shapes(shapes), torch.device("cpu"))
    build, text = spec.family.build(), spec.config.text_config
    with shapes_only():
        model = build.model(spec.config).to("meta", torch.bfloat16)
    plan, parts = Plan("int4-b32"), model.linear_parts()
    layers = {model.get_submodule(name): part for name, part in parts.items()}
    formats = {one: plan.layer_format(part, *one.weight.shape) for one, part in layers.items()}
    waiting = {one: format for one, format in formats.items() if format.calibrates}
    tokens = byte_tokenizer(spec.config.vocab_size, ("dog",))
    processor = build.processor(spec.config, tokens, "white")
    picture = load_image(picture_of(spec, 4, seed=1))
    prompts = [processor.chat([Message("user", (picture,))]), processor.of_ids(range(9))]
    meta = torch.device("meta")
    with torch.no_grad():
        assert calibrate.Calibration(waiting, lambda *_: None).read(model, prompts, meta) == {}
    wide, inner = text.hidden_size, text.intermediate_size
    count = text.num_hidden_layers
    assert sorted(widths) == [wide] * 6 * count + [inner] * count
    model.fuse_projections()


@pytest.mark.slow
def test_one_layers_sums_are_in_memory_at_a_time_and_one_layers_keys(few, tmp_path, monkeypatch):
    made: list[weakref.ref] = []
    most, caches = [], []

    class Gram(gptq.Gram):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(weakref.ref(self))
            most.append(sum(one() is not None for one in made))

    def encoded(self, model, prompts):
        caches.append(plain(self, model, prompts))
        return caches[-1]

    plain = calibrate.Calibration._encoded
    monkeypatch.setattr(gptq, "Gram", Gram)
    monkeypatch.setattr(calibrate.Calibration, "_encoded", encoded)
    export(tmp_path / "out", few)
    text = mmchat.load("tiny").spec.config.text_config
    # layers that read pictures have one, each of the others that of its projections, of what
    # attention gave, of the MLP and of its widest layer
    crossing = len(text.cross_attention_layers)
    assert len(made) == 1 + 4 * text.num_hidden_layers
    assert crossing
    assert set(most) == {1}
    assert [len({id(layer) for layer in cache.layers}) for cache in caches] == [1, 1]


@pytest.mark.slow
def test_texts_are_read_as_they_are_and_layers_of_pictures_stay_rounded(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(console.Stages, "show", lambda _, stage: shown.append(stage))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("A red circle is left of a blue square.\n" * 80)
    for hidden in (".hidden.txt", ".folder/a.txt"):
        (tmp_path / "texts" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / hidden).write_bytes(b"\xff\0")
    made = partial(run, "export", "tiny", "--format", "safetensors", "--quantize", "int4")
    made("--calibrate", str(tmp_path / "texts"), "-o", str(tmp_path / "out"))
    left = re.compile(r"calibrating, layer 2 of \d+, about \d+ s left")
    assert len(list(filter(left.fullmatch, shown))) == 1
    mine = mmchat.load(tmp_path / "out").runtime.model.state_dict()
    plain = mmchat.load("tiny", quantize="int4").runtime.model.state_dict()
    same = {n for n, t in mine.items() if t.dtype == torch.uint8 and torch.equal(t, plain[n])}
    assert same
    crossing = mmchat.load("tiny").spec.config.text_config.cross_attention_layers
    assert {int(name.split(".")[3]) for name in same} == set(crossing)
    report = export(tmp_path / "again", tmp_path / "texts")
    assert report.remarks == [
        "2 samples can do harm; give --calibrate some hundreds, as different as what you will ask",
        f"{7 * len(crossing)} layers are rounded without samples: none reached them; add pictures"
        " to the folder of --calibrate",
    ]


@pytest.mark.slow
def test_a_sample_that_cannot_be_asked_is_left_out_and_named(few, tmp_path):
    found = tmp_path / "samples"
    found.mkdir()
    shutil.copy(few / "0-0.png", found)
    (found / "broken.jpg").write_text("no picture")
    rows = [{"image": "none.png"}, {"custom_id": "7", "body": {"messages": 7}}]
    (found / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = export(tmp_path / "out", found)
    left_out = sorted(remark for remark in report.remarks if remark.startswith("left out: "))
    assert left_out[0].startswith(f"left out: '{found}/broken.jpg' is not a picture")
    assert left_out[1] == f"left out: {found}/more.jsonl: line 1: 'none.png' does not exist"
    assert left_out[2].startswith(f"left out: {found}/more.jsonl: line 2: messages must be a list")
    assert len(left_out) == 3
    assert "1 sample can do harm" in report.remarks[-1]


def test_samples_are_pictures_tables_and_texts_below_a_folder(few, tmp_path, monkeypatch):
    found = find_samples(few)
    assert found.texts == []
    assert all(row.file.name == "questions.jsonl" for row in found.rows)  # which name all pictures
    (few / "questions.jsonl").rename(tmp_path / "kept.jsonl")
    try:
        alone = find_samples(few).rows
    finally:
        (tmp_path / "kept.jsonl").rename(few / "questions.jsonl")
    assert [row.custom_id for row in alone] == sorted(map(str, few.glob("*.png")))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no picture, .txt or .jsonl; put some of your own there"),
        ({"a.md": b"text"}, "holds no picture"),
        ({"a.txt": b"\xff\xfe"}, "is UTF-16, not UTF-8 text"),
        ({"a.txt": b" \n"}, "holds no picture"),
        ({"a.png": b"no picture"}, "a.png"),
        ({"a.jsonl": b"{"}, "a.jsonl"),
    ],
)
def test_a_folder_that_gives_no_samples_is_refused_in_a_line(tmp_path, files, message):
    (tmp_path / "samples").mkdir()
    for name, data in files.items():
        (tmp_path / "samples" / name).write_bytes(data)
    with pytest.raises(MmchatError, match=message) as refused:
        export(tmp_path / "out", tmp_path / "samples")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="none' is not a folder; give one of pictures"):
        export(tmp_path / "out", tmp_path / "none")


@pytest.mark.parametrize("scheme", ["none", "auto", "int8", "int8-b32", "int6", "fp8"])
def test_schemes_of_more_bits_need_no_samples(tmp_path, scheme):
    with pytest.raises(UsageError, match=r"does nothing with --quantize .* int4-b32"):
        export(tmp_path / "out", tmp_path, scheme)


def test_what_takes_no_calibrated_weights_is_refused(tmp_path):
    options = LoadOptions(quantize="int4")
    with pytest.raises(UsageError, match="ExecuTorch rounds weights in its own form"):
        ExportPlan(options, tmp_path, "executorch", calibrate=tmp_path)
    kept = replace(options, quantize_keep=("text",))
    with pytest.raises(UsageError, match="--quantize-keep text leaves nothing to --calibrate"):
        ExportPlan(kept, tmp_path, calibrate=tmp_path)


def test_samples_that_do_not_fit_into_memory_are_refused_with_the_numbers(
    few, tmp_path, monkeypatch
):
    from mmchat.loading import loader

    load = loader.load
    monkeypatch.setattr(loader, "load", lambda *a, **k: replace(load(*a, **k), memory=4_000_000))
    with pytest.raises(MemoryError_, match=r"tokens and 1 picture needs .* are free; give"):
        export(tmp_path / "out", few)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["answering samples", "encoding pictures", "calibrating"])
def test_an_interrupt_leaves_nothing(few, tmp_path, stage):
    def interrupt(name, done, total):
        assert done <= total
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out", few, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_are_no_numbers_leave_nothing(few, tmp_path, monkeypatch):
    add = gptq.Gram.add
    monkeypatch.setattr(gptq.Gram, "add", lambda self, x: add(self, x * float("nan")))
    with pytest.raises(NumericalError, match="no number; try --dtype float32"):
        export(tmp_path / "out", few)
    assert list(tmp_path.iterdir()) == []
