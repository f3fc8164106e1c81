"""`mmchat bench DIR` of an exported folder: beside the model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmchat.cli import console, model_choice
from mmchat.errors import MmchatError, quoted
from mmchat.loading.options import LoadOptions

if TYPE_CHECKING:
    from mmchat.bench.plan import Variant
    from mmchat.catalog.find import ModelSource


@dataclass(frozen=True)
class ExportedPair:
    """An exported folder and the model that it was made from; None if that is not here.

    scheme: of the weights of both. notice: why there is nothing to compare with, or "".
    """

    folder: LoadOptions
    original: LoadOptions | None
    scheme: str
    notice: str

    def variants(self, compile: Sequence[str]) -> tuple[Variant, ...]:
        """The plain model first, then compiled if that is asked for, then the export."""
        from mmchat.bench.plan import Variant

        plain = ("off", *compile) if self.original else ()
        ways = (Variant(self.scheme, way) for way in plain)
        return (*dict.fromkeys(ways), Variant(self.scheme, exported=True))

    def load(self, variant: Variant) -> Any:
        """The folder, or the model that it was made from, as it was exported."""
        choice = self.folder if variant.exported else self.original
        return load_variant(choice or self.folder, variant)


def exported_pair(
    choice: LoadOptions, source: ModelSource, schemes: Sequence[str]
) -> ExportedPair | None:
    """None if `choice` is no exported folder. Raises UsageError for a scheme it does not have."""
    folder = source.exported
    if folder is None:
        return None
    for scheme in schemes:
        folder.check_scheme(scheme)
    record = folder.record
    original: LoadOptions | None = LoadOptions(
        name=folder.source,
        device=record.device,
        dtype=record.dtype,
        quantize=record.scheme,
        quantize_keep=record.keep,
        max_seq_len=record.max_seq_len,
    )
    notice = ""
    try:
        original.find()
    except MmchatError:
        original = None
        notice = f"{quoted(folder.source)}, which it was made from, is not here to compare with"
    return ExportedPair(choice, original, record.scheme, notice)


def load_variant(choice: LoadOptions, variant: Variant) -> Any:
    with console.Stages(quiet=True) as stages:
        options = replace(choice, **variant.options())
        return model_choice.load(options, options.find(), stages)
