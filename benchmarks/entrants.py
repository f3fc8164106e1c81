"""Make all that is compared, with the weights of equal dtype in memory once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.agreement import QUANTIZED_LIMITS, SAME_DTYPE_LIMITS
from benchmarks.contestants import Contestant, Mmchat
from benchmarks.plan import Plan, Say
from benchmarks.shapes import RandomTensors, byte_tokenizer, shaped_spec
from benchmarks.turns import WORDS
from mmchat.bench.run import Variant
from mmchat.hardware.placement import choose_placement
from mmchat.loading.loader import load_from_tensors
from mmchat.loading.options import LoadOptions

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec


@dataclass(frozen=True)
class Entrants:
    """All that is compared. The first of `all` gives the logits that others must agree with.

    ours: begins with the plain. rivals: name -> that of what its time is compared with. limits:
    name -> how far its logits may be from those of the first.
    """

    all: tuple[Contestant, ...]
    ours: tuple[Mmchat, ...]
    rivals: Mapping[str, str]
    limits: Mapping[str, float]

    def names(self) -> list[str]:
        return [c.name for c in self.all]


def gather(plan: Plan, say: Say) -> Entrants:
    """Build every contestant; the weights of equal dtype are in memory once.

    Raises MissingExtra without the peer, before anything is built.
    """
    peer_version(plan)
    device = choose_placement(plan.device, "float32", 0).device
    spec = shaped_spec(plan.shapes, device)
    placement = choose_placement(plan.device, plan.dtype, spec.parameters)
    tensors = RandomTensors(spec, plan.shapes.seed, placement.dtype, device, keep=True)
    say(f"{spec.parameters / 1e9:.1f} billion random weights")
    ours, limits = [], {}
    for variant in plan.variants:
        say(f"loading {variant.label(tensors.dtype)}")
        ours.append(contestant(spec, tensors, variant))
        limits[ours[-1].name] = allowed_error(variant.quantize, tensors.dtype_name)
    if plan.peer == "nothing":
        rivals = {one.name: ours[0].name for one in ours[1:]}
        return Entrants(tuple(ours), tuple(ours), rivals, limits)
    say("building the peer's model")
    if plan.peer == "llama.cpp":
        return _beside_llama_cpp(plan, ours, limits, spec, tensors)
    from benchmarks import transformers_mllama

    theirs = transformers_mllama.build(
        spec, tensors.read, list(tensors.shapes), tensors.dtype, tensors.device
    )
    if plan.peer == "transformers":
        rivals = {one.name: theirs.name for one in ours}
        return Entrants((theirs, *ours), tuple(ours), rivals, limits)
    compiled = transformers_mllama.CompiledMllama(theirs)
    rivals = {one.name: compiled.name for one in ours} | {compiled.name: theirs.name}
    limits[compiled.name] = allowed_error("none", tensors.dtype_name)
    return Entrants((theirs, compiled, *ours), tuple(ours), rivals, limits)


def _beside_llama_cpp(
    plan: Plan,
    ours: Sequence[Mmchat],
    limits: dict[str, float],
    spec: ModelSpec,
    tensors: RandomTensors,
) -> Entrants:
    """Each scheme that llama.cpp has too is its rival; the plain of ours is the reference."""
    from benchmarks import llama_cpp

    schemes = [variant.quantize for variant in plan.variants]
    theirs = llama_cpp.build(spec, tensors, schemes)
    rivals, pairs = {}, []
    for scheme, one in zip(schemes, ours, strict=True):
        pairs.append(one)
        if peer := theirs.get(scheme):
            pairs.append(peer)
            rivals[one.name] = peer.name
            limits[peer.name] = allowed_error(scheme, tensors.dtype_name)
    return Entrants(tuple(dict.fromkeys(pairs)), tuple(ours), rivals, limits)


def peer_version(plan: Plan) -> dict[str, str]:
    """Name and version of the plan's peer, none of nothing. Raises MissingExtra."""
    if plan.peer == "nothing":
        return {}
    if plan.peer == "llama.cpp":
        from benchmarks import llama_cpp

        return {"llama.cpp": llama_cpp.version()}
    from benchmarks import transformers_mllama

    return {"transformers": transformers_mllama.version()}


def contestant(spec: ModelSpec, tensors: RandomTensors, variant: Variant) -> Mmchat:
    loaded = load_from_tensors(
        spec,
        tensors.checkpoint(),
        byte_tokenizer(spec.config.vocab_size, WORDS),
        LoadOptions(
            device=str(tensors.device),
            dtype=tensors.dtype_name,
            quantize=variant.quantize,
            compile=variant.compile,
        ),
    )
    return Mmchat(f"mmchat {variant.label(loaded.dtype)}", loaded)


def allowed_error(scheme: str, dtype: str) -> float:
    """How far the logits of a right model in this scheme may be off."""
    bits = bits_of(scheme)
    return QUANTIZED_LIMITS[bits] if bits else SAME_DTYPE_LIMITS[dtype]


def bits_of(scheme: str) -> int | None:
    """Of a quantised weight, None for plain ones."""
    if scheme == "none":
        return None
    return 4 if scheme.startswith("int4") else 8
