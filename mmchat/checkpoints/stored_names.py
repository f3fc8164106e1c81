"""A model's own tensor names in files that carry more: wrappers of training, buffers of others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from mmchat.checkpoints.mapped_file import shown
from mmchat.errors import CheckpointError

# torch.compile, FSDP and activation checkpointing wrap modules at any depth.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# In front of every name: of DDP and FSDP, and of PEFT
_OUTERMOST = ("module.", "base_model.model.")
# What a model computes for itself, and some libraries, or older ones, store all the same.
_BUFFERS = re.compile(
    r"(.+\.)?(rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)|rope\.freqs|freqs_cis"
    r"|position_ids|causal_mask)"
)


def model_names(stored: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Stored name -> the model's own name, and the names of known buffers, which are left out.

    Raises CheckpointError where two stored names are one of the model.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in stored}
    names = {name: own for name, own in plain.items() if not _BUFFERS.fullmatch(own)}
    names = names or plain  # a file of buffers alone is no model, and is refused as such
    buffers = [name for name in plain if name not in names]
    while outer := _common(names.values()):
        names = {name: own.removeprefix(outer) for name, own in names.items()}
    found: dict[str, str] = {}
    for name, own in names.items():
        if own in found:
            raise CheckpointError(
                f"tensors {shown(found[own])} and {shown(name)} are two spellings of the same"
            )
        found[own] = name
    return names, buffers


def _common(names: Collection[str]) -> str | None:
    """The wrapper that is in front of every name."""
    fits = (outer for outer in _OUTERMOST if all(name.startswith(outer) for name in names))
    return next(fits, None) if names else None


def buffers_remark(buffers: list[str]) -> str:
    """That they were passed over, in one line."""
    rest = f" and {len(buffers) - 1:,} more" if len(buffers) > 1 else ""
    return f"passed over {shown(buffers[0])}{rest}, which other libraries store and mmchat computes"
