"""`adapter_config.json` of PEFT: how a LoRA adapter is scaled, and what of it cannot be merged."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmchat import limits
from mmchat.checkpoints.names import real_path
from mmchat.errors import CheckpointError, quoted
from mmchat.strict_json import Where, as_object, read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# What says nothing about the arithmetic, whatever its value. Names of modules are among it: the
# tensors say which are meant.
_PASSED_OVER = (
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "modules_to_save", "layers_to_transform", "layers_pattern",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "velora_config", "qalora_group_size", "ensure_weight_tying",
    "runtime_config", "unsloth_fixed", "unsloth_version",
)  # fmt: skip
_READ = (
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora", "bias",
    "rank_pattern", "alpha_pattern", "init_lora_weights",
)  # fmt: skip
# With any other, training begins by changing the weights of the base.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
# Names, and the parts of regular expressions that people put between them; all are quick to try.
_PATTERN = re.compile(r"\^?([\w.-]|\\\.|\.\*)+", re.ASCII)
_MOST_PATTERNS = 1024  # some inits write one for each module
_MOST_STARS = 16  # in all of them
_SIZES = (1e-6, 1e6)  # of lora_alpha

Patterns = list[tuple[re.Pattern[str], Any]]


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter says of itself. base: the model that it was trained on, or "".

    bias: "none", "lora_only" or "all", of which biases were trained. is_dora: it has magnitudes.
    """

    base: str
    bias: str
    is_dora: bool
    _rank: int
    _alpha: float
    _is_rslora: bool
    _ranks: Patterns
    _alphas: Patterns

    def rank(self, module: str) -> int:
        """Of a module, by the name that it has in the adapter's file."""
        return _matched(self._ranks, module, self._rank)

    def scale(self, module: str) -> float:
        """What the product of the module's matrices is multiplied with."""
        rank = self.rank(module)
        return _matched(self._alphas, module, self._alpha) / (
            math.sqrt(rank) if self._is_rslora else rank
        )


def is_adapter(folder: Path) -> bool:
    """Whether an adapter lies in the folder, by itself or beside a model."""
    return (folder / CONFIG_NAME).is_file()


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises CheckpointError, also for what mmchat cannot merge, by its name."""
    path = folder / CONFIG_NAME
    real_path(path, folder.resolve())
    where = Where(str(path), error=CheckpointError)
    found = as_object(read_json(path, where), where)
    if found.get("peft_type") != "LORA":
        raise where.fail(f"peft_type {quoted(found.get('peft_type'))}: mmchat merges LORA alone")
    init = found.get("init_lora_weights")
    if init not in _INITS:
        raise where.fail(
            f"init_lora_weights {quoted(init)} changes the base model itself; save the adapter with"
            " path_initial_model_for_weight_conversion, or merge it with peft"
        )
    for key, value in found.items():
        if value and key not in (*_READ, *_PASSED_OVER):
            raise where.fail(
                f"{quoted(key)} is set, which mmchat cannot merge; merge the adapter with the"
                " program that wrote it"
            )
    base = found.get("base_model_name_or_path") or ""
    bias = found.get("bias") or "none"
    if not isinstance(base, str) or bias not in ("none", "lora_only", "all"):
        raise where.fail(f"bias {quoted(bias)} or base_model_name_or_path is not understood")
    flags = {key: found.get(key) or False for key in ("use_rslora", "use_dora")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise where.child(key).fail(f"expected true or false, found {quoted(value)}")
    return AdapterConfig(
        base,
        bias,
        flags["use_dora"],
        _whole(found.get("r"), where.child("r")),
        _number(found.get("lora_alpha"), where.child("lora_alpha")),
        flags["use_rslora"],
        _patterns(found, "rank_pattern", where, _whole),
        _patterns(found, "alpha_pattern", where, _number),
    )


def _whole(value: Any, where: Where) -> int:
    if type(value) is not int or not 1 <= value <= limits.ADAPTER_RANK:
        raise where.fail(f"{quoted(value)} is no rank from 1 to {limits.ADAPTER_RANK:,}")
    return value


def _number(value: Any, where: Where) -> float:
    if type(value) not in (int, float) or not _SIZES[0] <= abs(value) <= _SIZES[1]:
        raise where.fail(f"{quoted(value)} is no number of a size from 1e-6 to 1e6")
    return value


def _patterns(
    found: Mapping[str, Any], key: str, where: Where, read: Callable[[Any, Where], Any]
) -> Patterns:
    """What fits the end of a module's name, and the value; the first one counts."""
    place = where.child(key)
    given = as_object(found.get(key) or {}, place)
    if len(given) > _MOST_PATTERNS or sum(text.count("*") for text in given) > _MOST_STARS:
        raise place.fail(f"{len(given):,} patterns are too many to be tried")
    for text in given:
        if not _PATTERN.fullmatch(text):
            raise place.fail(f"{quoted(text)} is more of a regular expression than mmchat reads")
    return [(_compiled(text), read(value, place.child(text))) for text, value in given.items()]


def _compiled(text: str) -> re.Pattern[str]:
    """`(.*\\.)?(text)$` of peft, in time that grows with the name alone.

    What stands between two `.*` has one length, so the leftmost place where it fits is as good as
    any; (?>…) tries no other.
    """
    first, *others = text.split(".*")
    if not others:
        return re.compile(rf"(.*\.)?({text})$")
    *middle, last = others
    found = "".join(f"(?>.*?{piece})" for piece in middle if piece)
    return re.compile(rf"(?>(.*?\.)??{first}){found}.*{last}$")


def _matched(patterns: Patterns, module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
