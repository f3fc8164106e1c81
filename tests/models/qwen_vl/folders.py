"""A tiny random Qwen-VL as a folder, as its repositories are: .bin files and qwen.tiktoken.

It answers nonsense: what is shown with it is that all of the program takes it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmchat.models.qwen_vl import translate
from mmchat.models.qwen_vl.config import QwenVLConfig
from mmchat.tokenizers.byte_pair import BytePairTokenizer
from mmchat.tokenizers.tiktoken_file import qwen_tokenizer
from tests.models.qwen_vl import oracle
from tests.synthetic_tokenizer import tiktoken_lines, trained_tokens

SPARE_ROWS = 7  # of embedding and head, behind the tokenizer's ids
GENERATION = {"temperature": 1.0, "top_p": 0.3}


@cache
def tokenizer() -> BytePairTokenizer:
    return qwen_tokenizer(trained_tokens())


@cache
def with_vocabulary() -> QwenVLConfig:
    text = replace(oracle.CONFIG.text_config, vocab_size=tokenizer().vocab_size + SPARE_ROWS)
    return replace(oracle.CONFIG, text_config=text)


@cache
def weights() -> dict[str, Tensor]:
    return oracle.weights_of(with_vocabulary())


def write_folder(folder: Path, *, is_chat: bool = True, **changed: Any) -> Path:
    """changed: other values in config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = translate.hub_documents(
        with_vocabulary(), tokenizer(), is_chat=is_chat, dtype="float32", generation=GENERATION
    )
    documents["config.json"] |= changed
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    computed = {"transformer.rotary_emb.inv_freq": torch.ones(32)}
    torch.save(weights() | computed, folder / "pytorch_model.bin")
    (folder / "qwen.tiktoken").write_bytes(tiktoken_lines(trained_tokens()))
    return folder
