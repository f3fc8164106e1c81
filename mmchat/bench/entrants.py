"""Make or load all that is compared, with the weights of equal dtype in memory once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmchat.bench.agreement import QUANTIZED_LIMITS, SAME_DTYPE_LIMITS
from mmchat.bench.contestants import Contestant, Mmchat
from mmchat.bench.plan import Plan, Say, Variant
from mmchat.bench.shapes import RandomTensors, byte_tokenizer, shaped_params
from mmchat.bench.turns import WORDS
from mmchat.hardware.placement import choose_placement
from mmchat.loading.loader import LoadedModel, load_from_tensors
from mmchat.loading.options import LoadOptions

if TYPE_CHECKING:
    from mmchat.catalog.find import ModelParams


@dataclass(frozen=True)
class Entrants:
    """All that is compared. The first of `all` is the reference; `ours` begins with the plain."""

    all: tuple[Contestant, ...]
    ours: tuple[Mmchat, ...]
    transformers: str | None

    def names(self) -> list[str]:
        return [c.name for c in self.all]


def gather(plan: Plan, say: Say) -> Entrants:
    """Build every contestant; the weights of equal dtype are in memory once."""
    if plan.shapes is None:
        ours = []
        for variant in plan.variants:
            say(f"loading {variant}")
            ours.append(named(plan.load(variant), variant))
        return Entrants(tuple(ours), tuple(ours), None)
    device = choose_placement(plan.device, "float32", 0).device
    params = shaped_params(plan.shapes, device)
    placement = choose_placement(plan.device, plan.dtype, params.parameters)
    say(f"making {params.parameters / 1e9:.1f} billion random weights")
    tensors = RandomTensors(params, plan.shapes.seed, placement.dtype, device, keep=True)
    ours = []
    for variant in plan.variants:
        say(f"loading {variant}")
        ours.append(named(from_tensors(params, tensors, variant), variant))
    if not plan.versus_transformers:
        return Entrants(tuple(ours), tuple(ours), None)
    from mmchat.bench import transformers_mllama

    say("building transformers' model")
    theirs = transformers_mllama.build(
        params, tensors.read, list(tensors.shapes), placement.dtype, device
    )
    return Entrants((theirs, *ours), tuple(ours), transformers_mllama.version())


def from_tensors(params: ModelParams, tensors: RandomTensors, variant: Variant) -> LoadedModel:
    options = LoadOptions(
        device=str(tensors.device),
        dtype=str(tensors.dtype).removeprefix("torch."),
        **variant.options(),
    )
    tokenizer = byte_tokenizer(params.config.text_config.vocab_size, WORDS)
    return load_from_tensors(params, tensors.checkpoint(), tokenizer, options)


def named(loaded: LoadedModel, variant: Variant) -> Mmchat:
    return Mmchat(variant.label(loaded.dtype), loaded)


def allowed_errors(entrants: Entrants, variants: Sequence[Variant]) -> dict[str, float]:
    """For each of ours by name: how far its logits may be from the first contestant's."""
    limits = {}
    reference = variants[0].quantize
    for contestant, variant in zip(entrants.ours, variants, strict=True):
        dtype = str(contestant.loaded.dtype).removeprefix("torch.")
        plain = SAME_DTYPE_LIMITS[dtype]
        limits[contestant.name] = plain
        if variant.bits:  # the same rounded weights, or rounded ones against those that are not
            bits = 8 if variant.quantize == reference else variant.bits
            limits[contestant.name] = QUANTIZED_LIMITS[bits]
    return limits
