"""GGUF: blocks to the bit, headers within bounds, and what hostile files end in."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from mmchat import limits
from mmchat.catalog.find import find_model
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.gguf_blocks import PACKED, widened
from mmchat.checkpoints.gguf_checkpoint import gguf_weight
from mmchat.checkpoints.mapped_file import TensorEntry
from mmchat.errors import CheckpointError
from mmchat.quant.formats.blocks import BLOCKS4, BLOCKS6, BLOCKS8
from mmchat.quant.formats.fp8 import FP8
from mmchat.quant.formats.int4 import Int4
from mmchat.quant.formats.int8 import INT8
from mmchat.quant.kernels import native
from tests.attack.mutations import mutated
from tests.checkpoints.test_fuzz import survives
from tests.gguf_models import packed, unpacked

KINDS = {block.name: block for block in PACKED.values()}
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where a block has its float16 numbers


def any_blocks(kind: str, rows: int = 4, blocks: int = 16) -> np.ndarray:
    """Blocks of random bits, whose float16 numbers are finite: [rows, bytes]."""
    draw, block = np.random.default_rng(7), KINDS[kind]
    data = draw.integers(0, 256, (rows * blocks, block.bytes), dtype=np.uint8)
    for begin in HALVES.get(kind, (0,)):
        halves = draw.standard_normal((len(data), 1)).astype(np.float16)
        data[:, begin : begin + 2] = halves.view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_numbers_of_the_gguf_package_to_the_bit(kind):
    data = any_blocks(kind)
    wanted = unpacked(data, kind).reshape(4, -1)
    found = widened(KINDS[kind], torch.from_numpy(data), wanted.shape)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_rows_are_widened_a_slice_at_a_time(kind):
    data = torch.from_numpy(any_blocks(kind, rows=6))
    whole = unpacked(data.numpy(), kind).reshape(6, -1)
    entry = TensorEntry("x", "float32", tuple(whole.shape), Path("model.gguf"))
    rows = gguf_weight(entry, KINDS[kind], lambda: data)
    assert len(rows) == 6
    assert torch.equal(rows[2:5], whole[2:5])
    assert torch.equal(rows.to(torch.bfloat16), whole.bfloat16())
    assert torch.equal(rows.to(torch.float32), whole)
    order = torch.tensor([3, 1, 2, 0, 5, 4])
    assert torch.equal(rows[order].rows(0, 6), whole[order])


@pytest.mark.parametrize(
    ("kind", "format"),
    [("Q4_K", BLOCKS4), ("Q6_K", BLOCKS6), ("Q8_0", BLOCKS8), ("Q5_0", BLOCKS8)],
)
@pytest.mark.parametrize("native_kernels", [True, False])
def test_blocks_are_held_as_they_are(kind, format, native_kernels, monkeypatch):
    """Any levels, scales and minima, signs of d and dmin included; products are theirs."""
    if not native_kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    data = any_blocks(kind, rows=16, blocks=2 * 256 // KINDS[kind].values)
    held = format.adopt(KINDS[kind].codes(torch.from_numpy(data)))
    wanted = unpacked(data, kind).reshape(16, -1)
    assert torch.equal(format.widen(*held), wanted)
    assert held[0].shape[1] == format.tensors(16, 512)["weight"][1][1]
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    expected = x @ wanted.T
    assert (format.product(x, *held) - expected).norm() < 0.012 * expected.norm()


def test_codes_of_another_form_are_not_taken():
    found = {k: block.codes(torch.from_numpy(any_blocks(k, 8, 16))) for k, block in KINDS.items()}
    for format, kinds in (
        (BLOCKS4, {"Q4_K"}),
        (BLOCKS6, {"Q6_K"}),
        (BLOCKS8, {"Q8_0", "Q5_0"}),
        (Int4(32), {"Q4_0"}),
        (Int4(64), set()),
        (INT8, set()),
        (FP8, set()),
    ):
        assert {kind for kind, codes in found.items() if format.adopt(codes)} == kinds


def test_the_packers_of_these_tests_lose_what_their_bits_lose():
    values = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    for kind, share in {"Q4_K": 0.09, "Q5_K": 0.045, "Q6_K": 0.025, "Q8_0": 0.01}.items():
        back = unpacked(packed(values.numpy(), kind), kind)
        assert (back - values).norm() < share * values.norm()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty; download it again"), (b"not found", "is text, not weights")],
)
@pytest.mark.parametrize("in_folder", [True, False])
def test_a_file_that_is_gguf_by_name_alone(tmp_path, content, reason, in_folder):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.gguf': {reason}"):
        find_model(tmp_path if in_folder else path)


# ---- headers -------------------------------------------------------------------------------------

TENSORS = [("a.weight", (4, 256), 12), ("b", (3,), 0)]  # name, shape, type


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + axes + struct.pack("<IQ", kind, offset)


INFOS = (info("a.weight", (4, 256), 12, 0), info("b", (3,), 0, 576))
PAIRS = (pair("general.architecture", 8, text("mllama")),)


def content(
    infos=INFOS, pairs=PAIRS, version: int = 3, tensors=None, keys=None, data: int = 588
) -> bytes:
    counts = len(infos) if tensors is None else tensors, len(pairs) if keys is None else keys
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join((*pairs, *infos))
    return head + bytes(-len(head) % 32 + data)


def opened(tmp_path: Path, data: bytes, name: str = "model.gguf"):
    """The vision part is not looked for: a name of it is there."""
    path = tmp_path / name
    path.write_bytes(data)
    return open_checkpoint(path)


def both(**changed) -> bytes:
    """A whole model, as far as names go."""
    more = (info("token_embd.weight", (1, 32), 8, 608), info("v.x", (1,), 0, 672))
    infos = changed.pop("infos", INFOS)
    return content(infos=(*infos, *more), data=changed.pop("data", 704), **changed)


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_of_either_version_is_read(tmp_path, version):
    with opened(tmp_path, both(version=version), "blob-without-ending") as files:
        assert files.format == "gguf"
        assert files.metadata["general.architecture"] == "mllama"
        assert files.entries["a.weight"].shape == (4, 256)
        assert files.entries["a.weight"].dtype == "float32"
        assert files.read("a.weight").tolist() == [[0.0] * 256] * 4
        assert files.read("b").tolist() == [0.0] * 3
        assert files.bytes_by_kind() == {"Q4_K": 576, "float32": 16, "Q8_0": 34}
        files.release("a.weight")


def test_the_gguf_package_writes_what_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mllama")
    values = {"u8": 7, "i8": -7, "u16": 300, "i16": -300, "u32": 70_000, "i32": -70_000}
    for kind, value in values.items():
        name = kind.replace("u", "uint").replace("i8", "int8").replace("i16", "int16")
        getattr(writer, f"add_{name.replace('i32', 'int32')}")(kind, value)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e-300)
    writer.add_bool("yes", True)
    writer.add_array("texts", ["ä", "", "b"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_custom_alignment(64)
    for name in ("token_embd.weight", "v.x"):
        data = gguf.quants.quantize(np.ones((2, 32), np.float32), Type.Q8_0)
        writer.add_tensor(name, data, raw_dtype=Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "model.gguf") as files:
        assert {**values, "f32": 0.5, "f64": 1e-300, "yes": True}.items() <= files.metadata.items()
        assert files.metadata["texts"] == ["ä", "", "b"]
        assert files.metadata["numbers"] == (1, -2, 3)
        assert files.read("v.x").shape == (2, 32)
        assert all(entry.offset % 64 == 0 for entry in files.entries.values())


HUGE = 2**60
HOSTILE = {
    "version 1": (content(version=1), "version 1; mmchat reads versions 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 2, 1) + bytes(64), "big-endian machine"),
    "no more than a version": (b"GGUF\x03" + bytes(3), "cut off inside its GGUF header"),
    "no tensors": (content(infos=()), "holds no tensors"),
    "2^60 tensors": (content(tensors=HUGE), "tensors, at most 20,000"),
    "more tensors than bytes": (content(tensors=20_000), ""),
    "2^60 keys": (content(keys=HUGE), "keys of metadata, at most"),
    "a key twice": (content(pairs=PAIRS * 2), "'general.architecture' of its metadata is there tw"),
    "a text of 2^60 bytes": (
        content(pairs=(pair("x", 8, struct.pack("<Q", HUGE)),)),
        "a text of 1,152,921,504,606,846,976 bytes",
    ),
    "a text that is cut": (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("x")[:-1], "cut off"),
    "no text": (content(pairs=(pair("x", 8, text(b"\xff\xfe")),)), "is not UTF-8"),
    "a list of 2^60 numbers": (
        content(pairs=(pair("x", 9, struct.pack("<IQ", 10, HUGE)),)),
        "a list of 1,152",
    ),
    "a list of 2^60 texts": (content(pairs=(pair("x", 9, struct.pack("<IQ", 8, HUGE)),)), "a list"),
    "a million texts, none there": (
        content(pairs=(pair("x", 9, struct.pack("<IQ", 8, 10**6)),), infos=(), tensors=1),
        "cut off inside",
    ),
    "a list of lists": (content(pairs=(pair("x", 9, struct.pack("<IQ", 9, 1)),)), "unknown kind 9"),
    "a value of no kind": (content(pairs=(pair("x", 77, b""),)), "unknown kind 77"),
    "alignment 0": (
        content(pairs=(pair("general.alignment", 4, struct.pack("<I", 0)),)),
        "no power of 2",
    ),
    "alignment as text": (content(pairs=(pair("general.alignment", 8, text("3")),)), "no power"),
    "a name too long": (content(infos=(info("n" * 300, (3,), 0, 0),)), "a text of 300 bytes"),
    "a name that is no text": (content(infos=(info(b"\xff", (3,), 0, 0),)), "is not UTF-8"),
    "nine axes": (content(infos=(info("a", (1,) * 9, 0, 0),)), "9 axes"),
    "2^32 axes": (content(infos=(text("a") + b"\xff" * 4,)), "axes, at most"),
    "an empty axis": (content(infos=(info("a", (0, 256), 12, 0),)), "is empty"),
    "2^60 rows": (content(infos=(info("a", (HUGE, 256), 12, 0),)), "is cut off in tensor 'a'"),
    "sizes whose product is 2^128": (content(infos=(info("a", (HUGE, HUGE), 0, 0),)), "cut off in"),
    "half a block": (content(infos=(info("a", (4, 128), 12, 0),)), "no whole blocks of 256"),
    "a block that is cut": (content(data=570), "is cut off in tensor"),
    "a type that is not read": (content(infos=(info("a", (4, 256), 10, 0),)), "of type Q2_K; mm"),
    "a type that is none": (content(infos=(info("a", (4, 256), 99, 0),)), "of type 99; mmchat"),
    "out of the file": (content(infos=(info("a", (3,), 0, HUGE),)), "is cut off in tensor"),
    "not aligned": (content(infos=(info("a", (3,), 0, 4),)), "is not aligned"),
    "overlapping": (
        content(infos=(*INFOS[:1], info("b", (3,), 0, 544))),
        "'a.weight' and 'b' share their data",
    ),
    "one name twice": (content(infos=(*INFOS, info("b", (3,), 0, 576))), "have one name"),
    "only a vision part": (content(infos=(info("v.x", (3,), 0, 0),)), "name the file of the text"),
    "only a text": (
        content(infos=(info("token_embd.weight", (3,), 0, 0),)),
        "without its vision part, and none is beside it",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    data, reason = HOSTILE[case]
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, data)
    assert reason in str(caught.value)
    assert "model.gguf" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_header_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "GGUF_HEADER_BYTES", 64)
    with pytest.raises(CheckpointError, match="header is longer than 64 bytes"):
        opened(tmp_path, content())


def test_a_name_with_a_path_names_no_file(tmp_path):
    data = both(infos=(info("../../x", (4, 256), 12, 0), INFOS[1]))
    with opened(tmp_path, data) as files:
        assert "../../x" in files.entries
        assert files.entries["../../x"].file == tmp_path / "model.gguf"


def test_two_files_with_the_text_or_the_vision(tmp_path):
    words, sight = info("token_embd.weight", (3,), 0, 0), info("v.x", (3,), 0, 0)
    (tmp_path / "a.gguf").write_bytes(content(infos=(words,)))
    (tmp_path / "b.gguf").write_bytes(content(infos=(sight,)))
    for path in (tmp_path, tmp_path / "a.gguf"):
        with open_checkpoint(path) as files:
            assert [file.name for file in files.files] == ["a.gguf", "b.gguf"]
    (tmp_path / "c.gguf").write_bytes(content(infos=(sight,)))
    with pytest.raises(CheckpointError, match="several files with it are beside it"):
        open_checkpoint(tmp_path / "a.gguf")
    (tmp_path / "c.gguf").write_bytes(content(infos=(words,)))
    with pytest.raises(CheckpointError, match=r"'a.gguf', 'b.gguf', 'c.gguf'; name one of them"):
        open_checkpoint(tmp_path)


@pytest.mark.slow
def test_fuzz_gguf_headers(tmp_path):
    whole, rng = both(), random.Random(20250513)
    path = tmp_path / "model.gguf"
    assert survives(path, whole)
    accepted = sum(survives(path, mutated(rng, whole, len(whole) - 704)) for _ in range(4000))
    assert accepted < 3000
