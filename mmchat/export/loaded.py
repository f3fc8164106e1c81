"""A loaded model as programs, or as weights in the form in which they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmchat.catalog.kept import origin
from mmchat.catalog.source import ModelSource
from mmchat.catalog.spec import params_document
from mmchat.checkpoints.manifest import ExportRecord
from mmchat.checkpoints.mapped_file import TensorEntry
from mmchat.checkpoints.writers import write_json, write_safetensors
from mmchat.export.plan import DEFAULT_MAX_SEQ_LEN, ExportPlan
from mmchat.export.token_table import write_token_table
from mmchat.loading.options import LoadOptions
from mmchat.models.base import ExportLimits
from mmchat.progress import ProgressCallback
from mmchat.quant.schemes import AUTO

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


class LoadedExport:
    """The model of a plan, loaded. num_bytes: of its weights. remarks: of the samples.

    Raises as `load_model` does, and MissingExtra.
    """

    def __init__(self, plan: ExportPlan, source: ModelSource, progress: ProgressCallback) -> None:
        if plan.format == "executorch":
            from mmchat.runtime.executorch import executorch_version

            executorch_version()  # raises MissingExtra
        self._plan, self._source = plan, source
        self._original, self.remarks = _load(plan, source, progress)
        self.device = self._original.device
        self._model: Any = self._original.runtime.model  # type: ignore[attr-defined]
        tensors = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        if plan.format == "safetensors":  # programs need those too that are computed anew
            stored = self._model.state_dict()
            tensors = {name: tensor for name, tensor in tensors.items() if name in stored}
        self._tensors = {n: tensor for n, tensor in tensors.items() if not tensor.is_meta}
        self.num_bytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def write(self, work: Path, progress: ProgressCallback) -> ExportRecord | None:
        """Write weights, programs and params; returns what they were made for."""
        record, programs = self._record(), ()
        if record.format != "executorch":  # whose programs hold the weights
            entries = [
                TensorEntry(n, str(one.dtype).removeprefix("torch."), tuple(one.shape), work)
                for n, one in self._tensors.items()
            ]
            # those that would leave the next one unaligned come last
            entries.sort(key=lambda entry: entry.num_bytes % _ALIGNMENT != 0)
            tensors = (self._tensors[entry.name].detach().cpu() for entry in entries)
            write_safetensors(work, entries, tensors, progress)
        if (format := self._plan.format) in ("aoti", "executorch"):
            from mmchat.export.aoti import compile_programs
            from mmchat.export.executorch import lower_programs

            write = lower_programs if format == "executorch" else compile_programs
            made = self._source.spec.family.build().programs(format)
            limits = ExportLimits(record.max_seq_len, record.max_images)
            programs = write(work, made.export_programs(self._model, limits), progress)
        spec = self._source.spec
        config = spec.family.with_alpha(spec.config, self._original.processor.alpha)
        write_json(work / "params.json", params_document(replace(spec, config=config)))
        if programs:
            write_token_table(work, self._original.tokenizer)
        return replace(record, programs=programs)

    def compare(self, work: Path, progress: ProgressCallback) -> float | None:
        """How far the logits of the programs in `work` are from the model's, by its largest one."""
        if self._plan.format == "safetensors":
            return None
        from mmchat.export.check import check_same
        from mmchat.loading.loader import load

        progress("comparing with the model", 0, 1)
        exported = load(LoadOptions(work, device=str(self._original.device)))
        return check_same(self._original, exported, self._plan.image_limit)

    def _record(self) -> ExportRecord:
        import torch

        from mmchat.loading.programs import processor_name
        from mmchat.runtime.executorch import executorch_version

        plan, original, companion = self._plan, self._original, self._source.companion
        return ExportRecord(
            format=plan.format,
            model=original.spec.name,
            dtype=str(original.dtype).removeprefix("torch."),
            scheme=original.options.quantize,
            keep=original.options.plan.keep,
            torch=torch.__version__.split("+")[0],
            device=original.device.type,
            executorch=executorch_version() if plan.format == "executorch" else "",
            processor=processor_name() if plan.format == "aoti" else "",
            max_seq_len=original.max_seq_len,
            max_images=plan.image_limit,
            programs=(),
            adapters=tuple(map(str, self._source.adapters)),
            companion=str(companion.resolve()) if companion else "",
            calibrate=str(plan.calibrate.resolve()) if plan.calibrate else "",
            origin=origin(self._source) if plan.format == "safetensors" else "",
        )


def _load(
    plan: ExportPlan, source: ModelSource, progress: ProgressCallback
) -> tuple[LoadedModel, Sequence[str]]:
    """The model, and LoadedExport.remarks."""
    from mmchat.loading.loader import load

    most = source.spec.config.max_position_embeddings
    scheme = plan.model.quantize
    options = replace(
        plan.model,
        quantize=AUTO if source.exported and scheme == "none" else scheme,  # as it was exported
        max_seq_len=plan.model.max_seq_len or min(DEFAULT_MAX_SEQ_LEN, most),
        progress=lambda stage, done, total: progress(
            "loading" if stage == "weights" else stage, done, total
        ),
    )
    plain = replace(options, quantize="none", quantize_keep=(), compile="off")
    if plan.calibrate is not None:
        from mmchat.export.calibrate import calibrate, find_samples

        samples = find_samples(plan.calibrate)
        return calibrate(load(plain, source, repack=False), options.plan, samples, progress)
    if plan.format != "executorch":
        return load(options, source, repack=False), ()
    # weights are rounded afterwards, to the form that XNNPACK takes, which is not ours
    loaded = load(replace(plain, dtype="float32"), source)
    if options.plan.scheme == "none":
        return loaded, ()
    from mmchat.export.executorch import quantize_linears

    progress("quantising", 0, 1)
    model: Any = loaded.runtime.model  # type: ignore[attr-defined]
    quantize_linears(model, options.plan)
    return replace(loaded, options=options), ()
