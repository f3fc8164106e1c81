"""How far quantised models are from plain ones: `python -m benchmarks.quantization`.

Of the built-in model, which is trained: divergence and agreement of the next token, over the right
answers to questions about held-out scenes, and how many answers are right. Of a model with 11B's
widths and random weights: the same over random text after a picture, and the error of each kind of
linear layer on the very inputs that the plain model gives it. int4 stands beside itself with plain
rounding in place of the search for scales, and on the built-in model int4 and int4-b32 beside
themselves calibrated on scenes of the other split. And how long products take in each format.
Writes figures/quantization.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import mmchat
from benchmarks import agreement
from benchmarks.entrants import contestant
from benchmarks.shapes import RandomTensors, Shapes, shaped_spec
from mmchat.bench.pictures import picture_of
from mmchat.bench.run import Variant
from mmchat.conversation import Image, Message, Text
from mmchat.engine.reading import encode, rest_of
from mmchat.evals.scenes import Question, heldout_scenes, make_scene
from mmchat.export import ExportPlan, export_model
from mmchat.images import from_pil, load_image
from mmchat.loading.loader import LoadedModel
from mmchat.loading.options import LoadOptions
from mmchat.models.base import Batch
from mmchat.nn.linear import Linear
from mmchat.quant.formats.int4 import Int4
from mmchat.quant.kernels.reference import LEAST_STEP
from mmchat.quant.schemes import SCHEMES, Plan

RESULTS = Path(__file__).parent / "figures" / "quantization.json"
PLAIN_ROUNDING = "int4, plain rounding"
CALIBRATED = ", calibrated"
WAYS = ("int8", "int4", PLAIN_ROUNDING)
BUILT_IN_WAYS = (*WAYS, f"int4{CALIBRATED}", "int4-b32", f"int4-b32{CALIBRATED}")
QUESTIONS = 8  # single questions about each scene to calibrate on, at most
TEXT_TOKENS = 48  # of random text at 11B's widths
TIMED = ("none", "int8", "int4", "int4-b32", "nf4", "int6", "int8-b32")
COPIES, ROUNDS = 8, 9  # of each weight, which exceed the caches together; of all formats in turn


@contextmanager
def rounding(way: str) -> Iterator[str]:
    """The scheme to load for one of WAYS, while int4 weights are rounded in that way."""
    if way != PLAIN_ROUNDING:
        yield way
        return
    with mock.patch.object(Int4, "quantize", plainly_rounded):
        yield "int4"


def plainly_rounded(format: Int4, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int4 weights by rounding to 16 levels over the range of each group."""
    groups = weight.float().unflatten(1, (-1, format.group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    inverse = torch.where(scale >= LEAST_STEP, 1 / scale.float(), 0)
    levels = ((groups - zero.float()[..., None]) * inverse[..., None] + 8).clamp(0, 15).round()
    pairs = levels.to(torch.uint8).reshape(len(weight), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, scale, zero


def compare_logits(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Each: a list of logits [S, V]. kl in nats of the expected distribution; top1 a share."""
    pairs = [
        agreement.compare(f[None], e[None])
        for ours, theirs in zip(found, expected, strict=True)
        for f, e in zip(ours, theirs, strict=True)
    ]
    return {
        "positions": len(pairs),
        "kl": statistics.fmean(p.kl for p in pairs),
        "relative_error": statistics.fmean(p.relative_error for p in pairs),
        "top1": statistics.fmean(p.top1 for p in pairs),
    }


def answer_logits(loaded: LoadedModel, scenes: int) -> tuple[list[Tensor], int]:
    """Logits [S, V] before each token of each right answer, the end of the turn included.

    And how many answers are right: greedy decoding gives one exactly if each of its tokens is the
    most likely one after those before it.
    """
    processor, runtime, found, right = loaded.processor, loaded.runtime, [], 0
    for scene in heldout_scenes(scenes):
        pictures = [from_pil(p, source=f"scene {scene.seed}") for p in scene.pictures]
        for question in scene.questions:
            prompt = processor.chat(messages(pictures, question))
            answer = processor.tokenizer.encode(question.answer)
            cache = runtime.new_cache(1, len(prompt.token_ids) + len(answer))
            encode(runtime, prompt, cache)
            first = runtime.forward(rest_of(prompt, cache, runtime.device), cache)
            rest = runtime.forward(Batch.all_of(torch.tensor(answer), cache.lengths[0]), cache)
            found.append(torch.cat((first, rest)))
            *said, end = found[-1].argmax(-1).tolist()
            right += said == answer and end in processor.stop_ids
    return found, right


def messages(pictures: list[Image], question: Question) -> list[Message]:
    """The conversation up to the question."""
    first, *later = (*question.earlier, question)
    found = [Message("user", (*pictures, Text(first.text)))]
    for before, asked in pairwise((first, *later)):
        found.append(Message("assistant", (Text(before.answer),)))
        found.append(Message("user", (Text(asked.text),)))
    return found


def draw_samples(folder: Path, scenes: int) -> Path:
    """Scenes that are in no evaluation, as pictures and a table of single questions about them."""
    folder.mkdir()
    rows = []
    for seed in range(scenes):
        scene = make_scene(seed, "train")
        names = [str(folder / f"{seed}-{number}.png") for number in range(len(scene.pictures))]
        for name, picture in zip(names, scene.pictures, strict=True):
            picture.save(name)
        asked = [question.text for question in scene.questions if not question.earlier]
        rows += [json.dumps({"image": names, "prompt": text}) for text in asked[:QUESTIONS]]
    (folder / "questions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def built_in(scenes: int, samples: int) -> dict[str, Any]:
    expected, right = answer_logits(mmchat.load("tiny", dtype="float32"), scenes)
    found, rights = {}, {"float32": right}
    with tempfile.TemporaryDirectory() as place:
        folder = draw_samples(Path(place) / "samples", samples)
        for way in BUILT_IN_WAYS:
            logits, rights[way] = answer_logits(built_in_as(way, folder), scenes)
            found[way] = compare_logits(logits, expected)
    return {
        "model": "tiny", "scenes": scenes, "right": rights, "against": "float32", "ways": found,
    }  # fmt: skip


def built_in_as(way: str, samples: Path) -> LoadedModel:
    """The built-in model rounded in one of BUILT_IN_WAYS."""
    if not way.endswith(CALIBRATED):
        with rounding(way) as scheme:
            return mmchat.load("tiny", dtype="float32", quantize=scheme)
    scheme = way.removesuffix(CALIBRATED)
    options, folder = LoadOptions("tiny", dtype="float32", quantize=scheme), samples.parent / scheme
    export_model(ExportPlan(options, folder, "safetensors", calibrate=samples))
    return mmchat.load(folder)


def picture_and_text_logits(loaded: LoadedModel) -> list[Tensor]:
    """Logits [S, V] of random tokens after a picture of one tile."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, loaded.vocab_size, (TEXT_TOKENS,), generator=draw)
    picture = load_image(picture_of(loaded.spec, 1, seed=1))
    prompt = loaded.processor.raw(Message("user", (picture,)))
    runtime = loaded.runtime
    cache = runtime.new_cache(1, len(prompt.token_ids) + TEXT_TOKENS)
    encode(runtime, prompt, cache)
    runtime.forward(rest_of(prompt, cache, runtime.device), cache)
    return [runtime.forward(Batch.all_of(tokens, cache.lengths[0]), cache)]


def wide(name: str) -> dict[str, Any]:
    spec = shaped_spec(Shapes(name), torch.device("cpu"))
    tensors = RandomTensors(spec, 0, torch.bfloat16, torch.device("cpu"), keep=True)
    plain = contestant(spec, tensors, Variant()).loaded
    with layer_errors(plain.runtime.model) as errors:  # type: ignore[attr-defined]
        expected = picture_and_text_logits(plain)
    found = {}
    for way in WAYS:
        with rounding(way) as scheme:
            loaded = contestant(spec, tensors, Variant(scheme)).loaded
        found[way] = compare_logits(picture_and_text_logits(loaded), expected)
        del loaded
    kinds = {k: {w: statistics.fmean(e) for w, e in ways.items()} for k, ways in errors.items()}
    return {"model": f"{name} widths, random weights", "ways": found, "layers": kinds}


@contextmanager
def layer_errors(model: torch.nn.Module) -> Iterator[dict[str, dict[str, list[float]]]]:
    """[kind of layer][way] -> relative errors of its products, filled as the model is run."""
    errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    hooks = []
    for name, part in model.linear_parts().items():  # type: ignore[operator]
        kind = part if part == "head" else f"{part} {name.rpartition('.')[2]}"
        hook = one_layer(part, errors[kind])
        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield errors
    finally:
        for hook in hooks:
            hook.remove()


def one_layer(part: str, errors: dict[str, list[float]]) -> Callable[..., None]:
    def compare(layer: Linear, inputs: tuple[Tensor], _: Tensor) -> None:
        x = inputs[0].float()
        exact = x @ layer.weight.float().T
        for way in WAYS:
            with rounding(way) as scheme:
                chosen = Plan(scheme).layer_format(part, *layer.weight.shape)
                y = chosen.product(x, *chosen.quantize(layer.weight))
            errors[way].append(float((y - exact).norm() / exact.norm()))

    return compare


def speeds(width: int) -> dict[str, Any]:
    """Milliseconds of one thread's processor time for a square weight, the medians of ROUNDS."""
    torch.set_num_threads(1)
    weight = torch.randn(width, width).bfloat16()
    layers = {scheme: [held(scheme, weight) for _ in range(COPIES)] for scheme in TIMED}
    taken: dict[str, dict[int, list[float]]] = {s: defaultdict(list) for s in TIMED}
    for tokens, _, scheme in itertools.product((1, 64), range(ROUNDS), TIMED):
        x = torch.randn(tokens, width).bfloat16()
        begin = time.process_time()
        for layer in layers[scheme]:
            layer(x)
        taken[scheme][tokens].append((time.process_time() - begin) / COPIES * 1e3)
    medians = {s: {str(n): statistics.median(t) for n, t in of.items()} for s, of in taken.items()}
    return {"width": width, "milliseconds by tokens": medians}


def held(scheme: str, weight: Tensor) -> Linear:
    layer = Linear(*weight.T.shape, bias=False, dtype=weight.dtype).requires_grad_(False)
    if scheme == "none":
        layer.weight.copy_(weight)
        return layer
    layer.set_format(SCHEMES[scheme])
    layer.quantize(weight)
    layer.repack()
    return layer


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--samples", type=int, default=128, help="scenes to calibrate on")
    parser.add_argument("--shapes", default="11B")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    versions = {"versions": {"mmchat": mmchat.__version__, "torch": torch.__version__}}
    record = {
        "built_in": versions | built_in(given.scenes, given.samples),
        "wide": versions | wide(given.shapes),
        "speed": versions | speeds(given.width),
    }
    text = json.dumps(rounded(record), indent=1) + "\n"
    given.output.write_text(text, encoding="utf-8")
    print(text)
