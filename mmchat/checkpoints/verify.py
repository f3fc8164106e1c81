"""Compare what a checkpoint holds with what a model needs; every difference in one error."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.mapped_file import ITEM_BYTES, TensorEntry, shown
from mmchat.errors import CheckpointError
from mmchat.spelling import closest

_LISTED = 10
_DTYPES = ("bfloat16", "float16", "float32")
_SIZE_TOLERANCE = 1.05


def check_entries(
    checkpoint: Checkpoint,
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[int, ...]],
    needed: Collection[str],
    scalars: Collection[str] = (),
    dtypes: Mapping[str, str] | None = None,
    advice: str = "is it the right params file? else download it again",
) -> None:
    """Raise CheckpointError unless `entries` are the `expected` tensors and no others.

    entries: those of the checkpoint by the names used in `expected`. needed: the names that must be
    there; the others may be missing. scalars: names whose tensor may have any length. dtypes: of
    each; None: any that a weight may have. advice: what to do.
    """
    missing = [name for name in expected if name in needed and name not in entries]
    unexpected = [name for name in entries if name not in expected]
    wrong = []
    for name, shape in expected.items():
        kinds = (dtypes[name],) if dtypes else _DTYPES
        if name in entries and (fault := _fault(entries[name], shape, name in scalars, kinds)):
            wrong.append(fault)
    faults = [
        _listed("missing", missing, lambda name: _with_hint(name, unexpected)),
        _listed("unexpected", unexpected, lambda name: _place(entries[name])),
        _listed("wrong", wrong, str),
    ]
    if not any(faults):
        return
    size = _too_small(checkpoint, sum(map(math.prod, expected.values())))
    parts = "; ".join(filter(None, [size, *faults]))
    if len(unexpected) == len(entries):
        advice = "this is the checkpoint of another kind of model"
    raise CheckpointError(f"{_where(checkpoint)}: does not fit the model: {parts}; {advice}")


def _too_small(checkpoint: Checkpoint, parameters: int) -> str | None:
    if checkpoint.format == "gguf":  # whose numbers take fewer bytes than what they stand for
        return None
    item = min(ITEM_BYTES[entry.dtype] for entry in checkpoint.entries.values())
    if checkpoint.computed:  # of fewer bytes than they have
        return None
    if parameters * item <= checkpoint.total_bytes * _SIZE_TOLERANCE:
        return None
    return (
        f"the params describe {parameters:,} parameters, {parameters * item:,} bytes,"
        f" and the files hold {checkpoint.total_bytes:,}"
    )


def _where(checkpoint: Checkpoint) -> str:
    files = checkpoint.files
    return shown(files[0] if len(files) == 1 else files[0].parent)


def _place(entry: TensorEntry) -> str:
    return f"{shown(entry.name)} in {shown(entry.file.name)}"


def _with_hint(name: str, unexpected: list[str]) -> str:
    close = closest(name, unexpected, cutoff=0.8)
    return f"{shown(name)} (is it {shown(close[0])}?)" if close else shown(name)


def _fault(
    entry: TensorEntry, shape: tuple[int, ...], is_scalar: bool, kinds: Sequence[str]
) -> str | None:
    fits = len(entry.shape) <= 1 if is_scalar else entry.shape == shape
    if fits and entry.dtype in kinds:
        return None
    any_of = "one of " * (len(kinds) > 1) + ", ".join(kinds)
    wanted = any_of if fits else f"{list(shape)}"
    found = f"{list(entry.shape)} {entry.dtype}"
    return f"{_place(entry)}: expected {wanted}, found {found}"


def _listed(kind: str, items: Sequence[str], describe: Callable[[str], str]) -> str:
    rest = f" and {len(items) - _LISTED:,} more" if len(items) > _LISTED else ""
    shown = ", ".join(map(describe, items[:_LISTED]))
    return f"{len(items):,} {kind}: {shown}{rest}" if items else ""
