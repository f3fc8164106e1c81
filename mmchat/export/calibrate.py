"""Round the text layers of a loaded model to 4 bits by what they read of somebody's own samples.

All samples are read in one pass, so that each weight is read once and one layer's products are in
memory at a time: a layer that is about to compute is rounded by what it is given, which has gone
through the rounded layers before it, and then computes as it will.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmchat.batch.rows import Row, opened, pictures, rows_of
from mmchat.batch.run import Defaults, prepare
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import MemoryError_, MmchatError, UsageError, quoted
from mmchat.input_text import lines
from mmchat.words import USUAL_QUESTION, plural, size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmchat.engine.driver import Talk
    from mmchat.loading.loader import LoadedModel
    from mmchat.models.prompt import Prompt
    from mmchat.nn.linear import Linear
    from mmchat.progress import ProgressCallback
    from mmchat.quant.formats.base import Format
    from mmchat.quant.gptq import Gram
    from mmchat.quant.schemes import Plan

    AnyFormat = Format[*tuple[Any, ...]]

HIDDEN = re.compile(r"(^|[/\\])\.")  # a file, or a folder that it is in
TABLES = (".jsonl", ".ndjson")
ANSWER = 128  # tokens of the model's own answer to a sample, at most
FEW = 16  # samples, of which a user is warned
PIECE = 2048  # characters of a text that are read as one prompt


@dataclass(frozen=True)
class Samples:
    """Questions, each of which the model answers first, and texts that are read as they are."""

    rows: Sequence[Row]
    texts: Sequence[str]


def find_samples(folder: Path) -> Samples:
    """The pictures, tables of questions and texts below `folder`.

    A picture that no row of a table names is asked what is in it. Raises UsageError for none, and
    PromptError for a .txt that is no text.
    """
    if not folder.is_dir():
        raise UsageError(f"--calibrate {quoted(folder, 300)} is not a folder; give one of pictures")
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in found if not HIDDEN.search(str(path.relative_to(folder)))]
    tables = [path for path in files if path.suffix.lower() in TABLES]
    rows = [row for path in tables for row, _ in rows_of(str(path))]
    named = {Path(image).absolute() for row in rows for image in row.read().images}
    alone = [path for path in pictures(str(folder)) if Path(path).absolute() not in named]
    rows += [row for path in alone for row, _ in rows_of(path)]
    texts = [_text(path) for path in files if path.suffix.lower() == ".txt"]
    texts = [text for text in texts if text.strip()]
    if not rows and not texts:
        raise UsageError(
            f"--calibrate {quoted(folder, 300)} holds no picture, .txt or .jsonl; put some of your"
            " own there"
        )
    return Samples(rows, texts)


def _text(path: Path) -> str:
    with opened(path) as file:
        return "\n".join(lines(file, quoted(path, 300)))


def calibrate(
    loaded: LoadedModel, plan: Plan, samples: Samples, progress: ProgressCallback
) -> tuple[LoadedModel, list[str]]:
    """Round a plain model in place, as `plan` says; and what is to be said of the samples.

    Those that cannot be asked are left out. Raises MemoryError_, NumericalError, and UsageError if
    none is left.
    """
    import torch

    remarks: list[str] = []
    answered = _answered(loaded, samples.rows, progress, remarks)
    prompts = [*answered, *_texts(loaded, samples.texts)]
    if not prompts:
        raise UsageError(f"no sample of --calibrate can be asked; {remarks[0]}")
    if len(prompts) < FEW:
        remarks.append(
            f"{plural(len(prompts), 'sample')} can do harm; give --calibrate some hundreds, as"
            " different as what you will ask"
        )
    model: Any = loaded.runtime.model  # type: ignore[attr-defined]
    parts = [(model.get_submodule(name), part) for name, part in model.linear_parts().items()]
    formats = {
        layer: plan.layer_format(part, *layer.weight.shape)
        for layer, part in parts
        if not layer.weight.is_meta  # of pictures, where the model is without
    }
    waiting = {layer: format for layer, format in formats.items() if format.calibrates}
    _check_memory(loaded, prompts, max((layer.in_features for layer in waiting), default=0))
    with torch.no_grad():
        for layer, format in formats.items():
            if not format.calibrates:
                _round(layer, format)
        unseen = Calibration(waiting, progress).read(model, prompts, loaded.device)
        for layer, format in unseen.items():
            _round(layer, format)
        model.fuse_projections()
    options = replace(loaded.options, quantize=plan.scheme, quantize_keep=plan.keep)
    if unseen:
        remarks.append(
            f"{len(unseen)} layers are rounded without samples: none reached them; add pictures to"
            " the folder of --calibrate"
        )
    return replace(loaded, options=options), remarks


def _round(layer: Linear, format: AnyFormat) -> None:
    """Without samples."""
    weight = layer.weight
    if format != layer.format:
        layer.set_format(format)
        layer.quantize(weight)


def _answered(
    loaded: LoadedModel, rows: Sequence[Row], progress: ProgressCallback, remarks: list[str]
) -> Iterator[Prompt]:
    """The prompts of questions, with the plain model's own answers behind them.

    remarks: takes which are left out, and why.
    """
    from mmchat.engine.driver import hold
    from mmchat.engine.room import usual_rows
    from mmchat.models.prompt import followed

    defaults = Defaults(USUAL_QUESTION, None, SamplingParams(max_new_tokens=ANSWER))

    def talk(row: Row) -> Talk[Prompt | None]:
        request: Any = prepare(loaded, defaults, row).end
        if isinstance(request, MmchatError):
            place = f"{row.file}: line {row.line[0]}: " if row.line[0] else ""
            remarks.append(f"left out: {place}{request}")
            return None
        most = min(request.sampling.max_new_tokens, ANSWER)
        greedy = replace(request.sampling, temperature=0.0, max_new_tokens=most)
        answer = yield replace(request, sampling=greedy)
        return followed(loaded.processor, request.prompt, answer.output_ids)

    # of a copy, which does not keep it
    engine = replace(loaded).engine_of(usual_rows(loaded, loaded.memory))
    for done, prompt in enumerate(hold(engine, map(talk, rows)), start=1):
        progress("answering samples", done, len(rows))
        if prompt is not None:
            yield prompt


def _texts(loaded: LoadedModel, texts: Sequence[str]) -> Iterator[Prompt]:
    """Texts in pieces, without the chat format."""
    from mmchat.conversation import Message, Text

    for text in texts:
        for begin in range(0, len(text), PIECE):
            piece = Text(text[begin : begin + PIECE])
            yield loaded.processor.raw(Message("user", (piece,)))


def _check_memory(loaded: LoadedModel, prompts: Sequence[Prompt], width: int) -> None:
    """Raises MemoryError_ if reading all prompts at once needs more than is free.

    width: of the widest input of a layer.
    """
    spec, item = loaded.spec, loaded.dtype.itemsize
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    facts = {p.media.content_hash: p.media.facts for prompt in prompts for p in prompt.media}
    wide = loaded.device.type == "cpu" and item < 4
    reading = spec.family.sizes(spec.config).prefill_bytes(
        tokens, item, pictures=bool(facts), wide_products=wide
    )
    # the sums, in two orders, and a share of its inverse
    need = reading + sum(map(loaded.media_bytes, facts.values())) + 3 * 4 * width**2
    if loaded.memory is not None and need > loaded.memory:
        raise MemoryError_(
            f"calibrating {spec.name} on {tokens:,} tokens and {plural(len(facts), 'picture')}"
            f" needs {size(need)} beside the model, and {size(loaded.memory)} are free; give"
            " --calibrate a folder of fewer files"
        )


class Calibration:
    """A pass over all samples. waiting: the layers that are to be rounded, and to what."""

    def __init__(self, waiting: dict[Linear, AnyFormat], progress: ProgressCallback) -> None:
        self._waiting, self._progress, self._count = waiting, progress, len(waiting)
        self._grams: dict[Linear, Gram] = {}
        self._last: tuple[Tensor, Gram] | None = None  # what was read last
        self._is_whole = False  # whether a layer is given all samples at once

    def read(
        self, model: Any, prompts: Sequence[Prompt], device: torch.device
    ) -> dict[Linear, AnyFormat]:
        """Round the layers that the samples reach; returns the others."""
        import torch

        from mmchat.models.base import Batch

        layers = list(self._waiting)
        for layer in layers:
            layer.forward = partial(self._product, layer)
        try:
            cache = self._encoded(model, prompts)
            if self._grams:  # layers that read pictures as they are encoded
                del cache
                for layer in list(self._grams):
                    self._round(layer)
                self._last = None
                cache = self._encoded(model, prompts)
            self._is_whole = True
            counts = tuple(len(prompt.token_ids) for prompt in prompts)
            ids = [token for prompt in prompts for token in prompt.token_ids]
            slots, starts = tuple(range(len(prompts))), (0,) * len(prompts)
            tokens = torch.tensor(ids, device=device)
            model.forward(Batch(tokens, slots, starts, counts, (0,)), cache)
        finally:
            for layer in layers:
                del layer.forward
        return self._waiting

    def _encoded(self, model: Any, prompts: Sequence[Prompt]) -> Any:
        """A cache in which all prompts are begun and all their pictures encoded."""
        from mmchat.models.base import cache_lacks

        cache = model.new_cache(len(prompts), 0)
        # a layer is done when the next one begins: the keys and values of one are enough
        cache.layers = cache.layers[:1] * len(cache.layers)
        for slot, prompt in enumerate(prompts):
            cache.begin(slot, prompt)
        media = {p.media.content_hash: p.media for prompt in prompts for p in prompt.media}
        while lacking := cache_lacks(cache, list(media.values())):
            self._progress("encoding pictures", len(media) - len(lacking) + 1, len(media))
            for _ in model.encode(lacking, cache):
                pass
        return cache

    def _product(self, layer: Linear, input: Tensor) -> Tensor:
        """In place of layer.forward."""
        if layer in self._waiting:
            self._note(layer, input)
            if not self._is_whole:
                return type(layer).forward(layer, input)
            self._round(layer)
        y = layer.format.product(input, *layer.held())  # not in another order, which is not saved
        return y if layer.bias is None else y + layer.bias

    def _note(self, layer: Linear, x: Tensor) -> None:
        """Add what a layer reads to its sums, which layers of one input have together."""
        from mmchat.quant.gptq import Gram

        if self._last is not None and self._last[0] is x:
            gram = self._grams.setdefault(layer, self._last[1])
            if gram is self._last[1]:
                return
        else:
            self._last = None  # before there is another
            gram = self._grams.get(layer) or Gram(x.shape[-1], x.device)
            self._grams[layer] = gram
        gram.add(x)
        self._last = x, gram

    def _round(self, layer: Linear) -> None:
        from mmchat.quant import gptq

        self._progress("calibrating", self._count - len(self._waiting) + 1, self._count)
        format, weight = self._waiting.pop(layer), layer.weight
        held = gptq.quantize(format, weight, self._grams.pop(layer))
        layer.set_format(format)
        layer.take(held)
