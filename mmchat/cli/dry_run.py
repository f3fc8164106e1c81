"""`mmchat generate --dry-run`: what a question would cost, without loading weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmchat.cli import console
from mmchat.cli.answer import image_facts
from mmchat.cli.model_choice import alpha_rule
from mmchat.conversation import Conversation
from mmchat.storage import atomic_file
from mmchat.words import first_pictures, held, pixels, size

if TYPE_CHECKING:
    from mmchat.catalog.source import ModelSource
    from mmchat.cli.generate import Asked
    from mmchat.estimate.memory import Workload
    from mmchat.hardware.placement import Placement
    from mmchat.loading.options import LoadOptions
    from mmchat.models.prompt import MediaFacts


def show_dry_run(
    asked: Asked,
    options: LoadOptions,
    source: ModelSource,
    new_tokens: int,
    *,
    as_json: bool,
    output: Path | None,
) -> None:
    """Print prompt tokens, how pictures are cut, and a memory estimate.

    new_tokens: the longest answer.
    """
    if source.exported:
        options = options.as_exported(source.exported)
    pictures = [(image.source, source.spec.facts(image)) for image in asked.images]
    facts = _facts(asked, options, source, new_tokens, pictures)
    lines = _lines(facts, pictures)
    if output is not None:
        text = console.to_json(facts) + "\n" if as_json else console.fact_text(lines)
        atomic_file.write_text(output, text)
    elif as_json:
        console.print_json(facts)
    else:
        console.print_facts(lines)


def _facts(
    asked: Asked,
    options: LoadOptions,
    source: ModelSource,
    new_tokens: int,
    pictures: Sequence[tuple[str, MediaFacts]],
) -> dict[str, Any]:
    from mmchat.estimate.memory import Workload

    spec = source.spec
    placement = options.placement(spec)
    dtype = str(placement.dtype).removeprefix("torch.")
    prompt_tokens = _prompt_tokens(asked, options, source)
    limit = spec.context_limit(options.max_seq_len)
    taken = prompt_tokens or sum(picture.positions for _, picture in pictures)
    positions = min(taken + new_tokens, limit)
    with source.open_adapters() as adapters:  # compared with the model
        remarks = list(adapters.remarks)
    workload = Workload(positions, prompt_tokens or positions, tuple(p for _, p in pictures))
    return {
        "model": spec.name,
        "device": str(placement.device),
        "dtype": dtype,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": new_tokens,
        "context": limit,
        "images": [image_facts(*picture) for picture in pictures],
        "quantize": options.scheme(spec, placement),
        "kv": options.kv,
        "parallel": options.ranks,
        "adapters": remarks,
        "memory": _memory(options, source, placement, workload),
    }


def _memory(
    options: LoadOptions, source: ModelSource, placement: Placement, workload: Workload
) -> dict[str, Any]:
    """Bytes by part. fits: None if the free memory is unknown. advice: what fits, if this does not.

    A checkpoint that is not here is taken for the released one, of 16 bits.
    """
    from mmchat.estimate.memory import advice
    from mmchat.hardware.memory import available_memory

    others = ()
    if source.spec.packing and source.checkpoint and not source.exported:
        from mmchat.loading.packed import as_packed

        with source.open_weights() as files:
            options, _, others = as_packed(files, source.spec, options, placement)
    in_place = _used_in_place(source, placement)
    known = {"workload": workload, "from_file": in_place, "others": others}
    setup = options.setup(source.spec, placement, **known)
    need, free = setup.need(), available_memory(placement.device)
    if free is not None and placement.device.type == "cpu":
        free //= options.ranks  # of one machine
    fits = None if free is None else need.total <= free
    facts = {**need.as_dict(), "available": free, "fits": fits}
    return facts if fits is not False else {**facts, "advice": advice(setup, free or 0)}


def _used_in_place(source: ModelSource, placement: Placement) -> bool:
    from mmchat.estimate.memory import used_in_place

    if source.exported:
        return True
    if source.adapters:
        return False
    if source.checkpoint is None:
        return placement.dtype.itemsize == 2
    with source.open_weights() as files:
        return used_in_place(files, str(placement.dtype).removeprefix("torch."))


def _prompt_tokens(asked: Asked, options: LoadOptions, source: ModelSource) -> int | None:
    """Positions of the prompt; None if the tokenizer is not on this machine."""
    if source.tokenizer is None:
        return None
    from mmchat.tokenizers import open_tokenizer

    spec = source.spec
    processor = spec.family.build().processor(
        spec.config, open_tokenizer(source.tokenizer), alpha_rule(options, source)
    )
    message = asked.message(processor)
    if asked.raw or spec.chat_format == "base":
        return len(processor.raw(message).token_ids)
    return len(processor.chat([*Conversation(asked.system).messages, message]).token_ids)


def _lines(
    facts: dict[str, Any], pictures: Sequence[tuple[str, MediaFacts]]
) -> list[tuple[str, str]]:
    tokens, memory = facts["prompt_tokens"], facts["memory"]
    known = "unknown, the tokenizer is not here" if tokens is None else f"{tokens:,} tokens"
    in_file = memory["in_file"]
    left = f", and {size(in_file)} more that stay in their file" if in_file else ""
    each = f" on each of {facts['parallel']} ranks" if facts["parallel"] > 1 else ""
    return [
        ("model", facts["model"]),
        ("device", f"{facts['device']}, {facts['dtype']}{held(facts['quantize'], facts['kv'])}"),
        *(("adapter", remark) for remark in facts["adapters"]),
        *(("picture", _picture(*picture)) for picture in pictures),
        ("prompt", known + _over(facts, pictures)),
        ("answer", f"at most {facts['max_new_tokens']:,} tokens, context {facts['context']:,}"),
        ("memory, about", f"{size(memory['total'])}{each}{_verdict(memory)}"),
        ("  weights", f"{size(memory['weights'])}{left}"),
        ("  cache", size(memory["cache"])),
        *([("  pictures", size(memory["pictures"]))] if memory["pictures"] else []),
        ("  working", size(memory["working"])),
    ]


def _over(facts: dict[str, Any], pictures: Sequence[tuple[str, MediaFacts]]) -> str:
    """What is said of a prompt that leaves no room for an answer."""
    tokens, context = facts["prompt_tokens"], facts["context"]
    if tokens is None or tokens < context:
        return ""
    taken = [picture.positions for _, picture in pictures]
    fits = lambda count: tokens - sum(taken[count:]) < context  # noqa: E731
    return f", too many for the context{first_pictures(fits, len(taken))}"


def _verdict(memory: dict[str, Any]) -> str:
    if memory["fits"] is None:
        return ""
    free = f"{size(memory['available'])} are free"
    return f"; {free}, it fits" if memory["fits"] else f", but {free}; {memory['advice']}"


def _picture(source: str, facts: MediaFacts) -> str:
    said = (pixels(facts.size), facts.placed, facts.cut, f"{facts.tokens:,} tokens")
    return f"{source}: {', '.join(filter(None, said))}"
