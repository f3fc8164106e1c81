"""A model with the files that were found of it."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mmchat.catalog.adapters import AdapterSource
from mmchat.catalog.known import find_spec, folder_on_disk
from mmchat.catalog.spec import ModelSpec
from mmchat.checkpoints.adapter import Adapters, open_adapters
from mmchat.checkpoints.checkpoint import (
    Checkpoint,
    StoredAs,
    is_stored_in_gguf,
    open_checkpoint,
    with_companion,
)
from mmchat.checkpoints.exported_folder import ExportedFolder, exported_folder
from mmchat.checkpoints.gguf_checkpoint import open_gguf
from mmchat.checkpoints.gguf_file import is_gguf
from mmchat.errors import CheckpointError, quoted
from mmchat.models.family import COMPANION
from mmchat.tokenizers import name_as_found


@dataclass(frozen=True)
class ModelSource:
    """A model and its files. checkpoint, companion: folder or file; tokenizer: file; None where not
    found. companion: weights of another repository that belong to the model. adapters: to be merged
    into them. kept: an export of all these, which is read in their place."""

    spec: ModelSpec
    checkpoint: Path | None
    tokenizer: Path | None
    companion: Path | None = None
    adapters: tuple[AdapterSource, ...] = ()
    kept: Path | None = None

    def open_adapters(self) -> Adapters:
        """What is to be merged, compared with the model. Raises CheckpointError."""
        adapters = () if self.kept else self.adapters
        given = [(adapter.folder, adapter.scale) for adapter in adapters]
        family = self.spec.family
        return open_adapters(given, family.shapes(self.spec.config), family.hub_name)

    def open_weights(self) -> Checkpoint:
        """The checkpoint, with that of the companion, unpacked. Raises CheckpointError."""
        if made_by_us := self.exported:
            try:
                return open_checkpoint(made_by_us.path, merge_rules=None)
            except CheckpointError as error:
                reason = str(error).removesuffix("; download it again")
                again = f"export it again: {made_by_us.again()} --force"
                raise CheckpointError(f"{reason}; {again}") from None
        if self.checkpoint is None:
            raise CheckpointError(
                f"no weights of {self.spec.name} are here; give --checkpoint-path"
            )
        if is_stored_in_gguf(self.checkpoint):
            return open_gguf(self.checkpoint, self.companion)
        if self.companion and is_stored_in_gguf(self.companion):
            raise CheckpointError(
                f"{quoted(str(self.companion), 300)} is GGUF, and the weights of {self.spec.name}"
                " are not; give the vision encoder as safetensors with --vision-tower"
            )
        with ExitStack() as opened:
            files = open_checkpoint(self.checkpoint, merge_rules=self.spec.family.shard_axis)
            own = opened.enter_context(files)
            if self.companion is not None:
                other = opened.enter_context(open_checkpoint(self.companion))
                own = with_companion(own, other, COMPANION)
            opened.pop_all()
        return self.spec.packing.unpacked(own) if self.spec.packing else own

    @property
    def format(self) -> StoredAs:
        """The format of the weights, as loading will find it; "hf" where there are none."""
        if self.checkpoint and is_stored_in_gguf(self.checkpoint):
            return "gguf"
        source = replace(self, kept=None) if self.kept else self
        with suppress(CheckpointError), source.open_weights() as files:
            return files.format  # where it cannot be opened, loading says what is wrong
        return "hf"

    @cached_property
    def exported(self) -> ExportedFolder | None:
        """What `mmchat export` made the folder for, if it did. Raises CheckpointError."""
        return exported_folder(self.kept or self.checkpoint)

    @property
    def known_as(self) -> str:
        """What to name in order to find the model again, from any folder."""
        known = find_spec(self.spec.name)
        if self.checkpoint is None or (known and folder_on_disk(known) == self.checkpoint):
            return self.spec.name
        return str(self.checkpoint.absolute())

    def tokenizer_file(self) -> Path:
        """The tokenizer. Raises CheckpointError, with the folder that it was looked for in."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.checkpoint is None:
            raise CheckpointError(f"no tokenizer of {self.spec.name} here; give --tokenizer-path")
        folder = quoted(str(folder_of(self.checkpoint)), 300)
        raise CheckpointError(
            f"no tokenizer.model, tokenizer.json or qwen.tiktoken in {folder};"
            " copy the one that came with the weights there, or give it with --tokenizer-path"
        )

    def copy_papers(self, folder: Path) -> None:
        """Put tokenizer, licence and use policy into a new folder, under names that it is read by.

        Raises CheckpointError, DiskError.
        """
        from mmchat import limits
        from mmchat.checkpoints.writers import copy_into, papers_beside, write_json
        from mmchat.tokenizers.tokenizer_json import tokenizer_document

        tokenizer = self.tokenizer_file()
        if is_gguf(tokenizer):
            write_json(folder / "tokenizer.json", tokenizer_document(tokenizer))
        else:
            name = name_as_found(tokenizer)
            copy_into(folder, tokenizer, limits.TOKENIZER_JSON_BYTES, name)
        for paper in papers_beside(self.checkpoint) if self.checkpoint else ():
            copy_into(folder, paper, limits.LICENCE_BYTES)


def folder_of(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent
