"""A checkpoint as a folder of the Hub: sharded safetensors and the JSON files that go with them.

No model is built: memory holds one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmchat.catalog.find import find_model
from mmchat.catalog.source import ModelSource
from mmchat.checkpoints.adapter import Adapters
from mmchat.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmchat.checkpoints.writers import write_json, write_safetensors
from mmchat.errors import CheckpointError, quoted
from mmchat.export.plan import ExportPlan
from mmchat.hardware.placement import dtype_name
from mmchat.progress import ProgressCallback
from mmchat.tokenizers import open_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.checkpoints.manifest import ExportRecord

SHARD_BYTES = 5 * 10**9  # as transformers had it when the family was released


class HubExport:
    """The tensors of an open checkpoint by the Hub's names, each in its own dtype or the plan's;
    those of GGUF in bfloat16 unless the plan says otherwise.

    adapters are merged into them.

    num_bytes: of all of them. Raises CheckpointError, DeviceError.
    """

    remarks = ()  # nothing is calibrated

    def __init__(
        self, plan: ExportPlan, source: ModelSource, files: Checkpoint, adapters: Adapters
    ) -> None:
        import torch

        self.device = torch.device("cpu")
        self._source, self._files, self._adapters = source, files, adapters
        self._max_shard_bytes = plan.max_shard_bytes or SHARD_BYTES
        self._weights = source.spec.family.build()
        self._entries = self._weights.hub_entries(files, source.spec.config)
        if plan.model.dtype != "auto" or files.format == "gguf":
            # what was packed is published in bfloat16, and no dtype of the file is that of all
            asked = str(plan.model.dtype)
            dtype = "bfloat16" if asked == "auto" else dtype_name(asked)
            self._entries = [replace(entry, dtype=dtype) for entry in self._entries]
        self.num_bytes = sum(entry.num_bytes for entry in self._entries)

    def write(self, work: Path, progress: ProgressCallback) -> ExportRecord | None:
        """Write all but what is copied; no record, for the folder is a checkpoint as any other."""
        for name, content in self._documents().items():  # a bad tokenizer ends it before the hours
            write_json(work / name, content)
        write_safetensors(work, self._entries, self._tensors(), progress, self._max_shard_bytes)

    def compare(self, work: Path, progress: ProgressCallback) -> float | None:
        """Read the new folder back: what it is, names, shapes and every bit of the weights."""
        import torch

        config = find_model(work).spec.config
        with open_checkpoint(work) as written:
            self._weights.check_weights(written, config)
            pairs = zip(self._entries, self._tensors(), strict=True)
            for done, (entry, wanted) in enumerate(pairs, start=1):
                found = written.read(entry.name)
                bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, wanted)]
                if not torch.equal(*bits):
                    raise CheckpointError(
                        f"tensor {quoted(entry.name)} was not written as it is; is the disk faulty?"
                    )
                written.release(entry.name)
                progress("comparing", done, len(self._entries))

    def _tensors(self) -> Iterator[Tensor]:
        import torch

        weights = self._weights.iter_weights(self._files, self._source.spec.config)
        for entry, (name, tensor) in zip(self._entries, weights, strict=True):
            dtype = getattr(torch, entry.dtype)
            yield self._adapters.merged(name, tensor, dtype).to(dtype)

    def _documents(self) -> dict[str, dict[str, Any]]:
        """File name -> content of the JSON files that say what the model is."""
        spec = self._source.spec
        return spec.family.hub_documents(
            spec.config,
            open_tokenizer(self._source.tokenizer_file()),
            is_chat=spec.chat_format == "instruct",
            dtype=self._entries[0].dtype,
            generation=asdict(spec.generation),
        )
