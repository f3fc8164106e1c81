"""From LoadOptions to a model that is ready to run."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from mmchat.catalog.adapters import AdapterSource, find_adapters
from mmchat.catalog.source import ModelSource
from mmchat.catalog.spec import ModelSpec
from mmchat.checkpoints.adapter import Adapters
from mmchat.checkpoints.checkpoint import Checkpoint, StoredAs
from mmchat.checkpoints.exported_folder import ExportedFolder
from mmchat.engine.engine import Engine
from mmchat.engine.events import Timings
from mmchat.engine.grammar import Grammar, Grammars
from mmchat.engine.request import Request, request_within
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError, MemoryError_, UsageError
from mmchat.estimate.memory import USUAL_POSITIONS, Setup
from mmchat.hardware.memory import available_memory, peak_memory
from mmchat.hardware.placement import Placement
from mmchat.limits import MOST_ROWS
from mmchat.loading.options import LoadOptions
from mmchat.loading.prepared import Prepared, placement_of, prepare, prepare_kernels
from mmchat.loading.shares import join
from mmchat.loading.weights import load_weights, together
from mmchat.models.prompt import MediaFacts, Prompt
from mmchat.parallel.launch import group_of
from mmchat.parallel.slices import Shares
from mmchat.quant.formats.base import Format
from mmchat.runtime.base import Runtime
from mmchat.runtime.compiled import make_runtime
from mmchat.tokenizers import open_tokenizer
from mmchat.tokenizers.base import Tokenizer
from mmchat.words import size

if TYPE_CHECKING:
    from mmchat.parallel.group import Group

# Rows of a head that makers add to their tokens, for a size that divides well.
MOST_SPARE_ROWS = 128


L = TypeVar("L", bound="LoadedModel")


@dataclass(frozen=True, kw_only=True)
class Running:
    """A model that runs.

    options: as they were taken, with those of an export in place of what was left open. format: of
    its weights, "hf", "meta" or "gguf". remarks: what is unusual about the weights, for those who
    ask for details. memory: bytes that rows and their pictures may take beside it, None where that
    is not known. most_rows: conversations that it reads at once; programs read one. formats: of the
    linear layers that are quantised, where the files decide it. rounding_seconds: processor time of
    reading and rounding weights, which an export saves; 0 where none are rounded.
    """

    runtime: Runtime
    placement: Placement
    options: LoadOptions
    format: StoredAs = "hf"
    remarks: tuple[str, ...] = ()
    memory: int | None = None
    most_rows: int = MOST_ROWS
    formats: Mapping[str, Format] | None = None
    rounding_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LoadedModel(Running):
    """A model with all that a conversation needs.

    max_seq_len: positions of prompt and answer. adapters: what was merged into the weights, as
    LoadOptions takes it.
    """

    spec: ModelSpec
    processor: Any
    tokenizer: Tokenizer
    max_seq_len: int
    sampling_defaults: SamplingParams
    load_seconds: float
    adapters: tuple[str, ...] = ()

    @functools.cached_property
    def engine(self) -> Engine:
        """Writes the answers of all conversations with this model, one at a time."""
        return Engine(replace(self))  # a copy, so that the model goes with its last reference

    def engine_of(self, rows: int) -> Engine:
        """Writes `rows` answers at once, or as many as the model reads and memory allows."""
        rows = min(rows, self.most_rows)
        return self.engine if rows == 1 else Engine(self, rows, memory=self.memory)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Compiles what answers of this model must be."""
        return Grammars(self.tokenizer, self.processor.stop_ids, self.vocab_size)

    def request(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        timings: Timings | None = None,
        grammar: Grammar | None = None,
    ) -> Request:
        """To answer `prompt` within the context. grammar: instead of that of the sampling's schema.

        Raises ContextLengthExceeded, SchemaError, MissingExtra.
        """
        if grammar is None and sampling.schema is not None:
            grammar = self.grammars.compile(sampling.schema)
        return request_within(self.max_seq_len, prompt, sampling, timings, grammar)

    @property
    def runs_programs(self) -> bool:
        """Whether it runs what `mmchat export` compiled, not weights."""
        return self.most_rows == 1

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self.placement.dtype

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can write."""
        return min(self.spec.config.vocab_size, self.tokenizer.vocab_size)

    def peak_memory(self) -> int:
        """Highest memory use so far, bytes."""
        return peak_memory(self.device)

    @functools.cached_property
    def _setup(self) -> Setup:
        return self.options.setup(self.spec, self.placement)

    @property
    def position_bytes(self) -> int:
        """What one position takes in the cache."""
        return self._setup.position_bytes

    def media_bytes(self, facts: MediaFacts) -> int:
        """What is kept of a picture."""
        return self._setup.picture_bytes(facts)


def load(
    options: LoadOptions, source: ModelSource | None = None, *, repack: bool = True
) -> LoadedModel:
    """Find, check and load a model. source: what `options.find()` gave, if it was asked already.

    repack: bring weights into the order that this machine reads fastest, in which none are saved.
    Raises ParamsError, CheckpointError, DeviceError, MemoryError_, UsageError, CompileError,
    ExportError.
    """
    begin = time.perf_counter()
    source = source or options.find()
    spec, exported = source.spec, source.exported
    if exported:
        options = options.as_exported(exported)
    if spec.text_only:
        options = replace(options, text_only=True)
    group = None
    if exported and exported.record.programs:
        from mmchat.loading.programs import check_programs

        check_programs(exported)
    elif options.ranks > 1:
        group = group_of(options.ranks, options.parallel_timeout)  # which begins while we read
    tokenizer = _open_tokenizer(source)
    if exported and exported.record.programs:
        running = _run_programs(exported, spec, options)
    elif group:
        running = _run_shared(source, options, group, repack=repack)
    else:
        running = _run(lambda: source, options, repack=repack)
    if source.kept:
        running = replace(running, format=source.format)
    loaded = _ready(spec, running, tokenizer, begin)
    return replace(loaded, adapters=tuple(map(str, source.adapters)))


def _run_shared(
    source: ModelSource, options: LoadOptions, group: Group, *, repack: bool
) -> Running:
    """Let all ranks load their share, of which this process has the first."""
    from mmchat.runtime.mirrored import MirroredRuntime, driver_of

    driver = driver_of(group)
    number = driver.new_number()
    driver.tell("model", number, options.as_json(), repack)
    own = _run(lambda: source, options, group, repack=repack)
    shared: Any = MirroredRuntime(driver, own.runtime, number)
    return replace(own, runtime=shared)


def load_share(given: dict[str, Any], repack: bool, group: Group) -> Runtime:
    """What `load` does on the other ranks, with the options that rank 0 sends."""
    options = LoadOptions(**given)
    return _run(options.find, options, group, repack=repack).runtime


def _run(
    find: Callable[[], ModelSource],
    options: LoadOptions,
    group: Group | None = None,
    *,
    repack: bool,
) -> Running:
    """What fails on one rank is raised on all, before weights are read or afterwards."""
    with ExitStack() as opened:
        with group.agreed() if group else nullcontext([]) as must_equal:
            source = find()
            files = opened.enter_context(source.open_weights())
            adapters = opened.enter_context(source.open_adapters())
            record = source.exported.record if source.exported else None
            prepared = prepare(files, source.spec, options, record, adapters, group)
            must_equal.append(prepared.identity)
        with group.agreed() if group else nullcontext():
            return _fill(prepared, group, repack=repack)


def load_with(
    loaded: L, wanted: Sequence[AdapterSource], compile: Literal["auto", "on", "off"] = "off"
) -> L:
    """The model with other adapters, perhaps none: what they do not change is in memory once.

    compile: as in LoadOptions. Raises CheckpointError, MemoryError_ before anything is read, and
    UsageError for a model that is shared with other ranks.
    """
    if loaded.options.ranks > 1:
        raise UsageError("one model is loaded with --parallel; start again without --adapter")
    source, placement = replace(loaded.options.find(), kept=None), loaded.placement
    given = replace(source, adapters=find_adapters(loaded.adapters))
    source = replace(source, adapters=tuple(wanted))
    with ExitStack() as opened:
        files = opened.enter_context(source.open_weights())
        before = opened.enter_context(given.open_adapters())
        adapters = opened.enter_context(source.open_adapters())
        changed = before.touched | adapters.touched
        shapes = loaded.spec.family.shapes(loaded.spec.config)
        apart = together(shapes, changed, joins=True)
        need = sum(math.prod(shapes[name]) for name in apart) * placement.dtype.itemsize
        cache = loaded.position_bytes * min(loaded.max_seq_len, USUAL_POSITIONS)
        available = available_memory(placement.device)
        if available is not None and need + cache > available:
            what = " and ".join(one.name for one in wanted)
            alone = "name it as MODEL to have it alone" if what else "start again without --adapter"
            raise MemoryError_(
                f"{what or 'the model without its adapter'} needs {size(need + cache)} beside what"
                f" is loaded, and {size(available)} are free; {alone}"
            )
        other: Any = loaded.runtime.model  # type: ignore[attr-defined]
        spec, options = loaded.spec, replace(loaded.options, progress=None)
        working = options.setup(spec, placement).need().working
        prepared = Prepared(files, spec, options, placement, None, adapters, loaded.formats)
        model = load_weights(prepared, other=other, changed=changed)
        remarks = adapters.remarks
    return replace(
        loaded,
        runtime=make_runtime(model, placement.device, compile),
        adapters=tuple(map(str, wanted)),
        remarks=remarks,
        memory=None if available is None else available - need - working,
    )


def load_from_tensors(
    spec: ModelSpec, files: Checkpoint, tokenizer: Tokenizer, options: LoadOptions
) -> LoadedModel:
    """`load` of tensors in memory (InMemoryCheckpoint), shared where device and dtype fit."""
    begin = time.perf_counter()
    running = _fill(prepare(files, spec, options, None, Adapters(())), repack=True)
    return _ready(spec, running, tokenizer, begin)


def _fill(prepared: Prepared, group: Group | None = None, *, repack: bool) -> Running:
    """Read the weights, or this rank's share of them."""
    p, told, shares, compile = prepared, prepared, None, prepared.options.compile
    if group:
        shares = Shares(p.spec.family.cuts(p.spec.config), group.rank, group.ranks)
        beating = replace(p.options, progress=group.beating(p.options.progress))
        told, compile = replace(p, options=beating), "off"
    begin = time.process_time()
    model = load_weights(told, repack=repack, shares=shares)
    is_rounded = p.options.quantize != "none" and not p.exported
    rounding = time.process_time() - begin if is_rounded else 0.0
    if group and shares:
        join(model, group, shares)
    runtime = make_runtime(model, p.placement.device, compile, p.options.progress)
    runtime.notices += p.notices
    remarks = (*p.files.remarks, *p.adapters.remarks, *model.remarks)
    return Running(
        runtime=runtime, placement=p.placement, options=p.options, format=p.files.format,
        remarks=remarks, memory=p.memory, formats=p.formats, rounding_seconds=rounding,
    )  # fmt: skip


def _run_programs(folder: ExportedFolder, spec: ModelSpec, options: LoadOptions) -> Running:
    from mmchat.loading.programs import open_programs

    placement = placement_of(spec, options, as_exported=True)
    runtime = open_programs(folder, spec, placement, options.progress)
    if folder.record.format == "aoti":
        runtime.notices += prepare_kernels(placement, options)
    return Running(runtime=runtime, placement=placement, options=options, most_rows=1)


def _ready(spec: ModelSpec, running: Running, tokenizer: Tokenizer, begin: float) -> LoadedModel:
    """Put the parts together; `begin` is when loading began."""
    options = running.options
    alpha = options.alpha or spec.family.alpha(spec.config, running.format)
    return LoadedModel(
        **vars(running),
        spec=spec,
        processor=spec.family.build().processor(spec.config, tokenizer, alpha),
        tokenizer=tokenizer,
        max_seq_len=spec.context_limit(options.max_seq_len),
        sampling_defaults=SamplingParams(**vars(spec.generation)),
        load_seconds=time.perf_counter() - begin,
    )


def _open_tokenizer(source: ModelSource) -> Tokenizer:
    path = source.tokenizer_file()
    tokenizer = open_tokenizer(path)
    rows = source.spec.config.readable_tokens
    if not 0 <= rows - tokenizer.vocab_size < MOST_SPARE_ROWS:
        raise CheckpointError(
            f"the tokenizer {str(path)!r} has {tokenizer.vocab_size} tokens, but the "
            f"model {source.spec.name} has {rows}; give the tokenizer that came with the weights"
        )
    return tokenizer
