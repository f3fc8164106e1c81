"""How much memory a model needs, before it is loaded, and what would fit where it does not.

What counts: everything that is allocated, and weights in the file that every token reads. What does
not: weights that are used where they lie in the file and are read seldom, such as the vision
encoder of a model in the checkpoint's own dtype on the CPU. The system keeps those in its page
cache as long as there is room and gives them up when there is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from mmchat import words
from mmchat.errors import MemoryError_
from mmchat.limits import MIB
from mmchat.parallel.slices import Shares
from mmchat.quant.schemes import Plan

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.checkpoints.checkpoint import Checkpoint
    from mmchat.hardware.placement import Placement
    from mmchat.models.family import Family
    from mmchat.models.prompt import MediaFacts
    from mmchat.models.sizes import Part, Sizes
    from mmchat.quant.formats.base import Format

# A conversation of which nothing is known yet, and the most of it that is read in one pass.
USUAL_POSITIONS, USUAL_PROMPT = 4096, 2048
SHORTEST_CONTEXT = 512
# What libraries, kernels and allocators take beyond the tensors.
OVERHEAD = {"cpu": 256 * MIB, "cuda": 512 * MIB, "mps": 256 * MIB}
# From the most exact to the smallest.
OFFERED_SCHEMES = ("none", "int8", "int4", "int4-g128")


@dataclass(frozen=True)
class Workload:
    """What a model will be asked. positions: of prompt and answer; prompt: of the longest text that
    is read in one pass; pictures: those in the conversation."""

    positions: int
    prompt: int
    pictures: tuple[MediaFacts, ...] = ()


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of each part. in_file: weights that are used from the file and do not count."""

    weights: int
    cache: int
    pictures: int
    working: int
    in_file: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.pictures + self.working

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Setup:
    """A way to load a model. item_bytes: of one number in the dtype of the activations.

    workload: None for a usual conversation about one picture. from_file: the checkpoint holds the
    weights in that dtype and in the order of this model, so that they need no copy on the CPU.
    others: (part, rows, columns, format) of the linear layers that are not held as their part is.
    ranks: processes that share the model; the need is that of the one that needs most. kv: of keys
    and values, as in LoadOptions.
    """

    spec: ModelSpec
    device_type: str
    item_bytes: int
    quantize: str = "none"
    keep: tuple[str, ...] = ()
    text_only: bool = False
    max_seq_len: int | None = None
    workload: Workload | None = None
    from_file: bool = False
    others: tuple[tuple[str, int, int, Format], ...] = ()
    ranks: int = 1
    kv: str = "auto"

    @classmethod
    def of(cls, spec: ModelSpec, placement: Placement, **options: Any) -> Setup:
        return cls(spec, placement.device.type, placement.dtype.itemsize, **options)

    @property
    def expected(self) -> Workload:
        """The workload, within the context; a context that was asked for counts in full."""
        limit = self.max_seq_len or self.spec.config.max_position_embeddings
        if self.workload is not None:
            given = self.workload
            positions, prompt = min(given.positions, limit), min(given.prompt, limit)
            return replace(given, positions=positions, prompt=prompt)
        positions = self.max_seq_len or min(USUAL_POSITIONS, limit)
        pictures = () if self.text_only else (self.sizes.largest_picture,)
        return Workload(positions, min(USUAL_PROMPT, positions), pictures)

    @cached_property
    def sizes(self) -> Sizes:
        return self.spec.family.sizes(self.spec.config)

    @property
    def position_bytes(self) -> int:
        """What one position takes in the cache."""
        numbers = self.sizes.cache_per_token // self.ranks
        return self.sizes.cache_bytes(numbers, self.item_bytes, self.kv)

    def picture_bytes(self, picture: MediaFacts) -> int:
        """What is kept of a picture."""
        ranks = self.ranks if self.sizes.shares_pictures else 1
        return self.sizes.picture_bytes(picture, self.item_bytes, self.kv) // ranks

    def linear_bytes(self, part: str, rows: int, columns: int) -> int:
        """Bytes of a linear layer's weight [rows, columns], in the format that it is held in."""
        chosen = Plan(self.quantize, self.keep).layer_format(part, rows, columns)
        return chosen.nbytes(rows, columns, self.item_bytes)

    def need(self) -> MemoryNeed:
        """Bytes that loading and the expected workload take."""
        sizes, work, item = self.sizes, self.expected, self.item_bytes
        weights, in_file = max(map(self._weights, self._shares()))
        weights += (
            sum(
                form.nbytes(rows, columns, item) - self.linear_bytes(part, rows, columns)
                for part, rows, columns, form in self.others
            )
            // self.ranks
        )
        wide = self.device_type == "cpu" and item < 4
        encode = max(
            (sizes.encode_bytes(one, item, wide_products=wide) for one in work.pictures), default=0
        )
        prefill = sizes.prefill_bytes(
            work.prompt, item, pictures=bool(work.pictures), wide_products=wide
        )
        return MemoryNeed(
            weights=weights - in_file,
            cache=self.position_bytes * work.positions,
            pictures=sum(map(self.picture_bytes, work.pictures)),
            working=max(encode, prefill) + OVERHEAD[self.device_type],
            in_file=in_file,
        )

    def _shares(self) -> Sequence[tuple[Part, ...]]:
        """The loaded parts, as each rank has them."""
        if self.ranks == 1:
            return [self.sizes.loaded_parts(text_only=self.text_only)]
        return _shares(self.spec.family, self.spec.config, self.text_only, self.ranks)

    def _weights(self, parts: Sequence[Part]) -> tuple[int, int]:
        """Bytes of all weights, and of those that stay in their file."""
        weights = in_file = 0
        for part in parts:
            size = part.bytes(self.item_bytes, self.linear_bytes)
            weights += size
            if self.from_file and self.device_type == "cpu" and part.reading == "seldom":
                # all of it, or what is left in the file of a part whose linear layers are quantised
                # or cut by columns, which are copied
                plain = self.ranks == 1 and size == part.bytes(self.item_bytes)
                in_file += size if plain else part.other * self.item_bytes
        return weights, in_file


@lru_cache(maxsize=64)  # for each scheme that is compared
def _shares(
    family: Family[Any, Any], config: Any, text_only: bool, ranks: int
) -> list[tuple[Part, ...]]:
    cuts, parts = family.cuts(config), family.sizes(config).loaded_parts(text_only=text_only)
    found = [Shares(cuts, rank, ranks) for rank in range(ranks)]
    return [tuple(part.share(shares) for part in parts) for shares in found]


def used_in_place(checkpoint: Checkpoint, dtype: str) -> bool:
    """Whether this model's tensors are those of the files, in `dtype`, and need no copy."""
    dtypes = {entry.dtype for entry in checkpoint.entries.values()}
    return checkpoint.format == "hf" and dtypes == {dtype} and not checkpoint.computed


def check_memory(setup: Setup, available: int | None) -> MemoryNeed:
    """What `setup` needs. Raises MemoryError_ with the numbers, and what would fit."""
    need = setup.need()
    if available is None or need.total <= available:
        return need
    raise MemoryError_(
        f"{setup.spec.name} needs {words.size(need.total)} on {setup.device_type}"
        f" ({_parts(setup)}), and {words.size(available)} are free; {advice(setup, available)}"
    )


def advice(setup: Setup, available: int) -> str:
    """The next step for a setup that does not fit, and how many of its pictures would."""
    pictures = setup.expected.pictures

    def fits(count: int) -> bool:
        return _with_first(setup, count).need().total <= available

    return _nearest(setup, available) + words.first_pictures(fits, len(pictures))


def _with_first(setup: Setup, count: int) -> Setup:
    """The setup for the first `count` of its pictures."""
    work = setup.expected
    left = sum(one.positions for one in work.pictures[count:])
    fewer = Workload(work.positions - left, max(work.prompt - left, 1), work.pictures[:count])
    return replace(setup, workload=fewer)


def _nearest(setup: Setup, available: int) -> str:
    """The setups that fit and are nearest to one that does not."""
    others = [(flags, other.need().total) for flags, other in _alternatives(setup)]
    found = next(((flags, total) for flags, total in others if total <= available), None)
    context = _longest_context(setup, available)
    shorter = f"--max-seq-len {context} fits" if context else ""
    if found:
        scheme = f"{found[0]} needs {words.size(found[1])} and fits"
        return f"{shorter}, and so does {found[0]}" if shorter else scheme
    if shorter:
        return shorter
    flags, least = min(others, key=lambda other: other[1], default=("", setup.need().total))
    even = f"even {flags} needs {words.size(least)}; " if flags else ""
    return f"{even}use a smaller model or another --device, or free some memory"


def _alternatives(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Smaller setups with their flags, the nearest to what was asked first."""
    most = setup.need().total
    item = min(setup.item_bytes, 2)
    dtype = [] if item == setup.item_bytes else ["--dtype bfloat16"]
    asked = setup.workload is not None and bool(setup.workload.pictures)
    for text_only in (setup.text_only,) if asked else (setup.text_only, True):
        for scheme, kv in product(OFFERED_SCHEMES, dict.fromkeys((setup.kv, "int8"))):
            other = replace(setup, item_bytes=item, quantize=scheme, text_only=text_only, kv=kv)
            if (scheme, text_only) != (setup.quantize, setup.text_only):  # of all layers then
                other = replace(other, others=())
            flags = dtype + ([f"--quantize {scheme}"] if scheme != setup.quantize else [])
            flags += ["--kv int8"] if kv != setup.kv else []
            flags += ["--text-only"] if text_only > setup.text_only else []
            if other.need().total < most:
                yield " ".join(flags), other


def _longest_context(setup: Setup, available: int) -> int | None:
    """The longest context with which the setup would fit; None if it is no use."""
    work = setup.expected
    if setup.workload is not None or work.positions <= SHORTEST_CONTEXT:
        return None
    context = work.positions
    while context > SHORTEST_CONTEXT:
        context = max(context // 2, SHORTEST_CONTEXT)
        if replace(setup, max_seq_len=context).need().total <= available:
            return context
    return None


def _parts(setup: Setup) -> str:
    """The parts of the sum, and for what they are: `weights 19.8 GiB in int8, cache …`."""
    need, work = setup.need(), setup.expected
    parts = [
        f"weights {words.size(need.weights)}",
        f"cache {words.size(need.cache)} for {work.positions:,} tokens",
    ]
    if need.pictures:
        parts.append(f"pictures {words.size(need.pictures)}")
    return ", ".join([*parts, f"working memory {words.size(need.working)}"])
