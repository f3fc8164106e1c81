"""Every reader of bytes from outside, with whole files to begin from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image as PILImage

from mmchat.catalog.known import known_specs
from mmchat.catalog.spec import load_spec
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.manifest import MANIFEST_NAME, FileRecord, Manifest, write_manifest
from mmchat.checkpoints.pickle_scan import scan
from mmchat.conversation import Conversation, Turn, question
from mmchat.errors import MmchatError
from mmchat.hub.integrity import verify_folder
from mmchat.images import from_pil, load_image
from mmchat.images.web import _parse
from mmchat.models.mllama.translate import hub_documents
from mmchat.repl import saving
from mmchat.strict_json import loads
from mmchat.terminal import sanitize
from mmchat.tokenizers import open_tokenizer
from tests.checkpoints.hostile_files import members_of, write_pth, write_safetensors
from tests.checkpoints.test_gguf_file import both as whole_gguf
from tests.images.test_documents import one_page
from tests.meta_checkpoint import meta_params
from tests.models.llava.released import HUB_7B, ORIGINAL_7B
from tests.models.qwen_vl.test_real_shapes import RELEASED
from tests.packed_writers import KINDS
from tests.repl.screens import SAMPLE, Terminal
from tests.sentencepiece_model import trained
from tests.synthetic_tokenizer import all_splits, hub_bytes, tiktoken_lines, trained_tokens

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Reader:
    """read: reads these bytes. wholes: what it takes. errors: how it refuses. rounds: of all."""

    read: Callable[[bytes], object]
    wholes: list[bytes]
    errors: tuple[type[Exception], ...]
    rounds: int


def readers(folder: Path) -> dict[str, Reader]:
    """By name; `folder` is theirs."""
    return {
        **_checkpoints(folder),
        **_documents(folder),
        **_pictures(),
        **_texts(),
    }


def _of_file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def put_and_read(data: bytes) -> object:
        path.unlink(missing_ok=True)  # much faster than to overwrite
        path.write_bytes(data)
        return read(path)

    path.parent.mkdir(parents=True, exist_ok=True)
    return put_and_read


def _tensors(path: Path) -> None:
    with open_checkpoint(path, merge_rules=lambda _: None) as found:
        for entry in found.entries.values():
            assert tuple(found.read(entry.name).clone().shape) == entry.shape


def _checkpoints(folder: Path) -> dict[str, Reader]:
    whole = write_safetensors(folder / "whole.safetensors").read_bytes()
    pth = write_pth(folder / "whole.pth", {"w": torch.ones(2, 3), "v": torch.ones(5).bfloat16()})
    pickled = next(data for name, data in members_of(pth).items() if name.endswith("data.pkl"))
    sharded = folder / "sharded"
    sharded.mkdir()
    shard = "model-00001-of-00001.safetensors"
    write_safetensors(sharded / shard)
    names = ["wide.weight", "half", "gate", "patch.weight", "ids"]
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}).encode()
    name = "model.safetensors.index.json"
    refuses = (MmchatError,)
    return {
        "safetensors": Reader(
            _of_file(folder / "a" / "model.safetensors", _tensors), [whole], refuses, 200_000
        ),
        "pth": Reader(_of_file(folder / "b.pth", _tensors), [pth.read_bytes()], refuses, 50_000),
        "gguf": Reader(_of_file(folder / "c.gguf", _tensors), [whole_gguf()], refuses, 50_000),
        "pickle": Reader(scan, [pickled], (ValueError,), 250_000),
        "index": Reader(
            _of_file(sharded / name, lambda path: _tensors(path.parent)), [index], refuses, 20_000
        ),
    }


def _documents(folder: Path) -> dict[str, Reader]:
    tokens = trained_tokens(merges=20)
    ours = (ROOT / "model_params" / "tiny.json").read_bytes()
    spec = next(spec for spec in known_specs() if spec.name == "tiny")
    meta = json.dumps(meta_params(spec.config)).encode()
    words = folder / "words.model"
    words.write_bytes(tiktoken_lines(tokens))
    documents = hub_documents(
        spec.config,
        open_tokenizer(words),
        is_chat=True,
        dtype="bfloat16",
        generation=asdict(spec.generation),
    )
    configs = [documents["config.json"], ORIGINAL_7B, HUB_7B, RELEASED]
    packed = [{**configs[0], key: value} for key, value, _ in KINDS.values()]
    configs = [json.dumps(one).encode() for one in (*configs, *packed)]
    recorded = folder / "recorded"
    recorded.mkdir()
    (recorded / "a").write_bytes(b"a")
    record = FileRecord(1, "0" * 64, None, True)
    write_manifest(recorded / MANIFEST_NAME, Manifest({"a": record, "b/c": record}))
    manifest = (recorded / MANIFEST_NAME).read_bytes()
    listed = folder / "listed"
    refuses = (MmchatError,)
    return {
        "json": Reader(loads, [ours, manifest], (ValueError,), 150_000),
        "params": Reader(
            _of_file(folder / "params.json", load_spec), [ours, meta], refuses, 40_000
        ),
        "config": Reader(
            _of_file(folder / "hf" / "config.json", load_spec),
            configs, refuses, 40_000,
        ),
        "manifest": Reader(
            _of_file(recorded / MANIFEST_NAME, lambda path: verify_folder(path.parent)),
            [manifest], refuses, 30_000,
        ),
        "checklist": Reader(
            _of_file(listed / "checklist.chk", lambda path: verify_folder(path.parent)),
            [b"d41d8cd98f00b204e9800998ecf8427e  consolidated.00.pth\n" * 3], refuses, 20_000,
        ),
        "tokenizer.model": Reader(
            _of_file(folder / "tokenizer.model", open_tokenizer),
            [tiktoken_lines(tokens), trained()], refuses, 10_000,
        ),
        "tokenizer.json": Reader(
            _of_file(folder / "tokenizer.json", open_tokenizer),
            [hub_bytes(tokens, all_splits(tokens))], refuses, 4_000,
        ),
        "saved chat": Reader(
            _of_file(folder / "chat.json", saving.read), [_saved_chat(folder)], refuses, 20_000
        ),
    }  # fmt: skip


def _saved_chat(folder: Path) -> bytes:
    picture = from_pil(PILImage.new("RGB", (9, 7), (200, 0, 0)))
    turns = (Turn(question("Is it red?", [picture], marks=True), "Yes", "stop"),)
    saving.write(folder / "saved.json", saving.SavedChat(Conversation(None, turns), "tiny"))
    return (folder / "saved.json").read_bytes()


def _pictures() -> dict[str, Reader]:
    small = PILImage.effect_noise((31, 17), 60).convert("RGB")
    wholes = []
    for kind, options in (
        ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {}), ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True}), ("WEBP", {}),
    ):  # fmt: skip
        file = io.BytesIO()
        small.save(file, kind, **options)
        wholes.append(file.getvalue())
    file = io.BytesIO()
    small.save(file, "PDF", save_all=True, append_images=[small])
    text = b"BT /F 20 Tf 5 9 Td (a page) Tj ET 1 0 0 rg 9 9 m 60 70 3 30 9 40 c f"
    font = b"/Resources <</Font <</F <</Type /Font /Subtype /Type1 /BaseFont /Helvetica>> >> >>"
    documents = [file.getvalue(), one_page(content=text, more=font)]
    return {
        "picture": Reader(load_image, wholes, (MmchatError,), 60_000),
        "document": Reader(load_image, documents, (MmchatError,), 10_000),
    }


def _texts() -> dict[str, Reader]:
    def address(data: bytes) -> None:
        _parse(data.decode("latin-1"))

    def harmless(data: bytes) -> None:
        shown = sanitize(data.decode("utf-8", "replace"))
        assert not set(shown) & {*map(chr, range(9)), *map(chr, range(11, 32)), "\x7f", "\x9b"}

    def markdown(data: bytes) -> None:
        terminal = Terminal()
        stream = terminal.markdown()
        text = sanitize(data.decode("utf-8", "replace"))
        for start in range(0, len(text), 97):
            stream.feed(text[start : start + 97])
        stream.finish()

    urls = [b"https://example.org:8443/a%20b.png?x=1&y=2#z", b"http://[::1]/x", b"http://h/"]
    escapes = "a\x1b[31mb\x1b]52;c;aGk=\x07c\u202ed\x9be\x1bPq\x1b\\f \U000e0041".encode()
    return {
        "address": Reader(address, urls, (MmchatError,), 100_000),
        "terminal": Reader(harmless, [escapes], (), 100_000),
        "markdown": Reader(markdown, [SAMPLE.encode()], (), 600),
    }
