"""Make all that is compared, with the weights of equal dtype in memory once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.agreement import QUANTIZED_LIMITS, SAME_DTYPE_LIMITS
from benchmarks.contestants import Contestant, Mmchat
from benchmarks.plan import Plan, Say
from benchmarks.shapes import RandomTensors, byte_tokenizer, shaped_spec
from benchmarks.turns import WORDS
from mmchat.bench.variants import Variant
from mmchat.hardware.placement import choose_placement
from mmchat.loading.loader import load_from_tensors
from mmchat.loading.options import LoadOptions

if TYPE_CHECKING:
    from benchmarks.transformers_mllama import TransformersMllama
    from mmchat.catalog.spec import ModelSpec


@dataclass(frozen=True)
class Entrants:
    """All that is compared. The first of `all` is the reference; `ours` begins with the plain."""

    all: tuple[Contestant, ...]
    ours: tuple[Mmchat, ...]

    def names(self) -> list[str]:
        return [c.name for c in self.all]


def gather(plan: Plan, say: Say) -> Entrants:
    """Build every contestant; the weights of equal dtype are in memory once.

    Raises MissingExtra without transformers, before anything is built.
    """
    if plan.transformers:
        from benchmarks.transformers_mllama import version

        version()
    spec, tensors = random_model(plan, keep=True)
    say(f"{spec.parameters / 1e9:.1f} billion random weights")
    ours = []
    for variant in plan.variants:
        say(f"loading {variant.label(tensors.dtype)}")
        ours.append(contestant(spec, tensors, variant))
    if not plan.transformers:
        return Entrants(tuple(ours), tuple(ours))
    say("building transformers' model")
    return Entrants((reference(spec, tensors), *ours), tuple(ours))


def random_model(plan: Plan, *, keep: bool) -> tuple[ModelSpec, RandomTensors]:
    """The spec of the plan's model and its weights, which are made when they are asked for.

    keep: whether those made are remembered, so that all contestants share them.
    """
    device = choose_placement(plan.device, "float32", 0).device
    spec = shaped_spec(plan.shapes, device)
    placement = choose_placement(plan.device, plan.dtype, spec.parameters)
    tensors = RandomTensors(spec, plan.shapes.seed, placement.dtype, device, keep=keep)
    return spec, tensors


def reference(spec: ModelSpec, tensors: RandomTensors) -> TransformersMllama:
    """transformers' model of the same tensors. Raises MissingExtra."""
    from benchmarks import transformers_mllama

    return transformers_mllama.build(
        spec, tensors.read, list(tensors.shapes), tensors.dtype, tensors.device
    )


def contestant(spec: ModelSpec, tensors: RandomTensors, variant: Variant) -> Mmchat:
    loaded = load_from_tensors(
        spec,
        tensors.checkpoint(),
        byte_tokenizer(spec.config.vocab_size, WORDS),
        LoadOptions(
            device=str(tensors.device),
            dtype=str(tensors.dtype).removeprefix("torch."),
            quantize=variant.quantize,
            compile=variant.compile,
        ),
    )
    return Mmchat(f"mmchat {variant.label(loaded.dtype)}", loaded)


def allowed_errors(entrants: Entrants, variants: Sequence[Variant]) -> dict[str, float]:
    """For each of ours by name: how far its logits may be from the first contestant's."""
    limits = {}
    for ours, variant in zip(entrants.ours, variants, strict=True):
        dtype = str(ours.loaded.dtype).removeprefix("torch.")
        bits = bits_of(variant.quantize)
        limits[ours.name] = QUANTIZED_LIMITS[bits] if bits else SAME_DTYPE_LIMITS[dtype]
    return limits


def bits_of(scheme: str) -> int | None:
    """Of a quantised weight, None for plain ones."""
    if scheme == "none":
        return None
    return 4 if scheme.startswith("int4") else 8
