"""GGUF files of Mllama as Ollama has them, and Ollama's folder, made of weights under the Hub's
names by the `gguf` package: names and layouts go the other way by other code than the reader's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from mmchat.models.mllama.config import MllamaConfig
from mmchat.nn.rope import inverse_frequencies, scale_llama3
from mmchat.tokenizers.base import Tokenizer
from mmchat.tokenizers.tokenizer_json import _last_pair
from tests.synthetic_tokenizer import letters

Form = Literal["pair", "early", "late"]  # of 2024, of some days in May 2025, and since
ChooseType = Callable[[str, tuple[int, ...]], str]
ROPE = "rope_freqs.weight"

_RENAMED = (  # in this order
    (r"^language_model\.(model\.)?", ""),
    (r"^layers\.", "blk."),
    (r"embed_tokens", "token_embd"),
    (r"^norm\.", "output_norm."),
    (r"lm_head", "output"),
    (r"self_attn\.([qkv])_proj", r"attn_\1"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"cross_attn\.([qk]_norm|[qkvo]_proj)", r"cross_attn_\1"),
    (r"mlp\.(gate|up|down)_proj", r"ffn_\1"),
    (r"mlp\.fc1", "ffn_up"),
    (r"mlp\.fc2", "ffn_down"),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"^vision_model\.", "v."),
    (r"^v\.global_transformer\.layers", "v.global.blk"),
    (r"^v\.transformer\.layers", "v.blk"),
    (r"gate_(attn|ffn)$", r"\1_gate"),
    (r"class_embedding", "class_embd"),
    (r"patch_embedding", "patch_embd"),
    (r"gated_positional_embedding\.tile_embedding", "tile_position_embd"),
    (r"gated_positional_embedding\.embedding", "position_embd.weight"),
    (r"gated_positional_embedding\.gate", "tile_position_embd.gate"),
    (r"(pre|post)_tile_positional_embedding\.(embedding\.)?", r"\1_tile_position_embd."),
    (r"layernorm_(pre|post)", r"\1_ln"),
    (r"multi_modal_projector", "mm.0"),
)
_PAIR_NAMES = {
    "attn_norm": "ln1",
    "ffn_norm": "ln2",
    "attn_output": "attn_out",
    "ffn_up": "ffn_down",
    "ffn_down": "ffn_up",
}


def gguf_name(name: str, form: Form) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    if form == "pair" and name.startswith("v.") and "blk" in name:
        *front, part, kind = name.split(".")
        name = ".".join([*front, _PAIR_NAMES.get(part, part), kind])
    return name


def mixed(name: str, shape: tuple[int, ...]) -> str:
    """Types as in Ollama's q4_K_M, with what small models need besides."""
    if name.startswith(("v.", "mm.")):
        is_matrix = len(shape) > 1 and "position_embd" not in name
        return "F16" if is_matrix else "F32"
    if len(shape) < 2:
        return "F32"
    wide = shape[-1] % 256 == 0
    is_fine = ("attn_v" in name or "ffn_down" in name) and "blk.1." not in name
    if is_fine or name == "output.weight":
        return "Q6_K" if wide else "Q8_0"
    return "Q4_K" if wide else "Q5_0"


def all_of(kind: str) -> ChooseType:
    """That type for matrices of the text, the usual ones for the rest."""

    def choose(name: str, shape: tuple[int, ...]) -> str:
        usual = mixed(name, shape)
        return usual if usual in ("F32", "F16") else kind

    return choose


def packed(values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Rows of numbers as a file holds them."""
    if kind in _K_QUANTS:
        return _K_QUANTS[kind](values.reshape(-1, 256)).reshape(*values.shape[:-1], -1)
    return gguf.quants.quantize(values, Type[kind])


def unpacked(data: NDArray[Any], kind: str) -> Tensor:
    """What the gguf package says that they stand for."""
    return torch.from_numpy(gguf.quants.dequantize(data, Type[kind]).astype(np.float32))


@cache
def _stored(values: bytes, width: int, kind: str) -> tuple[NDArray[Any], Tensor]:
    """Rows of numbers as a file holds them, and what they stand for; most tests write the same."""
    data = packed(np.frombuffer(values, np.float32).reshape(-1, width), kind)
    return data, unpacked(data, kind)


def write_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: MllamaConfig,
    tokenizer: Tokenizer,
    form: Form = "late",
    choose: ChooseType = mixed,
    **changed: Any,
) -> dict[str, Tensor]:
    """Write model.gguf, of a pair mmproj.gguf too; returns the exact weights by the Hub's names.

    changed: metadata that is to be otherwise; None leaves a key out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    exact: dict[str, Tensor] = {}
    writer = gguf.GGUFWriter(folder / "model.gguf", "mllama")
    vision = gguf.GGUFWriter(folder / "mmproj.gguf", "mllama") if form == "pair" else writer
    _add_metadata(writer, vision, config, tokenizer, form, changed)
    rope = config.text_config
    plain = inverse_frequencies(rope.head_dim, rope.rope_theta)
    scaling = asdict(rope.rope_scaling) if rope.rope_scaling else None
    scaled = scale_llama3(plain, *scaling.values()) if scaling else plain
    writer.add_tensor(ROPE, (plain / scaled).numpy())
    for hub, tensor in weights.items():
        name = gguf_name(hub, form)
        into = vision if name.startswith(("v.", "mm.")) else writer
        wide, order = tensor.float(), _rows(name, tensor, config, form)
        if _is_squashed(name, form):
            into.add_tensor(name, wide.tanh().numpy())
            if name == "v.tile_position_embd.gate":
                into.add_tensor("v.position_embd.gate", (1 - wide.tanh()).numpy())
            exact[hub] = wide
            continue
        kind = choose(name, tuple(tensor.shape))
        data, values = _stored(wide[order].numpy().tobytes(), wide.shape[-1], kind)
        into.add_tensor(name, data.reshape(*wide.shape[:-1], -1), raw_dtype=Type[kind])
        exact[hub] = torch.empty_like(wide)
        exact[hub][order] = values.reshape(wide.shape)
    for one in {id(w): w for w in (writer, vision)}.values():
        one.write_header_to_file()
        one.write_kv_data_to_file()
        one.write_tensors_to_file()
        one.close()
    return exact


def _rows(name: str, tensor: Tensor, config: MllamaConfig, form: Form) -> Tensor:
    """Which row of the Hub's tensor stands where: pairs of a head's halves side by side."""
    text = config.text_config
    heads = 0
    if match := re.fullmatch(r"blk\.\d+\.(?:attn_([qk])|cross_attn_([qk])_proj)\.weight", name):
        kind = match[1] or match[2]
        if match[1] or form != "early":
            heads = text.num_attention_heads if kind == "q" else text.num_key_value_heads
    elif form == "late" and re.fullmatch(r"v\..*\.attn_[qk]\.weight", name):
        heads = config.vision_config.attention_heads
    rows = torch.arange(len(tensor))
    return rows.reshape(heads, 2, -1).transpose(1, 2).reshape(-1) if heads else rows


def _is_squashed(name: str, form: Form) -> bool:
    if not name.startswith("v."):
        return False
    return name.endswith("embd.gate") or (form != "early" and name.endswith("_gate"))


def _add_metadata(
    text: gguf.GGUFWriter,
    vision: gguf.GGUFWriter,
    config: MllamaConfig,
    tokenizer: Tokenizer,
    form: Form,
    changed: Mapping[str, Any],
) -> None:
    t, v = config.text_config, config.vision_config
    of_text = {
        "block_count": t.num_hidden_layers,
        "context_length": t.max_position_embeddings,
        "embedding_length": t.hidden_size,
        "feed_forward_length": t.intermediate_size,
        "attention.head_count": t.num_attention_heads,
        "attention.head_count_kv": t.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": t.rms_norm_eps,
        "attention.cross_attention_layers": list(t.cross_attention_layers),
        "rope.freq_base": t.rope_theta,
        "rope.dimension_count": t.head_dim,
        "vocab_size": t.vocab_size,
    }
    of_vision = {
        "block_count": v.num_hidden_layers,
        "global.block_count": v.num_global_layers,
        "embedding_length": v.hidden_size,
        "feed_forward_length": v.intermediate_size,
        "attention.head_count": v.attention_heads,
        "attention.layer_norm_epsilon": v.norm_eps,
        "image_size": v.image_size,
        "patch_size": v.patch_size,
        "max_num_tiles": v.max_num_tiles,
        "num_channels": v.num_channels,
        "intermediate_layers_indices": list(v.intermediate_layers_indices),
    }
    _add(text, {f"mllama.{k}": value for k, value in of_text.items()}, changed)
    _add(vision, {f"mllama.vision.{k}": value for k, value in of_vision.items()}, changed)
    if vision is not text:
        _add(vision, {"general.type": "projector"}, changed)
    names = [letters(token) for token in tokenizer.tokens]
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    pairs = [pair for token in tokenizer.tokens if (pair := _last_pair(token, ranks))]
    special = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    special = [*(n.replace("<|image|>", "<|reserved_x|>") for n in special), "<|image|>"]
    base = len(names)
    tokens = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": names + special,
        "token_type": [1] * base + [3] * len(special),
        "merges": [f"{letters(a)} {letters(b)}" for a, b in pairs],
        "bos_token_id": base,
        "eos_token_id": base + 9,
    }
    _add(text, {f"tokenizer.ggml.{k}": value for k, value in tokens.items()}, changed)


def _add(writer: gguf.GGUFWriter, values: dict[str, Any], changed: Mapping[str, Any]) -> None:
    for key, usual in values.items():
        value = changed.get(key, usual)
        if value is None:
            continue
        if isinstance(value, bool | str):
            (writer.add_string if isinstance(value, str) else writer.add_bool)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)


# ---- K-quants, which the package reads and does not write ----------------------------------------


def _six_bits(scales: NDArray[np.uint8], minima: NDArray[np.uint8]) -> NDArray[np.uint8]:
    first = scales[:, :4] & 63 | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] & 63 | minima[:, 4:] >> 4 << 6
    return np.concatenate((first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4), axis=1)


def _with_minima(blocks: NDArray[np.float32], levels: int) -> tuple[NDArray[Any], NDArray[Any]]:
    groups = blocks.reshape(-1, 8, 32)
    low = np.minimum(groups.min(2), 0)
    steps = (groups.max(2) - low) / (levels - 1)
    halves = np.stack((steps.max(1), -low.min(1)), axis=1) / 63
    halves = np.maximum(halves, 1e-7).astype(np.float16)
    wide = halves.astype(np.float32)
    scales = np.clip(np.rint(steps / wide[:, :1]), 0, 63).astype(np.uint8)
    minima = np.clip(np.rint(-low / wide[:, 1:]), 0, 63).astype(np.uint8)
    scale, least = wide[:, :1] * scales, wide[:, 1:] * minima
    codes = (groups + least[..., None]) / np.maximum(scale, 1e-12)[..., None]
    codes = np.clip(np.rint(codes), 0, levels - 1).astype(np.uint8)
    return np.concatenate((halves.view(np.uint8), _six_bits(scales, minima)), axis=1), codes


def _q4_k(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    head, codes = _with_minima(blocks, 16)
    return np.concatenate((head, (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(-1, 128)), axis=1)


def _q5_k(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    head, codes = _with_minima(blocks, 32)
    high = np.bitwise_or.reduce((codes >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    low = codes & 15
    low = (low[:, 0::2] | low[:, 1::2] << 4).reshape(-1, 128)
    return np.concatenate((head, high, low), axis=1)


def _q6_k(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    groups = blocks.reshape(-1, 16, 16)
    steps = np.abs(groups).max(2) / 31
    half = np.maximum(steps.max(1, keepdims=True) / 127, 1e-7).astype(np.float16)
    scales = np.rint(steps / half.astype(np.float32)).astype(np.int8)
    scale = np.maximum(half.astype(np.float32) * scales, 1e-12)
    codes = (np.clip(np.rint(groups / scale[..., None]), -32, 31) + 32).astype(np.uint8)
    runs = codes.reshape(-1, 2, 4, 32)
    low = runs & 15
    low = np.concatenate((low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4), 2)
    high = runs >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = (low.reshape(-1, 128), high.reshape(-1, 64), scales.view(np.uint8), half.view(np.uint8))
    return np.concatenate(parts, axis=1)


_K_QUANTS = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}


# ---- Ollama's folder -----------------------------------------------------------------------------


def ollama_folder(
    root: Path,
    files: list[Path],
    name: str = "registry.ollama.ai/library/llama3.2-vision/latest",
    family: str = "mllama",
    **layers: Any,
) -> Path:
    """A manifest and blobs as Ollama has them; the files are moved there. layers: JSON of others.

    Returns the manifest.
    """
    blobs = root / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)

    def blob(content: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / f"sha256-{digest}").write_bytes(content)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    image = "application/vnd.ollama.image."
    kinds = zip(("model", "projector"), files, strict=False)
    found = [blob(file.read_bytes(), image + kind) for kind, file in kinds]
    found += [blob(json.dumps(c).encode(), image + kind) for kind, c in layers.items()]
    about = {"model_format": "gguf", "model_family": family, "file_type": "Q4_K_M"}
    manifest = root / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    config = blob(json.dumps(about).encode(), "application/vnd.docker.container.image.v1+json")
    content = {"schemaVersion": 2, "config": config, "layers": found}
    manifest.write_text(json.dumps(content))
    for file in files:
        file.unlink()
    return manifest
