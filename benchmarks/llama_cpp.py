"""llama.cpp's text model on the very same tensors, by its prebuilt library.

llama.cpp knows no Mllama. Text alone passes the self-attention layers only, and these are a Llama
that it knows: they are written as a GGUF file and rounded by llama.cpp itself, in the layout that
its users get from llama-quantize.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int8, c_int32, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.ctypeslib import as_array
from torch import Tensor

from benchmarks.contestants import DECODE_ROOM, Context, PicturePrompt
from benchmarks.random_mllama import config_of
from mmchat.errors import MissingExtra, MmchatError
from mmchat.nn.rope import RotaryEmbedding, inverse_frequencies

if TYPE_CHECKING:
    from benchmarks.shapes import RandomTensors
    from mmchat.catalog.spec import ModelSpec
    from mmchat.models.mllama.config import TextConfig

FOLDER_VARIABLE = "LLAMA_CPP"  # a folder with libllama, in place of the one below
FOLDER = Path(__file__).parents[1] / "build/node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"
INSTALL = "npm install --no-save --prefix build @node-llama-cpp/linux-x64"
FILE_TYPES = {"int8": ("Q8_0", 7), "int4": ("Q4_0", 2)}  # llama.h's numbers
_LAYER = {  # GGUF's name -> the Hub's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Params(ctypes.Structure):
    """Parameters of a context, or any others; longer than in any release, which reads its part.

    The first numbers have stood at this place for years, and are compared with what came of them.
    """

    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32), ("rest", c_uint64 * 128),
    )  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p),
        ("pos", POINTER(c_int32)), ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "log_set": (None, (_Log, c_void_p)),
    "backend_init": (None, ()),
    "model_default_params": (_Params, ()),
    "context_default_params": (_Params, ()),
    "model_quantize_default_params": (_Params, ()),
    "model_quantize": (c_uint32, (c_char_p, c_char_p, POINTER(_Params))),
    "model_load_from_file": (c_void_p, (c_char_p, _Params)),
    "model_free": (None, (c_void_p,)),
    "init_from_model": (c_void_p, (c_void_p, _Params)),
    "free": (None, (c_void_p,)),
    "n_batch": (c_uint32, (c_void_p,)),
    "n_seq_max": (c_uint32, (c_void_p,)),
    "set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "get_memory": (c_void_p, (c_void_p,)),
    "memory_clear": (None, (c_void_p, c_bool)),
    "memory_seq_cp": (None, (c_void_p, c_int32, c_int32, c_int32, c_int32)),
    "batch_init": (_Batch, (c_int32, c_int32, c_int32)),
    "batch_free": (None, (_Batch,)),
    "decode": (c_int32, (c_void_p, _Batch)),
    "get_logits_ith": (POINTER(ctypes.c_float), (c_void_p, c_int32)),
}
_quiet = _Log(lambda *_: None)


def _load(folder: Path) -> ctypes.CDLL:
    """libllama, with its processor's best backend."""
    base, whole = (
        ctypes.CDLL(str(_file(folder, name)), ctypes.RTLD_GLOBAL)
        for name in ("libggml", "libllama")
    )
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(whole, f"llama_{name}")
        function.restype, function.argtypes = result, arguments
    whole.llama_log_set(_quiet, None)
    base.ggml_backend_load_all_from_path(str(folder).encode())
    whole.llama_backend_init()
    return whole


def _folder() -> Path:
    """Where the library is. Raises MissingExtra."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or FOLDER)
    if not list(folder.glob("libllama.*")):
        raise MissingExtra(f"llama.cpp is not in {folder}; install it with: {INSTALL}")
    return folder


def _file(folder: Path, name: str) -> Path:
    return min(folder.glob(f"{name}.*"))


def version() -> str:
    """Of the library, by its file's name. Raises MissingExtra."""
    found = re.search(r"v?\d+(\.\d+)+", _file(_folder(), "libllama").name)
    return found[0] if found else "unknown"


class _Owned:
    """What llama.cpp made, freed with this object and before what it needs."""

    def __init__(self, pointer: int | None, free: Any, *needs: _Owned) -> None:
        if not pointer:
            raise MmchatError("llama.cpp does not load the model, or has no memory for its context")
        self.pointer, self._free, self._needs = pointer, free, needs

    def __del__(self) -> None:
        if hasattr(self, "_free"):
            self._free(self.pointer)


class LlamaCpp:
    """A GGUF file, read with torch's number of threads; `begin` reads real tokens."""

    reads_context = True

    def __init__(self, name: str, library: ctypes.CDLL, path: Path, vocab_size: int) -> None:
        self.name = name
        loaded = library.llama_model_load_from_file(
            str(path).encode(), library.llama_model_default_params()
        )
        self._model = _Owned(loaded, library.llama_model_free)
        self._library, self._vocab_size = library, vocab_size
        self._kept: _Cache | None = None

    def prefill(self, input_ids: tuple[int, ...]) -> Tensor:
        if self._kept is None or self._kept.positions < len(input_ids):
            self._kept = self._cache(1, len(input_ids))
        self._kept.clear()
        return self._kept.read(input_ids, (0,) * len(input_ids))

    def prefill_picture(self, prompt: PicturePrompt) -> Any:  # noqa: ARG002
        raise MmchatError("llama.cpp knows no pictures of Mllama")

    def begin(self, context: Context, rows: int) -> _Cache:
        if not isinstance(context, tuple):
            raise MmchatError("llama.cpp is given tokens to read, not keys and values")
        cache = self._cache(rows, len(context) + DECODE_ROOM)
        cache.read(context, (0,) * len(context))
        cache.share(rows)
        return cache

    def decode(self, token_ids: tuple[int, ...], cache: _Cache) -> Tensor:
        return cache.read(token_ids, tuple(range(len(token_ids))))

    def _cache(self, rows: int, positions: int) -> _Cache:
        return _Cache(self._library, self._model, self._vocab_size, rows, positions)


class _Cache:
    """A context of llama.cpp: so many rows, each of so many positions."""

    def __init__(
        self, library: ctypes.CDLL, model: _Owned, vocab_size: int, rows: int, positions: int
    ) -> None:
        self._library, self._vocab_size, self.positions = library, vocab_size, positions
        params = library.llama_context_default_params()
        size = rows * -(-positions // 256) * 256
        params.n_ctx, params.n_batch, params.n_seq_max = size, size, rows
        made = library.llama_init_from_model(model.pointer, params)
        self._owned = _Owned(made, library.llama_free, model)
        self._context = self._owned.pointer
        found = library.llama_n_batch(self._context), library.llama_n_seq_max(self._context)
        if found != (size, rows):
            raise MmchatError(f"this llama.cpp has other parameters: {found}")
        threads = torch.get_num_threads()
        library.llama_set_n_threads(self._context, threads, threads)
        self._memory = library.llama_get_memory(self._context)
        self.lengths = [0] * rows

    def clear(self) -> None:
        self._library.llama_memory_clear(self._memory, True)
        self.lengths = [0] * len(self.lengths)

    def share(self, rows: int) -> None:
        """Let all rows hold what the first holds."""
        for row in range(1, rows):
            self._library.llama_memory_seq_cp(self._memory, 0, row, -1, -1)
        self.lengths = self.lengths[:1] * rows

    def read(self, token_ids: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Token i goes on row rows[i]; logits [rows, V] of the last token of each."""
        library, last = self._library, {row: i for i, row in enumerate(rows)}
        batch = library.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, row) in enumerate(zip(token_ids, rows, strict=True)):
            batch.token[i], batch.pos[i] = token, self.lengths[row]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = last[row] == i
            self.lengths[row] += 1
        failed = library.llama_decode(self._context, batch)
        library.llama_batch_free(batch)
        if failed:
            raise MmchatError(f"llama.cpp cannot read: {failed}")
        found = (library.llama_get_logits_ith(self._context, i) for i in last.values())
        return torch.tensor(np.stack([as_array(at, (self._vocab_size,)) for at in found]))


def build(spec: ModelSpec, tensors: RandomTensors, schemes: Sequence[str]) -> dict[str, LlamaCpp]:
    """Scheme -> llama.cpp's model, for those that it has too: the plain one, int8 and int4.

    The files are on disk, without names, as long as the models are used. Raises MissingExtra.
    """
    library, found = _load(_folder()), {}
    vocab_size = config_of(spec).text_config.vocab_size
    with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
        plain = Path(folder) / "plain.gguf"
        write_gguf(plain, config_of(spec).text_config, tensors)
        for scheme in schemes:
            name, path = {"bfloat16": "BF16", "float32": "F32"}[tensors.dtype_name], plain
            if scheme != "none":
                if scheme not in FILE_TYPES:
                    continue
                name, number = FILE_TYPES[scheme]
                path = Path(folder) / f"{name}.gguf"
                _quantize(library, plain, path, number)
            found[scheme] = LlamaCpp(f"llama.cpp {name}", library, path, vocab_size)
    return found


def _quantize(library: ctypes.CDLL, source: Path, target: Path, file_type: int) -> None:
    params = library.llama_model_quantize_default_params()
    params.n_ctx, params.n_batch = os.cpu_count() or 1, file_type  # here: threads, type
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise MmchatError(f"llama.cpp does not write {target.name}")


def write_gguf(path: Path, config: TextConfig, tensors: RandomTensors) -> None:
    """The text model without its cross-attention layers, as a Llama."""
    import gguf

    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(config.self_attention_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")  # which is not used: tokens come as numbers
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name: str, tensor: Tensor) -> None:
        if tensor.dim() == 1 or tensor.dtype == torch.float32:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=kind)

    text = "language_model.model."
    add("rope_freqs.weight", frequency_factors(config))
    add("token_embd.weight", tensors.read(f"{text}embed_tokens.weight")[: config.vocab_size])
    add("output_norm.weight", tensors.read(f"{text}norm.weight"))
    add("output.weight", tensors.read("language_model.lm_head.weight"))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for number, layer in enumerate(config.self_attention_layers):
        for theirs, ours in _LAYER.items():
            tensor = tensors.read(f"{text}layers.{layer}.{ours}.weight")
            if theirs in heads:
                tensor = interleaved(tensor, heads[theirs])
            add(f"blk.{number}.{theirs}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def frequency_factors(config: TextConfig) -> Tensor:
    """By which llama.cpp divides the frequencies of RoPE, float32 [D/2]."""
    scaling = None if config.rope_scaling is None else vars(config.rope_scaling)
    rotary = RotaryEmbedding(config.head_dim, config.rope_theta, scaling)
    return inverse_frequencies(config.head_dim, config.rope_theta) / rotary.inv_freq


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows i and i + D/2 of each head, which are rotated together, as rows 2i and 2i + 1."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
