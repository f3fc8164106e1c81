"""Make or load all that is compared, with the weights of equal dtype in memory once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmchat.bench.agreement import QUANTIZED_LIMITS, SAME_DTYPE_LIMITS
from mmchat.bench.contestants import Contestant, Mmchat
from mmchat.bench.plan import Plan, Say
from mmchat.bench.shapes import RandomTensors, byte_tokenizer, shaped_params
from mmchat.device import choose_placement
from mmchat.loader import LoadedModel, load_from_tensors

if TYPE_CHECKING:
    from mmchat.params import ModelParams


@dataclass(frozen=True)
class Entrants:
    """Everybody in the race. The first of `all` is the reference; `ours` begins with no scheme."""

    all: tuple[Contestant, ...]
    ours: tuple[Mmchat, ...]
    transformers: str | None

    def names(self) -> list[str]:
        return [c.name for c in self.all]


def gather(plan: Plan, say: Say) -> Entrants:
    """Build every contestant; the weights of equal dtype are in memory once."""
    schemes = tuple(dict.fromkeys(("none", *plan.schemes)))
    if plan.shapes is None:
        ours = []
        for scheme in schemes:
            say(f"loading {scheme}")
            ours.append(named(plan.load(scheme), scheme))
        return Entrants(tuple(ours), tuple(ours), None)
    device = choose_placement(plan.device, "float32", 0).device
    params = shaped_params(plan.shapes, device)
    placement = choose_placement(plan.device, plan.dtype, params.parameters)
    say(f"making {params.parameters / 1e9:.1f} billion random weights")
    tensors = RandomTensors(params, plan.shapes.seed, placement.dtype, device, keep=True)
    ours = [named(from_tensors(params, tensors, scheme), scheme) for scheme in schemes]
    if not plan.versus_transformers:
        return Entrants(tuple(ours), tuple(ours), None)
    from mmchat.bench import transformers_mllama

    say("building transformers' model")
    theirs = transformers_mllama.build(
        params, tensors.read, list(tensors.shapes), placement.dtype, device
    )
    return Entrants((theirs, *ours), tuple(ours), transformers_mllama.version())


def from_tensors(params: ModelParams, tensors: RandomTensors, scheme: str) -> LoadedModel:
    options: dict[str, Any] = {} if scheme == "none" else {"quantize": scheme}
    return load_from_tensors(
        params,
        tensors.checkpoint(),
        byte_tokenizer(params.config.text_config.vocab_size),
        device=str(tensors.device),
        dtype=str(tensors.dtype).removeprefix("torch."),
        **options,
    )


def named(loaded: LoadedModel, scheme: str) -> Mmchat:
    dtype = str(loaded.dtype).removeprefix("torch.")
    return Mmchat(f"mmchat {dtype if scheme == 'none' else scheme}", loaded)


def allowed_errors(entrants: Entrants, schemes: Sequence[str]) -> dict[str, float]:
    """For each contestant but the first, by its dtype or the bits of its scheme."""
    dtype = str(entrants.ours[0].loaded.dtype).removeprefix("torch.")
    limits = {}
    for contestant, scheme in zip(entrants.ours, ("none", *schemes), strict=True):
        same = scheme == "none"
        limits[contestant.name] = (
            SAME_DTYPE_LIMITS[dtype] if same else QUANTIZED_LIMITS[4 if "4" in scheme[:4] else 8]
        )
    return limits
