"""Mllama's math, programs, and tensors from a checkpoint of any format, strictly checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from mmchat.checkpoints.checkpoint import Checkpoint, Used
from mmchat.checkpoints.mapped_file import TensorEntry, shown
from mmchat.checkpoints.mapping import Rule, source_shapes
from mmchat.checkpoints.verify import check_entries
from mmchat.errors import CheckpointError
from mmchat.models.build import Build, Programs, check_picture_size, read_entries
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.gguf_format import FREQUENCIES, gguf_rules
from mmchat.models.mllama.meta_format import meta_rules
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.mllama.processor import MllamaProcessor
from mmchat.models.mllama.tensor_names import hf_shapes, hub_name

if TYPE_CHECKING:
    from torch import Tensor

_META_PROBE = "text_model.tok_embeddings.weight"
_POSITIONS = (
    "vision_model.gated_positional_embedding.embedding",
    "vision_model.vision_encoder.positional_embedding",
    "v.position_embd.weight",
)


def _rules(checkpoint: Checkpoint, config: MllamaConfig) -> list[Rule]:
    """From its tensors to the Hub's; none where they are the Hub's."""
    if checkpoint.format == "gguf":
        return gguf_rules(config, checkpoint)
    return meta_rules(config) if checkpoint.format == "meta" else []


def _translated(
    checkpoint: Checkpoint, rules: list[Rule], used: Callable[[str], Used | None]
) -> Iterator[tuple[str, Tensor]]:
    for rule in rules:
        read = checkpoint.rows
        if checkpoint.format == "meta":  # whose rules move rows within a head alone
            read = partial(checkpoint.read, used=used(rule.target))
        yield rule.target, rule.transform([read(name) for name in rule.sources])
        for name in rule.sources:
            checkpoint.release(name)


def _in_file_order(checkpoint: Checkpoint, rules: list[Rule]) -> list[Rule]:
    order = {name: index for index, name in enumerate(checkpoint.entries)}
    return sorted(rules, key=lambda rule: order[rule.sources[0]])


def _check_ranks(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Name the shards after the last one here that a model split over more of them needs."""
    here, entry = len(checkpoint.files), checkpoint.entries.get(_META_PROBE)
    numbered = re.fullmatch(r"consolidated\.\d\d\.pth", checkpoint.files[-1].name)
    if entry is None or not entry.shape or not numbered:
        return
    total, rows = expected[_META_PROBE][0], entry.shape[0] // here
    if entry.shape[0] < total and total % rows == 0 and total // rows <= 64:
        names = ", ".join(f"consolidated.{rank:02d}.pth" for rank in range(here, total // rows))
        raise CheckpointError(
            f"{shown(checkpoint.files[0].parent)}: the model is split over {total // rows} files;"
            f" missing {names}"
        )


class MllamaBuild(Build[MllamaConfig, MllamaForConditionalGeneration]):
    """See mmchat.models.build.Build."""

    label = "Llama 3.2 Vision"
    shapes = staticmethod(hf_shapes)
    hub_name = staticmethod(hub_name)
    model = MllamaForConditionalGeneration
    processor = MllamaProcessor

    def programs(
        self, format: Literal["aoti", "executorch"]
    ) -> Programs[MllamaConfig, MllamaForConditionalGeneration]:
        """aoti writes into its caches, executorch gives new ones."""
        from mmchat.models.mllama import export, export_portable

        return export if format == "aoti" else export_portable

    def iter_weights(
        self,
        checkpoint: Checkpoint,
        config: MllamaConfig,
        wanted: Collection[str] | None = None,
        used: Callable[[str], Used | None] = lambda _: None,
    ) -> Iterator[tuple[str, Tensor]]:
        """(Hub name, tensor) for all or the `wanted` tensors, in the order of the files.

        Checks everything before the first tensor is read. A tensor may be a view of its file: copy
        it or keep it; what is written to it before the next is taken is lost. used: what the caller
        takes of a tensor, in whole heads; all where it gives None. Raises CheckpointError.
        """
        entries = self.check_weights(checkpoint, config, wanted)
        names = hf_shapes(config).keys() if wanted is None else wanted
        if rules := _rules(checkpoint, config):
            rules = [rule for rule in rules if rule.target in names]
            return _translated(checkpoint, _in_file_order(checkpoint, rules), used)
        return read_entries(checkpoint, entries, names)

    def check_weights(
        self, checkpoint: Checkpoint, config: MllamaConfig, wanted: Collection[str] | None = None
    ) -> Mapping[str, TensorEntry]:
        """Compare names, shapes and dtypes with the model's; reads headers only.

        wanted: Hub names that must be there, all when None. Returns by Hub names the checkpoint's
        entries, of a tensor that is made of several the first, in the order of the files. Raises
        OtherConfigError, or CheckpointError with every difference.
        """
        targets = hf_shapes(config).keys() if wanted is None else wanted
        if rules := _rules(checkpoint, config):
            expected = source_shapes(rules)
            needed = {name for rule in rules if rule.target in targets for name in rule.sources}
            scalars = {name for name, shape in expected.items() if shape == (1,)}
            entries = {n: entry for n, entry in checkpoint.entries.items() if n != FREQUENCIES}
            _check_ranks(checkpoint, expected)
        else:
            expected, needed, scalars = hf_shapes(config), set(targets), set()
            entries = self.entries(checkpoint)
        vision = config.vision_config
        complaint = (
            f"the checkpoint has tiles of {{}} px, the params say {vision.image_size}; use the"
            " params file of the same model"
        )
        for name in _POSITIONS:
            check_picture_size(entries.get(name), config, vision.tokens_per_tile, complaint)
        check_entries(checkpoint, entries, expected, needed, scalars)
        if rules:
            rules = [rule for rule in rules if rule.sources[0] in entries]
            return {r.target: entries[r.sources[0]] for r in _in_file_order(checkpoint, rules)}
        return entries
