"""LoRA and DoRA adapters of PEFT, merged into the tensors of a model as these are read.

W' = W + Σ s·B·A in float32, and of DoRA each row of it scaled to the length that was trained;
rounded once, to what the model holds. That is peft's `merge_and_unload` of a model in float32.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.checkpoints.adapter_config import WEIGHTS_NAME, read_adapter_config
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.computed import spans
from mmchat.checkpoints.mapped_file import shown
from mmchat.checkpoints.names import real_path
from mmchat.errors import CheckpointError
from mmchat.words import plural

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = tuple[int, ...]

_PREFIX = "base_model.model."
# A module of the base and what is trained beside it. Between the two may stand the name of the
# adapter, where its weights were saved by other means than peft's.
_TRAINED = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?!(weight|bias)$)[^.]+)?(\.(?P<last>weight|bias))?"
)
_WHOLE = re.compile(r"(?P<module>.+?)\.(base_layer|modules_to_save(\.[^.]+)?)\.(?P<last>[^.]+)")
_DTYPES = ("float32", "float16", "bfloat16")
_BLOCK_NUMBERS = 2**20  # of a weight that are widened at a time: 4 MiB, which caches hold


@dataclass(frozen=True)
class LowRank:
    """W + scale · B · A. a, b, magnitudes: names in the file; magnitudes: of DoRA, else None.

    rank: rows of A [rank, columns]; B: [rows, rank]. of_table: the product is transposed.
    """

    a: str
    b: str
    rank: int
    scale: float
    magnitudes: str | None = None
    of_table: bool = False


class Adapter:
    """An open adapter. low_rank, whole: by the model's names, what it adds and what it replaces."""

    def __init__(
        self,
        folder: Path,
        scale: float,
        shapes: Mapping[str, Shape],
        hub_name: Callable[[str], str | None],
    ) -> None:
        """shapes: of the model's tensors, by its names; hub_name: such a name of another spelling.

        scale: by which the change is multiplied. Raises CheckpointError unless the model takes
        every tensor of the file.
        """
        self.config = read_adapter_config(folder)
        self.folder, self.scale = folder, scale
        self._files = open_checkpoint(_weights_file(folder))
        try:
            self._shapes, self._hub_name = shapes, hub_name
            self.low_rank, self.whole = self._sorted()
            self._check_whole()
        except BaseException:
            self.close()
            raise

    @property
    def fixed(self) -> set[str]:
        """The tensors whose values it sets, so that no part or sum of them means anything."""
        return {*self.whole, *(self.low_rank if self.config.is_dora else ())}

    @property
    def touched(self) -> set[str]:
        return self.low_rank.keys() | self.whole.keys()

    @property
    def kind(self) -> str:
        return "DoRA" if self.config.is_dora else "LoRA"

    @property
    def remark(self) -> str:
        ranks = Counter(low.rank for low in self.low_rank.values())
        times = "" if self.scale == 1 else f" times {self.scale:g}"
        said = [f"{plural(n, 'module')} of rank {rank}" for rank, n in ranks.most_common(3)]
        if self.whole:
            said.append(f"{plural(len(self.whole), 'tensor')} replaced")
        return f"merged the {self.kind} {shown(self.folder)}{times}: {', '.join(said)}"

    def read(self, name: str) -> Tensor:
        return self._files.read(name)

    def close(self) -> None:
        self._files.close()

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{shown(self._files.files[0])}: {reason}")

    def _sorted(self) -> tuple[dict[str, LowRank], dict[str, str]]:
        """Every tensor of the file as a part of a change. Raises CheckpointError."""
        parts: dict[str, dict[str, str]] = {}
        modules: dict[str, str] = {}
        whole: dict[str, str] = {}
        for stored, entry in self._files.entries.items():
            if entry.dtype not in _DTYPES:
                raise self._error(f"tensor {shown(stored)} is {entry.dtype}")
            name = stored.removeprefix(_PREFIX)
            if match := _TRAINED.fullmatch(name):
                module, kind = match["module"], match["kind"]
                if match["last"] == "bias":
                    raise self._error(f"{shown(stored)} is a bias of LoRA, which is not merged")
                target = self._target(f"{module}.weight", stored)
                found = parts.setdefault(target, {})
                is_other = modules.setdefault(target, module) != module
            else:
                if match := _WHOLE.fullmatch(name):
                    name = f"{match['module']}.{match['last']}"
                target = self._target(name, stored)
                found, kind, is_other = whole, target, False
            if kind in found or is_other:
                raise self._error(f"{shown(stored)} is there twice, in two spellings")
            found[kind] = stored
        low_rank = {name: self._low_rank(name, modules[name], parts[name]) for name in parts}
        return low_rank, whole

    def _target(self, name: str, stored: str) -> str:
        target = self._hub_name(name)
        if target is None or target not in self._shapes:
            base = shown(self.config.base) if self.config.base else "a model that it does not name"
            raise self._error(
                f"{shown(stored)} belongs to nothing in the model; the adapter was made for {base}"
            )
        return target

    def _low_rank(self, target: str, module: str, found: Mapping[str, str]) -> LowRank:
        of_table = "embedding_A" in found
        a, b = ("embedding_A", "embedding_B") if of_table else ("A", "B")
        needed = {a, b, "magnitude_vector"} if self.config.is_dora else {a, b}
        if set(found) != needed or (of_table and self.config.is_dora):
            said, wanted = (
                ", ".join(f"lora_{n}" for n in sorted(kinds)) for kinds in (found, needed)
            )
            raise self._error(
                f"{shown(module)} has {said}, and {self.kind} of it would be {wanted}; tables have"
                " no DoRA"
            )
        shape, entries = self._shapes[target], self._files.entries
        first, second = entries[found[a]].shape, entries[found[b]].shape
        if len(first) != 2 or len(second) != 2 or len(shape) != 2:
            raise self._error(
                f"{shown(module)}: {list(first)} and {list(second)} on {list(shape)}; mmchat merges"
                " linear layers and tables, not convolutions"
            )
        made_for = (first[1], second[0]) if of_table else (second[0], first[1])
        if made_for != shape:
            raise self._error(
                f"{shown(module)} was trained on a weight {list(made_for)}, and the model's is"
                f" {list(shape)}: another size of model"
            )
        rank = first[0]
        if rank != second[1] or rank != self.config.rank(module):
            raise self._error(
                f"{shown(module)}: lora_A {list(first)} and lora_B {list(second)} are not of the"
                f" rank {self.config.rank(module)} that its config gives"
            )
        magnitudes = found.get("magnitude_vector")
        if magnitudes and entries[magnitudes].numel != shape[0]:
            raise self._error(
                f"{shown(magnitudes)} is {list(entries[magnitudes].shape)}, expected {[shape[0]]}"
            )
        scale = self.scale * self.config.scale(module)
        return LowRank(found[a], found[b], rank, scale, magnitudes, of_table)

    def _check_whole(self) -> None:
        for target, stored in self.whole.items():
            shape = self._files.entries[stored].shape
            if shape != self._shapes[target]:
                raise self._error(
                    f"{shown(stored)} is {list(shape)}, and the model's is"
                    f" {list(self._shapes[target])}: another size of model"
                )
        biases = {target.removesuffix("weight") + "bias" for target in self.low_rank}
        lacking = sorted((biases & self._shapes.keys()) - self.whole.keys())
        if self.config.bias != "none" and lacking:
            raise self._error(
                f"biases were trained (bias {shown(self.config.bias)}), but {shown(lacking[0])} is"
                " not in it; save it again with a newer peft"
            )
        if self.fixed and self.scale != 1:
            raise self._error(f"it sets values, so it cannot be taken times {self.scale:g}")


class Adapters:
    """Adapters that are merged into one model, as peft does one after the other. It closes them."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.all = tuple(adapters)
        for one, other in itertools.permutations(self.all, 2):
            if both := sorted(one.fixed & other.touched):
                raise CheckpointError(
                    f"{shown(other.folder)} changes {shown(both[0])}, whose values"
                    f" {shown(one.folder)} sets; give one of the two"
                )

    @property
    def touched(self) -> set[str]:
        """The model's names of the tensors that are not the base's."""
        return {name for adapter in self.all for name in adapter.touched}

    @property
    def remarks(self) -> tuple[str, ...]:
        return tuple(adapter.remark for adapter in self.all)

    def merged(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The model's tensor `name`: merged and in `dtype`, or `tensor` itself if none changes it.

        Beside the result some 20 MiB are taken.
        """
        for adapter in self.all:
            if name in adapter.whole:
                tensor = adapter.read(adapter.whole[name])
        changes = [(a, a.low_rank[name]) for a in self.all if name in a.low_rank]
        if not changes:
            return tensor
        import torch

        merged = torch.empty(tensor.shape, dtype=dtype)
        for begin, end in spans(tensor.shape, _BLOCK_NUMBERS):
            rows = slice(begin, end)
            block = tensor[rows].to(torch.float32, copy=True)
            for adapter, low in changes:
                block = _changed(block, adapter, low, rows)
            merged[rows] = block
        return merged

    def close(self) -> None:
        for adapter in self.all:
            adapter.close()

    def __enter__(self) -> Adapters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_adapters(
    given: Sequence[tuple[Path, float]],
    shapes: Mapping[str, Shape],
    hub_name: Callable[[str], str | None],
) -> Adapters:
    """Folders and scales, opened as Adapter says. Raises CheckpointError."""
    with ExitStack() as opened:
        adapters = [
            opened.enter_context(closing(Adapter(folder, scale, shapes, hub_name)))
            for folder, scale in given
        ]
        merged = Adapters(adapters)
        opened.pop_all()
    return merged


def _changed(block: Tensor, adapter: Adapter, low: LowRank, rows: slice) -> Tensor:
    """Rows of a weight, float32, with what one adapter adds to them."""
    import torch

    a, b = adapter.read(low.a).float(), adapter.read(low.b).float()
    change = (b @ a[:, rows]).T if low.of_table else b[rows] @ a
    block = block.add_(change.mul_(low.scale))
    if low.magnitudes is None:
        return block
    lengths = torch.linalg.norm(block, dim=1)
    wanted = adapter.read(low.magnitudes).float().reshape(-1)[rows]
    return block.mul_((wanted / lengths).view(-1, 1))


def _weights_file(folder: Path) -> Path:
    """The adapter's own file. Raises CheckpointError."""
    if (folder / "non_lora_trainables.bin").exists():
        raise CheckpointError(
            f"{shown(folder)}: non_lora_trainables.bin holds more of what was trained, as the"
            " training of some families writes it; merge it with their merge_lora_weights.py"
        )
    path = folder / WEIGHTS_NAME
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{shown(folder)}: adapter_model.bin is a pickle that may run code when read; load it"
            f" with peft and save it again, which writes {WEIGHTS_NAME}"
        )
    real_path(path, folder.resolve())
    return path
